"""Bytes of one decode step of one layer, per method and budget, counted, beside full attention's.

A step that chooses what it reads has three parts: it looks at something small for every key (*scan*), it selects, and
it attends to what was chosen. The first and the last are our kernels and are counted; the selection is a
``torch.topk``, of which the least is written down: every distance or score read once, the list written.

Every method attends by the same kernel, full attention too: what differs is what stands in the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from effattn_lab.measure import adamas_traffic, quest_traffic

METHODS = ("full", "streaming", "quest", "quest shared", "adamas", "adamas shared")
SINKS = 4


def rows(
    *,
    seqlen: int = 4096,
    budgets: Sequence[int] = (64, 256, 1024),
    methods: Sequence[str] = METHODS,
    num_heads: int = 9,
    num_kv_heads: int = 3,
    head_dim: int = 64,
    page_size: int = 16,
    dtype: str = "fp16",
) -> list[dict[str, Any]]:
    """Run one step of each method at each budget in Triton's interpreter and count.

    Args:
        seqlen: N keys. Default 4096, which takes some 20 seconds; :func:`predicted_rows` has any N at once.
        budgets: tokens a query head reads, multiples of page_size. Full attention has one row.
        methods: some of "full", "streaming" (4 sinks and a window), "quest" and "adamas" (each query head its own
            list, as in the papers), "quest shared" and "adamas shared" (one list for the heads that share keys).
        num_heads, num_kv_heads, head_dim: default SmolLM2-135M's, 9, 3 and 64.
        page_size: Quest's pages. Default 16.
        dtype: ``"fp16"``, ``"bf16"`` or ``"fp32"``.

    Returns:
        one dict a method and budget: method, budget, scan_bytes (the new key's code, or its page's bounds, and a pass
        over all codes or bounds), select_least_bytes (not counted), attend_bytes, total_bytes, and their share of the
        first row's total_bytes in per cent if that is full attention.

    Raises:
        ValueError: an unknown method, a budget that is no multiple of page_size, above N or below ``4 + 1``.
        RuntimeError: not in the interpreter.
    """
    import torch

    from effattn_lab.measure.traffic import count

    names = _check(seqlen, budgets, methods, page_size, dtype)
    with count():  # raises where nothing can be counted, before any work
        pass
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, num_heads, 1, head_dim, generator=generator).to(names[dtype])
    k, v = (
        torch.randn(1, num_kv_heads, seqlen, head_dim, generator=generator).to(names[dtype]) for _ in range(2)
    )
    table: list[dict[str, Any]] = []
    for method in methods:
        step = _Step(method, q, k, v, page_size)
        for budget in [seqlen] if method == "full" else budgets:
            with count() as traffic:
                index, size = step.choose(budget)
            scan = traffic.bytes
            select = step.selected + (8 * index.numel() if step.selected else 0)
            with count() as traffic:
                step.attend(index, size)
            table.append(_line(method, budget, scan, select, traffic.bytes, table))
    return table


def predicted_rows(
    *,
    seqlen: int = 32768,
    budgets: Sequence[int] = (64, 256, 1024, 4096),
    methods: Sequence[str] = METHODS,
    num_heads: int = 32,
    num_kv_heads: int = 32,
    head_dim: int = 128,
    page_size: int = 16,
    dtype: str = "fp16",
    arch: str = "sm80",
) -> list[dict[str, Any]]:
    """The table of :func:`rows` by the formulas, for any size at once; default Llama-2-7B's heads at 32 K.

    Args:
        arch: whose tiles, e.g. "sm90", or "interpreter". The rest as in :func:`rows`.
    """
    import torch
    from effattn_kernels import _adamas_tiles, _quest_tiles

    names = _check(seqlen, budgets, methods, page_size, dtype)
    tiles = _adamas_tiles.choose_tiles(head_dim, names[dtype], arch)
    itemsize = torch.empty(0, dtype=names[dtype]).element_size()
    quest = quest_traffic.Case(1, num_heads, num_kv_heads, seqlen, head_dim, itemsize, page_size)
    shape = (1, num_heads, num_kv_heads, seqlen, head_dim, itemsize)
    table: list[dict[str, Any]] = []
    for method in methods:
        name, shared = method.removesuffix(" shared"), method.endswith(" shared")
        lists = num_heads if name in ("quest", "adamas") and not shared else num_kv_heads
        for budget in [seqlen] if method == "full" else budgets:
            size = _full_page(seqlen) if name == "full" else page_size if name == "quest" else 1
            pages, scan, scores, missing = budget // size, 0, 0, 0
            if name == "quest":
                missing = quest.pages * page_size - seqlen  # in the last page
                newest = replace(quest, seqlen=page_size - missing)
                scan = quest_traffic.bounds_bytes(newest)
                scan += quest_traffic.scores_bytes(
                    quest, _quest_tiles.choose_tiles(head_dim, names[dtype], arch).scores
                )
                scores = 4 * num_heads * quest.pages
            case = adamas_traffic.Case(*shape, lists, pages, size, lists * (pages * size - missing))
            if name == "adamas":
                scan = adamas_traffic.encode_bytes(num_heads + num_kv_heads, head_dim, itemsize)
                scan += adamas_traffic.distances_bytes(case, tiles.distances)
                scores = 2 * num_heads * seqlen
            attend = adamas_traffic.decode_bytes(case, tiles.decode) + adamas_traffic.merge_bytes(case, tiles)
            select = scores + 8 * lists * pages if scores else 0
            table.append(_line(method, budget, scan, select, attend, table))
    return table


def _check(
    seqlen: int, budgets: Sequence[int], methods: Sequence[str], page_size: int, dtype: str
) -> dict[str, Any]:
    import torch

    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    if dtype not in names:
        raise ValueError(f"dtype: expected one of {', '.join(names)}, got {dtype!r}")
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"methods: expected some of {', '.join(METHODS)}, got {method!r}")
    for budget in budgets:
        if budget % page_size or not SINKS < budget <= seqlen:
            raise ValueError(
                f"budgets: expected multiples of {page_size} above {SINKS} and up to {seqlen}, got {budget}"
            )
    return names


def _full_page(seqlen: int) -> int:
    """The largest page that divides N, up to 16: full attention's list is short."""
    return min(16, seqlen & -seqlen)


