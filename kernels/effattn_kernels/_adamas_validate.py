"""Bad input to the kernels of Adamas gets a ValueError that names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._validate import DTYPES, _check_device, check_attention_inputs

ESTIMATORS = ("l1", "released")
CODED_DIMS = (16, 32, 64, 128, 256)


def _came(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__


def refuse_gradients(instead: str, **tensors: torch.Tensor) -> None:
    """These kernels are forward only: a tensor that needs a gradient would silently get none."""
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if x.requires_grad:
                raise ValueError(
                    f"{name}: expected a tensor that needs no gradient (this kernel is forward only), got "
                    f"requires_grad=True; use torch.no_grad(), or {instead}"
                )


def check_encode_inputs(x: torch.Tensor, thresholds: Sequence[float], mode: str) -> None:
    """Raise ValueError unless `encode` can compute exactly what was asked."""
    if not isinstance(x, torch.Tensor) or x.dim() < 1 or x.dtype not in DTYPES or x.numel() == 0:
        raise ValueError(
            f"x: expected a non-empty float16, bfloat16 or float32 tensor [..., D], got {_came(x)}"
        )
    if x.shape[-1] not in CODED_DIMS:
        raise ValueError(
            f"x: expected a last axis of {', '.join(map(str, CODED_DIMS))}, got shape {tuple(x.shape)}"
        )
    if x.numel() // x.shape[-1] >= 2**31:
        raise ValueError(f"x: expected fewer than 2^31 vectors, got shape {tuple(x.shape)}")
    if len(thresholds) != 3 or not thresholds[0] <= thresholds[1] <= thresholds[2]:
        raise ValueError(f"thresholds: expected three ascending numbers, got {tuple(thresholds)}")
    _check_device(x, mode, "x")


def check_codes(q_codes: torch.Tensor, k_codes: torch.Tensor, estimator: str, mode: str) -> None:
    """Raise ValueError unless `code_distances` can compute exactly what was asked."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    for name, x in (("q_codes", q_codes), ("k_codes", k_codes)):
        if not isinstance(x, torch.Tensor) or x.dim() != 4 or x.dtype != torch.int32 or 0 in x.shape:
            raise ValueError(f"{name}: expected a non-empty int32 tensor [B, H, N, W], got {_came(x)}")
    batch, heads, one, words = q_codes.shape
    if one != 1 or 16 * words not in CODED_DIMS:
        raise ValueError(
            f"q_codes: expected one query [B, Hq, 1, W] of 1, 2, 4, 8 or 16 words, got shape {tuple(q_codes.shape)}"
        )
    if (k_codes.shape[0], k_codes.shape[3]) != (batch, words) or heads % k_codes.shape[1]:
        raise ValueError(
            f"k_codes: expected [{batch}, a divisor of {heads}, N, {words}], got shape {tuple(k_codes.shape)}"
        )
    if k_codes.device != q_codes.device:
        raise ValueError(f"k_codes: expected the device of q_codes, {q_codes.device}, got {k_codes.device}")
    _check_device(q_codes, mode, "q_codes")


def check_decode_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: torch.Tensor,
    valid: torch.Tensor | None,
    page_size: int,
    scale: float | None,
    mode: str,
) -> None:
    """Raise ValueError unless `sparse_decode` can compute exactly what was asked."""
    check_attention_inputs(q, k, v, scale, None, mode)
    if q.shape[2] != 1:
        raise ValueError(f"q: expected one query [B, Hq, 1, D], got shape {tuple(q.shape)}")
    if (
        isinstance(page_size, bool)
        or not isinstance(page_size, int)
        or page_size < 1
        or page_size & (page_size - 1)
    ):
        raise ValueError(f"page_size: expected a power of two, got {page_size!r}")
    heads = (q.shape[1], k.shape[1])
    if not isinstance(index, torch.Tensor) or index.dtype != torch.int64 or index.dim() != 3:
        raise ValueError(f"index: expected an int64 tensor [B, Hq or Hkv, n], got {_came(index)}")
    if index.shape[0] != q.shape[0] or index.shape[1] not in heads or index.shape[2] == 0:
        raise ValueError(
            f"index: expected [{q.shape[0]}, {heads[0]} or {heads[1]}, n], n at least 1, got {tuple(index.shape)}"
        )
    if valid is not None and (
        not isinstance(valid, torch.Tensor) or valid.dtype != torch.bool or valid.shape != index.shape
    ):
        raise ValueError(
            f"valid: expected bool of the shape of index {tuple(index.shape)}, got {_came(valid)}"
        )
    for name, x in (("index", index), ("valid", valid)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
    refuse_gradients("effattn_lab.sparse.cache.sparse_decode", q=q, k=k, v=v)
