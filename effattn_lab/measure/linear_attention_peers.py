"""Our linear-attention kernels beside those of flash-linear-attention, compiled in one run by one compiler.

``python -m effattn_lab.measure.linear_attention_peers --gpu A100,H100``. Needs fla-core (extra ``peers``) and no GPU.

The operation is the one both have: causal, chunk 64, no denominator (fla divides afterwards, in PyTorch; our row
"with the denominator" does it inside). fla chooses its tiles on the GPU by timing. There is none here, so for each of
its kernels the candidates of its own list with 2 and 4 warps are compiled, and the one with the fewest instructions a
token stands in the table, among those that do not spill if there are any: we compare with fla at its best by this
measure.

Instructions a token: ``instructions * warps * programs a chunk / chunk``. The code is counted as it stands. With at
most 64 features and values no kernel has an inner loop over tiles; the two that walk the chunks carry the code of
their software pipeline with them, ours and theirs alike.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from effattn_lab.measure._carry import carry, unwrap
from effattn_lab.measure._gpu_limits import targets
from effattn_lab.measure._peers import command, record_of
from effattn_lab.measure._xray_pool import Job
from effattn_lab.measure.xray import XRay, _run

CHUNK = 64
# kernel of ours -> fla's for the same step: (module, name, what its tiles may be: (BLOCK_K, BLOCK_V)s)
PEERS: dict[str, tuple[str, str, tuple[tuple[int, int], ...]]] = {
    "states": ("chunk_h", "chunk_fwd_kernel_h", ((32, 32), (32, 64), (64, 32), (64, 64))),
    "outputs": ("chunk_o", "chunk_fwd_kernel_o", ((64, 64), (32, 32))),
    "dstates": ("chunk_h", "chunk_bwd_kernel_dh", ((32, 32), (32, 64), (64, 32), (64, 64))),
    "dqdk": ("chunk_o", "chunk_bwd_kernel_dqkwg", ((64, 64),)),
    "dv": ("chunk_o", "chunk_bwd_kernel_dv", ((64, 64),)),
}
# Which dimensions a kernel's grid is cut along, so how many programs work on one chunk of one head.
CUT = {"states": "KV", "outputs": "V", "dstates": "KV", "dqdk": "K", "dv": "V"}


def rows(
    gpus: str | Sequence[str] = "A100,H100",
    head_dim: int = 64,
    dtype: str = "bf16",
    warps: Sequence[int] = (2, 4),
    kernels: Sequence[str] = tuple(PEERS),
) -> list[dict[str, Any]]:
    """One dict a GPU, kernel and author.

    Args:
        gpus: as in :func:`effattn_lab.measure.xray.xray`, those with tensor cores that Triton knows.
        head_dim: features and values, 16, 32 or 64 (above, tiles are visited in loops and code is no measure).
        dtype: "bf16" or "fp16".
        warps: what fla's kernels are compiled with; the best is kept.
        kernels: some of "states", "outputs", "dstates", "dqdk", "dv".

    Returns:
        gpu, kernel, by ("ours", "ours, with the denominator", "fla"), tile, num_warps, registers, spill_bytes,
        shared_bytes, tensor_core_per_token, instructions_per_token.

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
                *_ours(target, name, head_dim, dtype),
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


def _rank(row: Mapping[str, Any]) -> tuple[bool, float]:
    return row["spill_bytes"] > 0, row["instructions_per_token"]


def _measure(row: XRay, name: str, tile: tuple[int, int], head_dim: int) -> dict[str, Any]:
    programs = 1
    for dim, block in zip("KV", tile):
        if dim in CUT[name]:
            programs *= -(-head_dim // block)
        elif block < head_dim:
            raise ValueError(f"tile: {name} visits {dim} in a loop with {block} of {head_dim}")
    issued = row.num_warps * programs / CHUNK
    return {
        "num_warps": row.num_warps,
        "registers": row.registers,
        "spill_bytes": row.spill_bytes,
        "shared_bytes": row.shared_bytes,
        "tensor_core_per_token": row.tensor_core_instructions * issued,
        "instructions_per_token": row.instructions * issued,
    }


def _ours(target: Any, name: str, head_dim: int, dtype: str) -> list[tuple[str, Job, tuple[int, int]]]:
    import torch
    from effattn_kernels.linear_attention import launches

    found = []
    for by, normalize in (("ours", False), ("ours, with the denominator", True)):
        element = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        for launch in launches(head_dim, element, target.sm.replace("_", ""), normalize=normalize):
            t = launch.tile
            if launch.name == name:
                if t.chunk != CHUNK:
                    raise ValueError(f"gpus: expected some where the chunk is {CHUNK}, got {target.gpu}")
                source = carry(launch.kernel)
                job = Job(source, launch.signature, launch.constexprs, target, t.num_warps, t.num_stages)
                found.append((by, job, (t.block_k, t.block_v)))
    return found


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
        # Everything that the plain operation does not use is None, as fla passes it, or False.
        constexprs: dict[str, Any] = {
            "B": 1, "H": 8, "HV": 8, "HQ": 8, "NG": 1, "K": head_dim, "V": head_dim,
            "BT": CHUNK, "BS": CHUNK, "BK": block_k, "BV": block_v,
        }  # fmt: skip
        signature: dict[str, str] = {}
        for arg in unwrap(kernel).arg_names:
            if arg in constexprs:
                signature[arg] = "constexpr"
            elif arg.isupper() and arg != "T":
                signature[arg], constexprs[arg] = "constexpr", False
            elif arg in ("q", "k", "v", "h", "o", "do", "dh", "dq", "dk", "dv") and not (
                name == "dqdk" and arg == "dv"
            ):
                signature[arg] = f"*{dtype}:16"
            elif arg == "scale":
                signature[arg] = "fp32"
            elif arg == "T":
                signature[arg] = "i32"
            else:
                signature[arg], constexprs[arg] = "constexpr", None
        constexprs = {arg: constexprs[arg] for arg in signature if arg in constexprs}
        for num_warps in warps:
            found.append(
                ("fla", Job(source, signature, constexprs, target, num_warps, 3), (block_k, block_v))
            )
    return found


def recorded() -> dict[str, Any]:
    """The table that the book shows, with its ``versions``. Compiling it takes minutes, so it is stored.

    A test compiles part of it again.
    """
    return record_of(__file__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    command(rows, __doc__, arguments)


if __name__ == "__main__":
    main()
