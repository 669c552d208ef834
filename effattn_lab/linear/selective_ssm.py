"""The selective scan of Mamba-1 in readable PyTorch: reference, parallel and chunked forms, one decode step.

Each of E channels is a linear system with S hidden numbers, ``h' = A h + B u``, ``y = C h + D u``, sampled with a
step ``delta`` that depends on the token, as B and C do; that is what *selective* means:

    h_t = exp(delta_t A) h_{t-1} + (delta_t u_t) B_t,     y_t = C_t . h_t + D u_t,     out_t = y_t silu(z_t)

Layout: ``[B, E, N]``, channels before time, as in mamba_ssm and transformers, so that arguments and weights mean
the same in all three. It costs nothing: the layer's projection gives ``[B, N, E]``, and its transpose is a view.
``B`` in a shape is the batch, elsewhere the input matrix; E stands for mamba_ssm's d_inner, S for its d_state, N
for L. Source: Gu and Dao 2023 (Mamba), sections 3.2 to 3.3; mamba_ssm's ``selective_scan_ref``.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from effattn_lab._validate import check_positive_int
from effattn_lab.linear._selective_ssm_inputs import RULES, Inputs, Rule, prepare
from effattn_lab.linear.scans import SCANS, scan_sequential


def discretize(
    delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, *, rule: Rule = "euler"
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sampling step of ``h' = A h + B u``: ``(A_bar, B_bar)`` with ``h_t = A_bar h_{t-1} + B_bar u_t``.

    An input held constant for a time delta (zero-order hold) has the exact solution ``A_bar = exp(delta A)`` and
    ``B_bar = (exp(delta A) - 1) / A * B``. That is the paper's equation 4. Its code keeps ``A_bar`` and takes the
    first term of ``B_bar`` alone, ``delta B`` ("euler"): the quotient is ``delta (1 + delta A / 2 + ...)``.

    Args:
        delta, A, B: of shapes that broadcast; A is diagonal, so all is elementwise.
        rule: "euler" (the code, default) or "zoh" (the paper).
    """
    if rule not in RULES:
        raise ValueError(f"rule: expected 'euler' or 'zoh', got {rule!r}")
    x = delta * A
    gain = delta if rule == "euler" else delta * _phi(x)
    return torch.exp(x), gain * B


def _phi(x: torch.Tensor) -> torch.Tensor:
    """``(exp(x) - 1) / x``, 1 at 0; its gradient too is finite there."""
    small = x.abs() < 1e-4
    safe = torch.where(small, 1.0, x)
    return torch.where(small, 1 + x / 2 + x * x / 6, torch.expm1(safe) / safe)