def _line(
    method: str, budget: int, scan: int, select: int, attend: int, before: list[dict[str, Any]]
) -> dict[str, Any]:
    total = scan + select + attend
    first: dict[str, Any] = before[0] if before else {"method": method, "total_bytes": total}
    return {
        "method": method,
        "budget": budget,
        "scan_bytes": scan,
        "select_least_bytes": select,
        "attend_bytes": attend,
        "total_bytes": total,
        "of_full_percent": (
            round(100 * total / first["total_bytes"], 2) if first["method"] == "full" else None
        ),
    }


class _Step:
    """One method on one cache, whose codes and bounds of all keys but the newest are there already."""

    def __init__(self, method: str, q: Any, k: Any, v: Any, page_size: int) -> None:
        self.method, self.shared = method.removesuffix(" shared"), method.endswith(" shared")
        self.q, self.k, self.v, self.page_size = q, k, v, page_size
        self.selected = 0  # bytes of scores or distances
        if self.method == "adamas":
            from effattn_kernels.adamas import encode

            self.codes = encode(k)
        elif self.method == "quest":
            from effattn_kernels.quest import page_bounds

            self.bounds = page_bounds(k, page_size)

    def choose(self, budget: int) -> tuple[Any, int]:
        """The list, and the tokens an entry stands for; runs the scanning kernels."""
        import torch

        from effattn_lab.sparse.adamas import select_nearest
        from effattn_lab.sparse.quest import select_pages

        q, k, seqlen, heads = self.q, self.k, self.k.shape[2], self.k.shape[1]
        if self.method == "full":
            size = _full_page(seqlen)
            return torch.arange(seqlen // size).expand(1, heads, -1), size
        if self.method == "streaming":
            window = torch.arange(seqlen - budget + SINKS, seqlen)
            return torch.cat([torch.arange(SINKS), window]).expand(1, heads, -1), 1
        if self.method == "quest":
            from effattn_kernels.quest import page_bounds, page_scores

            page_bounds(k[:, :, (seqlen - 1) // self.page_size * self.page_size :], self.page_size)
            scores = page_scores(q, *self.bounds)
            self.selected = scores.element_size() * scores.numel()
            best = scores.unflatten(1, (heads, -1)).amax(2) if self.shared else scores
            return select_pages(best, budget // self.page_size), self.page_size
        from effattn_kernels.adamas import code_distances, encode

        encode(k[:, :, -1:])
        distance = code_distances(encode(q), self.codes)
        self.selected = distance.element_size() * distance.numel()
        nearest = distance.unflatten(1, (heads, -1)).amin(2) if self.shared else distance
        return select_nearest(nearest, budget), 1

    def attend(self, index: Any, size: int) -> None:
        from effattn_kernels.adamas import sparse_decode

        sparse_decode(self.q, self.k, self.v, index, page_size=size)
