"""The state of ZeroS: three sums of outer products, and what one chunk of tokens reads from and writes to it.

``F = sum e^(s_i) k_i v_i^T``, ``G = sum s_i k_i v_i^T``, ``H = sum k_i v_i^T``, one for each function of the key's
step that the weights are mixed from (:mod:`effattn_lab.linear.zeros`). Everything is invariant to ``s + c``, so
``s`` is measured from the running maximum ``m``, which holds ``e^s`` below 1 and keeps ``G`` small: when the maximum
moves to ``m'``, ``F`` is multiplied by ``e^(m - m')`` and ``G`` gains ``(m - m') H``.
Source: Lu et al. 2025 (ZeroS), the scan of section 3; the chunkwise form is ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from effattn_lab.foundations.attention import repeat_kv


class ZeroSState(NamedTuple):
    """What ZeroS remembers, whatever the length: one entry for each *key-value* head, at least float32.

    ``F = sum_i e^(s_i - m) k_i v_i^T``, ``G = sum_i (s_i - m) k_i v_i^T``, ``H = sum_i k_i v_i^T``, each
    ``[B, Hkv, D, Dv]`` with ``k_i`` of length 1; the same sums without ``k v^T``: ``E``, ``P`` and the number of
    tokens ``t``; the largest logit so far, ``m``. The last four are ``[B, Hkv]``.
    """

    F: torch.Tensor
    G: torch.Tensor
    H: torch.Tensor
    E: torch.Tensor
    P: torch.Tensor
    t: torch.Tensor
    m: torch.Tensor


class Gates(NamedTuple):
    """One number a query head and query, ``[B, Hq, N]``; ``zeroth`` None: no constant term."""

    first: torch.Tensor
    higher: torch.Tensor
    zeroth: torch.Tensor | None

    def rows(self, a: int, b: int) -> Gates:
        zeroth = None if self.zeroth is None else self.zeroth[:, :, a:b]
        return Gates(self.first[:, :, a:b], self.higher[:, :, a:b], zeroth)


def init_state(
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> ZeroSState:
    """The state before the first token: zeros. (``m`` too: without a token it is not read.)"""
    heads = (batch, num_kv_heads)
    sums = (torch.zeros(*heads, head_dim, value_dim, dtype=dtype, device=device) for _ in range(3))
    return ZeroSState(*sums, *(torch.zeros(heads, dtype=dtype, device=device) for _ in range(4)))


def chunk_step(
    state: ZeroSState, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor, gates: Gates
) -> tuple[torch.Tensor, ZeroSState]:
    """Causal ZeroS of one chunk of C tokens, given what came before: ``(out [B, Hq, C, Dv], state after)``.

    ``q [B, Hq, C, D]`` and ``k [B, Hkv, C, D]`` have length 1, ``s [B, Hkv, C]``. Row a of the chunk stands at step
    ``t + a``. With ``m_a`` the maximum up to it, ``X_ab = e^(s_b - m_a)`` for ``b <= a``:

    ``R_ab = gate_h_a (X_ab / E_a - 1/t) + beta_a (s_b - P_a / t)``, and
    ``O = (Q K^T * R) V + alpha c * (Q F) + beta * (Q G) + gamma * (Q H)``.
    """
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    state = _origin(state, s)
    s = s - state.m[..., None]  # the origin of G and P; e^(0 - m_a) is the c of the docstring
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    top = s.cummax(dim=-1).values.clamp(min=0)  # [B, Hkv, C]: m_a - m
    before = torch.exp(-top)
    x = torch.exp((s[..., None, :] - top[..., None]).masked_fill(hidden, float("-inf")))  # [B, Hkv, C, C]
    t = state.t[..., None] + torch.arange(1, length + 1, device=q.device, dtype=q.dtype)
    e = before * state.E[..., None] + x.sum(dim=-1)
    mean = (state.P[..., None] + s.cumsum(dim=-1)) / t
    softmax, t, mean, c = (repeat_kv(y, groups) for y in (x / e[..., None], t, mean, before / e))
    beta = (gates.first - gates.higher) / t
    # Differences first: softmax against 1/t, s against its mean. What is left of them is the weight.
    r = gates.higher[..., None] * (softmax - 1 / t[..., None])
    r = r + beta[..., None] * (repeat_kv(s, groups)[..., None, :] - mean[..., None])
    if gates.zeroth is not None:
        r = r + (gates.zeroth / t)[..., None]
    inside = (q @ repeat_kv(k, groups).transpose(-1, -2)) * r.masked_fill(hidden, 0.0)
    out = inside @ repeat_kv(v, groups) + _mix(state, q, gates.higher * c, beta, _gamma(gates, beta, mean, t))
    return out, _write(state, k, v, s)


def read(state: ZeroSState, q: torch.Tensor, gates: Gates) -> torch.Tensor:
    """What queries of length 1, ``[B, Hq, N, D]``, find in the state: ``[B, Hq, N, Dv]``; 0 if it is empty."""
    groups = q.shape[1] // state.H.shape[1]
    empty = state.t == 0
    e, t = (x.masked_fill(empty, 1.0)[..., None] for x in (state.E, state.t))
    e, t, p = (repeat_kv(x, groups) for x in (e, t, state.P[..., None]))
    beta = (gates.first - gates.higher) / t
    return _mix(state, q, gates.higher / e, beta, _gamma(gates, beta, p / t, t))


def absorb(state: ZeroSState, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> ZeroSState:
    """Write keys of length 1, values and logits into the state, in any number."""
    if k.shape[2] == 0:
        return state
    state = _origin(state, s)
    return _write(state, k, v, s - state.m[..., None])


def _origin(state: ZeroSState, s: torch.Tensor) -> ZeroSState:
    """Before the first token the origin is its logit: as good as any, and near the rest."""
    return state._replace(m=torch.where(state.t > 0, state.m, s[..., 0]))


def _write(state: ZeroSState, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> ZeroSState:
    """The state after a chunk whose logits ``s`` are measured from ``state.m``."""
    rise = s.amax(dim=-1).clamp(min=0)  # m' - m
    s = s - rise[..., None]
    w, fade = torch.exp(s), torch.exp(-rise)
    kt, wide_fade, wide_rise = k.transpose(-1, -2), fade[..., None, None], rise[..., None, None]
    return ZeroSState(
        wide_fade * state.F + (kt * w[..., None, :]) @ v,
        state.G - wide_rise * state.H + (kt * s[..., None, :]) @ v,
        state.H + kt @ v,
        fade * state.E + w.sum(dim=-1),
        state.P - rise * state.t + s.sum(dim=-1),
        state.t + s.shape[-1],
        state.m + rise,
    )


def _gamma(gates: Gates, beta: torch.Tensor, mean: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Weight of the constant function: what makes the three sum to zero (to ``gate_0``, where there is one)."""
    constant = gates.higher if gates.zeroth is None else gates.higher - gates.zeroth
    return -beta * mean - constant / t


def _mix(
    state: ZeroSState, q: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, gamma: torch.Tensor
) -> torch.Tensor:
    """``alpha Q F + beta Q G + gamma Q H``, coefficients ``[B, Hq, N]``."""
    groups = q.shape[1] // state.H.shape[1]
    parts = zip((alpha, beta, gamma), (state.F, state.G, state.H))
    return sum((c[..., None] * (q @ repeat_kv(x, groups)) for c, x in parts), torch.zeros_like(q[..., :1]))
