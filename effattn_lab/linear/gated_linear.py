"""Linear attention that forgets: one recurrence with a decay, in four orders of computing.

``S_t = diag(exp(g_t)) S_(t-1) + k_t v_t^T`` and ``o_t = scale * S_t^T q_t``: decay, write, read. ``g`` is the *log*
decay, at most 0, one number a head or one a key channel. Fixed numbers make it RetNet, ``dt * A`` Mamba-2 (SSD), a
low-rank sigmoid GLA, and RWKV-6 reads before it writes: :mod:`effattn_lab.linear.gates`,
:mod:`effattn_lab.linear.rwkv`. With ``g = 0`` it is linear attention without the denominator.
Sources: Sun et al. 2023 (RetNet); Yang et al. 2024 (GLA); Dao and Gu 2024 (Mamba-2).
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F

from effattn_lab._validate import check_positive_int, check_qkv, resolve_scale
from effattn_lab.foundations.attention import repeat_kv
from effattn_lab.linear.decay import after, scores, up_to


def init_state(
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """The state before the first token: zeros ``[B, Hkv, K, V]``."""
    return torch.zeros(batch, num_kv_heads, head_dim, value_dim, dtype=dtype, device=device)


@overload
def gated_linear(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float | None = ...,
    initial_state: torch.Tensor | None = ...,
    return_state: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def gated_linear(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float | None = ...,
    initial_state: torch.Tensor | None = ...,
    return_state: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def gated_linear(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The reference, attention with a decaying weight for each pair; always causal.

    ``o_i = scale * sum_(j <= i) w_ij v_j`` with ``w_ij = sum_d q_id k_jd exp(sum_(j < t <= i) g_td)``.

    Args:
        q: queries ``[B, Hq, N, K]``, any floating dtype.
        k: keys ``[B, Hkv, N, K]``; Hkv divides Hq, query head h reads key head ``h // (Hq / Hkv)``.
        v: values ``[B, Hkv, N, V]``; V may differ from K.
        g: log decays, at most 0: ``[B, Hkv, N]`` a head or ``[B, Hkv, N, K]`` a channel, in the dtype of q or a wider
            one (a narrow one is widened before it is summed). ``-inf`` forgets all that came before.
        scale: multiplies the outputs. Default ``K ** -0.5``.
        initial_state: ``[B, Hkv, K, V]``, float32 or float64, what came before the first token; it decays from the
            first token on. Default: zeros.
        return_state: also return the state after the last token. Default False.

    Returns:
        ``out [B, Hq, N, V]`` in the dtype of ``q``, or ``(out, state)`` with the state in at least float32.
        Computed in float64 for float64 inputs, else in float32.

    Raises:
        ValueError: for inputs that do not fit together; the message names the argument.
    """
    dtype = q.dtype if isinstance(q, torch.Tensor) else None
    q, k, v, g, state = _prepare(q, k, v, g, scale, initial_state)
    groups = q.shape[1] // k.shape[1]
    keys, values, decays = (repeat_kv(x, groups) for x in (k, v, g))
    lag = decays[:, :, :0]  # [B, Hq, i, K or 1]: log decay from each key to the present token
    rows = []
    for i in range(q.shape[2]):
        lag = F.pad(lag + decays[:, :, i : i + 1], (0, 0, 0, 1))
        weights = (q[:, :, i : i + 1] * keys[:, :, : i + 1] * lag.exp()).sum(-1)  # [B, Hq, i + 1]
        rows.append(weights[:, :, None] @ values[:, :, : i + 1])
    out = torch.cat(rows, dim=2) + (q * up_to(decays).exp()) @ repeat_kv(state, groups)
    if not return_state:
        return out.to(dtype)
    # Query heads of a group share their key head's lags.
    kept = (keys * lag.exp())[:, ::groups].transpose(-1, -2) @ v
    return out.to(dtype), g.sum(2).exp()[..., None] * state + kept


