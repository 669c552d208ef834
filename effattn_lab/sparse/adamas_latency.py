"""A decode step of Adamas beside full attention on a CPU, its three stages apart: measured in one run, one thread.

``python -m effattn_lab.sparse.adamas_latency`` (a minute; ``effattn bench adamas`` prints the same rows). float32
keys and values, one query, two heads, D = 128. Caches are cold, as in a model: a layer's codes are not read again
before all other layers have had their turn. Times of different machines do not compare; ratios of one run do.

Codes lie word by word, ``[H, W, N]`` in 64-bit words, so that each pass runs over consecutive numbers, in pieces that
stay in the cache. The distance takes two counts of bits a word instead of three: the bits that the exact formula
takes off again are among the high ones, so it is ``popc(lo) + 2 popc(hi & ~(lo & g))``. NumPy counts bits from
version 2 on; with an older one :func:`effattn_lab.sparse.codes.l1_packed` does the work, more slowly.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from effattn_lab._command import file_to_write, positive
from effattn_lab._validate import check_positive_int
from effattn_lab.measure.timing import measure_cold
from effattn_lab.sparse.adamas import encode
from effattn_lab.sparse.codes import l1_packed

NUM_HEADS, HEAD_DIM, BUDGET = 2, 128, 128
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
#: Thresholds for numbers of deviation 1: four buckets equally full.
THRESHOLDS = (-0.67, 0.0, 0.67)
#: Keys a pass: 64 KiB of one word each.
_PIECE = 8192
_LOW = np.uint64(0x5555555555555555)
_ONE = np.uint64(1)


def words_first(codes: torch.Tensor) -> np.ndarray[Any, Any]:
    """Packed codes int32 ``[H, N, W]``, W even, as uint64 ``[H, W / 2, N]``."""
    if codes.dim() != 3 or codes.dtype != torch.int32 or codes.shape[2] % 2:
        raise ValueError(
            f"codes: expected int32 [H, N, W] with W even, got {codes.dtype} {tuple(codes.shape)}"
        )
    wide = codes.contiguous().numpy().view(np.uint64)
    return np.ascontiguousarray(wide.transpose(0, 2, 1))


def estimate(query: np.ndarray[Any, Any], keys: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """L1 distance of each head's query to its keys, uint16 ``[H, N]``.

    Args:
        query: uint64 ``[H, W, 1]``, see :func:`words_first`.
        keys: uint64 ``[H, W, N]``.
    """
    if query.shape != (*keys.shape[:2], 1):
        raise ValueError(f"query: expected shape {(*keys.shape[:2], 1)}, got {query.shape}")
    heads, words, n = keys.shape
    out = np.zeros((heads, n), dtype=np.uint16)
    if not hasattr(np, "bitwise_count"):
        a, b = (torch.from_numpy(x.transpose(0, 2, 1).copy().view(np.int32)) for x in (query, keys))
        return l1_packed(a, b).numpy().astype(np.uint16)
    x, lo, rest = (np.empty(min(_PIECE, n), dtype=np.uint64) for _ in range(3))
    count = np.empty(min(_PIECE, n), dtype=np.uint8)
    for h in range(heads):
        for begin in range(0, n, _PIECE):
            size = min(_PIECE, n - begin)
            bx, bl, br, bc = x[:size], lo[:size], rest[:size], count[:size]
            total = out[h, begin : begin + size]
            for w in range(words):
                q = query[h, w, 0]
                np.bitwise_xor(keys[h, w, begin : begin + size], q, out=bx)
                np.bitwise_and(bx, _LOW, out=bl)
                total += np.bitwise_count(bl, out=bc)
                np.right_shift(bx, _ONE, out=bx)
                np.bitwise_and(bx, _LOW, out=bx)  # high bits that differ
                np.bitwise_and(bl, (q ^ (q >> _ONE)) & _LOW, out=br)
                np.bitwise_and(br, bx, out=br)  # pairs of 1 and 2
                np.bitwise_xor(bx, br, out=bx)
                np.bitwise_count(bx, out=bc)
                total += bc
                total += bc
    return out


def select(distance: np.ndarray[Any, Any], budget: int) -> np.ndarray[Any, Any]:
    """The last token and the ``budget - 1`` others of least distance, of equals the more recent: int64 ``[H, k]``.

    A histogram of the distances gives the last one that is taken: two passes, whatever the budget is.
    """
    check_positive_int("budget", budget)
    heads, n = distance.shape
    budget = min(budget, n)
    taken = np.empty((heads, budget), dtype=np.int64)
    taken[:, -1] = n - 1
    if budget == 1:
        return taken
    for h in range(heads):
        past = distance[h, :-1]
        last = int(np.searchsorted(np.bincount(past).cumsum(), budget - 1))
        near = np.flatnonzero(past < last)
        missing = budget - 1 - len(near)
        tied = np.flatnonzero(past == last)[-missing:] if missing else near[:0]
        taken[h, :-1] = np.sort(np.concatenate([near, tied]))
    return taken


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, taken: np.ndarray[Any, Any]) -> torch.Tensor:
    """Exact attention of ``q [H, D]`` over the chosen rows of k and v ``[H, N, D]``: ``[H, D]``."""
    out = []
    for h, index in enumerate(torch.from_numpy(taken)):
        s = k[h].index_select(0, index) @ q[h] * q.shape[1] ** -0.5
        out.append(torch.softmax(s, dim=0) @ v[h].index_select(0, index))
    return torch.stack(out)


def rows(seqlens: Sequence[int] = LENGTHS, rounds: int = 25, budget: int = BUDGET) -> list[dict[str, Any]]:
    """One dict a length: milliseconds of ``full`` and ``read``, of ``step`` and its four stages.

    ``full`` is PyTorch's attention. ``read`` takes the largest entry of K and of V: what reading them once costs, and
    so a bound for any dense step of this thread. ``ratio`` is full over step, ``ratio_read`` read over step. The
    step is checked first: distances, choice and output; no times if it is wrong.

    Args:
        seqlens: tokens in the cache.
        rounds: samples of each, at least 3; medians are given.
        budget: tokens read, the current one included.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # NumPy has one, so both sides get one
    try:
        return [_row(n, rounds, budget) for n in seqlens]
    finally:
        torch.set_num_threads(before)


