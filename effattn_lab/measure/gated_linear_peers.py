"""Our gated-linear kernels beside those of flash-linear-attention, compiled in one run by one compiler.

``python -m effattn_lab.measure.gated_linear_peers --gpu A100,H100``. Needs fla-core (extra ``peers``) and no GPU.

The operation is the one both have with a decay a head (fla's ``simple_gla``): chunk 64, decays in fp32, already
summed inside each chunk. Tiles, candidates and instructions a token as in
:mod:`effattn_lab.measure.linear_attention_peers`: fla at its best among its own tiles with 2 and 4 warps. With at
most 64 channels no kernel of either has an inner loop, so the code as it stands is what one chunk executes. With a
decay a channel both have inner loops, of different kinds, and a count of code would compare nothing: those are left
to ``effattn xray gated_linear``.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import Any

from effattn_lab.measure._carry import carry, unwrap
from effattn_lab.measure._gpu_limits import targets
from effattn_lab.measure._peers import command, record_of
from effattn_lab.measure._xray_pool import Job
from effattn_lab.measure.linear_attention_peers import CHUNK, CUT, PEERS, _measure, _rank
from effattn_lab.measure.xray import _run

# What fla's kernels take as pointers when there is a decay a head; the rest is None, as fla passes it.
_IN_DTYPE = ("q", "k", "v", "h", "o", "do", "dh", "dq", "dk", "dv")
_IN_FP32 = ("g", "dg")


def rows(
    gpus: str | Sequence[str] = "A100,H100",
    head_dim: int = 64,
    dtype: str = "bf16",
    warps: Sequence[int] = (2, 4),
    kernels: Sequence[str] = tuple(PEERS),
) -> list[dict[str, Any]]:
    """One dict a GPU, kernel and author ("ours", "fla").

    Args:
        gpus: as in :func:`effattn_lab.measure.xray.xray`, those with tensor cores that Triton knows.
        head_dim: key channels and values, 16, 32 or 64.
        dtype: "bf16" or "fp16".
        warps: what fla's kernels are compiled with; the best is kept.
        kernels: some of "states", "outputs", "dstates", "dqdk", "dv".

    Returns:
        gpu, kernel, by, tile, num_warps, registers, spill_bytes, shared_bytes, tensor_core_per_token,
        instructions_per_token.

    Raises:
        ValueError: a head_dim, dtype or kernel that is not among these. RuntimeError: no fla-core.
    """
    if head_dim not in (16, 32, 64):
        raise ValueError(f"head_dim: expected 16, 32 or 64, got {head_dim!r}")
    if dtype not in ("bf16", "fp16"):
        raise ValueError(f"dtype: expected 'bf16' or 'fp16', got {dtype!r}")
    if unknown := [name for name in kernels if name not in PEERS]:
        raise ValueError(f"kernels: expected some of {', '.join(PEERS)}, got {unknown[0]!r}")
    jobs: list[Job] = []
    notes: list[dict[str, Any]] = []
    for target in targets(gpus):
        for name in kernels:
            for by, job, tile in [
                _ours(target, name, head_dim, dtype),
                *_theirs(target, name, head_dim, dtype, warps),
            ]:
                jobs.append(job)
                notes.append({"gpu": target.gpu, "kernel": name, "by": by, "tile": tile})
    best: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row, note in zip(_run(jobs), notes):
        found = {**note, **_measure(row, note["kernel"], note["tile"], head_dim)}
        key = (found["gpu"], found["kernel"], found["by"])
        if key not in best or _rank(found) < _rank(best[key]):
            best[key] = found
    return list(best.values())


def _ours(target: Any, name: str, head_dim: int, dtype: str) -> tuple[str, Job, tuple[int, int]]:
    import torch
    from effattn_kernels.gated_linear import launches

    element = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    found = launches(head_dim, element, target.sm.replace("_", ""), per_channel=False)
    (launch,) = (x for x in found if x.name == name)
    t = launch.tile
    if t.chunk != CHUNK:
        raise ValueError(f"gpus: expected some where the chunk is {CHUNK}, got {target.gpu}")
    job = Job(carry(launch.kernel), launch.signature, launch.constexprs, target, t.num_warps, t.num_stages)
    return "ours", job, (t.block_k, t.block_v)


def _theirs(
    target: Any, name: str, head_dim: int, dtype: str, warps: Sequence[int]
) -> list[tuple[str, Job, tuple[int, int]]]:
    import effattn_kernels  # noqa: F401  (before triton: it chooses the interpreter where there is no GPU)

    module, kernel_name, tiles = PEERS[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fla warns that there is no GPU
            kernel = getattr(importlib.import_module(f"fla.ops.common.{module}"), kernel_name)
    except ImportError as error:
        raise RuntimeError(
            f"fla-core is needed for this table (pip install effattn-lab[peers]): {error}"
        ) from None
    source = carry(kernel)
    found = []
    for block_k, block_v in dict.fromkeys((min(k, head_dim), min(v, head_dim)) for k, v in tiles):
        if any(block < head_dim for dim, block in zip("KV", (block_k, block_v)) if dim not in CUT[name]):
            continue  # its inner loop would run more than once
        fixed: dict[str, Any] = {
            "B": 1, "H": 8, "HV": 8, "HQ": 8, "NG": 1, "K": head_dim, "V": head_dim,
            "BT": CHUNK, "BS": CHUNK, "BK": block_k, "BV": block_v, "USE_G": True,
        }  # fmt: skip
        signature: dict[str, str] = {}
        constexprs: dict[str, Any] = {}
        for arg in unwrap(kernel).arg_names:
            if arg in fixed or (arg.isupper() and arg != "T"):
                signature[arg], constexprs[arg] = "constexpr", fixed.get(arg, False)
            elif arg in _IN_DTYPE and not (name == "dqdk" and arg == "dv"):
                signature[arg] = f"*{dtype}:16"
            elif arg in _IN_FP32:
                signature[arg] = "*fp32:16"
            elif arg == "scale":
                signature[arg] = "fp32"
            elif arg == "T":
                signature[arg] = "i32"
            else:
                signature[arg], constexprs[arg] = "constexpr", None
        for num_warps in warps:
            job = Job(source, signature, constexprs, target, num_warps, 3)
            found.append(("fla", job, (block_k, block_v)))
    return found


def recorded() -> dict[str, Any]:
    """The table that the book shows, with its ``versions``. Compiling it takes minutes, so it is kept as a file.

    A test compiles part of it again.
    """
    return record_of(__file__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    command(rows, __doc__, arguments)


if __name__ == "__main__":
    main()