def write(k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a chunk does to the state, ``S' = decay S + written``: ``(decay [..., K or 1, 1], written [..., K, V])``.

    ``k [..., C, K]``, ``v [..., C, V]``, ``g [..., C, K or 1]``; any number of chunks in the leading axes.
    """
    written = (k * after(g).exp()).transpose(-1, -2) @ v
    return g.sum(-2).exp()[..., None], written


def read(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """Outputs ``[..., C, V]`` of a chunk that finds ``state [..., K, V]``: its own pairs, and the state decayed."""
    return scores(q, k, g) @ v + (q * up_to(g).exp()) @ state


@overload
def gated_linear_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float | None = ...,
    chunk_size: int = ...,
    initial_state: torch.Tensor | None = ...,
    return_state: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def gated_linear_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float | None = ...,
    chunk_size: int = ...,
    initial_state: torch.Tensor | None = ...,
    return_state: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def gated_linear_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float | None = None,
    chunk_size: int = 64,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`gated_linear` in time linear in the length, by matrix products; differentiable.

    Two passes: :func:`write` of every chunk gives the state at each border, one after the other; :func:`read` then
    does all chunks at once. No exponent is positive, whatever the decays: see :mod:`effattn_lab.linear.decay`.

    Args:
        q, k, v, g, scale, initial_state, return_state: as in :func:`gated_linear`.
        chunk_size: C, at least 1. Default 64. The result does not depend on it but for rounding; time does.

    Returns:
        ``out`` or ``(out, state)`` as :func:`gated_linear`.

    Raises:
        ValueError: for inputs that do not fit together; the message names the argument.
    """
    check_positive_int("chunk_size", chunk_size)
    dtype = q.dtype if isinstance(q, torch.Tensor) else None
    q, k, v, g, state = _prepare(q, k, v, g, scale, initial_state)
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    q, k, v, g = (_cut(x, min(chunk_size, length)) for x in (q, k, v, g))  # [B, H, chunks, C, ...]
    decay, written = write(k, v, g)
    borders = []
    for c in range(q.shape[2]):
        borders.append(state)
        state = decay[:, :, c] * state + written[:, :, c]
    found = torch.stack(borders, dim=2)  # [B, Hkv, chunks, K, V]
    out = read(q, *(repeat_kv(x, groups) for x in (k, v, g, found)))
    out = out.flatten(2, 3)[:, :, :length].to(dtype)
    return (out, state) if return_state else out


def gated_linear_step(
    state: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode one token: decay the state, write into it, read it. Time and memory know no length.

    Args:
        state: what :func:`gated_linear_chunked` or the last step returned; None before the first token.
        q: the token's query ``[B, Hq, 1, K]``.
        k, v: its key ``[B, Hkv, 1, K]`` and value ``[B, Hkv, 1, V]``.
        g: its log decay ``[B, Hkv, 1]`` or ``[B, Hkv, 1, K]``.
        scale: as in :func:`gated_linear`.

    Returns:
        ``(out [B, Hq, 1, V] in the dtype of q, new state)``; the state given is left as it was.

    Raises:
        ValueError: for inputs that do not fit together; the message names the argument.
    """
    dtype = q.dtype if isinstance(q, torch.Tensor) else None
    q, k, v, g, state = _prepare(q, k, v, g, scale, state, name="state")
    if q.shape[2] != 1:
        raise ValueError(f"q: expected one token, a length of 1, got {q.shape[2]}")
    state = g.exp().transpose(-1, -2) * state + k.transpose(-1, -2) @ v
    return (q @ repeat_kv(state, q.shape[1] // k.shape[1])).to(dtype), state


def gated_linear_recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`gated_linear` token after token, as it is written down: an RNN whose hidden state is a matrix.

    Arguments and errors as in :func:`gated_linear_chunked`. Returns ``(out, state)``.
    """
    dtype = q.dtype if isinstance(q, torch.Tensor) else None
    q, k, v, g, state = _prepare(q, k, v, g, scale, initial_state)
    groups = q.shape[1] // k.shape[1]
    keep = g.exp().transpose(-1, -2)  # [B, Hkv, K or 1, N]
    rows = []
    for t in range(q.shape[2]):
        here = slice(t, t + 1)
        state = keep[..., here] * state + k[:, :, here].transpose(-1, -2) @ v[:, :, here]
        rows.append(q[:, :, here] @ repeat_kv(state, groups))
    return torch.cat(rows, dim=2).to(dtype), state


def check_gate(q: torch.Tensor, k: torch.Tensor, g: torch.Tensor, name: str = "g") -> None:
    """Raise ``ValueError`` unless ``g`` holds log decays for ``k``, a head or a channel."""
    if not isinstance(g, torch.Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(g).__name__}")
    if tuple(g.shape) not in (tuple(k.shape[:3]), tuple(k.shape)):
        raise ValueError(
            f"{name}: expected shape {tuple(k.shape[:3])} (a decay a head) or {tuple(k.shape)} (a decay a channel), "
            f"got {tuple(g.shape)}"
        )
    if not g.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype, got {g.dtype}")
    if g.device != q.device:
        raise ValueError(f"{name}: expected the device of q ({q.device}), got {g.device}")
    if not bool((g <= 0).all()):
        raise ValueError(f"{name}: expected log decays of at most 0, got {g.max().item():.3g}")


def start(state: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, name: str) -> torch.Tensor:
    """The state to begin with, ``[B, Hkv, K, V]`` in the dtype of ``k``; checked against keys and values."""
    shape = (*k.shape[:2], k.shape[3], v.shape[3])
    if state is None:
        return init_state(*shape, dtype=k.dtype, device=k.device)
    if not isinstance(state, torch.Tensor) or tuple(state.shape) != shape:
        came = tuple(state.shape) if isinstance(state, torch.Tensor) else type(state).__name__
        raise ValueError(f"{name}: expected shape {shape} or None, got {came}")
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name}: expected float32 or float64, got {state.dtype}")
    if state.device != k.device:
        raise ValueError(f"{name}: expected the device of k ({k.device}), got {state.device}")
    return state.to(k.dtype)


def _prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float | None,
    state: torch.Tensor | None,
    name: str = "initial_state",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Checked inputs in at least float32: ``(scale q, k, v, g [B, Hkv, N, K or 1], state)``."""
    check_qkv(q, k, v, any_value_dim=True)
    scale = resolve_scale(scale, q.shape[3])
    if k.shape[2] != q.shape[2]:
        raise ValueError(
            f"k: expected the length of q ({q.shape[2]}), got {k.shape[2]}; "
            "what came before the first query belongs into the state"
        )
    check_gate(q, k, g)
    # Half precision is widened first: sums over thousands of tokens would lose the small ones.
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v, g = (x.to(dtype) for x in (q, k, v, g))
    return scale * q, k, v, g if g.dim() == 4 else g[..., None], start(state, k, v, name)


def _cut(x: torch.Tensor, size: int) -> torch.Tensor:
    """``[B, H, N, D]`` to ``[B, H, chunks, size, D]``; the last is filled up with zeros: no key, no decay."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))
