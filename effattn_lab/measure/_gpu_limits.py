"""Hardware limits of the GPUs that the x-ray compiles for, and the occupancy that follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Target:
    """One GPU as a compiler target, with what one SM (compute unit) offers.

    Attributes:
        gpu: name, as in ``effattn_lab.measure.roofline.GPUS``.
        sm: architecture as printed (``sm_90``, ``gfx942``).
        target: arguments of triton's ``GPUTarget``: backend, architecture, threads a warp.
        max_warps: resident warps an SM (AMD: waves a compute unit).
        max_blocks: resident thread blocks an SM.
        shared_sm: shared memory of an SM, bytes. shared_block: the most one block may take, bytes.
        shared_reserved: bytes the driver takes of it for every block.
        shared_unit: shared memory is handed out in multiples of this many bytes.
        tensor_memory: columns of tensor memory an SM (Blackwell data-centre parts only).
    """

    gpu: str
    sm: str
    target: tuple[str, int | str, int]
    max_warps: int
    max_blocks: int
    shared_sm: int
    shared_block: int
    shared_reserved: int
    shared_unit: int
    tensor_memory: int = 0


# NVIDIA: "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide and the tuning
# guides of Turing, Ampere, Ada, Hopper and Blackwell; the reserved KiB a block is stated there since cc 8.0.
# All of them: 65,536 32-bit registers an SM, at most 255 a thread.
# MI300X: CDNA 3 ISA guide and the HIP hardware page: 4 SIMDs a compute unit, 8 waves and 512 registers a lane
# each (architectural and accumulation registers together), 64 KiB of LDS.
TARGETS: dict[str, Target] = {
    t.gpu: t
    for t in (
        Target("T4", "sm_75", ("cuda", 75, 32), 32, 16, 64 * KIB, 64 * KIB, 0, 256),
        Target("A100", "sm_80", ("cuda", 80, 32), 64, 32, 164 * KIB, 163 * KIB, KIB, 128),
        Target("L4", "sm_89", ("cuda", 89, 32), 48, 24, 100 * KIB, 99 * KIB, KIB, 128),
        Target("H100", "sm_90", ("cuda", 90, 32), 64, 32, 228 * KIB, 227 * KIB, KIB, 128),
        Target(
            "B200", "sm_100", ("cuda", 100, 32), 64, 32, 228 * KIB, 227 * KIB, KIB, 128, tensor_memory=512
        ),
        Target("RTX PRO 6000", "sm_120", ("cuda", 120, 32), 48, 32, 100 * KIB, 99 * KIB, KIB, 128),
        Target("MI300X", "gfx942", ("hip", "gfx942", 64), 32, 32, 64 * KIB, 64 * KIB, 0, 512),
    )
}


def targets(gpus: str | Sequence[str]) -> list[Target]:
    """The targets named: ``"all"``, one name, names with commas, or a list; ``sm_90`` works as well as ``H100``."""
    names = gpus.split(",") if isinstance(gpus, str) else list(gpus)
    if [name.strip().lower() for name in names] == ["all"]:
        return list(TARGETS.values())
    by_name = {key.lower(): t for t in TARGETS.values() for key in (t.gpu, t.sm)}
    by_name["h200"] = TARGETS["H100"]  # the same chip with more memory
    found = []
    for name in names:
        key = str(name).strip().lower()
        if key not in by_name:
            raise ValueError(f"gpus: expected 'all' or some of {', '.join(TARGETS)}, got {name!r}")
        if by_name[key] not in found:
            found.append(by_name[key])
    return found


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(
    target: Target, registers: int, shared_bytes: int, num_warps: int, tensor_memory_columns: int = 0
) -> tuple[float, str]:
    """Resident warps over the most an SM can hold, and the resource that sets the limit.

    Args:
        registers: registers a thread. shared_bytes: shared memory a block. num_warps: warps a block.
        tensor_memory_columns: tensor memory a block (Blackwell).

    Returns:
        ``(0.0, "shared memory")`` when one block alone asks for more than there is.
    """
    blocks = {"warps": target.max_warps // num_warps, "blocks": target.max_blocks}
    if target.target[0] == "cuda":
        per_warp = _up(max(registers, 1) * 32, 256)  # handed out a warp at a time, in units of 256
        warps = 65536 // per_warp // 4 * 4  # and evenly to the SM's four partitions
        blocks["registers"] = warps // num_warps
    else:
        waves = min(8, 512 // _up(max(registers, 1), 8))  # a SIMD
        # A block's waves are dealt to the compute unit's four SIMDs in turn.
        blocks["registers"] = waves * 4 // num_warps if num_warps < 4 else waves // (_up(num_warps, 4) // 4)
    shared = _up(shared_bytes + target.shared_reserved, target.shared_unit)
    blocks["shared memory"] = target.shared_sm // shared if shared else target.max_blocks
    if shared_bytes > target.shared_block:
        blocks["shared memory"] = 0
    if tensor_memory_columns and target.tensor_memory:
        blocks["tensor memory"] = target.tensor_memory // tensor_memory_columns
    limit = min(blocks, key=lambda name: blocks[name])
    return blocks[limit] * num_warps / target.max_warps, limit
