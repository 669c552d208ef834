"""What the two ZeroS kernels should move, by formula, and what they do move, counted.

Notation: ``N_q, N_k`` lengths, ``K, V`` head dimensions, ``e`` bytes an element, ``C`` the chunk, ``b_k, b_v`` the
tile; ``T_k = ceil(K / b_k)``, ``T_v = ceil(V / b_v)``; ``M = ceil(N_q / C)`` chunks; ``G`` query heads a key head.
Causal: ``J = M`` borders and ``P = min(N_k, N_q)`` key rows in chunks that have queries; otherwise ``J = 1``,
``P = 0``. A border holds three states in the inputs' dtype and four scalars; logits, gates and the inverse lengths of
the keys are fp32. Per *key* head, then times ``B Hkv``:

========  ===========================================================================  =============================
kernel    loads                                                                        stores
========  ===========================================================================  =============================
states    ``e N_k (T_v K + T_k V) + 4 T_k T_v (N_k + 1)``                              ``J (3 e K V + 16) + 4 N_k``
outputs   ``G (T_v (e K (N_q + P) + 4 (2 N_q + [2 P + 4 M])) + e P V + 3 e M K V)``    ``G e N_q V``
========  ===========================================================================  =============================

The bracket where causal; there also ``P`` and the third state. With ``T_k > 1`` the lengths need whole rows: the
states kernel then loads keys ``T_k T_v`` times, and the outputs kernel all but the first tile of its queries twice.
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
    seqlen_q: int
    seqlen_k: int
    key_dim: int
    value_dim: int
    itemsize: int
    causal: bool = True
    zeroth: bool = False

    @property
    def groups(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def pairs(self) -> int:
        return self.batch * self.num_kv_heads

    @property
    def shared(self) -> int:
        """Key rows in the same chunks as queries."""
        return min(self.seqlen_q, self.seqlen_k) if self.causal else 0

    def chunks(self, chunk: int) -> int:
        return -(-self.seqlen_q // chunk)

    def state(self) -> int:
        return self.itemsize * self.key_dim * self.value_dim


def _tiles(case: Case, tile: Any) -> tuple[int, int]:
    return -(-case.key_dim // tile.block_k), -(-case.value_dim // tile.block_v)


def states_bytes(case: Case, tile: Any) -> int:
    """Keys once for each tile of V (once for each tile, if K has several), values once for each tile of K."""
    tiles_k, tiles_v = _tiles(case, tile)
    borders = case.chunks(tile.chunk) if case.causal else 1
    loads = case.itemsize * case.seqlen_k * (tiles_v * tiles_k * case.key_dim + tiles_k * case.value_dim)
    loads += 4 * tiles_k * tiles_v * (case.seqlen_k + 1)  # logits, and the first one as the origin
    stores = borders * (3 * case.state() + 16) + 4 * case.seqlen_k
    return case.pairs * (loads + stores)


def outputs_bytes(case: Case, tile: Any) -> int:
    """Queries and keys once for each tile of V, values and states once, by each query head."""
    _, tiles_v = _tiles(case, tile)
    chunks, again = case.chunks(tile.chunk), max(0, case.key_dim - tile.block_k)
    rows = case.seqlen_q * (case.key_dim + again) + case.shared * case.key_dim
    loads = tiles_v * (case.itemsize * rows + 4 * case.seqlen_q * (2 + case.zeroth))
    loads += case.itemsize * case.shared * case.value_dim
    loads += chunks * case.state() * (3 if case.causal or case.zeroth else 2)
    if case.causal:
        loads += tiles_v * 4 * (2 * case.shared + 4 * chunks)  # logits, inverse lengths, scalars
    return case.pairs * case.groups * (loads + case.itemsize * case.seqlen_q * case.value_dim)


def forward_bytes(case: Case, tiles: Any) -> int:
    """Both kernels."""
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
    zeroth: bool = False,
) -> list[dict[str, Any]]:
    """Run the forward pass once, counted, and set each kernel's bytes beside its formula.

    Args:
        batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim, value_dim, causal: the case. The standard one
            has ragged ends in every dimension, grouped heads and more keys than queries, so that no term is idle.
        zeroth: with ``gate_0``.
        dtype: ``"fp16"``, ``"bf16"`` or ``"fp32"``.
    """
    import effattn_kernels
    import torch

    from effattn_lab.measure.traffic import count

    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    if dtype not in names:
        raise ValueError(f"dtype: expected one of {', '.join(names)}, got {dtype!r}")
    with count() as traffic:  # raises where nothing can be counted, before any work
        from effattn_kernels._tiles import architecture
        from effattn_kernels._zeros_tiles import choose_tiles
        from effattn_kernels.zeros import zeros_chunked

        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        q = draw(batch, num_heads, seqlen_q, head_dim).to(names[dtype])
        k = draw(batch, num_kv_heads, seqlen_k, head_dim).to(names[dtype])
        v = draw(batch, num_kv_heads, seqlen_k, value_dim).to(names[dtype])
        gates = [torch.sigmoid(draw(batch, num_heads, seqlen_q)) for _ in range(3)]
        zeros_chunked(
            q, k, v, draw(batch, num_kv_heads, seqlen_k), *gates[:2],
            gate_0=gates[2] if zeroth else None, causal=causal,
        )  # fmt: skip

    tiles = choose_tiles(head_dim, value_dim, names[dtype], architecture(q.device))
    case = Case(
        batch,
        num_heads,
        num_kv_heads,
        seqlen_q,
        seqlen_k,
        head_dim,
        value_dim,
        q.element_size(),
        causal,
        zeroth,
    )
    out = []
    for name, formula, tile in (
        ("states", states_bytes(case, tiles.states), tiles.states),
        ("outputs", outputs_bytes(case, tiles.outputs), tiles.outputs),
    ):
        kernel = f"_zeros_{name}_kernel"
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
                "mode": effattn_kernels.MODE,
            }
        )
    return out
