"""X-ray: compile a Triton kernel for GPUs that aren't there, and read what the compiler made of it.

Registers, spills, shared memory, instructions, tensor-core instructions and the occupancy that follows, for any
``@triton.jit`` kernel (one just written in a notebook cell too), with no GPU in the machine. The compiler runs in
processes of its own, without ``TRITON_INTERPRET``; results are kept in the user's cache folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from effattn_lab.measure._carry import carry, unwrap
from effattn_lab.measure._gpu_limits import occupancy, targets
from effattn_lab.measure._slugs import kernel_module
from effattn_lab.measure._xray_pool import Job, compile_all

__all__ = ["XRay", "show", "xray", "xray_rows"]


@dataclass(frozen=True)
class XRay:
    """What one kernel became on one GPU.

    Attributes:
        registers: registers a thread (AMD: architectural and accumulation registers together).
        spill_bytes: memory a thread needs because its values do not fit into registers. Each access goes to
            main memory through the caches: a kernel that spills in its inner loop is slow.
        shared_bytes: shared memory (LDS) a block. fits: is that allowed on this GPU?
        instructions: machine instructions in the kernel, padding left out.
        tensor_core_instructions: those that run on the matrix units.
        occupancy: resident warps over the most an SM can hold, 0 to 1; limited_by: the resource that says so.
    """

    kernel: str
    gpu: str
    sm: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int
    tensor_core_instructions: int
    occupancy: float
    limited_by: str
    fits: bool
    num_warps: int
    num_stages: int
    head_dim: int | None = None
    dtype: str | None = None
    mask: str | None = None
    tile: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def xray(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any] | None = None,
    gpus: str | Sequence[str] = "all",
    num_warps: int = 4,
    num_stages: int = 2,
    head_dim: int | None = None,
) -> list[XRay]:
    """Compile ``kernel`` for each GPU and measure the result.

    Args:
        kernel: a ``@triton.jit`` function, from a module, a file or a notebook cell.
        signature: type of each run-time argument: ``"*fp16"`` (pointer), ``"i32"``, ``"fp32"``, ... A trailing
            ``:16`` promises divisibility by 16, which lets the compiler load wide; pointers get it by themselves,
            as every tensor that torch allocates has it.
        constexprs: value of each ``tl.constexpr`` argument; an ordinary argument listed here is compiled in.
        gpus: ``"all"``, a name (``"T4"``, ``"A100"``, ``"L4"``, ``"H100"``, ``"B200"``, ``"RTX PRO 6000"``,
            ``"MI300X"``), several with commas, or a list.
        num_warps: warps a block. num_stages: loads in flight.
        head_dim: only noted in the rows.

    Raises:
        ValueError: an unknown GPU, an argument missing or unknown, a kernel that cannot be carried.
        RuntimeError: no triton here, or the kernel does not compile; the message holds the compiler's.
    """
    chosen = targets(gpus)
    _require_compiler()
    kernel = unwrap(kernel)
    constexprs = dict(constexprs or {})
    signature = _complete(kernel, signature, constexprs)
    carried = carry(kernel)
    jobs = [Job(carried, signature, constexprs, t, num_warps, num_stages) for t in chosen]
    return [replace(row, head_dim=head_dim) for row in _run(jobs)]


def xray_rows(
    slug: str = "flash",
    gpus: str | Sequence[str] = "all",
    head_dims: Iterable[int] = (64, 128),
    dtypes: Iterable[str] = ("fp16",),
    masks: Iterable[str] = ("causal",),
) -> list[dict[str, Any]]:
    """The shipped kernels with their shipped tiles (``effattn xray flash``).

    One dict a kernel, GPU, head dim, dtype and mask ("full", "causal", "window"; a window here is causal too).

    The kernels come from ``effattn_kernels.<slug>.launches``, which says what is launched with which tile.
    bf16 on a T4 is left out: that GPU has none and kernels refuse it there.

    Raises:
        ValueError: no such slug, GPU, dtype or mask; a head dim that the kernel refuses; nothing left to compile.
    """
    import torch

    launches = kernel_module(slug).launches
    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    chosen = targets(gpus)
    _require_compiler()
    jobs: list[Job] = []
    notes: list[dict[str, Any]] = []
    for target in chosen:
        for head_dim in head_dims:
            for dtype in dtypes:
                if dtype not in names:
                    raise ValueError(f"dtypes: expected some of {', '.join(names)}, got {dtype!r}")
                if target.gpu == "T4" and dtype == "bf16":
                    continue
                for mask in masks:
                    if mask not in ("full", "causal", "window"):
                        raise ValueError(f"masks: expected some of full, causal, window, got {mask!r}")
                    kinds = {"causal": mask != "full", "window": mask == "window"}
                    for launch in launches(head_dim, names[dtype], target.sm.replace("_", ""), **kinds):
                        t = launch.tile
                        source = carry(launch.kernel)
                        jobs.append(
                            Job(
                                source, launch.signature, launch.constexprs, target, t.num_warps, t.num_stages
                            )
                        )
                        notes.append({"head_dim": head_dim, "dtype": dtype, "mask": mask, "tile": t.label})
    if not jobs:
        raise ValueError("dtypes: expected one that the GPU has (a T4 has no bf16), got nothing to compile")
    return [replace(row, **note).as_dict() for row, note in zip(_run(jobs), notes)]


def show(rows: Iterable[XRay | Mapping[str, Any]]) -> None:
    """Print rows as a table, in a notebook or a terminal. Columns that are empty everywhere are left out."""
    dicts = [row.as_dict() if isinstance(row, XRay) else dict(row) for row in rows]
    names = [n for n in (dicts[0] if dicts else {}) if any(d[n] is not None for d in dicts)]
    cells = [[_text(d[n]) for n in names] for d in dicts]
    heads = [n.replace("tensor_core_instructions", "tensor_core").replace("_", " ") for n in names]
    widths = [max(len(c) for c in column) for column in zip(heads, *cells)]
    for line in [heads, ["-" * w for w in widths], *cells]:
        print("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip())


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _require_compiler() -> None:
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            "x-ray needs triton's compiler, which exists for Linux only. "
            "Use Linux, WSL2 or Colab: pip install triton."
        )


def _complete(kernel: Any, signature: Mapping[str, str], constexprs: Mapping[str, Any]) -> dict[str, str]:
    """One type for every argument of the kernel, in its order."""
    unknown = [n for n in [*signature, *constexprs] if n not in kernel.arg_names]
    if unknown:
        raise ValueError(
            f"signature: {kernel.fn.__name__} has no argument {unknown[0]!r}; it has {kernel.arg_names}"
        )
    full = {}
    for name in kernel.arg_names:
        if name in constexprs:
            full[name] = "constexpr"
        elif name in signature:
            kind = signature[name]
            full[name] = f"{kind}:16" if kind.startswith("*") and ":" not in kind else kind
        else:
            raise ValueError(f"signature: expected a type or a compile-time value for {name!r}, got neither")
    return full


def _cache_folder() -> Path:
    root = os.environ.get("EFFATTN_CACHE")
    if not root:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "effattn-lab")
    return Path(root) / "xray"


def _run(jobs: list[Job]) -> list[XRay]:
    """Compile what the cache does not hold, on as many processes as there are cores."""
    folder = _cache_folder()
    found: dict[str, dict[str, int]] = {}
    todo: dict[str, Job] = {}
    keys = [job.key() for job in jobs]
    for key, job in zip(keys, jobs):
        file = folder / f"{key}.json"
        if file.exists():
            found[key] = json.loads(file.read_text())
        else:
            todo[key] = job
    if todo:
        for key, result in compile_all(todo).items():
            found[key] = result
            _keep(folder / f"{key}.json", result)
    return [_row(job, found[key]) for key, job in zip(keys, jobs)]


def _keep(file: Path, result: dict[str, int]) -> None:
    """Write whole or not at all; a cache that cannot be written is no reason to fail."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(result))
        part.replace(file)
    except OSError:
        pass


def _row(job: Job, result: Mapping[str, int]) -> XRay:
    shared = result["shared_bytes"]
    share, limit = occupancy(
        job.target, result["registers"], shared, job.num_warps, result["tensor_memory_columns"]
    )
    return XRay(
        kernel=job.carried.name,
        gpu=job.target.gpu,
        sm=job.target.sm,
        registers=result["registers"],
        spill_bytes=result["spill_bytes"],
        shared_bytes=shared,
        instructions=result["instructions"],
        tensor_core_instructions=result["tensor_core_instructions"],
        occupancy=round(share, 4),
        limited_by=limit,
        fits=shared <= job.target.shared_block,
        num_warps=job.num_warps,
        num_stages=job.num_stages,
    )
