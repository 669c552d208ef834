"""What the kernels of linearized attention should move, by formula, and what they do move, counted.

Notation: ``N`` tokens, ``K`` and ``V`` dimensions, ``G`` the group, ``L`` lags, ``e`` bytes an element; ``T_v`` tiles
of V. For whole groups, a block of queries a group, and one head:

=======  ======================================================================  ==================
kernel   loads                                                                   stores
=======  ======================================================================  ==================
states   ``e (N - G) (T_v K + V)``                                               ``e (N/G) K V``
outputs  ``e N (2 T_v K + V) + (N/G) (e K V + 4 T_v) + e (N/G) (L-1) V``         ``e N V``
         ``+ e T_v N L`` for the weights of the band
conv     ``e N V + e (N/C) (L-1) V + e T_v N L``, C tokens a chunk               ``e N V``
dweight  ``2 e N V + e (N/C) (L-1) V``                                           ``4 (N/C) L``
=======  ======================================================================  ==================

less the rows before the first token, which do not exist. The functions below have the general case. What the
convolution costs inside ``outputs`` is its third and fifth term; alone it reads and writes everything again, and
somebody has to add the two: :func:`fusion_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One call; see the module's notation. ``lags`` 0: no convolution."""

    batch: int
    num_heads: int
    num_kv_heads: int
    seqlen_q: int
    seqlen_k: int
    key_dim: int
    value_dim: int
    itemsize: int
    group: int
    lags: int

    @property
    def offset(self) -> int:
        return self.seqlen_k - self.seqlen_q

    @property
    def first(self) -> int:
        """The first group that has queries."""
        return self.offset // self.group

    @property
    def groups(self) -> int:
        return -(-self.seqlen_k // self.group)


def _tiles_v(case: Case, tile: Any) -> int:
    return -(-case.value_dim // tile.block_v)


def states_bytes(case: Case, tile: Any) -> int:
    """Keys once for each tile of V and values once, of all groups but the last; a state before each group."""
    rows = (case.groups - 1) * case.group
    loads = rows * (_tiles_v(case, tile) * case.key_dim + case.value_dim)
    stores = (case.groups - case.first) * case.key_dim * case.value_dim
    return case.batch * case.num_kv_heads * case.itemsize * (loads + stores)


def outputs_bytes(case: Case, tile: Any) -> int:
    """A block of queries: its rows, the state, the group's keys and values up to it, what lies before, the band."""
    tiles, size = _tiles_v(case, tile), case.itemsize
    total = 0
    for group in range(case.first, case.groups):
        base = group * case.group
        for start in range(0, case.group, tile.block_m):
            low = max(base + start, case.offset)
            rows = max(0, min(base + min(start + tile.block_m, case.group), case.seqlen_k) - low)
            total += size * rows * (tiles * case.key_dim + case.value_dim)  # q, and the outputs
            total += size * case.key_dim * case.value_dim + 4 * tiles  # the state, alpha
            stop = -(-min(start + tile.block_m, case.group) // tile.block_n) * tile.block_n
            keys = max(0, min(base + min(stop, case.group), case.seqlen_k) - base)
            total += size * keys * (tiles * case.key_dim + case.value_dim)
            lags = band_lanes(tile.block_m, start, stop, case.lags)
            if case.lags > 1 and start < case.lags - 1:
                lags += sum(max(0, case.lags - 1 - row) for row in range(start, start + tile.block_m))
                total += size * min(case.lags - 1 - start, base) * case.value_dim
            total += size * tiles * lags
    return case.batch * case.num_heads * total


def band_lanes(rows: int, start: int, stop: int, lags: int) -> int:
    """Elements of the band in rows ``start .. start + rows`` and columns ``0 .. stop``."""
    return sum(max(0, min(row, stop - 1) - max(row - lags + 1, 0) + 1) for row in range(start, start + rows))


def conv_bytes(case: Case, tile: Any) -> int:
    """Each chunk: its values and the L - 1 before them, L weights a row; all is read by each query head."""
    chunk, size = tile.block_m, case.itemsize
    chunks = -(-case.seqlen_q // chunk)
    near = sum(min(case.lags - 1, case.offset + c * chunk) for c in range(chunks))
    values = (2 * case.seqlen_q + near) * case.value_dim
    return case.batch * case.num_heads * size * (values + _tiles_v(case, tile) * chunks * chunk * case.lags)


def conv_backward_bytes(case: Case, tile: Any) -> int:
    """Its transpose, for dV: every key-value head reads the gradients of all its query heads, and the L - 1 after."""
    chunk, size = tile.block_m, case.itemsize
    chunks, repeat = -(-case.seqlen_q // chunk), case.num_heads // case.num_kv_heads
    after = sum(max(0, min(case.lags - 1, case.seqlen_q - (c + 1) * chunk)) for c in range(chunks))
    loads = repeat * (
        (case.seqlen_q + after) * case.value_dim + _tiles_v(case, tile) * chunks * chunk * case.lags
    )
    return case.batch * case.num_kv_heads * size * (loads + case.seqlen_q * case.value_dim)


def dweight_bytes(case: Case, tile: Any) -> int:
    """Values and gradients once, the L - 1 values before each chunk; L partial sums a chunk, in fp32."""
    chunks = -(-case.seqlen_q // tile.block_m)
    near = sum(min(case.lags - 1, case.offset + c * tile.block_m) for c in range(chunks))
    loads = case.itemsize * (2 * case.seqlen_q + near) * case.value_dim
    return case.batch * case.num_heads * (loads + 4 * chunks * case.lags)


def fused_bytes(case: Case, tiles: Any) -> int:
    """A forward pass with the convolution inside."""
    return states_bytes(case, tiles.states) + outputs_bytes(case, tiles.outputs)


def separate_bytes(case: Case, tiles: Any) -> int:
    """The same in separate launches: attention, convolution, and an addition that reads both and writes the sum."""
    plain = Case(**{**case.__dict__, "lags": 0})
    add = 3 * case.itemsize * case.batch * case.num_heads * case.seqlen_q * case.value_dim
    return fused_bytes(plain, tiles) + conv_bytes(case, tiles.conv) + add


def fusion_rows(
    arch: str = "sm80", *, num_heads: int = 9, num_kv_heads: int = 3, seqlen: int = 4096, head_dim: int = 64,
    group: int = 64, lags: tuple[int, ...] = (4, 32, 128),
) -> list[dict[str, Any]]:  # fmt: skip
    """Bytes of a forward pass with the convolution inside and apart, by the formulas, SmolLM2's heads in 16 bits.

    Keys: lags, attention_bytes (without convolution), fused_bytes, separate_bytes, and what the convolution adds to
    attention in each case, in per cent.
    """
    import torch
    from effattn_kernels._linearized_llm_tiles import choose_tiles

    tiles = choose_tiles(head_dim, head_dim, group, torch.float16, arch)
    table = []
    for n in lags:
        case = Case(1, num_heads, num_kv_heads, seqlen, seqlen, head_dim, head_dim, 2, group, n)
        alone = fused_bytes(Case(**{**case.__dict__, "lags": 0}), tiles)
        fused, separate = fused_bytes(case, tiles), separate_bytes(case, tiles)
        table.append(
            {
                "lags": n, "attention_bytes": alone, "fused_bytes": fused, "separate_bytes": separate,
                "fused_adds_percent": 100 * (fused / alone - 1),
                "separate_adds_percent": 100 * (separate / alone - 1),
            }
        )  # fmt: skip
    return table


def rows(
    *,
    batch: int = 1,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    seqlen_q: int = 50,
    seqlen_k: int = 75,
    head_dim: int = 24,
    value_dim: int = 40,
    group: int = 20,
    lags: int = 9,
    dtype: str = "fp16",
    **unused: Any,
) -> list[dict[str, Any]]:
    """Run attention's forward and the convolution's forward and backward once, counted, beside the formulas.

    The standard case has ragged ends in every dimension, grouped heads, more keys than queries and a group that fills
    no tile. The convolution gets ``seqlen_q`` values after a tail of L - 1.
    """
    import effattn_kernels
    import torch

    from effattn_lab.measure.traffic import count

    if unused.pop("causal", True) is not True:
        raise ValueError("causal: expected True, got False; linearized attention is causal")
    if unused:
        raise ValueError(f"shape: expected no {next(iter(unused))!r}")
    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    if dtype not in names:
        raise ValueError(f"dtype: expected one of {', '.join(names)}, got {dtype!r}")
    with count() as traffic:  # raises where nothing can be counted, before any work
        from effattn_kernels._linearized_llm_tiles import choose_tiles
        from effattn_kernels._tiles import architecture
        from effattn_kernels.linearized_llm import linearized_attention_chunked, masked_depthwise_conv_chunked

        generator = torch.Generator().manual_seed(0)

        def draw(heads: int, length: int, dim: int) -> torch.Tensor:
            return torch.randn(batch, heads, length, dim, generator=generator).to(names[dtype])

        q, k = draw(num_heads, seqlen_q, head_dim), draw(num_kv_heads, seqlen_k, head_dim)
        v = draw(num_kv_heads, seqlen_k, value_dim)
        weight = torch.randn(num_heads, lags, generator=generator)
        linearized_attention_chunked(q, k, v, conv_weight=weight, group_size=group)
        x = draw(num_kv_heads, seqlen_q, value_dim).requires_grad_()
        tail = draw(num_kv_heads, lags - 1, value_dim)
        y = masked_depthwise_conv_chunked(x, weight.requires_grad_(), initial_tail=tail)
        forward_conv = traffic.by_kernel["_linearized_llm_conv_kernel"].bytes
        y.sum().backward()

    tiles = choose_tiles(head_dim, value_dim, group, names[dtype], architecture(q.device))
    size = q.element_size()
    case = Case(batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim, value_dim, size, group, lags)
    after_tail = Case(
        batch, num_heads, num_kv_heads, seqlen_q, seqlen_q + lags - 1, value_dim, value_dim, size, group, lags
    )
    conv = traffic.by_kernel["_linearized_llm_conv_kernel"]
    parts = {
        "states": (states_bytes(case, tiles.states), tiles.states, None),
        "outputs": (outputs_bytes(case, tiles.outputs), tiles.outputs, None),
        "conv": (conv_bytes(after_tail, tiles.conv), tiles.conv, forward_conv),
        "conv, transposed": (
            conv_backward_bytes(after_tail, tiles.conv), tiles.conv, conv.bytes - forward_conv,
        ),
        "dweight": (dweight_bytes(after_tail, tiles.dweight), tiles.dweight, None),
    }  # fmt: skip
    out = []
    for name, (formula, tile, counted) in parts.items():
        kernel = f"_linearized_llm_{name.split(',')[0]}_kernel"
        moved = traffic.by_kernel[kernel].bytes if counted is None else counted
        out.append(
            {
                "kernel": kernel if name != "conv, transposed" else f"{kernel} (dV)",
                "measured_bytes": moved,
                "formula_bytes": formula,
                "flops": traffic.by_kernel[kernel].flops,
                "ratio": round(moved / formula, 4),
                "tile": tile.label,
                "batch": batch,
                "num_heads": num_heads,
                "num_kv_heads": num_kv_heads,
                "seqlen_q": seqlen_q,
                "seqlen_k": seqlen_k,
                "head_dim": head_dim,
                "value_dim": value_dim,
                "group": group,
                "lags": lags,
                "dtype": dtype,
                "mode": effattn_kernels.MODE,
            }
        )
    return out
