"""What the six linear-attention kernels should move, by formula, and what they do move, counted.

Notation: ``N_q, N_k`` lengths, ``K`` features, ``V`` values, ``e`` bytes an element, ``C`` the chunk, ``b_k, b_v``
the tile; ``T_k = ceil(K / b_k)``, ``T_v = ceil(V / b_v)`` tiles; ``M = ceil(N_q / C)`` chunks; ``G`` query heads a
key head. Causal: borders ``J = M`` forward and ``J' = M + 1`` backward, and ``P = min(N_k, N_q)`` key rows in chunks
that have queries; otherwise ``J = J' = 1`` and ``P = 0``. States are kept in the inputs' dtype, key sums and row
factors in fp32. Per *key* head, then times ``B Hkv``; with the normaliser:

========  ===================================================================  ==================================
kernel    loads                                                                stores
========  ===================================================================  ==================================
states    ``e N_k (T_v K + T_k V)``                                            ``J (e K V + 4 K)``
outputs   ``G T_v (e N_q K + e P K + M (e K V / T_v + 4 K)) + G e P V``        ``G N_q (e V + 4)``
delta     ``2 G e N_q V``                                                      ``4 G N_q``
dstates   ``G N_q (T_v e K + T_k e V + 8 T_k T_v)``                            ``J' (e K V + 4 K)``
dqdk      see `dqdk_bytes`                                                     ``e (G N_q K + N_k K)``
dv        see `dv_bytes`                                                       ``e N_k V``
========  ===================================================================  ==================================

fp16 adds one fp32 number a border, by which its states are divided, and each program that reads a state reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One call; see the module's notation. ``scaled``: fp16 inputs, whose states are stored as means."""

    batch: int
    num_heads: int
    num_kv_heads: int
    seqlen_q: int
    seqlen_k: int
    key_dim: int
    value_dim: int
    itemsize: int
    causal: bool = True
    normalize: bool = True
    scaled: bool = False

    @property
    def groups(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def pairs(self) -> int:
        return self.batch * self.num_kv_heads

    def chunks(self, chunk: int) -> int:
        return -(-self.seqlen_q // chunk)

    def early(self, chunk: int) -> int:
        """Chunks of keys that come before every query."""
        offset = self.seqlen_k - self.seqlen_q if self.causal else self.seqlen_k
        return -(-max(offset, 0) // chunk)

    @property
    def shared(self) -> int:
        """Key rows in the same chunks as queries; under the offset rule a query's own position and its chunk's."""
        return min(self.seqlen_q, self.seqlen_k) if self.causal else 0

    def state(self) -> int:
        return self.itemsize * self.key_dim * self.value_dim


def _tiles(case: Case, tile: Any) -> tuple[int, int]:
    return -(-case.key_dim // tile.block_k), -(-case.value_dim // tile.block_v)


def states_bytes(case: Case, tile: Any) -> int:
    """Keys once for each tile of V, values once for each tile of K; a state and a key sum stored at each border."""
    tiles_k, tiles_v = _tiles(case, tile)
    borders = case.chunks(tile.chunk) if case.causal else 1
    loads = case.itemsize * case.seqlen_k * (tiles_v * case.key_dim + tiles_k * case.value_dim)
    stores = borders * (case.state() + 4 * case.key_dim * case.normalize + 4 * case.scaled)
    return case.pairs * (loads + stores)


def outputs_bytes(case: Case, tile: Any) -> int:
    """Queries and keys once for each tile of V, values and states once, by each query head."""
    _, tiles_v = _tiles(case, tile)
    chunks = case.chunks(tile.chunk)
    rows = tiles_v * case.key_dim * (case.seqlen_q + case.shared) + case.value_dim * case.shared
    states = chunks * (case.state() + tiles_v * (4 * case.key_dim * case.normalize + 4 * case.scaled))
    stores = case.seqlen_q * (case.itemsize * case.value_dim + 4 * case.normalize)
    return case.pairs * case.groups * (case.itemsize * rows + states + stores)


def delta_bytes(case: Case) -> int:
    """O and dO read once, one fp32 number a row written. Not launched without the normaliser."""
    rows = case.pairs * case.groups * case.seqlen_q
    return rows * (2 * case.itemsize * case.value_dim + 4) * case.normalize


def dstates_bytes(case: Case, tile: Any) -> int:
    """As `states_bytes`, with Q and dO; R and delta are read by every program."""
    tiles_k, tiles_v = _tiles(case, tile)
    borders = case.chunks(tile.chunk) + 1 if case.causal else 1
    row = (
        case.itemsize * (tiles_v * case.key_dim + tiles_k * case.value_dim)
        + 8 * tiles_k * tiles_v * case.normalize
    )
    stores = borders * (case.state() + 4 * case.key_dim * case.normalize + 4 * case.scaled)
    return case.pairs * (case.groups * case.seqlen_q * row + stores)


def dqdk_bytes(case: Case, tile: Any) -> int:
    """For each tile of K and query head: V, dO, S; causal K and Q; R, delta, z. Once a key head D and d.

    Early chunks have no queries but read what a chunk reads, states included.
    """
    tiles_k, _ = _tiles(case, tile)
    key, value, size, norm = case.key_dim, case.value_dim, case.itemsize, case.normalize
    programs = case.chunks(tile.chunk) + case.early(tile.chunk)
    border = programs * (case.state() + tiles_k * 4 * case.scaled + 4 * key * norm)
    per_head = border + tiles_k * size * value * (case.seqlen_q + case.seqlen_k)
    per_head += (
        size * key * (case.seqlen_q + case.seqlen_k) * case.causal + tiles_k * 8 * case.seqlen_q * norm
    )
    stores = size * key * (case.groups * case.seqlen_q + case.seqlen_k)
    return case.pairs * (border + case.groups * per_head + stores)


def dv_bytes(case: Case, tile: Any) -> int:
    """For each tile of V: K and D; causal, for each query head K again, Q, R, and dO; dV is written."""
    _, tiles_v = _tiles(case, tile)
    key, value, size = case.key_dim, case.value_dim, case.itemsize
    programs = case.chunks(tile.chunk) + case.early(tile.chunk)
    loads = tiles_v * size * key * case.seqlen_k + programs * (case.state() + tiles_v * 4 * case.scaled)
    per_head = tiles_v * size * key * (case.seqlen_k + case.seqlen_q) + size * value * case.seqlen_q
    per_head += tiles_v * 4 * case.seqlen_q * case.normalize
    return case.pairs * (loads + case.groups * per_head * case.causal + size * value * case.seqlen_k)


def forward_bytes(case: Case, tiles: Any) -> int:
    """Both kernels of the forward pass."""
    return states_bytes(case, tiles.states) + outputs_bytes(case, tiles.outputs)


def rows(
    *,
    batch: int = 1,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    seqlen_q: int = 70,
    seqlen_k: int = 100,
    head_dim: int = 40,
    value_dim: int = 72,
    dtype: str = "fp16",
    causal: bool = True,
    normalize: bool = True,
) -> list[dict[str, Any]]:
    """Run forward and backward once, counted, and set each kernel's bytes beside its formula.

    Args:
        batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim (features), value_dim, causal, normalize: the
            case. The standard one has ragged ends in every dimension, grouped heads and more keys than queries, so
            that no term of a formula is idle.
        dtype: ``"fp16"``, ``"bf16"`` or ``"fp32"``.
    """
    import effattn_kernels
    import torch

    from effattn_lab.measure.traffic import count

    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    if dtype not in names:
        raise ValueError(f"dtype: expected one of {', '.join(names)}, got {dtype!r}")
    with count() as traffic:  # raises where nothing can be counted, before any work
        from effattn_kernels._linear_attention_tiles import choose_tiles
        from effattn_kernels._tiles import architecture
        from effattn_kernels.linear_attention import linear_attention_chunked

        generator = torch.Generator().manual_seed(0)

        def draw(heads: int, length: int, dim: int) -> torch.Tensor:
            x = torch.rand(batch, heads, length, dim, generator=generator)  # features: not negative
            return x.to(names[dtype]).requires_grad_()

        q, k = draw(num_heads, seqlen_q, head_dim), draw(num_kv_heads, seqlen_k, head_dim)
        v = draw(num_kv_heads, seqlen_k, value_dim)
        linear_attention_chunked(q, k, v, causal=causal, normalize=normalize).sum().backward()

    tiles = choose_tiles(head_dim, value_dim, names[dtype], architecture(q.device), num_heads // num_kv_heads)
    case = Case(
        batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim, value_dim, q.element_size(), causal,
        normalize, names[dtype] is torch.float16,
    )  # fmt: skip
    formulas = {
        # The backward pass computes the states again.
        "states": (2 * states_bytes(case, tiles.states), tiles.states),
        "outputs": (outputs_bytes(case, tiles.outputs), tiles.outputs),
        "delta": (delta_bytes(case), tiles.delta),
        "dstates": (dstates_bytes(case, tiles.dstates), tiles.dstates),
        "dqdk": (dqdk_bytes(case, tiles.dqdk), tiles.dqdk),
        "dv": (dv_bytes(case, tiles.dv), tiles.dv),
    }
    out = []
    for name, (formula, tile) in formulas.items():
        kernel = f"_linear_attention_{name}_kernel"
        if kernel not in traffic.by_kernel:  # without the normaliser there is no delta
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
                "num_heads": num_heads,
                "num_kv_heads": num_kv_heads,
                "seqlen_q": seqlen_q,
                "seqlen_k": seqlen_k,
                "head_dim": head_dim,
                "value_dim": value_dim,
                "dtype": dtype,
                "causal": causal,
                "normalize": normalize,
                "mode": effattn_kernels.MODE,
            }
        )
    return out
