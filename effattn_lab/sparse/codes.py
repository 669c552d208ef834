"""Two-bit codes of keys: Hadamard transform, three thresholds, sixteen coordinates to a 32-bit word, L1 by bits.

Source: the released code of Yan et al. 2025 (Adamas): the Sylvester matrix divided by ``sqrt(D)``, thresholds -10, 0
and 10, coordinate ``8 w + i`` in bits ``2 i`` and ``2 i + 1`` of 16-bit word ``w``. Two such words are one of ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

THRESHOLDS = (-10.0, 0.0, 10.0)
#: Coordinates a 32-bit word.
PER_WORD = 16
_LOW = 0x55555555


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """``x H`` along the last axis, ``H`` the orthonormal Walsh-Hadamard matrix: ``D log2 D`` additions.

    ``H_1 = [1]``, ``H_2n = [[H_n, H_n], [H_n, -H_n]] / sqrt(2)``; symmetric and its own inverse, so dot products and
    lengths stay. L1 distances do not.

    Args:
        x: ``[..., D]``, floating point, D a power of two. Half precision is widened for the sums.

    Returns:
        the shape and dtype of ``x``.
    """
    dim = x.shape[-1] if x.dim() else 0
    if not x.is_floating_point() or dim < 1 or dim & (dim - 1):
        raise ValueError(
            f"x: expected floats with a last axis of a power of two, got {x.dtype} {tuple(x.shape)}"
        )
    y, half = x.to(torch.promote_types(x.dtype, torch.float32)), 1
    while half < dim:
        pairs = y.unflatten(-1, (-1, 2, half))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        half *= 2
    return (y * dim**-0.5).to(x.dtype)


def bucketize(x: torch.Tensor, thresholds: Sequence[float] = THRESHOLDS) -> torch.Tensor:
    """How many of the three thresholds a number exceeds: uint8 codes 0..3. On a threshold counts as below; NaN is 0.

    Args:
        x: any shape, floating point.
        thresholds: three numbers, ascending. Default (-10, 0, 10), the released code's, for every layer and model.
    """
    if len(thresholds) != 3 or not thresholds[0] <= thresholds[1] <= thresholds[2]:
        raise ValueError(f"thresholds: expected three ascending numbers, got {tuple(thresholds)}")
    return sum(((x > t).to(torch.uint8) for t in thresholds), torch.zeros_like(x, dtype=torch.uint8))


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes ``[..., D]``, 0..3, to int32 words ``[..., D / 16]``; coordinate ``i`` in bits ``2 i`` of its word.

    D must be a multiple of 16. The last coordinate's high bit is the sign: words are bit patterns, not numbers.
    """
    dim = codes.shape[-1] if codes.dim() else 0
    if dim == 0 or dim % PER_WORD:
        raise ValueError(
            f"codes: expected a last axis of a multiple of {PER_WORD}, got shape {tuple(codes.shape)}"
        )
    shift = 2 * torch.arange(PER_WORD, device=codes.device)
    wide = (codes.long().unflatten(-1, (-1, PER_WORD)) << shift).sum(dim=-1)
    return torch.where(wide >= 2**31, wide - 2**32, wide).to(torch.int32)


def unpack(words: torch.Tensor) -> torch.Tensor:
    """The codes again, uint8 ``[..., 16 W]`` from int32 ``[..., W]``."""
    shift = 2 * torch.arange(PER_WORD, device=words.device)
    return (words.long()[..., None] >> shift & 3).flatten(-2).to(torch.uint8)


def l1_naive(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``sum_i |a_i - b_i|`` of codes ``[..., D]``, which broadcast: int32. The reference."""
    return (a.to(torch.int32) - b.to(torch.int32)).abs().sum(dim=-1, dtype=torch.int32)


def l1_packed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The same from packed words, exactly: three counts of bits a word.

    With ``x = a ^ b``, ``lo`` and ``hi`` the low and high bits of the pairs in x, and ``g`` the low bits of
    ``a ^ (a >> 1)``: ``popc(lo) + 2 popc(hi) - 2 popc(lo & hi & g)``. The last term mends the pair {1, 2}: its codes
    01 and 10 differ in both bits though they are neighbours. Of codes that differ in both, ``g`` marks those two.

    Args:
        a, b: int32 ``[..., W]``, which broadcast.

    Returns:
        int32 ``[...]``, 0 to ``3 D``.
    """
    x = a ^ b
    lo, hi = x & _LOW, (x >> 1) & _LOW
    central = lo & hi & (a ^ (a >> 1))
    return (_popcount(lo) + 2 * _popcount(hi) - 2 * _popcount(central)).sum(dim=-1, dtype=torch.int32)


def released_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``popc(lo) + 2 popc(hi)``: L1 but for {1, 2}, counted 3. The last of three forms of the released kernel.

    The first was exact; the second, ``popc(lo) + popc(hi) << 1``, is twice :func:`hamming_distance`: C adds before it
    shifts. Which of them the authors timed is not said.
    """
    x = a ^ b
    return (_popcount(x & _LOW) + 2 * _popcount((x >> 1) & _LOW)).sum(dim=-1, dtype=torch.int32)


def hamming_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Bits that differ: {1, 2} counts like {0, 3}, and {0, 2} like neighbours."""
    x = a ^ b
    return (_popcount(x & _LOW) + _popcount((x >> 1) & _LOW)).sum(dim=-1, dtype=torch.int32)


def _popcount(x: torch.Tensor) -> torch.Tensor:
    """Set bits of int32 words of which only even bits are set: nothing overflows, and no sign is dragged along."""
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x + (x >> 16)) & 0x3F
