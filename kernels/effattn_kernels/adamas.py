"""Adamas in Triton: `encode` keys and queries, `code_distances` between them, `sparse_decode` over what was chosen.

The kernels are in `_adamas_kernels`, the tile table in `_adamas_tiles`, the input checks in `_adamas_validate`. To
read first: the PyTorch versions of the same names, ``effattn_lab.sparse.adamas`` and ``effattn_lab.sparse.cache``.
The choice between the two, ``select_nearest``, is a ``torch.topk``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import MODE, require
from ._adamas_tiles import Tile, choose_tiles, power
from ._adamas_validate import CODED_DIMS, check_codes, check_decode_inputs, check_encode_inputs
from ._tiles import architecture
from .flash import Launch, _cdiv, _on

__all__ = ["code_distances", "encode", "launches", "sparse_decode"]

THRESHOLDS = (-10.0, 0.0, 10.0)
#: Coordinates a 32-bit word.
PER_WORD = 16


def encode(
    x: torch.Tensor, *, thresholds: Sequence[float] = THRESHOLDS, transform: bool = True
) -> torch.Tensor:
    """Two-bit codes of vectors: Hadamard transform, three thresholds, sixteen coordinates a word, in one pass.

    The transform is ``log2 D`` steps of sums in float32, rounded to the dtype of x: the codes are those of the
    PyTorch form, bit for bit.

    Args:
        x: ``[..., D]``, after RoPE; float16, bfloat16 or float32, D of 16, 32, 64, 128 or 256. Up to four dimensions
            with any strides; more are made contiguous first.
        thresholds: three ascending numbers; a coordinate's code is how many of them it exceeds. Rounded to the dtype
            of x, as PyTorch does. Default (-10, 0, 10), the released code's.
        transform: apply the transform. Default True.

    Returns:
        int32 ``[..., D / 16]``: 2 bits a coordinate, coordinate ``16 w + i`` in bits ``2 i`` of word ``w``.

    Raises:
        ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: kernels cannot run here (no triton, or triton imported too early).

    Source: Adamas (2025) and its released code, which packs eight coordinates to 16 bits: the same bits.
    """
    require()
    check_encode_inputs(x, thresholds, MODE)
    from ._adamas_kernels import _adamas_encode_kernel

    shape, dim = x.shape[:-1], x.shape[-1]
    x = x.detach()
    x = x.reshape(1, 1, -1, dim) if x.dim() > 4 else x[(None,) * (4 - x.dim())]
    codes = torch.empty(*shape, dim // PER_WORD, dtype=torch.int32, device=x.device)
    rows = x.numel() // dim
    tile = choose_tiles(dim, x.dtype, architecture(x.device)).encode
    edges = torch.tensor(thresholds, dtype=x.dtype).tolist()
    with _on(x.device):
        _adamas_encode_kernel[(_cdiv(rows, tile.block),)](
            x, codes, *edges, dim**-0.5, *x.stride(), x.shape[1], x.shape[2], rows,
            DIM=dim, LOG_DIM=dim.bit_length() - 1, BLOCK=tile.block, TRANSFORM=bool(transform), **_run(tile),
        )  # fmt: skip
    return codes


def code_distances(q_codes: torch.Tensor, k_codes: torch.Tensor, *, estimator: str = "l1") -> torch.Tensor:
    """Distance of each query head's code from all codes of its KV head: all that is read of a key that isn't chosen.

    Args:
        q_codes: int32 ``[B, Hq, 1, W]``, see `encode`.
        k_codes: int32 ``[B, Hkv, N, W]``; batch, heads and keys in any strides. Query head ``h`` reads key head
            ``h // (Hq // Hkv)``, and the query heads of a key head are served by one load.
        estimator: "l1", the default: ``sum_i |a_i - b_i|``; or "released", which counts the pair {1, 2} as 3.

    Returns:
        int16 ``[B, Hq, N]``, 0 to ``48 W``, exact.

    Raises:
        ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: kernels cannot run here (no triton, or triton imported too early).

    Source: Adamas (2025), and the last of three forms of the distance in its released kernel.
    """
    require()
    check_codes(q_codes, k_codes, estimator, MODE)
    from ._adamas_kernels import _adamas_distances_kernel

    batch, num_heads, _, words = q_codes.shape
    num_kv_heads, seqlen_k = k_codes.shape[1:3]
    if k_codes.stride(3) != 1:
        k_codes = k_codes.contiguous()
    out = torch.empty(batch, num_heads, seqlen_k, dtype=torch.int16, device=q_codes.device)
    tile = choose_tiles(PER_WORD * words, torch.float16, architecture(q_codes.device)).distances
    with _on(q_codes.device):
        _adamas_distances_kernel[(_cdiv(seqlen_k, tile.block), batch * num_kv_heads)](
            q_codes.contiguous(), k_codes, out, *k_codes.stride()[:3], num_kv_heads, seqlen_k,
            WORDS=words, GROUP=num_heads // num_kv_heads, BLOCK=tile.block, EXACT=estimator == "l1", **_run(tile),
        )  # fmt: skip
    return out


def sparse_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    page_size: int = 1,
    scale: float | None = None,
) -> torch.Tensor:
    """Exact softmax of one query over the tokens or pages that ``index`` names, split over programs and merged.

    Args:
        q: ``[B, Hq, 1, D]``, float16, bfloat16 or float32, any strides, 16 <= D <= 256.
        k, v: ``[B, Hkv, N, D]``; query head ``h`` reads key head ``h // (Hq // Hkv)``.
        index: int64 ``[B, Hq, n]``, or ``[B, Hkv, n]``: then the query heads of a key head read the same list, and
            its keys and values are loaded once for all of them. Page ``p`` holds the tokens ``p P`` to
            ``p P + P - 1``; those outside ``0..N-1`` do not exist and are skipped, so -1 names nothing. A page named
            twice counts twice.
        valid: bool, shape of ``index``: pages that count. None: all.
        page_size: P tokens a page, a power of two. Default 1: ``index`` names tokens.
        scale: factor on the scores; None means ``D ** -0.5``.

    Returns:
        ``[B, Hq, 1, D]`` in the dtype of q; 0 for a head without a valid token. The same bits on every run, and for
        a sequence the same whatever else is in the batch.

    Raises:
        ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: kernels cannot run here (no triton, or triton imported too early).

    Source: split-KV as in Flash-Decoding (Dao et al. 2023), over a list as in Quest and Adamas.
    """
    require()
    check_decode_inputs(q, k, v, index, valid, page_size, scale, MODE)
    from ._adamas_kernels import _adamas_decode_kernel, _adamas_merge_kernel

    batch, num_heads, _, dim = q.shape
    num_kv_heads, seqlen_k = k.shape[1:3]
    lists, pages = index.shape[1:]
    rows = num_heads // lists  # query heads that share a list
    dense = k.stride(3) == v.stride(3) == 1
    tiles = choose_tiles(dim, q.dtype, architecture(q.device), dense=dense)
    tile = tiles.decode
    splits = _cdiv(pages * page_size, tile.split)
    out = torch.empty(batch, num_heads, 1, dim, dtype=q.dtype, device=q.device)
    part, lse = out, out
    if splits > 1:
        part = torch.empty(batch, num_heads, splits, dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(batch, num_heads, splits, dtype=torch.float32, device=q.device)
    index = index.contiguous()
    mask = index if valid is None else valid.contiguous().view(torch.uint8)
    q, k, v = q.detach(), k.detach(), v.detach()
    with _on(q.device):
        _adamas_decode_kernel[(splits, batch * lists)](
            q, k, v, index, mask, part, lse, dim**-0.5 if scale is None else float(scale),
            q.stride(0), q.stride(1), q.stride(3), *k.stride(), *v.stride(),
            lists, rows, num_heads // num_kv_heads, seqlen_k, pages,
            HEAD_DIM=dim, BLOCK_D=power(dim), BLOCK_M=power(rows), BLOCK_N=tile.block,
            SPLIT=tile.split, PAGE=page_size, VALID=valid is not None, MERGE=splits > 1, **_run(tile),
        )  # fmt: skip
        if splits > 1:
            _adamas_merge_kernel[(batch * num_heads,)](
                part, lse, out, splits, HEAD_DIM=dim, BLOCK_D=power(dim), BLOCK=tiles.merge.block,
                **_run(tiles.merge),
            )  # fmt: skip
    return out


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
    page_size: int = 1,
) -> list[Launch]:
    """The four kernels with the tiles they get on ``arch`` (``"sm80"``, ...), for a list longer than one split.

    Contiguous inputs; ``group`` query heads share their keys and a list of pages. ``causal`` changes nothing: the
    query of a decode step is the last token.
    """
    if window:
        raise ValueError("window: expected False, got True; what is read stands in a list")
    if isinstance(head_dim, bool) or head_dim not in CODED_DIMS:
        raise ValueError(f"head_dim: expected one of {', '.join(map(str, CODED_DIMS))}, got {head_dim!r}")
    from ._adamas_kernels import (
        _adamas_decode_kernel,
        _adamas_distances_kernel,
        _adamas_encode_kernel,
        _adamas_merge_kernel,
    )

    tiles = choose_tiles(head_dim, dtype, arch)
    element = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    fixed = {
        "codes_ptr": "i32", "d_ptr": "i16", "index_ptr": "i64", "valid_ptr": "i64", "lse_ptr": "fp32",
        "part_ptr": "fp32",
    }  # fmt: skip
    values = {
        "DIM": head_dim, "LOG_DIM": head_dim.bit_length() - 1, "TRANSFORM": True, "WORDS": head_dim // PER_WORD,
        "GROUP": group, "EXACT": True, "HEAD_DIM": head_dim, "BLOCK_D": power(head_dim), "BLOCK_M": power(group),
        "PAGE": page_size, "VALID": False, "MERGE": True,
    }  # fmt: skip
    rows = []
    for name, kernel, tile in (
        ("encode", _adamas_encode_kernel, tiles.encode),
        ("distances", _adamas_distances_kernel, tiles.distances),
        ("decode", _adamas_decode_kernel, tiles.decode),
        ("merge", _adamas_merge_kernel, tiles.merge),
    ):
        signature: dict[str, str] = {}
        constexprs: dict[str, Any] = {}
        blocks = {"BLOCK": tile.block, "BLOCK_N": tile.block, "SPLIT": tile.split}
        codes = name == "distances"
        for arg in kernel.arg_names:
            if arg.endswith("_ptr"):
                kind = fixed.get(arg, "i32" if codes else element)
                signature[arg] = f"*{'fp32' if (name, arg) == ('decode', 'o_ptr') else kind}:16"
            elif arg in ("t0", "t1", "t2", "norm", "sm_scale"):
                signature[arg] = "fp32"
            elif arg.startswith("stride_") and arg.endswith("d"):
                signature[arg], constexprs[arg] = "constexpr", 1
            elif arg.startswith("stride_"):
                # Codes of a key are head_dim / 16 words: rows of 256 dimensions alone are a multiple of 16.
                step = head_dim // PER_WORD if (codes and arg.endswith("n")) else head_dim
                signature[arg] = "i32:16" if step % 16 == 0 else "i32"
            elif arg.isupper():
                signature[arg], constexprs[arg] = "constexpr", {**values, **blocks}[arg]
            else:
                signature[arg] = "i32"
        rows.append(Launch(name, kernel, signature, constexprs, tile))
    return rows
