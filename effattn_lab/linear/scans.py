"""Inclusive scans of the recurrence ``h_t = a_t h_{t-1} + b_t``, along the first axis: sequential, and in log
depth.

One step is the map ``h -> a h + b``, a pair ``(a, b)``. Maps compose to maps, and composition is associative:

    first (a1, b1), then (a2, b2):   a2 (a1 h + b1) + b2  =  (a2 a1) h + (a2 b1 + b2)

so any bracketing of the N maps gives the same result, and brackets without common members can be worked out at the
same time. The order matters: the pair of the *earlier* tokens is applied first.
Source: Blelloch, *Prefix Sums and Their Applications*, CMU-CS-90-190, 1990; Hillis and Steele, CACM 29(12), 1986.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Pair = tuple[torch.Tensor, torch.Tensor]


def combine(first: Pair, then: Pair) -> Pair:
    """The one map that does ``first`` and then ``then``: ``(a2 a1, a2 b1 + b2)``."""
    (a1, b1), (a2, b2) = first, then
    return a2 * a1, a2 * b1 + b2


def scan_hillis_steele(a: torch.Tensor, b: torch.Tensor) -> Pair:
    """Doubling: in round ``k`` every entry absorbs the one ``2^k`` before it. Depth ``log2 N``, work ``N log2 N``.

    Args:
        a: factors ``[N, ...]``. b: addends ``[N, ...]``, of the same shape.

    Returns:
        ``(products, h)``, both ``[N, ...]``: entry t is the map that tokens 0..t make together, and ``h[t]`` is
        also the state after token t for an initial state of zero.
    """
    step = 1
    while step < len(a):
        new_a, new_b = combine((a[:-step], b[:-step]), (a[step:], b[step:]))
        a, b = torch.cat([a[:step], new_a]), torch.cat([b[:step], new_b])
        step *= 2
    return a, b


def scan_blelloch(a: torch.Tensor, b: torch.Tensor) -> Pair:
    """Combine neighbours, scan the half as many pairs, fill the gaps. Work below ``2 N``, depth ``2 log2 N``.

    The recursive form of Blelloch's up-sweep and down-sweep; any N, no padding. Arguments and result as in
    :func:`scan_hillis_steele`.
    """
    n = len(a)
    if n == 1:
        return a, b
    # Up: tokens 2i and 2i + 1 become one map. Those at odd positions are final after the scan of these.
    odd_a, odd_b = scan_blelloch(*combine((a[: n - 1 : 2], b[: n - 1 : 2]), (a[1::2], b[1::2])))
    # Down: an even position is the odd one before it, and its own map.
    last = (n - 1) // 2
    even_a, even_b = combine((odd_a[:last], odd_b[:last]), (a[2::2], b[2::2]))
    return _interleave(a[:1], even_a, odd_a), _interleave(b[:1], even_b, odd_b)


def _interleave(first: torch.Tensor, even: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
    out = odd.new_empty(len(first) + len(even) + len(odd), *odd.shape[1:])
    out[0::2], out[1::2] = torch.cat([first, even]), odd
    return out


SCANS: dict[str, Callable[[torch.Tensor, torch.Tensor], Pair]] = {
    "blelloch": scan_blelloch,
    "hillis-steele": scan_hillis_steele,
}


def scan_sequential(a: torch.Tensor, b: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """``h_t = a_t h_{t-1} + b_t`` one after the other; every state is kept. Work N, depth N.

    Args:
        a, b: ``[N, ...]`` of one shape. initial: ``h_{-1} [...]``.

    Returns:
        ``h [N, ...]``. The gradient is a scan of its own, from the end: see :class:`_Sequential`.
    """
    h: torch.Tensor = _Sequential.apply(a, b, initial)
    return h


class _Sequential(torch.autograd.Function):
    """Backward: with ``g_t`` the gradient of the loss by ``h_t``, through all later tokens too,

    ``g_t = dh_t + a_{t+1} g_{t+1}``, then ``db_t = g_t``, ``da_t = g_t h_{t-1}`` and ``dh_{-1} = a_0 g_0``.
    """

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        h = torch.empty_like(b)
        before = initial
        for t in range(len(b)):
            before = torch.addcmul(b[t], a[t], before, out=h[t])
        ctx.save_for_backward(a, h, initial)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: torch.Tensor) -> Pair3:
        a, h, initial = ctx.saved_tensors
        g = dh.clone(memory_format=torch.contiguous_format)
        for t in range(len(g) - 2, -1, -1):
            g[t].addcmul_(a[t + 1], g[t + 1])
        da = g * torch.cat([initial[None], h[:-1]])
        return da, g, a[0] * g[0]


Pair3 = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def combines(name: str, length: int) -> int:
    """How many pairs the scan combines, counted from its definition: its work."""
    if name == "sequential":
        return length - 1
    if name == "hillis-steele":
        return sum(length - (1 << k) for k in range((length - 1).bit_length()))
    if name == "blelloch":
        return 0 if length <= 1 else length // 2 + (length - 1) // 2 + combines(name, length // 2)
    raise ValueError(f"name: expected sequential, {', '.join(SCANS)}, got {name!r}")


def depth(name: str, length: int) -> int:
    """How many combinations must wait for one another: the time on a machine with a processor for each token."""
    if name == "sequential":
        return length - 1
    if name == "hillis-steele":
        return (length - 1).bit_length()
    if name == "blelloch":
        return 0 if length <= 1 else 1 + (length > 2) + depth(name, length // 2)
    raise ValueError(f"name: expected sequential, {', '.join(SCANS)}, got {name!r}")
