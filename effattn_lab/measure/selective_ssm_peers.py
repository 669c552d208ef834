"""Our selective scan beside what flash-linear-attention has nearest to it, compiled in one run by one compiler.

``python -m effattn_lab.measure.selective_ssm_peers --gpu A100,H100``; with ``--json`` it writes the record that the
book shows. Needs fla-core (extra ``peers``) and no GPU.

fla-core 0.6.0 has no Mamba-1 (its layer calls mamba_ssm's CUDA kernel, which is not Triton). Two of its
kernels can do the recurrence:

- ``fused_recurrent`` with a head for each channel, keys of size S and values of size 1: the same sums, but q, k and
  the log-decays ``delta A`` have to stand in memory for every channel.
- ``hgrn``, the element-wise ``h = exp(g) h + x``, over all E S states: decays and additions in memory, every state
  stored, and the sum over states left to another kernel.

Neither does discretisation, softplus, skip and gate, which ours does on the way.

Instructions a token and channel: those of the loop over tokens, ``body * warps / (tokens of a turn * channels of a
program)``, warp instructions as elsewhere. The compiler unrolls loops as it likes; each of the three stores once a
token, so the stores of a body say how many tokens it is. What stands before the loop is not counted: it runs once.
Bytes a token and channel: what is read and written for each, B and C (q and k) included; each input once.
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
from effattn_lab.measure.delta_rule_peers import _Compiler

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


def rows(
    gpus: str | Sequence[str] = "A100,H100", state_size: int = 16, dtype: str = "bf16"
) -> list[dict[str, Any]]:
    """One dict a GPU and author: gpu, by, registers, spill_bytes, shared_bytes, num_warps, channels (a
    program's), tokens_a_turn (of the loop), instructions_per_token (and channel), bytes_per_token (and channel).

    Where fla tunes on the GPU, each of its settings is compiled and the one with the fewest instructions kept.

    Args:
        gpus: as in :func:`effattn_lab.measure.xray.xray`. dtype: "bf16", "fp16" or "fp32".
        state_size: S, 8, 16 or 32: a power of two, so that no kernel carries idle states.

    Raises:
        ValueError: another dtype or state size. RuntimeError: no fla-core.
    """
    if state_size not in (8, 16, 32):
        raise ValueError(f"state_size: expected 8, 16 or 32, got {state_size!r}")
    if dtype not in ITEMSIZE:
        raise ValueError(f"dtype: expected one of {', '.join(ITEMSIZE)}, got {dtype!r}")
    best: dict[tuple[str, str], dict[str, Any]] = {}
    with _Compiler() as compiler:
        for target in targets(gpus):
            if not target.sm.startswith("sm"):
                raise ValueError(f"gpus: expected NVIDIA's, whose machine code is read, got {target.gpu}")
            for by, job, channels, nbytes in (
                _ours(target, state_size, dtype),
                *_fused_recurrent(target, state_size, dtype),
                *_hgrn(target, state_size, dtype),
            ):
                result: Any = compiler.compile(job)
                tokens, body = max(zip(result["loop_stores"], (loop[0] for loop in result["loops"])))
                found = {
                    "gpu": target.gpu, "by": by, "num_warps": job.num_warps, "channels": channels,
                    "registers": result["registers"], "spill_bytes": result["spill_bytes"],
                    "shared_bytes": result["shared_bytes"], "tokens_a_turn": tokens,
                    "instructions_per_token": body * job.num_warps / (tokens * channels),
                    "bytes_per_token": nbytes,
                }  # fmt: skip
                held = best.get((target.gpu, by))
                if held is None or found["instructions_per_token"] < held["instructions_per_token"]:
                    best[target.gpu, by] = found
    return list(best.values())


Entry = tuple[str, Job, float, float]  # by, job, channels of a program, bytes


def _ours(target: Any, size: int, dtype: str) -> Entry:
    import torch
    from effattn_kernels.selective_ssm import launches

    element = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    launch = next(
        x for x in launches(64, element, target.sm.replace("_", ""), state_size=size) if x.name == "scan"
    )
    tile = launch.tile
    job = Job(
        carry(launch.kernel), launch.signature, launch.constexprs, target, tile.num_warps, tile.num_stages
    )
    nbytes = ITEMSIZE[dtype] * (4 + 2 * size / tile.block_e)  # u, delta, z, out; B and C once a program
    return "ours", job, tile.block_e, nbytes


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


def _fused_recurrent(target: Any, size: int, dtype: str) -> list[Entry]:
    kernel = _kernel("fla.ops.common.fused_recurrent", "fused_recurrent_fwd_kernel")
    pointers = {"q": dtype, "k": dtype, "v": dtype, "gk": dtype, "o": "fp32"}
    values = {"H": 1024, "K": size, "V": 1, "BK": size, "BV": 1, "USE_GK": True}
    nbytes = ITEMSIZE[dtype] * (3 * size + 1) + 4  # q, k, gk and v of a head; o in fp32
    return [
        ("fla fused_recurrent", _job(kernel, pointers, values, target, warps), 1, nbytes) for warps in (4, 8)
    ]


def _hgrn(target: Any, size: int, dtype: str) -> list[Entry]:
    kernel = _kernel("fla.ops.hgrn.fused_recurrent", "fused_recurrent_hgrn_fwd_kernel")
    pointers = dict.fromkeys("xgo", dtype)
    nbytes = ITEMSIZE[dtype] * 3 * size
    return [
        (
            "fla hgrn",
            _job(kernel, pointers, {"D": 1024 * size, "BD": lanes}, target, warps),
            lanes / size,
            nbytes,
        )
        for lanes in (32, 64, 128)
        for warps in (1, 2, 4, 8)
    ]


def recorded() -> dict[str, Any]:
    """The table that the book shows, with its ``versions``; a test compiles part of it again."""
    return record_of(__file__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    command(rows, __doc__, arguments, size="state_size", default=16)


if __name__ == "__main__":
    main()
