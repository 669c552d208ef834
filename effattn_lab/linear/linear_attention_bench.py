"""From which length is linear attention faster? Measured beside predicted, on this machine, in one run.

``python -m effattn_lab.linear.linear_attention_bench`` (some minutes; ``effattn bench linear_attention`` prints the
rows alone). float32 on the CPU, causal. Times of different machines do not compare; ratios of one run do.

Softmax attention and linear attention compute different functions: the rows compare what a layer costs. Linear rows
are checked first, against float64, and carry no time if they are wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from effattn_lab._command import file_to_write, positive, seconds
from effattn_lab._validate import check_positive_int
from effattn_lab.foundations import cost_model
from effattn_lab.linear import linear_attention_cost as cost
from effattn_lab.linear.feature_maps import FEATURE_MAPS
from effattn_lab.linear.linear_attention import (
    linear_attention,
    linear_attention_chunked,
    linear_attention_step,
)
from effattn_lab.measure.timing import measure

NUM_HEADS, HEAD_DIM, CHUNK = 2, 64, 64
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
SHORT = (128, 256, 512)  # where the crossings lie
CHECKED = 1024  # rows compared with float64; the whole square of 32768 would take 17 GB


def rows(
    seqlens: Sequence[int] | None = None,
    min_run_time: float = 0.3,
    passes: Sequence[str] = ("forward", "decode"),
) -> list[dict[str, Any]]:
    """SDPA, the chunked form and fla's naive chunks (where fla-core is installed) at each length.

    Args:
        seqlens: lengths N, default 1 k to 32 k.
        min_run_time: seconds to measure each row.
        passes: "forward" (a whole causal sequence), "decode" (one token with N tokens behind it: a KV cache of N for
            SDPA, the state for linear attention).

    Returns:
        one dict a row: implementation, device, seqlen, pass, max_error, allowed_error, correct, median_ms, vs_sdpa
        (above 1: faster than SDPA), gflops_per_s (by the cost model's count).
    """
    seqlens = LENGTHS if seqlens is None else seqlens
    for seqlen in seqlens:
        check_positive_int("seqlen", seqlen)
    if unknown := [p for p in passes if p not in ("forward", "decode")]:
        raise ValueError(f"passes: expected some of forward, decode, got {unknown[0]!r}")
    table: list[dict[str, Any]] = []
    for seqlen in seqlens:
        if "forward" in passes:
            table += _forward(seqlen, min_run_time)
        if "decode" in passes:
            table += _decode(seqlen, min_run_time)
    return table


def crossover(table: Sequence[dict[str, Any]], direction: str, implementation: str) -> float | None:
    """Length at which ``implementation`` begins to be faster than SDPA, interpolated between rows on log scales.

    None: it is faster, or slower, at every length measured.
    """
    ratios = [
        (row["seqlen"], row["vs_sdpa"])
        for row in table
        if row["pass"] == direction and row["implementation"] == implementation and row["vs_sdpa"]
    ]
    for (n_a, a), (n_b, b) in itertools.pairwise(ratios):
        if a < 1 <= b:
            share = -math.log(a) / (math.log(b) - math.log(a))
            return n_a * (n_b / n_a) ** share
    return None


def crossovers(table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measured crossings beside the cost model's.

    Forward: predicted where both take equally many FLOPs. ``with_rates``: the same with each side's FLOP/s of this
    run (at the measured lengths' largest), since SDPA's fused loop and small products in Python reach different
    shares of the machine. Decode: predicted where a step moves equally many bytes, state and cache both float32.
    """
    found = []
    for name in ("chunked", "fla naive"):
        measured = crossover(table, "forward", name)
        if any(row["implementation"] == name for row in table):
            predicted = cost.crossover_flops(HEAD_DIM, chunk_size=CHUNK)
            rates = [_rate(table, "forward", side) for side in ("sdpa", name)]
            scaled = (predicted + 1) * rates[0] / rates[1] - 1 if all(rates) else None
            found.append(_crossing("forward", name, measured, predicted, scaled))
    predicted = cost.crossover_step(HEAD_DIM, itemsize=4, state_itemsize=4)
    found.append(_crossing("decode", "step", crossover(table, "decode", "step"), predicted, None))
    return found


def _crossing(
    direction: str, name: str, measured: float | None, predicted: float, scaled: float | None
) -> dict[str, Any]:
    return {
        "pass": direction,
        "implementation": name,
        "measured_length": None if measured is None else round(measured),
        "predicted_length": round(predicted),
        "with_rates": None if scaled is None else round(scaled),
    }


def _rate(table: Sequence[dict[str, Any]], direction: str, name: str) -> float:
    """FLOP/s at the largest length measured."""
    found = [r["gflops_per_s"] for r in table if r["pass"] == direction and r["implementation"] == name]
    return found[-1] or 0.0 if found else 0.0


def _draw(seqlen: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seqlen)
    shape = (1, NUM_HEADS, seqlen, HEAD_DIM)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _chunked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return linear_attention_chunked(q, k, v, causal=True, chunk_size=CHUNK)


def _fla() -> Callable[..., torch.Tensor] | None:
    """fla's readable chunked form, with the same feature map before it and its own layout [B, N, H, D]."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fla warns that there is no GPU; this form is plain PyTorch
            from fla.ops.linear_attn.naive import naive_chunk_linear_attn
    except ImportError:
        return None
    phi = FEATURE_MAPS["elu"]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        inputs = (x.transpose(1, 2) for x in (phi(q), phi(k), v))
        out: torch.Tensor = naive_chunk_linear_attn(*inputs, normalize=True)
        return out.transpose(1, 2)

    return run


def _forward(seqlen: int, min_run_time: float) -> list[dict[str, Any]]:
    inputs = _draw(seqlen)
    head = [x[:, :, :CHECKED] for x in inputs]  # causal: the first rows are those of a shorter sequence
    truth = linear_attention(*(x.double() for x in head), causal=True)
    allowed = 2 * _error(_plain(*head), truth)
    linear_flops = cost.chunked_flops(NUM_HEADS, seqlen, HEAD_DIM, HEAD_DIM, CHUNK)
    contenders: list[tuple[str, Callable[..., torch.Tensor], float]] = [
        ("sdpa", _sdpa, cost_model.attention_flops(1, NUM_HEADS, seqlen, seqlen, HEAD_DIM, causal=True)),
        ("chunked", _chunked, linear_flops),
    ]
    fla = _fla()
    if fla is not None and seqlen % CHUNK == 0:  # fla's form takes whole chunks only
        contenders.append(("fla naive", fla, linear_flops))
    table: list[dict[str, Any]] = []
    for name, fn, flops in contenders:
        error = None if name == "sdpa" else _error(fn(*inputs)[:, :, :CHECKED], truth)
        if (
            name == "fla naive"
        ):  # another eps (1e-10) and plain running sums: judged by its own authors' tolerance
            allowed = 1e-3 * truth.square().mean().sqrt().item()
        table.append(_row(table, name, seqlen, "forward", error, allowed, flops, min_run_time, fn, *inputs))
    return table


def _decode(seqlen: int, min_run_time: float) -> list[dict[str, Any]]:
    q, k, v = _draw(seqlen)
    q, last_k, last_v = (x[:, :, -1:].contiguous() for x in (q, k, v))
    _, state = linear_attention_chunked(
        k[:, :, :-1][:, :, -1:] if seqlen > 1 else k, k[:, :, :-1] if seqlen > 1 else k,
        v[:, :, :-1] if seqlen > 1 else v, return_state=True,
    )  # fmt: skip
    error = allowed = None
    if seqlen > 1:
        truth = linear_attention(q.double(), k.double(), v.double(), causal=True)
        error = _error(linear_attention_step(state, q, last_k, last_v)[0], truth)
        allowed = 2 * _error(_plain(q, k, v), truth) + 1e-6 * truth.abs().max().item()

    def cached(q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def step(q: torch.Tensor) -> torch.Tensor:
        return linear_attention_step(state, q, last_k, last_v)[0]

    table: list[dict[str, Any]] = []
    flops = cost_model.decode_flops(1, NUM_HEADS, seqlen, HEAD_DIM)
    table.append(_row(table, "sdpa", seqlen, "decode", None, None, flops, min_run_time, cached, q))
    flops = cost.step_flops(NUM_HEADS, NUM_HEADS, HEAD_DIM, HEAD_DIM)
    table.append(_row(table, "step", seqlen, "decode", error, allowed, flops, min_run_time, step, q))
    return table


def _row(
    table: list[dict[str, Any]],
    name: str,
    seqlen: int,
    direction: str,
    error: float | None,
    allowed: float | None,
    flops: float,
    min_run_time: float,
    fn: Callable[..., torch.Tensor],
    *inputs: torch.Tensor,
) -> dict[str, Any]:
    correct = error is None or allowed is None or error <= allowed
    with torch.inference_mode():
        seconds = measure(fn, *inputs, min_run_time=min_run_time).median_s if correct else None
    sdpa_ms = table[0]["median_ms"] if table else None
    return {
        "implementation": name,
        "device": "cpu",
        "seqlen": seqlen,
        "pass": direction,
        "max_error": error,
        "allowed_error": allowed,
        "correct": correct,
        "median_ms": None if seconds is None else 1e3 * seconds,
        "vs_sdpa": 1.0 if not table else (sdpa_ms / (1e3 * seconds) if sdpa_ms and seconds else None),
        "gflops_per_s": None if seconds is None else flops / seconds / 1e9,
    }


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """All weights at once, in the dtype of the inputs: what one writes before knowing better."""
    phi = FEATURE_MAPS["elu"]
    weights = (phi(q) @ phi(k).transpose(-1, -2)) * q.shape[-1] ** -0.5
    seqlen_q, seqlen_k = weights.shape[-2:]
    weights = weights.tril(seqlen_k - seqlen_q)
    return (weights @ v) / (weights.sum(-1, keepdim=True) + 1e-6)


def _error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return (got.double() - truth).abs().max().item()


def recorded() -> dict[str, Any]:
    """The figures that the book shows, of one run, kept beside this module: ``rows``, ``crossovers``, the machine."""
    found: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the rows and the crossings."""
    from effattn_lab.measure.xray import show

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seqlen", type=positive, nargs="+", default=[*SHORT, *LENGTHS])
    parser.add_argument("--seconds", type=seconds, default=0.3, help="to measure each row")
    parser.add_argument(
        "--json", type=file_to_write, metavar="FILE", help="write the figures to a file, for `recorded`"
    )
    chosen = parser.parse_args(arguments)
    table = rows(chosen.seqlen, chosen.seconds)
    if chosen.json:
        machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
                   "python": platform.python_version()}  # fmt: skip
        record = {"machine": machine, "rows": table, "crossovers": crossovers(table)}
        chosen.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    show([{k: v for k, v in row.items() if "error" not in k and k != "device"} for row in table])
    print()
    show(crossovers(table))


if __name__ == "__main__":
    main()
