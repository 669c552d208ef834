"""What the kernels of the selective scan should move, by formula, and what they do move, counted.

Notation: ``E`` channels in ``G`` groups, ``S`` states a channel, ``N`` tokens, ``e`` bytes an element; ``P``
programs along the channels, ``G ceil(E / G / block_e)``; ``J`` segments of ``L`` tokens; ``C`` the chunk and
``M = ceil(N / C)`` borders. A, D, the bias, states and sums are fp32. With D, gate, bias, an initial state and
the final state's gradient, for each sequence:

========  ===========================================================
================================================== kernel    loads
          stores ========  ===========================================================
          ==================================================
states    ``(J - 1) (4 S E + 4 E + L e (2 E + S P))``                  ``(J - 1) (4 S E + 4 E)``
carry     ``8 S E + (J - 1) (4 S E + 4 E)``                            ``4 J S E``
scan      ``J (8 S E + 8 E) + N e (3 E + 2 S P)``                      ``N e E``, and ``4 S E`` for the final
state dreads    ``J (8 S E + 8 E) + N e (4 E + 2 S P)``                      ``4 M S E + N (e E + 4 S P) + 4 J
E`` dwrites   ``8 S E + 8 E + 4 M S E + N e (4 E + 2 S P)``                ``8 S E + 4 E + N (2 e E + 4 S P)``
          ``+ (N - floor(N / C)) e (2 E + S P)``
========  ===========================================================
==================================================

No term is a product of all three of N, E and S but ``4 M S E``, which only training has. With one segment
there are no first two kernels. ``P`` differs from kernel to kernel where the tiles do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One call; see the module's notation."""

    batch: int
    channels: int
    groups: int
    state_size: int
    seqlen: int
    itemsize: int
    segment: int
    skip: bool = True
    gate: bool = True
    bias: bool = True
    initial: bool = True

    @property
    def segments(self) -> int:
        return -(-self.seqlen // self.segment)

    @property
    def state(self) -> int:
        """Bytes of one state of all channels, and of A."""
        return 4 * self.state_size * self.channels

    def shared(self, tile: Any) -> int:
        """B, or C, of one token: read by each program along the channels."""
        blocks = self.groups * -(-self.channels // self.groups // tile.block_e)
        return self.itemsize * self.state_size * blocks

    @property
    def row(self) -> int:
        """u, delta, z or the output of one token."""
        return self.itemsize * self.channels

    def vectors(self, *present: bool) -> int:
        """D and the bias, as many of them as there are."""
        return 4 * self.channels * sum(present)


def states_bytes(case: Case, tile: Any) -> int:
    """What every segment but the last adds: no output, no C, no gate."""
    each = case.state + case.vectors(case.bias) + case.segment * (2 * case.row + case.shared(tile))
    return case.batch * (case.segments - 1) * (each + case.state + 4 * case.channels)


def carry_bytes(case: Case) -> int:
    """States and sums of all segments, through one register."""
    if case.segments == 1:
        return 0
    loads = case.state * (1 + case.initial) + (case.segments - 1) * (case.state + 4 * case.channels)
    return case.batch * (loads + case.segments * case.state)


def scan_bytes(case: Case, tile: Any, final: bool = True) -> int:
    """Inputs once, B and C once a program, the output once."""
    start = case.initial or case.segments > 1
    once = case.segments * (case.state * (1 + start) + case.vectors(case.bias, case.skip))
    token = case.row * (3 + case.gate) + 2 * case.shared(tile)  # u, delta, z, out
    return case.batch * (once + case.seqlen * token + case.state * final)


def dreads_bytes(case: Case, tile: Any) -> int:
    """The forward pass again with dout; dz, a part of dC and a state every chunk stored. C is read for the
    gate only."""
    start = case.initial or case.segments > 1
    once = case.segments * (case.state * (1 + start) + case.vectors(case.bias, case.skip, case.skip))
    parts = 4 * case.shared(tile) // case.itemsize
    token = case.row * (3 + 2 * case.gate) + case.shared(tile) * (1 + case.gate) + parts
    return case.batch * (once + -(-case.seqlen // tile.chunk) * case.state + case.seqlen * token)


def dwrites_bytes(case: Case, tile: Any, end: bool = True) -> int:
    """Every token read twice, but the last of each chunk, since its own state is not needed; du, ddelta, dB
    stored."""
    once = case.state * (3 + end) + case.vectors(case.bias, case.skip, case.bias)
    borders = -(-case.seqlen // tile.chunk) * case.state
    again = (case.seqlen - case.seqlen // tile.chunk) * (2 * case.row + case.shared(tile))
    parts = 4 * case.shared(tile) // case.itemsize
    token = case.row * (5 + case.gate) + 2 * case.shared(tile) + parts
    return case.batch * (once + borders + again + case.seqlen * token)


def forward_bytes(case: Case, tiles: Any, final: bool = False) -> int:
    """All kernels of the forward pass."""
    return states_bytes(case, tiles.scan) + carry_bytes(case) + scan_bytes(case, tiles.scan, final)


def rows(
    *,
    batch: int = 2,
    channels: int = 72,
    groups: int = 2,
    state_size: int = 5,
    seqlen: int = 70,
    dtype: str = "fp16",
    options: bool = True,
) -> list[dict[str, Any]]:
    """Run forward and backward once, counted, and set each kernel's bytes beside its formula.

    Args:
        batch, channels, groups, state_size, seqlen: the case. The standard one has ragged ends in every
        dimension,
            two groups and two segments, so that no term of a formula is idle.
        dtype: "fp16", "bf16" or "fp32".
        options: with D, gate, bias, softplus, initial state and the final state's gradient, or without all of
        them.
    """
    import effattn_kernels
    import torch

    from effattn_lab.measure.traffic import count

    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    if dtype not in names:
        raise ValueError(f"dtype: expected one of {', '.join(names)}, got {dtype!r}")
    with count() as traffic:  # raises where nothing can be counted, before any work
        from effattn_kernels._selective_ssm_tiles import choose_segment, choose_tiles
        from effattn_kernels._tiles import architecture
        from effattn_kernels.selective_ssm import selective_scan_chunked

        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.rand(*shape, generator=generator)

        shared = (batch, groups, state_size, seqlen)
        inputs = [draw(*s).to(names[dtype]) for s in ((batch, channels, seqlen),) * 2]
        inputs += [-draw(channels, state_size), *(draw(*shared).to(names[dtype]) for _ in range(2))]
        more: dict[str, Any] = {}
        if options:
            more = {
                "D": draw(channels), "z": draw(batch, channels, seqlen).to(names[dtype]),
                "delta_bias": draw(channels), "delta_softplus": True,
                "initial_state": draw(batch, channels, state_size),
            }  # fmt: skip
        for x in (*inputs, *more.values()):
            if isinstance(x, torch.Tensor):
                x.requires_grad_()
        result = selective_scan_chunked(*inputs, **more, return_state=options)
        (result[0].sum() + result[1].sum() if options else result.sum()).backward()

    arch = architecture(inputs[0].device)
    tiles = choose_tiles(state_size, names[dtype], arch, channels // groups)
    programs = batch * groups * -(-channels // groups // tiles.scan.block_e)
    case = Case(
        batch, channels, groups, state_size, seqlen, inputs[0].element_size(),
        choose_segment(seqlen, programs, arch), *[options] * 4,
    )  # fmt: skip
    # "states" and "scan" are two settings of one kernel, counted together.
    scans = states_bytes(case, tiles.scan) + scan_bytes(case, tiles.scan, final=options)
    formulas = {
        "_selective_scan_kernel": (scans, tiles.scan),
        "_selective_scan_carry_kernel": (carry_bytes(case), tiles.carry),
        "_selective_scan_dreads_kernel": (dreads_bytes(case, tiles.dreads), tiles.dreads),
        "_selective_scan_dwrites_kernel": (dwrites_bytes(case, tiles.dwrites, end=options), tiles.dwrites),
    }
    out = []
    for kernel, (formula, tile) in formulas.items():
        if kernel not in traffic.by_kernel:  # one segment carries nothing
            continue
        measured = traffic.by_kernel[kernel]
        out.append(
            {
                "kernel": kernel,
                "measured_bytes": measured.bytes,
                "formula_bytes": formula,
                "flops": measured.flops,
                "ratio": round(measured.bytes / formula, 4),
                "loads_bytes": measured.loads_bytes,
                "stores_bytes": measured.stores_bytes,
                "launches": measured.launches,
                "tile": tile.label,
                "batch": batch,
                "channels": channels,
                "groups": groups,
                "state_size": state_size,
                "seqlen": seqlen,
                "dtype": dtype,
                "mode": effattn_kernels.MODE,
            }
        )
    return out
