"""The delta rule in readable PyTorch: DeltaNet and Gated DeltaNet, token by token and in chunks.

Linear attention adds ``k v^T`` to its state, whatever the state says about ``k`` already. The delta rule asks first,
and writes what is missing:

    forget  S = exp(g_t) S_{t-1}                 (DeltaNet: g = 0)
    error   e = v_t - S^T k_t                    what the state answers to k_t, against what it should
    write   S_t = S + beta_t k_t e^T
    read    o_t = scale S_t^T q_t

One write is a step of gradient descent, rate ``beta_t``, on ``|S^T k_t - v_t|^2 / 2``; in one line
``S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T``. In the direction of ``k_t`` the old state is
multiplied by ``1 - beta_t |k_t|^2`` (:func:`transition_eigenvalue`): with keys of length 1 and ``beta`` in (0, 2) it
never grows, with longer keys it can explode. **The functions here take keys as they come**: call
:func:`l2_normalize` first, as :class:`~effattn_lab.linear.delta_rule_layer.DeltaRule` does.

Source: Schlag et al. 2021; the chunked form Yang et al. 2024 (DeltaNet); the gate Yang et al. 2025 (Gated DeltaNet).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from effattn_lab._validate import check_positive_int, check_qkv, resolve_scale


def l2_normalize(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """``x / sqrt(|x|^2 + eps)`` over the last axis: length 1 at most, a zero vector stays zero."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + eps)


def transition_eigenvalue(k: torch.Tensor, beta: torch.Tensor, g: torch.Tensor | None = None) -> torch.Tensor:
    """What each token multiplies the old state by, along its own key: ``exp(g) (1 - beta |k|^2)``, ``[B, H, N]``.

    All other directions are multiplied by ``exp(g)``. An absolute value above 1, again and again, and the state
    explodes; with keys of length 1 it takes a ``beta`` below 0 or above 2. Negative values (``beta > 1``) flip the
    sign of what is stored, which is what counting modulo two needs.
    """
    value = 1 - beta * k.square().sum(dim=-1)
    return value if g is None else value * g.exp()


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The reference: forget, compare, write, read, token after token. Causal by its nature.

    Args:
        q: queries ``[B, Hq, N, D]``, any floating dtype.
        k: keys ``[B, Hkv, N, D]``, meant to have length 1; Hkv divides Hq, query head h reads state
            ``h // (Hq / Hkv)``.
        v: values ``[B, Hkv, N, Dv]``; Dv may differ from D.
        beta: how far each write goes, ``[B, Hkv, N]``. 0: nothing is written. 1: the state then answers ``v`` to
            ``k`` exactly (for ``|k| = 1``), whatever it answered before. Up to 2: beyond it, mirrored.
        g: log decay ``[B, Hkv, N]``, at most 0: the state is multiplied by ``exp(g)`` *before* the comparison.
            Default: no decay, DeltaNet; with it, Gated DeltaNet.
        scale: multiplies what is read. Default ``D ** -0.5``.
        initial_state: ``S [B, Hkv, D, Dv]``, float32 or float64. Default: zeros.
        return_state: also return the state after the last token. Default False.

    Returns:
        ``out [B, Hq, N, Dv]`` in the dtype of ``q``, or ``(out, state)``. Computed, and the state kept, in float64
        for float64 inputs, else in float32.

    Raises:
        ValueError: for inputs that do not fit together; the message names the argument.
    """
    dtype = q.dtype if isinstance(q, torch.Tensor) else None
    q, k, v, beta, g, state = _prepare(q, k, v, beta, g, scale, initial_state)
    outs = []
    for t in range(k.shape[2]):
        decay = None if g is None else g[:, :, t].exp()
        out, state = _token(state, q[:, :, :, t], k[:, :, t], v[:, :, t], beta[:, :, t], decay)
        outs.append(out)
    merged = torch.stack(outs, dim=3).flatten(1, 2).to(dtype)
    return (merged, state) if return_state else merged


def delta_rule_step(
    state: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode one token: the same numbers as the other forms, time and memory that know no length.

    Args:
        state: ``S [B, Hkv, D, Dv]`` as returned by any form; None before the first token.
        q, k, v, beta, g, scale: as in :func:`delta_rule`, with N = 1.

    Returns:
        ``(out [B, Hq, 1, Dv], new state)``; the state given is left as it was.

    Raises:
        ValueError: for inputs that do not fit together; the message names the argument.
    """
    dtype = q.dtype if isinstance(q, torch.Tensor) else None
    q, k, v, beta, g, state = _prepare(q, k, v, beta, g, scale, state, state_name="state")
    if k.shape[2] != 1:
        raise ValueError(f"q: expected one token, a length of 1, got {k.shape[2]}")
    decay = None if g is None else g[:, :, 0].exp()
    out, state = _token(state, q[:, :, :, 0], k[:, :, 0], v[:, :, 0], beta[:, :, 0], decay)
    return out.flatten(1, 2)[:, :, None].to(dtype), state


