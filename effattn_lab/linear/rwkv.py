"""RWKV-6 and RWKV-7: one reads before it writes, the other leaves the pure decay.

RWKV-6 is :mod:`effattn_lab.linear.gated_linear` with two changes at the token itself: it is read *before* the decay
and the write, and gets a weight ``u`` of its own. The state that query t + 1 finds is the one that token t left, so
shifting the queries by one place turns it into the plain recurrence; nothing new has to be computed.

RWKV-7 has the transition ``diag(exp(g)) - kappa (a kappa)^T``, a decay *and* a rank-one erase: no mask of decays
describes a product of such matrices. Its chunks solve a triangular system first, which gives each token a
pseudo-value (what it erases); then the rest is the plain chunk with twice as many keys.
Sources: Peng et al. 2024 (Eagle and Finch), Peng et al. 2025 (RWKV-7 Goose).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from effattn_lab._validate import check_positive_int, check_qkv, resolve_scale
from effattn_lab.linear.decay import after, before, scores, up_to
from effattn_lab.linear.gated_linear import (
    check_gate,
    gated_linear_chunked,
    gated_linear_step,
    init_state,
    start,
)


def rwkv6(
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    u: torch.Tensor,
    *,
    scale: float = 1.0,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference: read ``o_t = scale (S_(t-1) + diag(u) k_t v_t^T)^T r_t``, then decay and write as ever.

    ``S_t = diag(exp(g_t)) S_(t-1) + k_t v_t^T``.

    Args:
        r: receptance, the queries ``[B, H, N, K]``.
        k, v, g: keys, values and log decays a channel, ``[B, H, N, K]``, ``[B, H, N, V]``, ``[B, H, N, K]``.
        u: bonus of the token itself ``[H, K]``.
        scale: RWKV uses 1.
        initial_state: ``[B, H, K, V]`` or None.

    Returns:
        ``(out [B, H, N, V] in the dtype of r, state)``.

    Raises:
        ValueError: for inputs that do not fit together; the message names the argument.
    """
    dtype = r.dtype if isinstance(r, torch.Tensor) else None
    _check(r, k, v, g, u)
    wide = torch.promote_types(r.dtype, torch.float32)
    r, k, v, g, u = (x.to(wide) for x in (r, k, v, g, u))
    state = start(initial_state, k, v, "initial_state")
    rows = []
    for t in range(r.shape[2]):
        kv = k[:, :, t, :, None] * v[:, :, t, None, :]  # [B, H, K, V]
        rows.append(r[:, :, t, None] @ (state + u[:, :, None] * kv))
        state = g[:, :, t].exp()[..., None] * state + kv
    return (scale * torch.cat(rows, dim=2)).to(dtype), state


