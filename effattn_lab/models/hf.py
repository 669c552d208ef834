"""Run any mechanism of the book inside any transformers model.

``register("tiled", flash_attention)`` and ``model.set_attn_implementation("tiled")``: from then on every
attention layer of the model calls our function, with queries, keys and values after RoPE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Mechanism = Callable[..., torch.Tensor]


def register(name: str, fn: Mechanism, *, with_layer: bool = False) -> None:
    """Make ``attn_implementation=name`` run ``fn(q, k, v, *, causal, scale)`` in transformers.

    Args:
        name: how the model will ask for it. Names that transformers gives a meaning of its own
            are refused: "eager", "sdpa", and any with "flash", "flex" or "paged" in it.
        fn: takes q ``[B, Hq, seqlen_q, D]``, k and v ``[B, Hkv, seqlen_k, D]`` (grouped heads, offset rule) and
            returns ``[B, Hq, seqlen_q, D]``.
        with_layer: pass the layer's number, from 0, as ``layer`` too. Default False.

    Only plain causal decoding is passed on: a call with padding or another mask raises ``ValueError`` in the
    forward pass, since ``fn`` would silently ignore it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if not isinstance(name, str) or not name:
        raise ValueError(f"name: expected a non-empty string, got {name!r}")
    if name in ("eager", "sdpa") or any(word in name for word in ("flash", "flex", "paged")):
        # transformers 5 takes every name with "flash" in it for a kernel to fetch from a hub.
        raise ValueError(f"name: expected one without eager, sdpa, flash, flex or paged, got {name!r}")
    if not callable(fn):
        raise ValueError(f"fn: expected a function of q, k, v, got {type(fn).__name__}")

    def forward(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        if dropout:
            raise ValueError(f"dropout: expected 0, {name} has none; got {dropout}")
        causal = bool(getattr(module, "is_causal", True))
        if attention_mask is not None and not _is_plain(attention_mask, causal, query, key):
            raise ValueError(
                f"attention_mask: expected none or the plain causal one ({name} gets q, k, v alone), "
                f"got shape {tuple(attention_mask.shape)}"
            )
        extra = {"layer": module.layer_idx} if with_layer else {}
        out = fn(query, key, value, causal=causal, scale=scaling, **extra)
        if not isinstance(out, torch.Tensor) or out.shape != query.shape:
            got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ValueError(f"fn: expected {name} to return the shape of q {tuple(query.shape)}, got {got}")
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, forward)
    # Without a mask function of its own a new name gets no mask at all, and padding would be attended to in silence.
    AttentionMaskInterface.register(name, sdpa_mask)


def _is_plain(mask: torch.Tensor, causal: bool, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Does this mask hide what the offset rule hides, and nothing else?"""
    from effattn_lab.foundations.attention import visible

    keep = visible(query.shape[2], key.shape[2], causal=causal, device=mask.device)
    shown = mask if mask.dtype == torch.bool else mask == 0
    return shown.shape[-2:] == keep.shape and bool((shown == keep).all())


@contextmanager
def use(model: Any, fn: Mechanism, name: str = "effattn_use", *, with_layer: bool = False) -> Iterator[None]:
    """Inside the ``with`` block ``model`` runs ``fn``; afterwards it is as it was, also after an error.

    Arguments as in :func:`register`.
    """
    before = model.config._attn_implementation
    register(name, fn, with_layer=with_layer)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
