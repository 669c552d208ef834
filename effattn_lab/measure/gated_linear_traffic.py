"""What the six gated-linear kernels should move, by formula, and what they do move, counted.

Notation: ``N`` tokens, ``K`` key channels, ``V`` values, ``e`` bytes an element, ``s`` of a stored state (``e``, for
fp16 4), ``w`` of a sum of decays (4; for fp32 inputs 8, two parts), ``C`` the chunk, ``M = ceil(N / C)`` chunks,
``L = log2 C`` levels; ``T_k, T_v`` tiles of a dimension; ``G`` query heads a key head; ``D = K`` with a decay a
channel, else 1. Sums are kept, and read, for whole chunks. Per *key* head, then times ``B Hkv``:

========  ====================================================================  ============================
kernel    loads                                                                 stores
========  ====================================================================  ============================
sums      ``4 N D`` (float32 decays)                                            ``w M C D``
states    ``e N (T_v K + T_k V) + w M (C + 1) T_v d_k``                         ``s M K V``
outputs   ``G (e N (2 T_v K + V) + s M K V + w M C T_v (1 + L) K)``             ``G e N V``
dstates   ``G e N (T_v K + T_k V) + w M (C + 1) T_v d_k``                       ``s M K V``
dqdk      see `dqdk_bytes`                                                      ``e N K (G + 1) + 4 N d_k``
dv        see `dv_bytes`                                                        ``e N V``
========  ====================================================================  ============================

``d_k`` is what all tiles of K together read of a row of sums: K with a decay a channel, else T_k. With a decay a head
outputs reads ``w M C T_v`` of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One call; see the module's notation."""

    batch: int
    num_heads: int
    num_kv_heads: int
    seqlen: int
    key_dim: int
    value_dim: int
    dtype: str
    per_channel: bool = True

    @property
    def groups(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def pairs(self) -> int:
        return self.batch * self.num_kv_heads

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "fp32" else 2

    @property
    def sum_size(self) -> int:
        return 8 if self.dtype == "fp32" else 4

    def chunks(self, tile: Any) -> int:
        return -(-self.seqlen // tile.chunk)

    def states(self, tile: Any) -> int:
        """Bytes of the states at all borders."""
        size = 2 if self.dtype == "bf16" else 4
        return size * self.chunks(tile) * self.key_dim * self.value_dim

    def tiles(self, tile: Any) -> tuple[int, int]:
        return -(-self.key_dim // tile.block_k), -(-self.value_dim // tile.block_v)

    def sums(self, tile: Any, rows: int) -> int:
        """Bytes that all tiles of K read of ``rows`` rows of sums in every chunk."""
        return self.sum_size * self.chunks(tile) * rows * self.width(tile)

    def width(self, tile: Any) -> int:
        return self.key_dim if self.per_channel else self.tiles(tile)[0]


def sums_bytes(case: Case, tile: Any) -> int:
    """The decays read, float32; their sums written for whole chunks."""
    rows = 4 * case.seqlen + case.sum_size * case.chunks(tile) * tile.chunk
    return case.pairs * rows * (case.key_dim if case.per_channel else 1)


def states_bytes(case: Case, tile: Any, groups: int = 1) -> int:
    """Keys once for each tile of V, values once for each tile of K; a state stored at each border."""
    tiles_k, tiles_v = case.tiles(tile)
    rows = case.itemsize * case.seqlen * (tiles_v * case.key_dim + tiles_k * case.value_dim)
    return case.pairs * (groups * rows + tiles_v * case.sums(tile, tile.chunk + 1) + case.states(tile))


def dstates_bytes(case: Case, tile: Any) -> int:
    """As `states_bytes`, with Q and dO of every query head."""
    return states_bytes(case, tile, case.groups)


def _score_sums(case: Case, tile: Any) -> int:
    """Sums read for the scores of all chunks, once: a row each, and with a decay a channel one a level more."""
    if case.per_channel:
        return case.sums(tile, tile.chunk * tile.chunk.bit_length())  # 1 + log2 C
    return case.sum_size * case.chunks(tile) * tile.chunk


def outputs_bytes(case: Case, tile: Any) -> int:
    """Queries, keys and sums once for each tile of V, values and states once, by each query head."""
    _, tiles_v = case.tiles(tile)
    rows = case.itemsize * case.seqlen * (2 * tiles_v * case.key_dim + 2 * case.value_dim)
    return case.pairs * case.groups * (rows + case.states(tile) + tiles_v * _score_sums(case, tile))


def dqdk_bytes(case: Case, tile: Any) -> int:
    """Once: K, its sums, D. For each query head: Q, S, and V and dO for each tile of K; with a decay a channel the
    sums of each level. dQ, dK and, in fp32, dG are written: a column a channel, or one a tile of K."""
    tiles_k, _ = case.tiles(tile)
    key = case.itemsize * case.seqlen * case.key_dim
    once = key + case.sums(tile, tile.chunk + 1) + case.states(tile)
    levels = case.sums(tile, tile.chunk * (tile.chunk.bit_length() - 1)) if case.per_channel else 0
    head = key + case.states(tile) + 2 * tiles_k * case.itemsize * case.seqlen * case.value_dim + levels
    stores = key * (case.groups + 1) + 4 * case.seqlen * case.width(tile)
    return case.pairs * (once + case.groups * head + stores)


def dv_bytes(case: Case, tile: Any) -> int:
    """For each tile of V: K with its sums, D; for each query head K again, Q and dO, and with a decay a channel the
    sums of the scores. A decay a head: with one query head a key head and one tile of K, no K again."""
    tiles_k, tiles_v = case.tiles(tile)
    key = case.itemsize * case.seqlen * case.key_dim
    value = case.itemsize * case.seqlen * case.value_dim
    sums, again = case.sums(tile, tile.chunk + 1), key
    if case.per_channel:
        again += _score_sums(case, tile)
    else:
        sums //= tiles_k  # they are the same for all tiles
        again = 0 if case.groups == tiles_k == 1 else key
    once = tiles_v * (key + sums) + case.states(tile)
    head = tiles_v * (key + again) + value
    return case.pairs * (once + case.groups * head + value)


def forward_bytes(case: Case, tiles: Any) -> int:
    """The three kernels of the forward pass."""
    return (
        sums_bytes(case, tiles.sums) + states_bytes(case, tiles.states) + outputs_bytes(case, tiles.outputs)
    )


def rows(
    *,
    batch: int = 1,
    num_heads: int = 2,
    num_kv_heads: int = 1,
    seqlen: int = 40,
    head_dim: int = 72,
    value_dim: int = 80,
    dtype: str = "fp16",
    per_channel: bool = True,
) -> list[dict[str, Any]]:
    """Run forward and backward once, counted, and set each kernel's bytes beside its formula.

    Args:
        batch, num_heads, num_kv_heads, seqlen, head_dim, value_dim, per_channel: the case. The standard one has
            ragged ends in every dimension and grouped heads, so that no term of a formula is idle.
        dtype: ``"fp16"``, ``"bf16"`` or ``"fp32"``.
    """
    import effattn_kernels
    import torch

    from effattn_lab.measure.traffic import count

    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    if dtype not in names:
        raise ValueError(f"dtype: expected one of {', '.join(names)}, got {dtype!r}")
    with count() as traffic:  # raises where nothing can be counted, before any work
        from effattn_kernels._gated_linear_tiles import choose_tiles
        from effattn_kernels._tiles import architecture
        from effattn_kernels.gated_linear import gated_linear_chunked

        generator = torch.Generator().manual_seed(0)

        def draw(heads: int, dim: int) -> torch.Tensor:
            x = torch.randn(batch, heads, seqlen, dim, generator=generator)
            return x.to(names[dtype]).requires_grad_()

        q, k, v = draw(num_heads, head_dim), draw(num_kv_heads, head_dim), draw(num_kv_heads, value_dim)
        size = (*k.shape[:3], head_dim) if per_channel else k.shape[:3]
        g = -torch.rand(size, generator=generator)
        gated_linear_chunked(q, k, v, g.requires_grad_()).sum().backward()

    groups = num_heads // num_kv_heads
    tiles = choose_tiles(head_dim, value_dim, names[dtype], architecture(q.device), per_channel, groups)
    case = Case(batch, num_heads, num_kv_heads, seqlen, head_dim, value_dim, dtype, per_channel)
    formulas = {
        # The backward pass computes sums and states again.
        "sums": (2 * sums_bytes(case, tiles.sums), tiles.sums),
        "states": (2 * states_bytes(case, tiles.states), tiles.states),
        "outputs": (outputs_bytes(case, tiles.outputs), tiles.outputs),
        "dstates": (dstates_bytes(case, tiles.dstates), tiles.dstates),
        "dqdk": (dqdk_bytes(case, tiles.dqdk), tiles.dqdk),
        "dv": (dv_bytes(case, tiles.dv), tiles.dv),
    }
    out = []
    for name, (formula, tile) in formulas.items():
        kernel = f"_gated_linear_{name}_kernel"
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
                "num_heads": num_heads,
                "num_kv_heads": num_kv_heads,
                "seqlen": seqlen,
                "head_dim": head_dim,
                "value_dim": value_dim,
                "dtype": dtype,
                "per_channel": per_channel,
                "mode": effattn_kernels.MODE,
            }
        )
    return out
