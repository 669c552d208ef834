"""Our kernels of linearized attention beside flash-linear-attention's nearest, compiled in one run by one compiler.

``python -m effattn_lab.measure.linearized_llm_peers --gpu A100,H100``. Needs fla-core (extra ``peers``) and no GPU.

fla has no grouped linear attention with a convolution, but it has its parts: states by chunks and outputs of plain
linear attention (``chunk_fwd_kernel_h``, ``chunk_fwd_kernel_o``, chunk 64), and a causal convolution
(``causal_conv1d_fwd_kernel``), which has a kernel for each *channel* where ours has one for each head, and loops over
the lags. So our rows come in steps: the same work as fla's and a ReLU^2, then the lengths of q and k divided out, and
then the convolution. fla chooses its tiles by timing on a GPU; here those of its own list that are asked for are
compiled and the one with the fewest instructions a token stands, as in
:mod:`effattn_lab.measure.linear_attention_peers`, which says how they are counted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effattn_lab._command import bad_values, positive
from effattn_lab.measure._carry import carry, unwrap
from effattn_lab.measure._gpu_limits import targets
from effattn_lab.measure._xray_pool import Job
from effattn_lab.measure.linear_attention_peers import _theirs
from effattn_lab.measure.xray import _run, show

GROUP = 64
RECORD = Path(__file__).with_suffix(".json")
KERNELS = ("states", "outputs", "conv")
# By whom and with what: (NORM, LAGS) of our kernels.
STEPS: dict[str, dict[str, tuple[bool, int | None]]] = {
    "states": {"ours, no lengths": (False, 0), "ours": (True, 0)},
    "outputs": {
        "ours, no lengths, no convolution": (False, 0),
        "ours, no convolution": (True, 0),
        "ours": (True, None),
    },
    "conv": {"ours": (False, None)},
}


def rows(
    gpus: str | Sequence[str] = "A100,H100",
    head_dim: int = 64,
    dtype: str = "bf16",
    lags: int = 32,
    kernels: Sequence[str] = KERNELS,
    warps: Sequence[int] = (2, 4),
) -> list[dict[str, Any]]:
    """One dict a GPU, kernel and author.

    Args:
        gpus: as in :func:`effattn_lab.measure.xray.xray`, those with tensor cores that Triton knows.
        head_dim: keys and values, 64 (above, tiles are visited in loops and code is no measure).
        dtype: "bf16" or "fp16".
        lags: of the convolution; fla unrolls its loop over them.
        kernels: some of "states", "outputs", "conv".
        warps: what fla's kernels are compiled with; the best is kept.

    Returns:
        gpu, kernel, by, tile, num_warps, registers, spill_bytes, shared_bytes, tensor_core_per_token,
        instructions_per_token, and for "conv" ``loads_per_token``: elements of V asked for, each channel.
    """
    if head_dim != 64:
        raise ValueError(f"head_dim: expected 64, got {head_dim!r}")
    if dtype not in ("bf16", "fp16"):
        raise ValueError(f"dtype: expected 'bf16' or 'fp16', got {dtype!r}")
    if unknown := [name for name in kernels if name not in KERNELS]:
        raise ValueError(f"kernels: expected some of {', '.join(KERNELS)}, got {unknown[0]!r}")
    jobs: list[Job] = []
    notes: list[dict[str, Any]] = []
    for target in targets(gpus):
        for name in kernels:
            found = _ours(target, name, head_dim, dtype, lags)
            if name == "conv":
                found += _their_conv(target, head_dim, dtype, lags, warps)
            else:
                found += [
                    (by, job, (GROUP, *tile), 1)
                    for by, job, tile in _theirs(target, name, head_dim, dtype, warps)
                ]
            for by, job, tile, programs in found:
                jobs.append(job)
                notes.append(
                    {"gpu": target.gpu, "kernel": name, "by": by, "tile": tile, "programs": programs}
                )
    best: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row, note in zip(_run(jobs), notes):
        issued = row.num_warps * _programs(note, head_dim) / note["tile"][0]
        found_row = {
            **{k: v for k, v in note.items() if k != "programs"},
            "num_warps": row.num_warps,
            "registers": row.registers,
            "spill_bytes": row.spill_bytes,
            "shared_bytes": row.shared_bytes,
            "tensor_core_per_token": row.tensor_core_instructions * issued,
            "instructions_per_token": row.instructions * issued,
            "loads_per_token": None,
        }
        if note["kernel"] == "conv":
            found_row["loads_per_token"] = lags if note["by"] == "fla" else 1 + (lags - 1) / note["tile"][0]
        key = (note["gpu"], note["kernel"], note["by"])
        rank = (found_row["spill_bytes"] > 0, found_row["instructions_per_token"])
        if key not in best or rank < (best[key]["spill_bytes"] > 0, best[key]["instructions_per_token"]):
            best[key] = found_row
    return list(best.values())


def recorded() -> list[dict[str, Any]]:
    """The rows that ``--write`` recorded."""
    found: list[dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))["rows"]
    return found


def _programs(note: dict[str, Any], head_dim: int) -> int:
    """Programs that work on one tile of tokens of one head."""
    if note["by"] != "fla" or note["kernel"] == "conv":
        return int(note["programs"])
    _, block_k, block_v = note["tile"]
    cuts = [-(-head_dim // block_v)] + ([-(-head_dim // block_k)] if note["kernel"] == "states" else [])
    return cuts[0] * (cuts[1] if len(cuts) > 1 else 1)


def _ours(target: Any, name: str, head_dim: int, dtype: str, lags: int) -> list[tuple[str, Job, Any, int]]:
    import torch
    from effattn_kernels.linearized_llm import launches

    element = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    found = []
    for by, (norm, taps) in STEPS[name].items():
        for launch in launches(head_dim, element, target.sm.replace("_", ""), lags=lags):
            if launch.name != name:
                continue
            t = launch.tile
            constexprs = dict(launch.constexprs)
            if "NORM" in constexprs:
                constexprs["NORM"] = norm
            if taps is not None and "LAGS" in constexprs:
                constexprs["LAGS"] = taps
            job = Job(carry(launch.kernel), launch.signature, constexprs, target, t.num_warps, t.num_stages)
            tokens = t.block_m or GROUP
            found.append((by, job, (tokens, head_dim, t.block_v), -(-head_dim // t.block_v)))
    return found


def _their_conv(
    target: Any, head_dim: int, dtype: str, lags: int, warps: Sequence[int]
) -> list[tuple[str, Job, Any, int]]:
    import effattn_kernels  # noqa: F401  (before triton: it chooses the interpreter where there is no GPU)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fla warns that there is no GPU
            kernel = importlib.import_module("fla.modules.causal_conv1d.ops").causal_conv1d_fwd_kernel
    except ImportError as error:
        raise RuntimeError(
            f"fla-core is needed for this table (pip install effattn-lab[peers]): {error}"
        ) from None
    source = carry(kernel)
    found = []
    for block_d in (32, 64):
        constexprs: dict[str, Any] = {
            "D": head_dim, "W": lags, "BT": GROUP, "BW": 1 << (lags - 1).bit_length(), "BD": block_d,
            "ACTIVATION": None, "HAS_WEIGHT": True, "HAS_BIAS": False, "HAS_RESIDUAL": False,
            "USE_INITIAL_STATE": False, "IS_VARLEN": False, "bias": None, "residual": None, "cu_seqlens": None,
            "initial_state": None, "chunk_indices": None, "stride_x_d": 1,
        }  # fmt: skip
        signature: dict[str, str] = {}
        for arg in unwrap(kernel).arg_names:
            if arg in constexprs:
                signature[arg] = "constexpr"
            elif arg in ("x", "y", "weight"):
                signature[arg] = f"*{dtype}:16"
            elif arg.startswith("stride"):
                signature[arg] = "i32:16"
            else:
                signature[arg] = "i32"
        ordered = {arg: constexprs[arg] for arg in signature if arg in constexprs}
        for num_warps in warps:
            job = Job(source, signature, ordered, target, num_warps, 3)
            found.append(("fla", job, (GROUP, 0, block_d), -(-head_dim // block_d)))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", default="A100,H100")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--lags", type=positive, default=32)
    parser.add_argument(
        "--write", action="store_true", help="record the rows beside this file, for the chapter"
    )
    chosen = parser.parse_args(arguments)
    with bad_values(parser):
        table = rows(chosen.gpu, 64, chosen.dtype, chosen.lags)
    if chosen.write:
        import fla
        import triton

        about = {
            "triton": triton.__version__,
            "fla-core": fla.__version__,
            "dtype": chosen.dtype,
            "lags": chosen.lags,
        }
        RECORD.write_text(json.dumps({"about": about, "rows": table}, indent=1) + "\n", encoding="utf-8")
    show([{**row, "tile": "x".join(map(str, row["tile"]))} for row in table])


if __name__ == "__main__":
    main()
