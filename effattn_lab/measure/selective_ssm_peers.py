"""Our selective scan beside what flash-linear-attention has nearest to it, compiled in one run by one compiler.

``python -m effattn_lab.measure.selective_ssm_peers --gpu A100,H100``. Needs fla-core (extra ``peers``) and no
GPU.

fla-core 0.6.0 has no Mamba-1 (its layer calls mamba_ssm's CUDA kernel, which is not Triton). Two of its
kernels can do the recurrence:

- ``fused_recurrent`` with a head for each channel, keys of size S and values of size 1: the same sums, but q,
k and the
  log-decays ``delta A`` have to stand in memory for every channel.
- ``hgrn``, the element-wise ``h = exp(g) h + x``, over all E S states: decays and additions in memory, every
state stored,
  and the sum over states left to another kernel.

Neither does discretisation, softplus, skip and gate, which ours does on the way.

Instructions a token and channel: ``instructions * warps / (tokens of one turn of the loop * channels of a
program)``, with the code before the loop counted in: a bound from above for all three. Bytes a token and
channel: what is read and written for each, B and C (q and k) included; each input once.
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections.abc import Sequence
from typing import Any

from effattn_lab._command import bad_values
from effattn_lab.measure._carry import carry, unwrap
from effattn_lab.measure._gpu_limits import targets
from effattn_lab.measure._xray_pool import Job
from effattn_lab.measure.xray import _run, show

SIZE = 16  # states a channel
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


def rows(gpus: str | Sequence[str] = "A100,H100", dtype: str = "bf16") -> list[dict[str, Any]]:
    """One dict a GPU and author: gpu, by, registers, spill_bytes, shared_bytes, num_warps, channels (a
    program's), instructions_per_token (and channel), bytes_per_token (and channel).

    Where fla tunes on the GPU, each of its settings is compiled and the one with the fewest instructions kept.

    Args:
        gpus: as in :func:`effattn_lab.measure.xray.xray`. dtype: "bf16", "fp16" or "fp32".

    Raises:
        ValueError: another dtype. RuntimeError: no fla-core.
    """
    if dtype not in ITEMSIZE:
        raise ValueError(f"dtype: expected one of {', '.join(ITEMSIZE)}, got {dtype!r}")
    jobs: list[Job] = []
    notes: list[dict[str, Any]] = []
    for target in targets(gpus):
        for by, job, tokens, channels, nbytes in [
            _ours(target, dtype),
            *_fused_recurrent(target, dtype),
            *_hgrn(target, dtype),
        ]:
            jobs.append(job)
            notes.append(
                {
                    "gpu": target.gpu,
                    "by": by,
                    "channels": channels,
                    "tokens": tokens,
                    "bytes_per_token": nbytes,
                }
            )
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row, note in zip(_run(jobs), notes):
        found = {
            "gpu": note["gpu"], "by": note["by"], "num_warps": row.num_warps, "channels": note["channels"],
            "registers": row.registers, "spill_bytes": row.spill_bytes, "shared_bytes": row.shared_bytes,
            "instructions_per_token": row.instructions * row.num_warps / (note["tokens"] * note["channels"]),
            "bytes_per_token": note["bytes_per_token"],
        }  # fmt: skip
        key = (found["gpu"], found["by"])
        if key not in best or found["instructions_per_token"] < best[key]["instructions_per_token"]:
            best[key] = found
    return list(best.values())


Entry = tuple[str, Job, int, float, float]


def _ours(target: Any, dtype: str) -> Entry:
    import torch
    from effattn_kernels.selective_ssm import launches

    element = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    launch = next(
        x for x in launches(64, element, target.sm.replace("_", ""), state_size=SIZE) if x.name == "scan"
    )
    tile = launch.tile
    job = Job(
        carry(launch.kernel), launch.signature, launch.constexprs, target, tile.num_warps, tile.num_stages
    )
    nbytes = ITEMSIZE[dtype] * (4 + 2 * SIZE / tile.block_e)  # u, delta, z, out; B and C once a program
    return "ours", job, tile.unroll, tile.block_e, nbytes


def _kernel(module: str, name: str) -> Any:
    import effattn_kernels  # noqa: F401  (before triton: it chooses the interpreter where there is no GPU)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fla warns that there is no GPU
            return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise RuntimeError(
            f"fla-core is needed for this table (pip install effattn-lab[peers]): {error}"
        ) from None


def _job(kernel: Any, pointers: dict[str, str], values: dict[str, Any], target: Any, num_warps: int) -> Job:
    """A launch of theirs: pointers that are used, T as a number, and nothing (None or False) for what is
    not."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    for arg in unwrap(kernel).arg_names:
        if arg in pointers:
            signature[arg] = f"*{pointers[arg]}:16"
        elif arg in ("T", "B"):
            signature[arg] = "i32"
        elif arg == "scale":
            signature[arg] = "fp32"
        else:
            signature[arg], constexprs[arg] = "constexpr", values.get(arg, False if arg.isupper() else None)
    return Job(carry(kernel), signature, constexprs, target, num_warps, 3)


def _fused_recurrent(target: Any, dtype: str) -> list[Entry]:
    kernel = _kernel("fla.ops.common.fused_recurrent", "fused_recurrent_fwd_kernel")
    pointers = {"q": dtype, "k": dtype, "v": dtype, "gk": dtype, "o": "fp32"}
    values = {"H": 1024, "K": SIZE, "V": 1, "BK": SIZE, "BV": 1, "USE_GK": True}
    nbytes = ITEMSIZE[dtype] * (3 * SIZE + 1) + 4  # q, k, gk and v of a head; o in fp32
    return [
        ("fla fused_recurrent", _job(kernel, pointers, values, target, warps), 1, 1, nbytes)
        for warps in (4, 8)
    ]


def _hgrn(target: Any, dtype: str) -> list[Entry]:
    kernel = _kernel("fla.ops.hgrn.fused_recurrent", "fused_recurrent_hgrn_fwd_kernel")
    pointers = dict.fromkeys("xgo", dtype)
    nbytes = ITEMSIZE[dtype] * 3 * SIZE
    return [
        (
            "fla hgrn",
            _job(kernel, pointers, {"D": 1024 * SIZE, "BD": lanes}, target, warps),
            1,
            lanes / SIZE,
            nbytes,
        )
        for lanes in (32, 64, 128)
        for warps in (1, 2, 4, 8)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", default="A100,H100")
    parser.add_argument("--dtype", default="bf16")
    chosen = parser.parse_args(arguments)
    with bad_values(parser):
        table = rows(chosen.gpu, chosen.dtype)
    show(table)


if __name__ == "__main__":
    main()
