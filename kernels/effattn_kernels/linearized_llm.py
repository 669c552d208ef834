"""Linearized attention in Triton: `linearized_attention_chunked` with its convolution inside (forward), and
`masked_depthwise_conv_chunked` alone (forward and backward).

The kernels are in `_linearized_llm_kernels`, the tile table in `_linearized_llm_tiles`. To read first: the PyTorch
versions of the same names, ``effattn_lab.linear.linearized_llm`` and ``effattn_lab.linear.linearized_llm_conv``.
"""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import MODE, require
from ._linearized_llm_checks import check_alpha, check_state, check_weight
from ._linearized_llm_tiles import MAX_DIM, choose_tiles, power
from ._tiles import architecture
from ._validate import DTYPES, _check_device, _check_tensors
from .flash import Launch, _cdiv, _on

__all__ = ["LinearizedState", "launches", "linearized_attention_chunked", "masked_depthwise_conv_chunked"]


class LinearizedState(NamedTuple):
    """``S [B, Hkv, K, V]`` of the complete groups, keys (length 1) and values of the open one, the last L - 1 values.

    All float32. ``seen``: tokens so far."""

    S: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    tail: torch.Tensor
    seen: int


def linearized_attention_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    alpha: float | torch.Tensor = 1.0,
    conv_weight: torch.Tensor | None = None,
    group_size: int = 64,
    qk_norm: bool = True,
    initial_state: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int] | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, LinearizedState]:
    """ReLU^2 attention inside groups, linear attention to the groups before, a masked convolution; always causal.

    Args:
        q: ``[B, Hq, seqlen_q, K]``, float16, bfloat16 or float32, any strides, K at most 256.
        k: ``[B, Hkv, seqlen_k, K]``; query head ``h`` reads key head ``h // (Hq // Hkv)``. With
            ``seqlen_q < seqlen_k`` the queries are the last positions.
        v: ``[B, Hkv, seqlen_k, V]``.
        alpha: weight of the global branch: a number, or a tensor of shape () or ``[Hq]``.
        conv_weight: ``[Hq, L]`` by lag, L at most 129; None: no convolution. It is rounded to the dtype of v.
        group_size: G, 1 to 256; part of the function.
        qk_norm: divide queries and keys by their lengths, inside the kernel.
        initial_state, return_state: as the PyTorch version's, float32.

    Returns:
        ``out [B, Hq, seqlen_q, V]`` in the dtype of q, and with ``return_state`` a `LinearizedState`. Forward only.

    Raises:
        ValueError: an argument is wrong, or a gradient would be needed; the message names it.
        RuntimeError: kernels cannot run here.

    Source: You et al., arXiv:2406.07368; the states in a pass of their own as in Yang et al., arXiv:2312.06635.
    """
    require()
    _check_tensors(q, k, v, any_value_dim=True)
    if q.shape[3] > MAX_DIM:
        raise ValueError(f"q: expected a head dimension of at most {MAX_DIM}, got {q.shape[3]}")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"q: expected at most as many queries as keys, {k.shape[2]}, got {q.shape[2]}")
    if isinstance(group_size, bool) or not isinstance(group_size, int) or not 1 <= group_size <= 256:
        raise ValueError(f"group_size: expected an integer from 1 to 256, got {group_size!r}")
    local_only = isinstance(alpha, Real) and alpha == 0 and not return_state
    alpha = check_alpha(alpha, q)
    if conv_weight is not None:
        check_weight("conv_weight", conv_weight, v)
        if conv_weight.shape[0] != q.shape[1]:
            raise ValueError(
                f"conv_weight: expected a row for each head of q, {q.shape[1]}, got {conv_weight.shape[0]}"
            )
    lags = 0 if conv_weight is None else conv_weight.shape[1]
    check_state(initial_state, k, v, lags, group_size)
    state = None if initial_state is None else LinearizedState(*initial_state)
    _check_device(q, MODE)
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, alpha, conv_weight)
    ):
        raise ValueError(
            "q: expected inputs without gradient (this kernel is forward only), got one that requires it; "
            "use torch.no_grad(), or train with effattn_lab.linear.linearized_llm"
        )
    new = k.shape[2]
    opened, lead = 0, 0
    if state is not None:
        # The open group comes first again; values older than it are read by the convolution alone.
        opened = state.k.shape[2]
        lead = max(0, state.tail.shape[2] - opened)
        k = torch.cat([state.k.to(k.dtype), k], 2)
        v = torch.cat([state.tail[:, :, :lead].to(v.dtype), state.v.to(v.dtype), v], 2)
    case = _Case(q, k, v, lead, group_size, lags, qk_norm, 0 if state is None else state.seen - opened)
    states, last = (None, None) if local_only else case.states(state, return_state)
    out = case.outputs(states, alpha, conv_weight)
    if not return_state:
        return out
    whole = k.shape[2] // group_size * group_size
    open_k = k[:, :, whole:].float()
    if qk_norm:
        open_k = F.normalize(open_k, dim=-1, eps=1e-6)
    tail = F.pad(v, (0, 0, max(0, lags - 1), 0))[:, :, v.shape[2] :].float() if lags else v[:, :, :0].float()
    seen = new + (0 if state is None else state.seen)
    return out, LinearizedState(last, open_k, v[:, :, lead + whole :].float(), tail, seen)


