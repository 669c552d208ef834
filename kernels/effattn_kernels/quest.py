"""Quest in Triton: `page_bounds` of keys and `page_scores` of a query.

The kernels are in `_quest_kernels`, the tile table in `_quest_tiles`. To read first: the PyTorch versions of the same
names, ``effattn_lab.sparse.quest``. The pages are chosen by ``torch.topk``, and read by
``effattn_kernels.adamas.sparse_decode`` with their ``page_size``.
"""

from __future__ import annotations

from typing import Any

import torch

from . import MODE, require
from ._adamas_validate import refuse_gradients
from ._quest_tiles import Tile, choose_tiles, power
from ._tiles import architecture
from ._validate import DTYPES, HEAD_DIM_RANGE, _check_device
from .flash import Launch, _cdiv, _on

__all__ = ["launches", "page_bounds", "page_scores"]


def page_bounds(k: torch.Tensor, page_size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest key of each page and channel, in one pass over the keys.

    Args:
        k: keys after RoPE ``[B, Hkv, N, D]``, float16, bfloat16 or float32, any strides, 16 <= D <= 256.
        page_size: P, at least 1. Default 16. The last page may hold fewer.

    Returns:
        ``(least, greatest)``, each ``[B, Hkv, ceil(N / P), D]`` in the dtype of k, exact.

    Raises:
        ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: kernels cannot run here (no triton, or triton imported too early).

    Source: Tang et al. 2024 (Quest), section 3.3.
    """
    require()
    if isinstance(page_size, bool) or not isinstance(page_size, int) or page_size < 1:
        raise ValueError(f"page_size: expected an integer of at least 1, got {page_size!r}")
    _check("k", k)
    _check_device(k, MODE, "k")
    refuse_gradients("effattn_lab.sparse.quest.page_bounds", k=k)
    from ._quest_kernels import _quest_bounds_kernel

    batch, heads, seqlen, dim = k.shape
    pages = _cdiv(seqlen, page_size)
    least, greatest = (
        torch.empty(batch, heads, pages, dim, dtype=k.dtype, device=k.device) for _ in range(2)
    )
    tile = choose_tiles(dim, k.dtype, architecture(k.device)).bounds
    with _on(k.device):
        _quest_bounds_kernel[(_cdiv(pages, tile.block), batch * heads)](
            k.detach(), least, greatest, *k.stride(), heads, seqlen, pages, page_size,
            HEAD_DIM=dim, BLOCK_D=power(dim), BLOCK=tile.block, **_run(tile),
        )  # fmt: skip
    return least, greatest


def page_scores(q: torch.Tensor, least: torch.Tensor, greatest: torch.Tensor) -> torch.Tensor:
    """``U_p = sum_i max(q_i M_pi, q_i m_pi)``: no key of page p has a larger product with q (before scaling).

    Args:
        q: ``[B, Hq, 1, D]``, float16, bfloat16 or float32, any strides, 16 <= D <= 256.
        least, greatest: ``[B, Hkv, pages, D]`` in the dtype of q, see `page_bounds`. Query head ``h`` reads key head
            ``h // (Hq // Hkv)``, and the query heads of a key head are served by one load.

    Returns:
        float32 ``[B, Hq, pages]``.

    Raises:
        ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: kernels cannot run here (no triton, or triton imported too early).

    Source: Tang et al. 2024 (Quest), section 3.3.
    """
    require()
    for name, x in (("q", q), ("least", least), ("greatest", greatest)):
        _check(name, x)
    batch, num_heads, one, dim = q.shape
    if one != 1:
        raise ValueError(f"q: expected one query [B, Hq, 1, D], got shape {tuple(q.shape)}")
    if (least.shape[0], least.shape[3]) != (batch, dim) or num_heads % least.shape[1]:
        raise ValueError(
            f"least: expected [{batch}, a divisor of {num_heads}, pages, {dim}], got shape {tuple(least.shape)}"
        )
    if least.shape != greatest.shape:
        raise ValueError(
            f"greatest: expected the shape of least {tuple(least.shape)}, got {tuple(greatest.shape)}"
        )
    for name, x in (("least", least), ("greatest", greatest)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: expected {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}")
    _check_device(q, MODE)
    refuse_gradients("effattn_lab.sparse.quest.page_scores", q=q, least=least, greatest=greatest)
    from ._quest_kernels import _quest_scores_kernel

    num_kv_heads, pages = least.shape[1:3]
    scores = torch.empty(batch, num_heads, pages, dtype=torch.float32, device=q.device)
    tile = choose_tiles(dim, q.dtype, architecture(q.device)).scores
    with _on(q.device):
        _quest_scores_kernel[(_cdiv(pages, tile.block), batch * num_kv_heads)](
            q.detach(), least.detach(), greatest.detach(), scores,
            q.stride(0), q.stride(1), q.stride(3), *least.stride(), *greatest.stride(), num_kv_heads, pages,
            HEAD_DIM=dim, BLOCK_D=power(dim), BLOCK=tile.block, GROUP=num_heads // num_kv_heads, **_run(tile),
        )  # fmt: skip
    return scores


def _check(name: str, x: torch.Tensor) -> None:
    low, high = HEAD_DIM_RANGE
    if not isinstance(x, torch.Tensor) or x.dim() != 4 or x.dtype not in DTYPES or 0 in x.shape:
        came = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(
            f"{name}: expected a non-empty float16, bfloat16 or float32 tensor [B, H, N, D], got {came}"
        )
    if not low <= x.shape[3] <= high:
        raise ValueError(f"{name}: expected a head dimension from {low} to {high}, got {x.shape[3]}")


def _run(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def launches(
    head_dim: int,
    dtype: torch.dtype,
    arch: str,
    *,
    causal: bool = True,
    window: bool = False,
    group: int = 4,
) -> list[Launch]:
    """Both kernels with the tiles they get on ``arch`` (``"sm80"``, ...): contiguous inputs, ``group`` query heads a
    key head. ``causal`` changes nothing: the query of a decode step is the last token.
    """
    if window:
        raise ValueError("window: expected False, got True; what is read stands in a list")
    low, high = HEAD_DIM_RANGE
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or not low <= head_dim <= high:
        raise ValueError(f"head_dim: expected an integer from {low} to {high}, got {head_dim!r}")
    from ._quest_kernels import _quest_bounds_kernel, _quest_scores_kernel

    tiles = choose_tiles(head_dim, dtype, arch)
    element = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    rows = []
    for name, kernel, tile in (
        ("bounds", _quest_bounds_kernel, tiles.bounds),
        ("scores", _quest_scores_kernel, tiles.scores),
    ):
        values = {"HEAD_DIM": head_dim, "BLOCK_D": power(head_dim), "GROUP": group, "BLOCK": tile.block}
        signature: dict[str, str] = {}
        constexprs: dict[str, Any] = {}
        for arg in kernel.arg_names:
            if arg.endswith("_ptr"):
                signature[arg] = "*fp32:16" if arg == "u_ptr" else f"*{element}:16"
            elif arg.startswith("stride_") and arg.endswith("d"):
                signature[arg], constexprs[arg] = "constexpr", 1
            elif arg.startswith("stride_"):
                signature[arg] = "i32:16" if head_dim % 16 == 0 else "i32"
            elif arg.isupper():
                signature[arg], constexprs[arg] = "constexpr", values[arg]
            else:
                signature[arg] = "i32"
        rows.append(Launch(name, kernel, signature, constexprs, tile))
    return rows
