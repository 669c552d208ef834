"""Our ZeroS kernels beside flash-linear-attention's linear attention run three times, compiled in one run.

``python -m effattn_lab.measure.zeros_peers --gpu A100,H100``. Needs fla-core (extra ``peers``) and no GPU.

Nobody else has a kernel for ZeroS. What one can do with fla is what the scan says: normalise q and k (`l2norm`), run
plain causal linear attention three times, with keys times ``e^s``, ``s`` and 1, and mix the outputs. The table counts
fla's kernels for that, each at its best (see :mod:`effattn_lab.measure.linear_attention_peers`). What PyTorch does
around them, scaling the keys twice and mixing three outputs, has no kernel to look into: its bytes are counted. Left
out are the prefix sums of the logits; that ``e^s`` overflows without the running maximum, which this route lacks; and
that the mix takes the small difference of three rounded outputs.

Bytes a token and head follow from the formulas: ours :mod:`effattn_lab.measure.zeros_traffic`; fla's kernels load
their inputs and store their outputs once, with one tile of 64 features and values.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import Any

from effattn_lab.measure._carry import carry
from effattn_lab.measure._gpu_limits import Target, targets
from effattn_lab.measure._peers import command, record_of
from effattn_lab.measure._xray_pool import Job
from effattn_lab.measure.linear_attention_peers import CHUNK
from effattn_lab.measure.linear_attention_peers import rows as linear_rows
from effattn_lab.measure.xray import XRay, _run
from effattn_lab.measure.zeros_traffic import Case, outputs_bytes, states_bytes

RUNS = {"states": 3, "outputs": 3, "l2norm": 2}
L2NORM_ROWS, L2NORM_WARPS = (16, 32, 64), (1, 2, 4)


def rows(
    gpus: str | Sequence[str] = "A100,H100", head_dim: int = 64, dtype: str = "bf16"
) -> list[dict[str, Any]]:
    """One dict a GPU, author and kernel, and a total for each author.

    Args:
        gpus: as in :func:`effattn_lab.measure.xray.xray`, those with tensor cores that Triton knows.
        head_dim: of keys and values, 16, 32 or 64.
        dtype: "bf16" or "fp16".

    Returns:
        gpu, by ("ours", "fla", "PyTorch"), kernel, runs, num_warps, registers, spill_bytes, shared_bytes,
        tensor_core_per_token, instructions_per_token and bytes_per_token of all its runs together, per head; None
        where nothing is compiled.

    Raises:
        ValueError: a head_dim or dtype that is not among these. RuntimeError: no fla-core.
    """
    theirs = [
        r for r in linear_rows(gpus, head_dim, dtype, kernels=("states", "outputs")) if r["by"] == "fla"
    ]
    table: list[dict[str, Any]] = []
    for target in targets(gpus):
        ours = _ours(target, head_dim, dtype)
        mine = [{**r, "by": "fla", "runs": 1} for r in theirs if r["gpu"] == target.gpu]
        mine.append(_l2norm(target, head_dim, dtype))
        state = 2 * head_dim * head_dim / CHUNK
        once = {"states": 4 * head_dim + state, "outputs": 8 * head_dim + state, "l2norm": 4 * head_dim + 4}
        fla = [_times(r, RUNS[r["kernel"]], once[r["kernel"]]) for r in mine]
        # Two scaled copies of the keys (one read, two written); three outputs read, one written.
        around = _row(target.gpu, "PyTorch", "scale and mix", 1, 2 * head_dim * 3 + 2 * head_dim * 4)
        table += [*ours, _total(ours, "ours"), *fla, around, _total([*fla, around], "fla and PyTorch")]
    return table


def _row(gpu: str, by: str, kernel: str, runs: int, size: float, **measured: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("num_warps", "registers", "spill_bytes", "shared_bytes"))
    counts = {"tensor_core_per_token": None, "instructions_per_token": None}
    return {
        "gpu": gpu,
        "by": by,
        "kernel": kernel,
        "runs": runs,
        **empty,
        **counts,
        **measured,
        "bytes_per_token": size,
    }


def _measured(row: XRay, programs: int, rows_each: int) -> dict[str, Any]:
    issued = row.num_warps * programs / rows_each
    return {
        "num_warps": row.num_warps,
        "registers": row.registers,
        "spill_bytes": row.spill_bytes,
        "shared_bytes": row.shared_bytes,
        "tensor_core_per_token": row.tensor_core_instructions * issued,
        "instructions_per_token": row.instructions * issued,
    }


def _times(row: dict[str, Any], runs: int, size: float) -> dict[str, Any]:
    counts = {n: runs * row[n] for n in ("tensor_core_per_token", "instructions_per_token")}
    kept = {n: row[n] for n in ("num_warps", "registers", "spill_bytes", "shared_bytes")}
    return _row(row["gpu"], row["by"], row["kernel"], runs, runs * size, **kept, **counts)


def _total(parts: Sequence[dict[str, Any]], by: str) -> dict[str, Any]:
    sums = {n: sum(p[n] or 0 for p in parts) for n in ("tensor_core_per_token", "instructions_per_token")}
    spill = max(p["spill_bytes"] or 0 for p in parts)
    size = sum(p["bytes_per_token"] for p in parts)
    return _row(parts[0]["gpu"], by, "total", sum(p["runs"] for p in parts), size, spill_bytes=spill, **sums)


def _ours(target: Target, head_dim: int, dtype: str) -> list[dict[str, Any]]:
    import torch
    from effattn_kernels.zeros import launches

    element = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    found = list(launches(head_dim, element, target.sm.replace("_", "")))
    jobs = [
        Job(carry(x.kernel), x.signature, x.constexprs, target, x.tile.num_warps, x.tile.num_stages)
        for x in found
    ]
    length = 64 * CHUNK  # any whole number of chunks: bytes a token do not depend on it
    case = Case(1, 1, 1, length, length, head_dim, head_dim, 2)
    size = {"states": states_bytes, "outputs": outputs_bytes}
    return [
        _row(
            target.gpu, "ours", x.name, 1, size[x.name](case, x.tile) / length,
            **_measured(row, -(-head_dim // x.tile.block_v), x.tile.chunk),
        )
        for x, row in zip(found, _run(jobs))
    ]  # fmt: skip


def _l2norm(target: Target, head_dim: int, dtype: str) -> dict[str, Any]:
    """fla's kernel that makes vectors of length 1: the candidate of its list with the fewest instructions a row."""
    import effattn_kernels  # noqa: F401  (before triton: it chooses the interpreter where there is no GPU)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fla warns that there is no GPU
            kernel = importlib.import_module("fla.modules.norm.l2norm").l2norm_fwd_kernel
    except ImportError as error:
        raise RuntimeError(
            f"fla-core is needed for this table (pip install effattn-lab[peers]): {error}"
        ) from None
    source = carry(kernel)
    signature = {"x": f"*{dtype}:16", "y": f"*{dtype}:16", "rstd": "*fp32:16", "eps": "fp32", "T": "i32"}
    signature.update(dict.fromkeys(("D", "BD", "NB", "BT"), "constexpr"))
    jobs, each = [], []
    for block in L2NORM_ROWS:
        for num_warps in L2NORM_WARPS:
            constants = {"D": head_dim, "BD": head_dim, "NB": 1, "BT": block}
            jobs.append(Job(source, signature, constants, target, num_warps, 2))
            each.append(block)
    measured = [_measured(row, 1, block) for row, block in zip(_run(jobs), each)]
    best = min(measured, key=lambda m: (m["spill_bytes"] > 0, m["instructions_per_token"]))
    return {"gpu": target.gpu, "by": "fla", "kernel": "l2norm", "runs": 1, **best}


def recorded() -> dict[str, Any]:
    """The table that the book shows, with its ``versions``; compiling takes minutes, so it is kept here.

    A test compiles part of it again.
    """
    return record_of(__file__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    command(rows, __doc__, arguments)


if __name__ == "__main__":
    main()
