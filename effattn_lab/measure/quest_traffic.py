"""What the kernels of Quest should move, by formula, and what they do move, counted.

Notation: ``N`` keys in ``n = ceil(N / P)`` pages, ``D`` head dimension, ``e`` bytes an element, ``G`` query heads a
key head, ``b`` pages a block of the scores. Per key head:

======  ==========================================  ============
kernel  loads                                       stores
======  ==========================================  ============
bounds  ``e N D``                                   ``2 e n D``
scores  ``2 e n D + ceil(n / b) G e D``             ``4 G n``
======  ==========================================  ============

In 16 bits and with pages of 16 the bounds are ``D / 4`` bytes a key: as many as the codes of Adamas.
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
    head_dim: int
    itemsize: int
    page_size: int

    @property
    def pages(self) -> int:
        return -(-self.seqlen // self.page_size)


def bounds_bytes(case: Case) -> int:
    """Each key once, two bounds a page."""
    vectors = case.seqlen + 2 * case.pages
    return case.batch * case.num_kv_heads * case.itemsize * vectors * case.head_dim


def scores_bytes(case: Case, tile: Any) -> int:
    """Both bounds once for each group; the queries for each block of pages; four bytes a score."""
    blocks, group = -(-case.pages // tile.block), case.num_heads // case.num_kv_heads
    loads = case.itemsize * case.head_dim * (2 * case.pages + blocks * group)
    return case.batch * case.num_kv_heads * (loads + 4 * group * case.pages)


def rows(
    *,
    batch: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    seqlen: int = 715,
    head_dim: int = 24,
    page_size: int = 16,
    dtype: str = "fp16",
    causal: bool = True,
) -> list[dict[str, Any]]:
    """Bounds of all keys and scores of one query, once, counted, and each kernel's bytes beside its formula.

    Args:
        batch, num_heads, num_kv_heads, seqlen, head_dim, page_size: the case. The standard one has ragged ends in
            every dimension and grouped heads.
        dtype: ``"fp16"``, ``"bf16"`` or ``"fp32"``.
    """
    import effattn_kernels
    import torch

    from effattn_lab.measure.traffic import count

    if causal is not True:
        raise ValueError("causal: expected True, got False; the query of a decode step is the last token")
    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    if dtype not in names:
        raise ValueError(f"dtype: expected one of {', '.join(names)}, got {dtype!r}")
    with count() as traffic:  # raises where nothing can be counted, before any work
        from effattn_kernels._quest_tiles import choose_tiles
        from effattn_kernels._tiles import architecture
        from effattn_kernels.quest import page_bounds, page_scores

        generator = torch.Generator().manual_seed(0)
        q = torch.randn(batch, num_heads, 1, head_dim, generator=generator).to(names[dtype])
        k = torch.randn(batch, num_kv_heads, seqlen, head_dim, generator=generator).to(names[dtype])
        page_scores(q, *page_bounds(k, page_size))

    tiles = choose_tiles(head_dim, names[dtype], architecture(q.device))
    case = Case(batch, num_heads, num_kv_heads, seqlen, head_dim, q.element_size(), page_size)
    out = []
    for name, formula in (("bounds", bounds_bytes(case)), ("scores", scores_bytes(case, tiles.scores))):
        measured = traffic.by_kernel[f"_quest_{name}_kernel"]
        out.append(
            {
                "kernel": f"_quest_{name}_kernel",
                "measured_bytes": measured.bytes,
                "formula_bytes": formula,
                "flops": measured.flops,
                "ratio": round(measured.bytes / formula, 4),
                "loads_bytes": measured.loads_bytes,
                "stores_bytes": measured.stores_bytes,
                "launches": measured.launches,
                "tile": getattr(tiles, name).label,
                "batch": batch,
                "num_heads": num_heads,
                "num_kv_heads": num_kv_heads,
                "seqlen": seqlen,
                "head_dim": head_dim,
                "page_size": page_size,
                "dtype": dtype,
                "mode": effattn_kernels.MODE,
            }
        )
    return out
