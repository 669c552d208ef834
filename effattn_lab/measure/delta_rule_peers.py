"""Our delta-rule kernels beside those of flash-linear-attention, compiled in one run by one compiler.

``python -m effattn_lab.measure.delta_rule_peers --gpu A100,H100``. Needs fla-core (extra ``peers``) and no GPU. With
``--write`` the rows are kept for the book, with the versions that made them.

The operation is the forward pass at chunk 64, with or without the gate. fla takes four kernels: the inverse of the
triangular matrix, W and U from it, states, outputs (and one more to sum the gate, left out here). Ours takes three:
W and U come from the kernel that solves the system, which never stores the inverse. So fla's first two stand
together, as "transform". fla chooses its tiles on the GPU by timing. There is none here, so the candidates of its
own lists are compiled, and the one with the fewest instructions a token stands in the table, among those that do
not spill if there are any: we compare with fla at its best by this measure.

Instructions a token: ``instructions * warps * programs a chunk / chunk``, loops weighted by how often they run. One
with matrix products runs once for each tile of K; one without is a forward substitution (15 steps in ours, 14 in
fla's, which begins with the third row). The kernel that walks the chunks counts with the body of that walk.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from effattn_lab._command import bad_values, positive
from effattn_lab.measure import _loop_worker
from effattn_lab.measure._carry import carry, unwrap
from effattn_lab.measure._gpu_limits import targets
from effattn_lab.measure._xray_pool import Job, _Worker
from effattn_lab.measure.xray import show

CHUNK = 64
# kernel of ours -> fla's for the same step: (module, name, candidates of (BLOCK_K, BLOCK_V, warps)).
PEERS: dict[str, tuple[tuple[str, str, tuple[tuple[int, int, int], ...]], ...]] = {
    "transform": (
        (
            "gated_delta_rule.chunk_fwd",
            "chunk_gated_delta_rule_fwd_kkt_solve_kernel",
            ((64, 64, 1), (64, 64, 2), (32, 64, 1)),
        ),
        ("gated_delta_rule.wy_fast", "recompute_w_u_fwd_kernel", ((64, 64, 2), (64, 64, 4))),
    ),
    "states": (
        (
            "common.chunk_delta_h",
            "chunk_gated_delta_rule_fwd_kernel_h_blockdim64",
            ((64, 64, 2), (64, 64, 4), (64, 32, 2)),
        ),
    ),
    "outputs": (("common.chunk_o", "chunk_fwd_kernel_o", ((64, 64, 4), (32, 32, 2))),),
}
RECORDED = Path(__file__).with_suffix(".json")
SUBSTITUTION = {"ours": 15, "fla": 14}


def rows(
    gpus: str | Sequence[str] = "A100",
    head_dim: int = 64,
    dtype: str = "bf16",
    gated: bool = True,
    kernels: Sequence[str] = tuple(PEERS),
) -> list[dict[str, Any]]:
    """One dict a GPU, kernel and author.

    Args:
        gpus: NVIDIA's with tensor cores that Triton knows, as in :func:`effattn_lab.measure.xray.xray`.
        head_dim: of keys and values, 32 or 64.
        dtype: "bf16" or "fp16".
        gated: with the decay.
        kernels: some of "transform", "states", "outputs".

    Returns:
        gpu, kernel, by ("ours", "fla"), registers and spill_bytes (the larger of two kernels), shared_bytes,
        tensor_core_per_token, instructions_per_token (the sum of two).

    Raises:
        ValueError: a head_dim, dtype or kernel that is not among these. RuntimeError: no fla-core.
    """
    if head_dim not in (32, 64):
        raise ValueError(f"head_dim: expected 32 or 64, got {head_dim!r}")
    if dtype not in ("bf16", "fp16"):
        raise ValueError(f"dtype: expected 'bf16' or 'fp16', got {dtype!r}")
    if unknown := [name for name in kernels if name not in PEERS]:
        raise ValueError(f"kernels: expected some of {', '.join(PEERS)}, got {unknown[0]!r}")
    out = []
    with _Compiler() as compiler:
        for target in targets(gpus):
            for name in kernels:
                parts = {
                    "ours": [[_ours(target, name, head_dim, dtype, gated)]],
                    "fla": _theirs(target, name, head_dim, dtype, gated),
                }
                for by, steps in parts.items():
                    best = [
                        min((_measure(compiler, name, by, *c, head_dim) for c in step), key=_rank)
                        for step in steps
                    ]
                    row: dict[str, Any] = {"gpu": target.gpu, "kernel": name, "by": by}
                    for key in ("registers", "spill_bytes", "shared_bytes"):
                        row[key] = max(part[key] for part in best)
                    for key in ("tensor_core_per_token", "instructions_per_token"):
                        row[key] = sum(part[key] for part in best)
                    out.append(row)
    return out


def _rank(row: Mapping[str, Any]) -> tuple[bool, float]:
    return row["spill_bytes"] > 0, row["instructions_per_token"]


def _measure(
    compiler: _Worker, name: str, by: str, job: Job, block_k: int, block_v: int, head_dim: int
) -> dict[str, Any]:
    result: Any = compiler.compile(job)
    loops: list[list[int]] = result["loops"]
    total = [result["instructions"], result["tensor_core_instructions"]]
    if name == "states":
        walk: list[int] = max(loops, key=lambda body: body[1])
        total = walk
    else:
        for body in loops:
            times = -(-head_dim // block_k) if body[1] else SUBSTITUTION[by]
            total = [count + (times - 1) * more for count, more in zip(total, body)]
    programs = 1 if name == "transform" else -(-head_dim // block_v)
    issued = job.num_warps * programs / CHUNK
    return {
        "registers": result["registers"],
        "spill_bytes": result["spill_bytes"],
        "shared_bytes": result["shared_bytes"],
        "tensor_core_per_token": total[1] * issued,
        "instructions_per_token": total[0] * issued,
    }


def _ours(target: Any, name: str, head_dim: int, dtype: str, gated: bool) -> tuple[Job, int, int]:
    import torch
    from effattn_kernels.delta_rule import launches

    element = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    (launch,) = (
        x for x in launches(head_dim, element, target.sm.replace("_", ""), gated=gated) if x.name == name
    )
    t = launch.tile
    if t.chunk != CHUNK or not target.sm.startswith("sm"):
        raise ValueError(f"gpus: expected NVIDIA's with tensor cores (chunks of {CHUNK}), got {target.gpu}")
    job = Job(carry(launch.kernel), launch.signature, launch.constexprs, target, t.num_warps, t.num_stages)
    return job, t.block_k, t.block_v


def _theirs(
    target: Any, name: str, head_dim: int, dtype: str, gated: bool
) -> list[list[tuple[Job, int, int]]]:
    import effattn_kernels  # noqa: F401  (before triton: it chooses the interpreter where there is no GPU)

    steps = []
    for module, kernel_name, tiles in PEERS[name]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # fla warns that there is no GPU
                kernel = getattr(importlib.import_module(f"fla.ops.{module}"), kernel_name)
        except ImportError as error:
            raise RuntimeError(
                f"fla-core is needed for this table (pip install effattn-lab[peers]): {error}"
            ) from None
        source = carry(kernel)
        candidates = []
        for block_k, block_v, warps in dict.fromkeys(
            (min(k, head_dim), min(v, head_dim), w) for k, v, w in tiles
        ):
            fixed: dict[str, Any] = {
                "H": 8, "HV": 8, "K": head_dim, "V": head_dim, "BT": CHUNK, "BC": 16, "BK": block_k, "BV": block_v,
                "USE_G": gated, "SAVE_NEW_VALUE": True,
            }  # fmt: skip
            signature: dict[str, str] = {}
            constexprs: dict[str, Any] = {}
            for arg in unwrap(kernel).arg_names:
                if arg in fixed or (arg.isupper() and arg not in ("A", "T")):
                    # What the plain operation does not use is off.
                    signature[arg], constexprs[arg] = "constexpr", fixed.get(arg, False)
                elif arg == "g" and gated:
                    signature[arg] = "*fp32:16"  # fla sums it in fp32, in a kernel of its own
                elif arg in ("q", "k", "v", "w", "u", "A", "beta", "h", "v_new", "o"):
                    signature[arg] = f"*{dtype}:16"
                elif arg == "scale":
                    signature[arg] = "fp32"
                elif arg == "T":
                    signature[arg] = "i32"
                else:
                    signature[arg], constexprs[arg] = "constexpr", None
            candidates.append((Job(source, signature, constexprs, target, warps, 2), block_k, block_v))
        steps.append(candidates)
    return steps


class _Compiler(_Worker):
    """One compiler process that reports loops."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="effattn_loops_")
        self.scratch = Path(self._folder.name)
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": self._folder.name,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", _loop_worker.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self._folder.cleanup()


def recorded() -> dict[str, Any]:
    """The last run with ``--write``: versions and rows."""
    found: dict[str, Any] = json.loads(RECORDED.read_text())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", default="A100,H100")
    parser.add_argument("--head-dim", type=positive, default=64)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--no-gate", action="store_true")
    parser.add_argument("--write", action="store_true", help=f"keep the rows in {RECORDED.name}")
    chosen = parser.parse_args(arguments)
    with bad_values(parser):
        table = rows(chosen.gpu, chosen.head_dim, chosen.dtype, not chosen.no_gate)
    show(table)
    if chosen.write:
        versions = {name: version(name) for name in ("triton", "fla-core")}
        RECORDED.write_text(json.dumps({"versions": versions, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
