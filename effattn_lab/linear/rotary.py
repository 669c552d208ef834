"""Rotary positions: q and k turned by angles that grow with their positions, so that ``q . k`` sees the distance.

Channel ``j`` is paired with ``j + D/2`` and the pair turned by ``position * base^(-2j/D)``. A turn keeps lengths, and
the product of two turned vectors depends on the difference of their positions only. Both fail if the table of angles
is laid out for neighbouring pairs and the turn for distant ones. Source: Su et al. 2021 (RoFormer).
"""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, positions: torch.Tensor, *, base: float = 10000.0) -> torch.Tensor:
    """``x [..., N, D]`` turned by its ``positions``, which broadcast to ``[..., N]``; an odd last channel stays.

    Angles are worked out in float64: in float32 position 100,000 would be off by thousandths of a turn.
    """
    half = x.shape[-1] // 2
    rates = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / max(half, 1))
    angles = positions.to(torch.float64)[..., None] * rates  # [..., N, D / 2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)
