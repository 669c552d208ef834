"""What the kernels of Adamas should move, by formula, and what they do move, counted.

Notation: ``N`` keys, ``D`` head dimension, ``e`` bytes an element, ``G`` query heads a key head; ``R`` of them share
a list of ``n`` pages with ``t`` existing tokens; ``S`` splits; ``b`` keys a block of the estimator.

=========  ========  =====================================================  =====================================
kernel     per       loads                                                  stores
=========  ========  =====================================================  =====================================
encode     vector    ``e D``                                                ``D / 4``
distances  key head  ``N D / 4 + ceil(N / b) G D / 4``                      ``2 G N``
decode     list      ``2 e D t + 8 n + S R e D``, and ``n`` for ``valid``   ``R e D``; if S > 1, ``4 S R (D + 1)``
merge      query h.  ``4 S (D + 1)``, if S > 1                              ``e D``
=========  ========  =====================================================  =====================================

The estimator's ``D / 4`` bytes a key stand against full attention's ``2 e D``: a sixteenth in 16 bits, whatever the
number of query heads. What it writes does grow with them. A page longer than a tile of the decode kernel has its
entry loaded once a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One call; see the module's notation. ``lists`` of pages a sequence, ``tokens`` that exist in all of them."""

    batch: int
    num_heads: int
    num_kv_heads: int
    seqlen: int
    head_dim: int
    itemsize: int
    lists: int
    pages: int
    page_size: int
    tokens: int
    valid: bool = False

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def rows(self) -> int:
        """Query heads that share a list."""
        return self.num_heads // self.lists


def encode_bytes(vectors: int, head_dim: int, itemsize: int) -> int:
    """Each coordinate once, and two bits of it."""
    return vectors * (itemsize * head_dim + head_dim // 4)


def distances_bytes(case: Case, tile: Any) -> int:
    """All codes once for each group; the queries' for each block of keys; two bytes a distance."""
    code = case.head_dim // 4
    blocks = -(-case.seqlen // tile.block)
    loads = case.seqlen * code + blocks * case.group * code
    return case.batch * case.num_kv_heads * (loads + 2 * case.group * case.seqlen)


def splits(case: Case, tile: Any) -> int:
    """Programs that share a list."""
    return -(-case.pages * case.page_size // tile.split)


def decode_bytes(case: Case, tile: Any) -> int:
    """Keys and values named once for each list, the list, the queries for each split, the outputs in parts.

    ``case.tokens`` is a sum over lists. With ``valid`` the entries that are not valid are not loaded; the formula
    wants them counted out of ``tokens`` and assumes pages of one token.
    """
    parts, d, e = splits(case, tile), case.head_dim, case.itemsize
    lists = case.batch * case.lists
    out = 4 * parts * (d + 1) if parts > 1 else e * d
    entries = case.tokens if case.valid else lists * case.pages
    total = 2 * e * d * case.tokens + 8 * entries * max(1, case.page_size // tile.block)
    total += lists * case.pages if case.valid else 0
    return total + lists * case.rows * (parts * e * d + out)


def merge_bytes(case: Case, tiles: Any) -> int:
    """The parts, their log-sum-exps, the output; 0 if there is one part."""
    parts = splits(case, tiles.decode)
    one = 4 * parts * (case.head_dim + 1) + case.itemsize * case.head_dim
    return case.batch * case.num_heads * one if parts > 1 else 0


def rows(
    *,
    batch: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    seqlen: int = 700,
    head_dim: int = 32,
    budget: int = 300,
    page_size: int = 1,
    share: bool = False,
    valid: bool = False,
    dtype: str = "fp16",
    causal: bool = True,
) -> list[dict[str, Any]]:
    """Encode keys and queries, rank, and attend, once, counted, and set each kernel's bytes beside its formula.

    Args:
        batch, num_heads, num_kv_heads, seqlen, head_dim: the case. The standard one fills no block, and its list
            needs two splits.
        budget: tokens a list names, a multiple of page_size, the last page among them.
        page_size: tokens a page. share: one list for the heads of a group. Default: each head its own.
        valid: half of the entries are marked as not valid.
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
    if valid and page_size > 1:
        raise ValueError("page_size: expected 1 with valid=True, as the formula wants")
    with count() as traffic:  # raises where nothing can be counted, before any work
        from effattn_kernels._adamas_tiles import choose_tiles
        from effattn_kernels._tiles import architecture
        from effattn_kernels.adamas import code_distances, encode, sparse_decode

        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(names[dtype])

        q = draw(batch, num_heads, 1, head_dim)
        k, v = (draw(batch, num_kv_heads, seqlen, head_dim) for _ in range(2))
        code_distances(encode(q), encode(k))
        lists, last = num_kv_heads if share else num_heads, -(-seqlen // page_size)
        pages = min(budget // page_size, last)
        index = torch.arange(last - pages, last).expand(batch, lists, -1).contiguous()
        marks = (torch.arange(pages) % 2 == 0).expand(batch, lists, -1) if valid else None
        sparse_decode(q, k, v, index, valid=marks, page_size=page_size)

    tiles = choose_tiles(head_dim, names[dtype], architecture(q.device))
    named = -(-pages // 2) if valid else pages * page_size - (last * page_size - seqlen)
    case = Case(
        batch, num_heads, num_kv_heads, seqlen, head_dim, q.element_size(), lists, pages, page_size,
        batch * lists * named, valid,
    )  # fmt: skip
    vectors = batch * (num_heads + num_kv_heads * seqlen)
    out = []
    for name, formula in (
        ("encode", encode_bytes(vectors, head_dim, case.itemsize)),
        ("distances", distances_bytes(case, tiles.distances)),
        ("decode", decode_bytes(case, tiles.decode)),
        ("merge", merge_bytes(case, tiles)),
    ):
        measured = traffic.by_kernel.get(f"_adamas_{name}_kernel")
        if measured is None:  # one split
            continue
        out.append(
            {
                "kernel": f"_adamas_{name}_kernel",
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
                "budget": budget,
                "page_size": page_size,
                "dtype": dtype,
                "mode": effattn_kernels.MODE,
            }
        )
    return out