def masked_depthwise_conv_chunked(
    v: torch.Tensor,
    weight: torch.Tensor,
    *,
    initial_tail: torch.Tensor | None = None,
    return_tail: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``y_t = sum_l weight_l v_{t - l}``, one kernel for each head, as a band matrix times V; differentiable once.

    Args:
        v: ``[B, Hkv, N, V]``, float16, bfloat16 or float32, any strides.
        weight: ``[Hq, L]`` by lag, L at most 129; query head ``h`` reads value head ``h // (Hq // Hkv)``. It is
            rounded to the dtype of v; its gradient comes in its own.
        initial_tail: the L - 1 values before the first ``[B, Hkv, L - 1, V]``; None: zeros. Not differentiated.
        return_tail: also return the last L - 1 values, float32.

    Returns:
        ``[B, Hq, N, V]`` in the dtype of v, or ``(y, tail)``.
    """
    require()
    if not isinstance(v, torch.Tensor) or v.dim() != 4 or v.dtype not in DTYPES or 0 in v.shape:
        came = f"{v.dtype} {tuple(v.shape)}" if isinstance(v, torch.Tensor) else type(v).__name__
        raise ValueError(f"v: expected float16, bfloat16 or float32 [B, H, N, D], no dimension 0, got {came}")
    check_weight("weight", weight, v)
    lags = weight.shape[1]
    shape = (*v.shape[:2], lags - 1, v.shape[3])
    if initial_tail is not None and (
        not isinstance(initial_tail, torch.Tensor)
        or initial_tail.shape != shape
        or initial_tail.device != v.device
    ):
        came = (
            tuple(initial_tail.shape)
            if isinstance(initial_tail, torch.Tensor)
            else type(initial_tail).__name__
        )
        raise ValueError(f"initial_tail: expected shape {shape} on the device of v, got {came}")
    _check_device(v, MODE)
    y = _Conv.apply(v, weight, initial_tail)
    if not return_tail:
        return y
    before = torch.zeros(shape, device=v.device) if initial_tail is None else initial_tail.float()
    return y, torch.cat([before, v.float()], 2)[:, :, v.shape[2] :]


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v, weight, tail):  # type: ignore[no-untyped-def]
        x = v if tail is None else torch.cat([tail.detach().to(v.dtype), v], 2)
        ctx.save_for_backward(x, weight)
        ctx.length = v.shape[2]
        return _conv(x, weight, v.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        dv = dweight = None
        if ctx.needs_input_grad[0]:
            dv = _conv(dy, weight, ctx.length, heads=x.shape[1])
        if ctx.needs_input_grad[1]:
            dweight = _dweight(x, dy, weight)
        return dv, dweight, None


def _conv(x, weight, length, heads=None):  # type: ignore[no-untyped-def]
    """Forward on the last ``length`` rows of x; with ``heads`` the transpose, from query heads to that many."""
    from ._linearized_llm_kernels import _linearized_llm_conv_kernel

    lags, dim = weight.shape[1], x.shape[3]
    tile = choose_tiles(dim, dim, 1, x.dtype, architecture(x.device)).conv
    out_heads = weight.shape[0] if heads is None else heads
    repeat = weight.shape[0] // (x.shape[1] if heads is None else heads)
    y = torch.empty(x.shape[0], out_heads, length, dim, dtype=x.dtype, device=x.device)
    with _on(x.device):
        _linearized_llm_conv_kernel[(_cdiv(length, tile.block_m), _cdiv(dim, tile.block_v), x.shape[0] * out_heads)](
            x, weight.to(x.dtype).contiguous(), y, *x.stride(),
            out_heads, repeat, x.shape[2], length, x.shape[2] - length if heads is None else 0,
            V=dim, BLOCK_V=tile.block_v, CHUNK=tile.block_m, LAGS=lags, BLOCK_L=power(max(1, lags - 1)),
            REVERSE=heads is not None, REPEAT=1 if heads is None else repeat,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return y


def _dweight(x, dy, weight):  # type: ignore[no-untyped-def]
    from ._linearized_llm_kernels import _linearized_llm_dweight_kernel

    heads, lags = weight.shape
    batch, kv_heads, _, dim = x.shape
    tile = choose_tiles(dim, dim, 1, x.dtype, architecture(x.device)).dweight
    chunks = _cdiv(dy.shape[2], tile.block_m)
    parts = torch.empty(batch, heads, chunks, lags, device=x.device)
    with _on(x.device):
        _linearized_llm_dweight_kernel[(chunks, 1, batch * heads)](
            x, dy, parts, *x.stride(), *dy.stride(),
            heads, heads // kv_heads, x.shape[2], dy.shape[2], x.shape[2] - dy.shape[2],
            V=dim, BLOCK_V=tile.block_v, CHUNK=tile.block_m, LAGS=lags, BLOCK_L=power(max(1, lags - 1)),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return parts.sum((0, 2)).to(weight.dtype)


class _Case:
    """The launches of one forward call. ``v`` has ``lead`` rows before the first key; ``seen``: tokens before it."""

    def __init__(self, q, k, v, lead, group, lags, norm, seen):  # type: ignore[no-untyped-def]
        self.q, self.k, self.v, self.lead = q, k, v, lead
        self.batch, self.num_heads, self.seqlen_q, self.key_dim = q.shape
        self.num_kv_heads, self.seqlen_k, self.value_dim = k.shape[1], k.shape[2], v.shape[3]
        self.group, self.lags, self.seen = group, lags, seen
        self.offset = self.seqlen_k - self.seqlen_q
        self.first, self.groups = self.offset // group, _cdiv(self.seqlen_k, group)
        self.tiles = choose_tiles(self.key_dim, self.value_dim, group, q.dtype, architecture(q.device))
        self.common = {
            "K": self.key_dim, "V": self.value_dim, "BLOCK_K": power(self.key_dim), "GROUP": group,
            "NORM": norm, "SCALED": q.dtype is torch.float16,
        }  # fmt: skip

    def _empty(self, *shape, dtype=torch.float32):  # type: ignore[no-untyped-def]
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def states(self, state, final):  # type: ignore[no-untyped-def]
        from ._linearized_llm_kernels import _linearized_llm_states_kernel

        s0 = None if state is None else state.S.contiguous()
        heads, tile = (self.batch, self.num_kv_heads), self.tiles.states
        s = self._empty(*heads, self.groups - self.first, self.key_dim, self.value_dim, dtype=self.q.dtype)
        last = self._empty(*heads, self.key_dim, self.value_dim) if final else None
        sums = self.seqlen_k // self.group if final else self.groups - 1
        grid = (_cdiv(self.value_dim, tile.block_v), self.batch * self.num_kv_heads)
        with _on(self.q.device):
            _linearized_llm_states_kernel[grid](
                self.k, self.v, s, s if s0 is None else s0, s if last is None else last,
                *self.k.stride(), *self.v.stride(),
                self.num_kv_heads, self.seqlen_k, self.lead, self.first, self.groups, sums, self.seen,
                **self.common, BLOCK_V=tile.block_v, BLOCK_N=tile.block_n,
                EARLY=self.first > 0, INITIAL=s0 is not None, FINAL=final,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
        return s, last

    def outputs(self, states, alpha, weight):  # type: ignore[no-untyped-def]
        from ._linearized_llm_kernels import _linearized_llm_outputs_kernel

        tile = self.tiles.outputs
        out = self._empty(self.batch, self.num_heads, self.seqlen_q, self.value_dim, dtype=self.q.dtype)
        blocks = _cdiv(self.group, tile.block_m)
        weight = (
            alpha if weight is None else weight.to(self.v.dtype).contiguous()
        )  # any pointer will do for none
        grid = (
            (self.groups - self.first) * blocks, _cdiv(self.value_dim, tile.block_v), self.batch * self.num_heads,
        )  # fmt: skip
        with _on(self.q.device):
            _linearized_llm_outputs_kernel[grid](
                self.q, self.k, self.v, alpha if states is None else states, weight, alpha, out,
                *self.q.stride(), *self.k.stride(), *self.v.stride(),
                self.num_heads, self.num_heads // self.num_kv_heads, self.seqlen_q, self.seqlen_k, self.offset,
                self.lead, self.first, self.groups, self.seen,
                **self.common, BLOCK_V=tile.block_v, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCKS=blocks,
                LAGS=self.lags, BLOCK_L=power(max(1, self.lags - 1)), GLOBAL=states is not None,
                BEFORE=self.offset % self.group > 0,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
        return out


def launches(
    head_dim: int,
    dtype: torch.dtype,
    arch: str,
    *,
    causal: bool = True,
    window: bool = False,
    value_dim: int | None = None,
    group_size: int = 64,
    lags: int = 32,
    repeat: int = 1,
) -> list[Launch]:
    """The four kernels with the tiles they get on ``arch`` (``"sm80"``, ...), always causal.

    ``states`` and ``outputs`` of attention, ``conv`` and ``dweight`` of the convolution alone. Contiguous inputs, no
    initial state.
    """
    del causal  # there is no other form
    if window:
        raise ValueError("window: expected False, got True; linearized attention has groups instead")
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or not 1 <= head_dim <= MAX_DIM:
        raise ValueError(f"head_dim: expected an integer from 1 to {MAX_DIM}, got {head_dim!r}")
    from ._linearized_llm_kernels import (
        _linearized_llm_conv_kernel,
        _linearized_llm_dweight_kernel,
        _linearized_llm_outputs_kernel,
        _linearized_llm_states_kernel,
    )

    value_dim = head_dim if value_dim is None else value_dim
    tiles = choose_tiles(head_dim, value_dim, group_size, dtype, arch)
    element = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    values = {
        "K": head_dim, "V": value_dim, "BLOCK_K": power(head_dim), "GROUP": group_size, "LAGS": lags,
        "BLOCK_L": power(max(1, lags - 1)), "NORM": True, "SCALED": dtype is torch.float16, "EARLY": False,
        "INITIAL": False, "FINAL": False,
        "BEFORE": False, "GLOBAL": True, "REVERSE": False, "REPEAT": repeat,
    }  # fmt: skip
    kernels = [
        ("states", _linearized_llm_states_kernel, tiles.states),
        ("outputs", _linearized_llm_outputs_kernel, tiles.outputs),
        ("conv", _linearized_llm_conv_kernel, tiles.conv),
        ("dweight", _linearized_llm_dweight_kernel, tiles.dweight),
    ]
    rows = []
    for name, kernel, tile in kernels:
        blocks = {
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_V": tile.block_v,
            "CHUNK": tile.block_m,
        }
        blocks["BLOCKS"] = _cdiv(group_size, max(1, tile.block_m))
        signature: dict[str, str] = {}
        constexprs: dict[str, Any] = {}
        for arg in kernel.arg_names:
            if arg in ("s0_ptr", "sT_ptr", "alpha_ptr", "parts_ptr"):
                signature[arg] = "*fp32:16"
            elif arg.endswith("_ptr"):
                signature[arg] = f"*{element}:16"
            elif arg.startswith("stride_") and arg.endswith("d"):
                signature[arg], constexprs[arg] = "constexpr", 1
            elif arg.startswith("stride_"):
                dim = (
                    value_dim
                    if arg in ("stride_vn", "stride_yn") or name in ("conv", "dweight")
                    else head_dim
                )
                signature[arg] = "i32:16" if dim % 16 == 0 else "i32"
            elif arg.isupper():
                signature[arg] = "constexpr"
                constexprs[arg] = {**values, **blocks}[arg]
            else:
                signature[arg] = "i32"
        rows.append(Launch(name, kernel, signature, constexprs, tile))  # type: ignore[arg-type]
    return rows
