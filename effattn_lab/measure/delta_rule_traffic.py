"""What the three kernels of the delta rule should move, by formula, and what they do move, counted.

Notation: ``N`` tokens, ``K`` and ``V`` dimensions of keys and values, ``e`` bytes an element (``e_g`` of beta and g),
``M = ceil(N / C)`` chunks, ``T_v = ceil(V / b_v)`` tiles of V, ``G`` query heads a key head. Per *key* head, then
times ``B Hkv``; the terms in N alone but for beta are there with a gate only:

=========  ======================================================  ======================
kernel     loads                                                   stores
=========  ======================================================  ======================
transform  ``e N (2 K + V) + 2 e_g N``                             ``e N (K + V) + 8 N``
states     ``e N (2 T_v K + V) + 4 T_v (N + M)``                   ``e N V + M e K V``
outputs    ``G (e N (2 T_v K + V) + M e K V + 4 T_v N)``           ``G e N V``
=========  ======================================================  ======================

An initial or final state adds ``4 K V`` to the loads or stores of the second.
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
    itemsize: int
    gate_itemsize: int
    gated: bool = True
    states_kept: int = 0  # of the initial and the final state, how many there are

    @property
    def pairs(self) -> int:
        return self.batch * self.num_kv_heads

    def states(self, chunk: int) -> int:
        """Bytes of the states at all chunk borders of one head."""
        return -(-self.seqlen // chunk) * self.itemsize * self.key_dim * self.value_dim


def transform_bytes(case: Case, tile: Any) -> int:
    """Keys twice (once for K K^T), values and gates once; W, U and two fp32 sums of the gate written."""
    del tile
    rows = case.seqlen * (3 * case.key_dim + 2 * case.value_dim)
    gates = case.seqlen * (case.gate_itemsize * (1 + case.gated) + 8 * case.gated)
    return case.pairs * (case.itemsize * rows + gates)


def states_bytes(case: Case, tile: Any) -> int:
    """W and K once for each tile of V, U read, X and a state a chunk written; a sum a token, and one a chunk."""
    tiles = -(-case.value_dim // tile.block_v)
    rows = case.seqlen * (2 * tiles * case.key_dim + 2 * case.value_dim)
    gates = 4 * tiles * (case.seqlen + -(-case.seqlen // tile.chunk)) * case.gated
    kept = 4 * case.key_dim * case.value_dim * case.states_kept
    return case.pairs * (case.itemsize * rows + gates + case.states(tile.chunk) + kept)


def outputs_bytes(case: Case, tile: Any) -> int:
    """Q and K once for each tile of V, X and the states once, by each query head; O written."""
    tiles = -(-case.value_dim // tile.block_v)
    rows = case.seqlen * (2 * tiles * case.key_dim + 2 * case.value_dim)
    gates = 4 * tiles * case.seqlen * case.gated
    heads = case.pairs * (case.num_heads // case.num_kv_heads)
    return heads * (case.itemsize * rows + gates + case.states(tile.chunk))


def forward_bytes(case: Case, tiles: Any) -> int:
    """All three kernels."""
    return (
        transform_bytes(case, tiles.transform)
        + states_bytes(case, tiles.states)
        + outputs_bytes(case, tiles.outputs)
    )


def rows(
    *,
    batch: int = 1,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    seqlen: int = 70,
    head_dim: int = 40,
    value_dim: int = 72,
    dtype: str = "fp16",
    gated: bool = True,
    with_states: bool = False,
) -> list[dict[str, Any]]:
    """Run the forward pass once, counted, and set each kernel's bytes beside its formula.

    Args:
        batch, num_heads, num_kv_heads, seqlen, head_dim (of keys), value_dim, gated: the case. The standard one has
            ragged ends in every dimension and grouped heads, so that no term of a formula is idle.
        dtype: ``"fp16"``, ``"bf16"`` or ``"fp32"``; beta and g are float32.
        with_states: give an initial state and ask for the final one.
    """
    import effattn_kernels
    import torch

    from effattn_lab.measure.traffic import count

    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    if dtype not in names:
        raise ValueError(f"dtype: expected one of {', '.join(names)}, got {dtype!r}")
    with count() as traffic:  # raises where nothing can be counted, before any work
        from effattn_kernels._delta_rule_tiles import choose_tiles
        from effattn_kernels._tiles import architecture
        from effattn_kernels.delta_rule import delta_rule_chunked

        generator = torch.Generator().manual_seed(0)

        def draw(heads: int, dim: int) -> torch.Tensor:
            return torch.randn(batch, heads, seqlen, dim, generator=generator).to(names[dtype])

        q, k, v = draw(num_heads, head_dim), draw(num_kv_heads, head_dim), draw(num_kv_heads, value_dim)
        k = k / k.norm(dim=-1, keepdim=True)
        beta, decay = torch.rand(2, batch, num_kv_heads, seqlen, generator=generator)
        start = torch.zeros(batch, num_kv_heads, head_dim, value_dim) if with_states else None
        delta_rule_chunked(
            q, k, v, beta, -decay if gated else None, initial_state=start, return_state=with_states
        )

    tiles = choose_tiles(head_dim, value_dim, names[dtype], architecture(q.device))
    case = Case(
        batch, num_heads, num_kv_heads, seqlen, head_dim, value_dim, q.element_size(), 4, gated, 2 * with_states
    )  # fmt: skip
    formulas = {
        "transform": (transform_bytes(case, tiles.transform), tiles.transform),
        "states": (states_bytes(case, tiles.states), tiles.states),
        "outputs": (outputs_bytes(case, tiles.outputs), tiles.outputs),
    }
    out = []
    for name, (formula, tile) in formulas.items():
        measured = traffic.by_kernel[f"_delta_rule_{name}_kernel"]
        out.append(
            {
                "kernel": f"_delta_rule_{name}_kernel",
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
                "gated": gated,
                "mode": effattn_kernels.MODE,
            }
        )
    return out