@overload
def selective_scan(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
    D: torch.Tensor | None = ..., z: torch.Tensor | None = ..., delta_bias: torch.Tensor | None = ...,
    delta_softplus: bool = ..., initial_state: torch.Tensor | None = ..., return_state: Literal[False] = ...,
    *, rule: Rule = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def selective_scan(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
    D: torch.Tensor | None = ..., z: torch.Tensor | None = ..., delta_bias: torch.Tensor | None = ...,
    delta_softplus: bool = ..., initial_state: torch.Tensor | None = ..., *, return_state: Literal[True],
    rule: Rule = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    *,
    rule: Rule = "euler",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The reference: token after token, as it is written.

    Args:
        u: inputs ``[B, E, N]``, any floating dtype.
        delta: step sizes ``[B, E, N]``, at least 0 after bias and softplus.
        A: ``[E, S]``, any floating dtype; negative, or the state grows.
        B, C: ``[B, S, N]``, shared by all channels, or ``[B, G, S, N]``: G groups of ``E / G`` channels.
        D: skip weights ``[E]``, or None: no skip.
        z: gate ``[B, E, N]``; the output is multiplied by ``silu(z)``. None: no gate.
        delta_bias: ``[E]``, added to delta.
        delta_softplus: apply softplus to delta, after the bias. Default False.
        initial_state: ``[B, E, S]`` in float32 or float64. Default zeros.
        return_state: also return the state after the last token. Default False.
        rule: how the input enters, see :func:`discretize`. Default "euler", as all released models.

    Returns:
        ``out [B, E, N]`` in the dtype of u, or ``(out, state [B, E, S])`` with the state in at least float32.
        Computed in float64 for float64 inputs, else in float32.

    Raises:
        ValueError: for inputs that do not fit together; the message names the argument.
    """
    x = prepare(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, rule)
    h, rows = x.state, []
    for u_t, delta_t, B_t, C_t in zip(x.u, x.delta, x.B, x.C):
        A_bar, B_bar = discretize(delta_t[..., None], x.A, B_t[:, :, None, :], rule=rule)
        h = A_bar * h + B_bar * u_t[..., None]  # [B, G, R, S]
        rows.append((h * C_t[:, :, None, :]).sum(-1))  # the state is read after it is written
    out = _finish(torch.stack(rows), x.u, u, D, z)
    return (out, h.flatten(1, 2)) if return_state else out


def selective_scan_parallel(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    *,
    rule: Rule = "euler",
    algorithm: str = "blelloch",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`selective_scan` in logarithmic depth, by an associative scan over all tokens at once; differentiable.

    Arguments, result and errors as there, and ``algorithm``: "blelloch" (fewer combinations, default) or
    "hillis-steele" (half the depth), see :mod:`effattn_lab.linear.scans`. Holds ``[N, B, E, S]``.
    """
    if algorithm not in SCANS:
        raise ValueError(f"algorithm: expected one of {', '.join(SCANS)}, got {algorithm!r}")
    x = prepare(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, rule)
    a, b = _maps(x, rule)
    products, h = SCANS[algorithm](a, b)
    h = h + products * x.state  # decays multiply, they are never divided out: nothing can overflow
    out = _finish(_read(h, x.C), x.u, u, D, z)
    return (out, h[-1].flatten(1, 2)) if return_state else out


def selective_scan_chunked(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    *,
    rule: Rule = "euler",
    chunk_size: int = 64,
    recompute: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`selective_scan` chunk by chunk: only one chunk's states exist at a time, a border state is handed on.

    Arguments, result and errors as there, and

    Args:
        chunk_size: tokens a chunk, at least 1. Default 64. The result does not depend on it but for rounding.
        recompute: for the backward pass keep the border states alone, ``ceil(N / chunk_size)`` of them, and work
        out
            a chunk's inner states again: Mamba's second idea beside the scan. Costs one more forward. Default True.
    """
    check_positive_int("chunk_size", chunk_size)
    x = prepare(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, rule)
    state, parts = x.state, []
    keep = not (recompute and torch.is_grad_enabled() and any(t.requires_grad for t in x))
    for u_c, delta_c, B_c, C_c in zip(*(t.split(chunk_size) for t in (x.u, x.delta, x.B, x.C))):
        chunk = Inputs(u_c, delta_c, x.A, B_c, C_c, state)
        if keep:
            y, state = _chunk(rule, *chunk)
        else:
            y, state = checkpoint(_chunk, rule, *chunk, use_reentrant=False, preserve_rng_state=False)
        parts.append(y)
    out = _finish(torch.cat(parts), x.u, u, D, z)
    return (out, state.flatten(1, 2)) if return_state else out


def _chunk(rule: Rule, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(y [C, B, G, R], state after the chunk)``."""
    x = Inputs(*inputs)
    h = scan_sequential(*_maps(x, rule), x.state)
    return _read(h, x.C), h[-1]


def selective_scan_step(
    state: torch.Tensor | None,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    *,
    rule: Rule = "euler",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode one token: decay the state, write, read. Time and memory know no length.

    Args:
        state: ``[B, E, S]``, what a scan or the last step returned; None before the first token.
        u, delta, z: ``[B, E, 1]``. B, C: ``[B, S, 1]`` or ``[B, G, S, 1]``. The rest as in :func:`selective_scan`.

    Returns:
        ``(out [B, E, 1] in the dtype of u, new state)``; the state given is left as it was.
    """
    if isinstance(u, torch.Tensor) and u.dim() == 3 and u.shape[2] != 1:
        raise ValueError(f"u: expected one token, a length of 1, got {u.shape[2]}")
    x = prepare(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, rule, state_name="state")
    a, b = _maps(x, rule)
    h = a * x.state + b
    return _finish(_read(h, x.C), x.u, u, D, z), h[0].flatten(1, 2)


def implicit_attention(
    delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, *, rule: Rule = "euler"
) -> torch.Tensor:
    """The matrix that the scan multiplies ``u`` by, ``[B, E, N, N]``; quadratic, to look at and to test with.

    ``M[t, r] = sum_j C_t[j] exp(A[j] (delta_{r+1} + ... + delta_t)) B_bar_r[j]`` for ``r <= t``: scores ``C . B``
    as queries and keys have, under a decay that each channel and each state sets for itself. No matrix product
    gives all channels at once; that is what Mamba-2 gave up the inner structure of A for.

    Args:
        delta: ``[B, E, N]``, bias and softplus applied. A, B, C, rule: as in :func:`selective_scan`.
    """
    x = prepare(delta, delta, A, B, C, None, None, None, False, None, rule)
    log_decay = x.delta[..., None] * x.A  # [N, B, G, R, S]
    since = log_decay.cumsum(0)
    span = since[:, None] - since[None]  # [t, r, ...]: the decay of r+1 .. t
    n = len(since)
    seen = torch.ones(n, n, dtype=torch.bool, device=delta.device).tril()[:, :, None, None, None, None]
    # Masked before the exponential: above the diagonal it would be exp of something large.
    weights = torch.exp(torch.where(seen, span, -torch.inf))
    _, B_bar = discretize(x.delta[..., None], x.A, x.B[:, :, :, None, :], rule=rule)
    m = torch.einsum("tbgs,trbgcs,rbgcs->bgctr", x.C, weights, B_bar)
    return m.flatten(1, 2)


def lti_kernel(
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    length: int,
    *,
    rule: Rule = "euler",
) -> torch.Tensor:
    """What the scan is when nothing depends on the token: the kernel of a causal convolution, ``[E, length]``.

    ``K[j] = sum_s C[s] exp(delta A[s])^j B_bar[s]``. This is S4D's kernel; a selective model has none.

    Args:
        delta: ``[E]``. A, B, C: ``[E, S]``. length: entries wanted.
    """
    check_positive_int("length", length)
    _, B_bar = discretize(delta[:, None], A, B, rule=rule)
    powers = torch.arange(length, dtype=A.dtype, device=A.device)
    decay = torch.exp((delta[:, None] * A)[..., None] * powers)  # [E, S, length]
    return ((C * B_bar)[..., None] * decay).sum(1)


def _maps(x: Inputs, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's map ``h -> a h + b``, two tensors ``[N, B, G, R, S]``."""
    a, B_bar = discretize(x.delta[..., None], x.A, x.B[:, :, :, None, :], rule=rule)
    return a, B_bar * x.u[..., None]


def _read(h: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """``y [N, B, G, R]`` from states ``[N, B, G, R, S]`` and read vectors ``[N, B, G, S]``."""
    if h.shape[3] == 1:  # a group for each channel: many products of two vectors
        return (h * C[:, :, :, None]).sum(-1)
    return (h @ C[..., None])[..., 0]


def _finish(
    y: torch.Tensor, u_first: torch.Tensor, u: torch.Tensor, D: torch.Tensor | None, z: torch.Tensor | None
) -> torch.Tensor:
    """Skip and gate, back to ``[B, E, N]`` and to the dtype of u."""
    y = y.flatten(2)  # [N, B, E]
    if D is not None:
        y = y + u_first.flatten(2) * D.to(y.dtype)
    out = y.permute(1, 2, 0)
    if z is not None:
        out = out * F.silu(z.to(y.dtype))
    return out.to(u.dtype)