def _row(seqlen: int, rounds: int, budget: int) -> dict[str, Any]:
    check_positive_int("seqlen", seqlen)
    g = torch.Generator().manual_seed(seqlen)
    q = torch.randn(NUM_HEADS, HEAD_DIM, generator=g)
    k, v = torch.randn(2, NUM_HEADS, seqlen, HEAD_DIM, generator=g)
    codes = encode(k, thresholds=THRESHOLDS)
    keys = words_first(codes)

    def code() -> np.ndarray[Any, Any]:
        return words_first(encode(q[:, None], thresholds=THRESHOLDS))

    def step() -> torch.Tensor:
        return attend(q, k, v, select(estimate(code(), keys), budget))

    def full() -> torch.Tensor:
        return F.scaled_dot_product_attention(q[None, :, None], k[None], v[None])[0, :, 0]

    query = code()
    distance = estimate(query, keys)
    taken = select(distance, budget)
    exact = l1_packed(encode(q[:, None], thresholds=THRESHOLDS), codes).numpy()
    right = bool((distance == exact).all()) and _same(attend(q, k, v, taken), q, k, v, taken)
    found: dict[str, Any] = {"seqlen": seqlen, "budget": budget, "correct": right}
    stages: dict[str, Callable[[], Any]] = {
        "full": full,
        "read": lambda: (k.amax(), v.amax()),
        "encode": code,
        "estimate": lambda: estimate(query, keys),
        "select": lambda: select(distance, budget),
        "attend": lambda: attend(q, k, v, taken),
        "step": step,
    }
    with torch.inference_mode():
        times = measure_cold(stages, rounds) if right else {}
    for name in stages:
        found[name] = 1e3 * times[name].median_s if right else None
    found["ratio"] = found["full"] / found["step"] if right else None
    found["ratio_read"] = found["read"] / found["step"] if right else None
    return found


def _same(
    out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, taken: np.ndarray[Any, Any]
) -> bool:
    """Against float64 over the same tokens."""
    index = torch.from_numpy(taken)[..., None].expand(-1, -1, q.shape[1])
    keys, values = (torch.gather(x, 1, index).double() for x in (k, v))
    a = torch.softmax((keys @ q.double()[..., None])[..., 0] * q.shape[1] ** -0.5, dim=-1)
    return bool(((a[:, None] @ values)[:, 0] - out.double()).abs().max() < 1e-5)


def recorded() -> dict[str, Any]:
    """The figures that the book shows, of one run, kept beside this module: ``rows`` and the machine."""
    found: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the rows."""
    from effattn_lab.measure.xray import show

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seqlen", type=positive, nargs="+", default=list(LENGTHS))
    parser.add_argument("--rounds", type=positive, default=25, help="samples of each stage, at least 3")
    parser.add_argument(
        "--json", type=file_to_write, metavar="FILE", help="write the figures to a file, for `recorded`"
    )
    chosen = parser.parse_args(arguments)
    table = rows(chosen.seqlen, chosen.rounds)
    if chosen.json:
        machine = {"cores": os.cpu_count(), "threads": 1, "torch": torch.__version__,
                   "numpy": np.__version__, "python": platform.python_version()}  # fmt: skip
        record = {"machine": machine, "rows": table}
        chosen.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    show(table)


if __name__ == "__main__":
    main()
