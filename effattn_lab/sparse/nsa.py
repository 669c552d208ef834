"""Native sparse attention: a coarse look at everything, a fine look at a few blocks, a window; mixed by gates.

The coarse branch attends to compressed blocks. Its weights say which blocks deserve the fine look, so the choice
costs nothing more. Each branch has keys and values of its own, else the window, easiest to learn from, would starve
the others. Gates are sigmoids: they need not sum to one.

Source: Yuan et al. 2025 (NSA), sections 3.2 and 3.3. Its compression is a learned function; here it is handed over,
with the mean as its simplest form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from effattn_lab._validate import check_positive_int, check_qkv, resolve_scale
from effattn_lab.foundations.attention import attention, repeat_kv

Compress = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Blocks:
    """Sizes of NSA, the paper's by default.

    Attributes:
        length, stride: l and d, compressed blocks of l tokens that begin every d.
        select: l', tokens a selected block; a multiple of d.
        count: n, selected blocks, of which ``first`` at the beginning and ``local`` at the query are given.
        first, local: 1 and 2.
        window: w.
    """

    length: int = 32
    stride: int = 16
    select: int = 64
    count: int = 16
    first: int = 1
    local: int = 2
    window: int = 512

    def __post_init__(self) -> None:
        for name in ("length", "stride", "select", "count", "first", "local", "window"):
            check_positive_int(name, getattr(self, name))
        if self.length % self.stride or self.select % self.stride:
            raise ValueError(
                f"stride: expected a divisor of length {self.length} and select {self.select}, got {self.stride}"
            )
        if self.first + self.local > self.count:
            raise ValueError(
                f"count: expected at least first + local = {self.first + self.local} blocks, got {self.count}"
            )


def mean_of_block(x: torch.Tensor) -> torch.Tensor:
    """``[..., blocks, l, D] -> [..., blocks, D]``: the simplest compression."""
    return x.mean(dim=-2)


def compress(x: torch.Tensor, blocks: Blocks, phi: Compress = mean_of_block) -> torch.Tensor:
    """Compressed keys or values: block i holds tokens ``i d .. i d + l - 1``; only whole blocks exist.

    Args:
        x: ``[B, H, N, D]``.
        phi: ``[B, H, blocks, l, D] -> [B, H, blocks, D]``.

    Returns:
        ``[B, H, floor((N - l) / d) + 1, D]``, no block at all if N is below l.
    """
    if x.shape[2] < blocks.length:
        return x[:, :, :0]
    return phi(x.unfold(2, blocks.length, blocks.stride).transpose(-1, -2))


def compressed_weights(
    q: torch.Tensor, k_cmp: torch.Tensor, blocks: Blocks, *, scale: float | None = None
) -> torch.Tensor:
    """Softmax over the compressed blocks that end at or before the query, ``[B, Hq, N, blocks]``; 0 if none does."""
    scale = resolve_scale(scale, q.shape[3])
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys = repeat_kv(k_cmp.to(dtype), q.shape[1] // k_cmp.shape[1])
    s = scale * q.to(dtype) @ keys.transpose(-1, -2)
    ends = torch.arange(k_cmp.shape[2], device=q.device) * blocks.stride + blocks.length - 1
    seen = ends <= torch.arange(q.shape[2], device=q.device)[:, None]
    lse = torch.logsumexp(s.masked_fill(~seen, float("-inf")), dim=-1, keepdim=True)
    return torch.exp(s.masked_fill(~seen, float("-inf")) - lse.masked_fill(lse.isneginf(), 0.0))


def overlap(compressed: int, selectable: int, blocks: Blocks) -> torch.Tensor:
    """How many strides of compressed block i lie in selectable block j, ``[compressed, selectable]``.

    With the paper's sizes a block of 64 gets weights 1, 2, 2, 2, 1 from compressed blocks ``4 j - 1 .. 4 j + 3``.
    """
    i = torch.arange(compressed)[:, None] * blocks.stride
    j = torch.arange(selectable) * blocks.select
    shared = torch.minimum(i + blocks.length, j + blocks.select) - torch.maximum(i, j)
    return shared.clamp_min(0) / blocks.stride


def nsa_selection(p_cmp: torch.Tensor, blocks: Blocks, num_kv_heads: int) -> torch.Tensor:
    """Blocks for the fine look: the first, the local ones, and the best of the rest; one choice for a group of heads.

    Args:
        p_cmp: ``[B, Hq, N, compressed]``, see :func:`compressed_weights`.
        num_kv_heads: Hkv; scores are summed over the query heads of each, so that a group loads its blocks once.

    Returns:
        bool ``[B, Hkv, N, ceil(N / l')]``, no gradient. Of equal scores the earlier block; none of the future.
    """
    n = p_cmp.shape[2]
    columns = -(-n // blocks.select)
    shares = overlap(p_cmp.shape[3], columns, blocks).to(p_cmp)
    score = (p_cmp.detach() @ shares).unflatten(1, (num_kv_heads, -1)).sum(dim=2)
    own = torch.arange(n, device=p_cmp.device)[:, None] // blocks.select
    column = torch.arange(columns, device=p_cmp.device)
    given = (column < blocks.first) | ((own - column < blocks.local) & (own >= column))
    score = score.masked_fill(given, float("inf")).masked_fill(column > own, float("-inf"))
    order = torch.sort(score, dim=-1, descending=True, stable=True)
    take = order.indices[..., : blocks.count]
    real = ~order.values[..., : blocks.count].isneginf()
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, take, real)


def nsa_attention(
    q: torch.Tensor,
    keys: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    values: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    gates: torch.Tensor,
    *,
    blocks: Blocks | None = None,
    phi: Compress = mean_of_block,
    scale: float | None = None,
) -> torch.Tensor:
    """``o_t = g_cmp o_cmp + g_slc o_slc + g_win o_win``, causal.

    Args:
        q: ``[B, Hq, N, D]``.
        keys, values: of the compressed, the selected and the window branch, each ``[B, Hkv, N, D]``.
        gates: ``[B, Hq, N, 3]``, in this order.
        blocks: sizes. Default: the paper's.
        phi: compression of keys and values alike, see :func:`compress`.
        scale: default ``D ** -0.5``.

    Returns:
        ``[B, Hq, N, D]``. Before the first whole compressed block its branch gives 0.
    """
    if len(keys) != 3 or len(values) != 3:
        raise ValueError(
            f"keys: expected three branches of keys and values, got {len(keys)} and {len(values)}"
        )
    for k, v in zip(keys, values):
        check_qkv(q, k, v)
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"q: expected as many queries as keys ({k.shape[2]}), got {q.shape[2]}")
    if gates.shape != (*q.shape[:3], 3):
        raise ValueError(f"gates: expected shape {(*q.shape[:3], 3)}, got {tuple(gates.shape)}")
    blocks = blocks or Blocks()
    groups, n = q.shape[1] // keys[0].shape[1], q.shape[2]
    p = compressed_weights(q, compress(keys[0], blocks, phi), blocks, scale=scale)
    coarse = (p @ repeat_kv(compress(values[0], blocks, phi).to(p.dtype), groups)).to(q.dtype)
    chosen = nsa_selection(p, blocks, keys[1].shape[1])
    keep = chosen.repeat_interleave(blocks.select, dim=-1)[..., :n].repeat_interleave(groups, dim=1)
    fine = attention(q, keys[1], values[1], causal=True, mask=keep, scale=scale)
    near = attention(q, keys[2], values[2], causal=True, window_size=blocks.window, scale=scale)
    parts = torch.stack([coarse, fine, near], dim=-1)
    return (parts * gates[..., None, :].to(q.dtype)).sum(dim=-1)