def _token(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    decay: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: ``q [B, Hkv, G, D]``, ``k [B, Hkv, D]``, ``v [B, Hkv, Dv]``, ``beta`` and ``decay [B, Hkv]``."""
    if decay is not None:
        state = decay[..., None, None] * state
    error = v - (k[..., None, :] @ state)[..., 0, :]  # [B, Hkv, Dv]
    state = state + (beta[..., None] * k)[..., :, None] * error[..., None, :]
    return q @ state, state  # read after the write: a token sees itself


def decay_matrix(g: torch.Tensor) -> torch.Tensor:
    """``Gamma[a, b] = exp(g_{b+1} + ... + g_a)`` for ``a >= b``, else 0: what a write at b has kept at a.

    ``g [..., C]`` to ``[..., C, C]``. The sums are of the segments themselves, not differences of running sums: one
    token that forgets all (g = -1e4, or -inf) would cost those differences the digits of all that follow.
    """
    size = g.shape[-1]
    steps = g[..., :, None].expand(*g.shape, size)  # [.., a, b]: g_a in row a
    square = torch.ones(size, size, dtype=torch.bool, device=g.device)
    sums = steps.masked_fill(square.triu(), 0.0).cumsum(dim=-2)
    return sums.masked_fill(square.triu(1), float("-inf")).exp()


def forward_substitution(lower: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    """Solve ``(I + lower) x = rhs`` row by row, ``lower [..., C, C]`` strictly lower triangular, ``rhs [..., C, n]``.

    ``x_i = rhs_i - sum_{j<i} lower_ij x_j``: each row needs the finished ones above it. These C steps are the only
    sequential part of a chunk, and they are short: C numbers each, where the recurrence carries a whole state.
    :func:`wy_transform` leaves them to ``torch.linalg.solve_triangular``, which does the same.
    """
    rows: list[torch.Tensor] = []
    for i in range(lower.shape[-1]):
        row = rhs[..., i, :]
        if rows:
            row = row - (lower[..., i, None, :i] @ torch.stack(rows, dim=-2))[..., 0, :]
        rows.append(row)
    return torch.stack(rows, dim=-2)


def wy_transform(
    k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, gamma: torch.Tensor, from_start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The UT transform of a chunk: ``U [..., C, Dv]`` and ``W [..., C, D]`` with ``X = U - W S``.

    ``X`` holds what each token of the chunk writes, ``x_a = beta_a e_a``, and the error of token a contains the
    writes before it: ``x_a = beta_a (v_a - decay_a k_a S - sum_{b<a} Gamma_ab (k_a . k_b) x_b)``. Collect the x:

        (I + L) X = beta (V - decay K S),    L = strictly lower part of beta (Gamma * K K^T)

    a unit lower triangular system. S comes later, so both parts of the right side are solved for.

    Args:
        k: keys ``[..., C, D]``. v: values ``[..., C, Dv]``. beta: ``[..., C]``.
        gamma: :func:`decay_matrix` of the chunk, ``[..., C, C]``.
        from_start: what each token finds left of the state that the chunk began with, ``exp(g_1 + .. + g_a)``.
    """
    weights = beta[..., None] * gamma * (k @ k.mT)
    rhs = beta[..., None] * torch.cat([v, from_start[..., None] * k], dim=-1)
    # unitriangular: the diagonal is taken as 1 and the upper part is not looked at, so no masks and no I.
    solved = torch.linalg.solve_triangular(weights, rhs, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    return u, w


def delta_rule_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    chunk_size: int = 64,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`delta_rule` by matrix products, ``chunk_size`` tokens at a time; differentiable.

    1. All chunks at once: :func:`wy_transform`.
    2. Chunk after chunk: ``X = U - W S``, then ``S' = decay_C S + (to_end K)^T X``.
    3. All chunks at once: ``O = decay Q S + (Gamma * Q K^T) X``.

    Args:
        q, k, v, beta, g, scale, initial_state, return_state: as in :func:`delta_rule`.
        chunk_size: C, at least 1. Default 64. The result does not depend on it but for rounding; time does.

    Returns:
        ``out [B, Hq, N, Dv]`` in the dtype of ``q``, or ``(out, state)`` with the state in at least float32.

    Raises:
        ValueError: for inputs that do not fit together; the message names the argument.
    """
    check_positive_int("chunk_size", chunk_size)
    dtype = q.dtype if isinstance(q, torch.Tensor) else None
    q, k, v, beta, g, state = _prepare(q, k, v, beta, g, scale, initial_state)
    length = k.shape[2]
    size = min(chunk_size, length)
    # Ragged end: tokens with key, value, beta and log decay 0 write nothing and forget nothing.
    pad = -length % size
    k, v, q = (F.pad(x, (0, 0, 0, pad)).unflatten(-2, (-1, size)) for x in (k, v, q))  # [B, Hkv, M, C, .]
    beta = F.pad(beta, (0, pad)).unflatten(-1, (-1, size))
    if g is None:
        gamma = torch.ones(size, size, dtype=k.dtype, device=k.device).tril()
        from_start = torch.ones(size, dtype=k.dtype, device=k.device)
    else:
        g = F.pad(g, (0, pad)).unflatten(-1, (-1, size))
        gamma, from_start = decay_matrix(g), g.cumsum(dim=-1).exp()
    u, w = wy_transform(k, v, beta, gamma, from_start)
    keys = gamma[..., -1, :, None] * k  # as much of each write as the end of the chunk still has
    states, writes = [], []
    for m in range(k.shape[2]):
        x = u[:, :, m] - w[:, :, m] @ state
        states.append(state)
        writes.append(x)
        if g is not None:
            state = from_start[:, :, m, -1, None, None] * state
        state = state + keys[:, :, m].mT @ x
    before, x = torch.stack(states, dim=2)[:, :, None], torch.stack(writes, dim=2)[:, :, None]
    # q is [B, Hkv, G, M, C, D]; the G query heads of a key head share everything else.
    scores = (q @ k[:, :, None].mT) * (gamma if g is None else gamma[:, :, None])
    decayed = q if g is None else from_start[:, :, None, ..., None] * q
    out = (decayed @ before + scores @ x).flatten(3, 4)[:, :, :, :length].flatten(1, 2).to(dtype)
    return (out, state) if return_state else out


def _prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    scale: float | None,
    state: torch.Tensor | None,
    state_name: str = "initial_state",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Checked inputs in at least float32; q scaled and grouped, ``[B, Hkv, G, N, D]``; the state to begin with."""
    check_qkv(q, k, v, any_value_dim=True)
    scale = resolve_scale(scale, q.shape[3])
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k: expected the length of q ({q.shape[2]}), got {k.shape[2]}")
    for name, x in (("beta", beta), ("g", g)):
        if x is not None or name == "beta":
            _check_gate(name, x, k)
    # Half precision is widened first: a state is a long sum, and an error in it is compared with later ones.
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, heads, _, dim = k.shape
    if state is None:
        state = torch.zeros(batch, heads, dim, v.shape[3], dtype=dtype, device=k.device)
    else:
        _check_state(state_name, state, k, v)
    q = (scale * q.to(dtype)).unflatten(1, (heads, -1))
    g = None if g is None else g.to(dtype)
    return q, k.to(dtype), v.to(dtype), beta.to(dtype), g, state.to(dtype)


def _check_gate(name: str, x: object, k: torch.Tensor) -> None:
    shape = tuple(k.shape[:3])
    if not isinstance(x, torch.Tensor) or tuple(x.shape) != shape:
        came = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"{name}: expected one number a token and key head, shape {shape}, got {came}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name}: expected a floating dtype, got {x.dtype}")
    if x.device != k.device:
        raise ValueError(f"{name}: expected the device of k ({k.device}), got {x.device}")


def _check_state(name: str, state: object, k: torch.Tensor, v: torch.Tensor) -> None:
    shape = (*k.shape[:2], k.shape[3], v.shape[3])
    if not isinstance(state, torch.Tensor) or tuple(state.shape) != shape:
        came = tuple(state.shape) if isinstance(state, torch.Tensor) else type(state).__name__
        raise ValueError(f"{name}: expected a state of shape {shape} or None, got {came}")
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name}: expected float32 or float64, got {state.dtype}")
    if state.device != k.device:
        raise ValueError(f"{name}: expected the device of k ({k.device}), got {state.device}")