def rwkv6_chunked(
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    u: torch.Tensor,
    *,
    scale: float = 1.0,
    chunk_size: int = 64,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`rwkv6` through :func:`~effattn_lab.linear.gated_linear.gated_linear_chunked`.

    Query t + 1 reads what token t left: queries ``1 .. N - 1`` go with keys, values and decays ``0 .. N - 2``, all
    views of what is there. Query 0 reads the initial state; the bonus is a product of each token with itself.
    """
    dtype = r.dtype if isinstance(r, torch.Tensor) else None
    check_positive_int("chunk_size", chunk_size)
    _check(r, k, v, g, u)
    wide = torch.promote_types(r.dtype, torch.float32)
    r, k, v, g, u = (x.to(wide) for x in (r, k, v, g, u))
    state = start(initial_state, k, v, "initial_state")
    out = r[:, :, :1] @ state
    if r.shape[2] > 1:
        past = (x[:, :, :-1] for x in (k, v, g))
        rest, state = gated_linear_chunked(
            r[:, :, 1:], *past, scale=1.0, chunk_size=chunk_size, initial_state=state, return_state=True
        )
        out = torch.cat([out, rest], dim=2)
    out = out + (r * u[:, None] * k).sum(-1, keepdim=True) * v
    last = slice(r.shape[2] - 1, None)
    state = g[:, :, last].exp().transpose(-1, -2) * state + k[:, :, last].transpose(-1, -2) @ v[:, :, last]
    return (scale * out).to(dtype), state


def rwkv6_step(
    state: torch.Tensor | None,
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    u: torch.Tensor,
    *,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of :func:`rwkv6`, ``[B, H, 1, ...]``: ``(out, new state)``."""
    _check(r, k, v, g, u)
    wide = torch.promote_types(r.dtype, torch.float32)
    found = start(state, k.to(wide), v.to(wide), "state")
    own = (r * u[:, None] * k).to(wide).sum(-1, keepdim=True) * v
    # The plain step decays and writes; its reading, of the state after, is not the one wanted here.
    _, state = gated_linear_step(found, r, k, v, g)
    return (scale * (r.to(wide) @ found + own)).to(r.dtype), state


def rwkv7(
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    kappa: torch.Tensor,
    a: torch.Tensor,
    *,
    scale: float = 1.0,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference: ``S_t = diag(exp(g_t)) S_(t-1) - (a_t * kappa_t) (kappa_t^T S_(t-1)) + k_t v_t^T``.

    ``o_t = scale S_t^T r_t``. Decay, then an erase of what the removal key ``kappa`` finds in the *undecayed* state,
    then a write. With a = 0 it is :func:`~effattn_lab.linear.gated_linear.gated_linear`; with g = 0, ``a = beta`` in
    every channel and ``k = beta kappa`` it is the delta rule.

    Args:
        r, k, v, g: as in :func:`rwkv6`.
        kappa: removal keys ``[B, H, N, K]`` of length 1 (or 0).
        a: in-context learning rates ``[B, H, N, K]`` in [0, 1].
        scale: RWKV uses 1.
        initial_state: ``[B, H, K, V]`` or None.

    Returns:
        ``(out [B, H, N, V] in the dtype of r, state)``.

    Raises:
        ValueError: for inputs that do not fit together; the message names the argument.
    """
    dtype = r.dtype if isinstance(r, torch.Tensor) else None
    r, k, v, g, kappa, a, state = _prepare7(r, k, v, g, kappa, a, scale, initial_state, "initial_state")
    rows = []
    for t in range(r.shape[2]):
        here = slice(t, t + 1)
        found = kappa[:, :, here] @ state  # [B, H, 1, V]
        erased = (a * kappa)[:, :, here].transpose(-1, -2) @ found
        state = g[:, :, here].exp().transpose(-1, -2) * state - erased
        state = state + k[:, :, here].transpose(-1, -2) @ v[:, :, here]
        rows.append(r[:, :, here] @ state)
    return torch.cat(rows, dim=2).to(dtype), state


def rwkv7_chunked(
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    kappa: torch.Tensor,
    a: torch.Tensor,
    *,
    scale: float = 1.0,
    chunk_size: int = 16,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`rwkv7` chunk by chunk; a triangular system in each.

    Write the erase as ``- b_t x_t^T`` with ``b = a kappa`` and the pseudo-value ``x_t = S_(t-1)^T kappa_t``. Then the
    state is a plain decayed sum, of the ``k v^T`` and of the ``- b x^T``, and x reads it, one token earlier:
    ``X = kappa_decayed S + A_kk V - A_kb X``. A is strictly lower triangular, so the system
    ``(I + A_kb) X = kappa_decayed S + A_kk V`` is solved from the top.
    """
    dtype = r.dtype if isinstance(r, torch.Tensor) else None
    check_positive_int("chunk_size", chunk_size)
    r, k, v, g, kappa, a, state = _prepare7(r, k, v, g, kappa, a, scale, initial_state, "initial_state")
    pieces = zip(*(x.split(chunk_size, dim=2) for x in (r, k, v, g, kappa, a)))
    rows = []
    for r_c, k_c, v_c, g_c, kappa_c, a_c in pieces:
        b_c = a_c * kappa_c
        size = r_c.shape[2]
        eye = torch.eye(size, dtype=r_c.dtype, device=r_c.device)
        found = (kappa_c * before(g_c).exp()) @ state + _earlier(kappa_c, k_c, g_c) @ v_c
        x = torch.linalg.solve_triangular(
            eye + _earlier(kappa_c, b_c, g_c), found, upper=False, unitriangular=True
        )
        out = (r_c * up_to(g_c).exp()) @ state + scores(r_c, k_c, g_c) @ v_c - scores(r_c, b_c, g_c) @ x
        rest = after(g_c).exp()
        state = g_c.sum(2).exp()[..., None] * state + (k_c * rest).transpose(-1, -2) @ v_c
        state = state - (b_c * rest).transpose(-1, -2) @ x
        rows.append(out)
    return torch.cat(rows, dim=2).to(dtype), state


def rwkv7_step(
    state: torch.Tensor | None,
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    kappa: torch.Tensor,
    a: torch.Tensor,
    *,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of :func:`rwkv7`, ``[B, H, 1, ...]``: ``(out, new state)``."""
    if isinstance(r, torch.Tensor) and r.dim() == 4 and r.shape[2] != 1:
        raise ValueError(f"r: expected one token, a length of 1, got {r.shape[2]}")
    if state is None and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor) and k.dim() == 4:
        state = init_state(k.shape[0], k.shape[1], k.shape[3], v.shape[3], device=k.device)
    return rwkv7(r, k, v, g, kappa, a, scale=scale, initial_state=state)


def _earlier(query: torch.Tensor, key: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Strictly causal scores, decayed up to token i - 1: row i is the plain row i - 1 with the next query."""
    if query.shape[2] == 1:
        return torch.zeros_like(query[..., :1])
    inside = scores(query[:, :, 1:], key[:, :, :-1], g[:, :, :-1])
    return F.pad(inside, (0, 1, 1, 0))


def _check(r: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, u: torch.Tensor) -> None:
    check_qkv(r, k, v, any_value_dim=True)
    if r.shape != k.shape:
        raise ValueError(f"k: expected the shape of r {tuple(r.shape)}, got {tuple(k.shape)}")
    check_gate(r, k, g)
    if g.dim() != 4:
        raise ValueError(f"g: expected a decay a channel, shape {tuple(k.shape)}, got {tuple(g.shape)}")
    shape = (k.shape[1], k.shape[3])
    if not isinstance(u, torch.Tensor) or tuple(u.shape) != shape:
        came = tuple(u.shape) if isinstance(u, torch.Tensor) else type(u).__name__
        raise ValueError(f"u: expected shape {shape}, got {came}")


def _prepare7(
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    kappa: torch.Tensor,
    a: torch.Tensor,
    scale: float,
    state: torch.Tensor | None,
    name: str,
) -> tuple[torch.Tensor, ...]:
    """Checked inputs in at least float32: ``(scale r, k, v, g, kappa, a, state)``."""
    check_qkv(r, k, v, any_value_dim=True)
    if r.shape != k.shape:
        raise ValueError(f"k: expected the shape of r {tuple(r.shape)}, got {tuple(k.shape)}")
    check_gate(r, k, g)
    for argument, x in (("g", g), ("kappa", kappa), ("a", a)):
        if not isinstance(x, torch.Tensor) or x.shape != k.shape:
            came = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{argument}: expected the shape of k {tuple(k.shape)}, got {came}")
    wide = torch.promote_types(r.dtype, torch.float32)
    r, k, v, g, kappa, a = (x.to(wide) for x in (r, k, v, g, kappa, a))
    return resolve_scale(scale, k.shape[3]) * r, k, v, g, kappa, a, start(state, k, v, name)
