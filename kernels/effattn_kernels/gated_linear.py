"""Gated linear attention in Triton: `gated_linear_chunked`, forward and backward, decay a head or a channel.

The kernels are in `_gated_linear_decay`, `_gated_linear_fwd` and `_gated_linear_bwd`, the tile table in
`_gated_linear_tiles`, the input checks in `_validate_gated`. To read first: the PyTorch version of the same name,
``effattn_lab.linear.gated_linear``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import MODE, require
from ._gated_linear_tiles import Tiles, choose_tiles
from ._linear_attention_tiles import Tile
from ._tiles import architecture
from ._validate_gated import check_gated_linear_inputs
from .flash import Launch, _cdiv, _on
from .linear_attention import _blocks

__all__ = ["gated_linear_chunked", "launches"]


def gated_linear_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``S_t = diag(exp(g_t)) S_(t-1) + k_t v_t^T``, ``o_t = scale S_t^T q_t``, chunk by chunk; always causal.

    Args:
        q: ``[B, Hq, N, K]``, float16, bfloat16 or float32, any K, any strides (each row stride compiles once more).
        k: ``[B, Hkv, N, K]``; ``Hq`` is a multiple of ``Hkv`` and query head ``h`` reads key head
            ``h // (Hq // Hkv)``. Heads that share a key may be an expanded view, as in Mamba-2.
        v: ``[B, Hkv, N, V]``; V may differ from K.
        g: *log* decays, at most 0, ``[B, Hkv, N]`` a head or ``[B, Hkv, N, K]`` a channel, float16, bfloat16 or
            float32 whatever q has. Below -128 (a factor of 3e-56) they count as -128; -inf is legal. That none is
            above 0 is checked in the interpreter only: on a GPU it would wait for the device.
        scale: None means ``K ** -0.5``.
        initial_state: ``[B, Hkv, K, V]``, float32. None: zeros.
        return_state: also return the state after the last token.

    Returns:
        ``out [B, Hq, N, V]`` in the dtype of q, and with ``return_state`` the state ``[B, Hkv, K, V]`` in float32.
        All is differentiable once, g too; gradients are the same bits on every run.

    Raises:
        ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: kernels cannot run here (no triton, or triton imported too early).

    Source: Yang et al., arXiv:2312.06635, section 4; the split of a pair at its level is this package's own.
    """
    require()
    check_gated_linear_inputs(q, k, v, g, scale, initial_state, MODE)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out, state = _GatedLinear.apply(q, k, v, g, initial_state, _Options(scale, bool(return_state)))
    return (out, state) if return_state else out


class _Options(NamedTuple):
    scale: float
    return_state: bool


class _GatedLinear(torch.autograd.Function):
    """Keeps the inputs; sums of decays and states are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, q, k, v, g, s0, options):  # type: ignore[no-untyped-def]
        case = _Case(q, k, v, g, options)
        s0 = None if s0 is None else s0.contiguous()
        sums = case.sums()
        states, final = case.states(sums, s0, final=options.return_state)
        ctx.save_for_backward(q, k, v, g, s0)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return case.outputs(sums, states), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout, dsT):  # type: ignore[no-untyped-def]
        q, k, v, g, s0 = ctx.saved_tensors
        case = _Case(q, k, v, g, ctx.options)
        if dout is None:  # only the state was used
            dout = q.new_zeros(*q.shape[:3], v.shape[3])
        need_q, need_k, need_v, need_g, need_s, _ = ctx.needs_input_grad
        sums = case.sums()
        dstates, ds0 = case.dstates(sums, dout, dsT, initial=need_s)
        dq = dk = dv = dg = None
        if need_q or need_k or need_g:
            states, _ = case.states(sums, s0, final=False)
            dq, dk, dg = case.dqdk(sums, states, dstates, dout)
        if need_v:
            dv = case.dv(sums, dstates, dout)
        return dq, dk, dv, dg, ds0, None


class _Case:
    """The launches of one call: shapes, tiles and chunks worked out once."""

    tiles: Tiles

    def __init__(self, q, k, v, g, options):  # type: ignore[no-untyped-def]
        self.q, self.k, self.v, self.options = q, k, v, options
        self.per_channel = g.dim() == 4
        self.g = g if self.per_channel else g[..., None]
        self.batch, self.num_heads, self.seqlen, self.key_dim = q.shape
        self.num_kv_heads, self.value_dim = k.shape[1], v.shape[3]
        self.groups = self.num_heads // self.num_kv_heads
        self.pairs = self.batch * self.num_kv_heads
        self.tiles = choose_tiles(
            self.key_dim, self.value_dim, q.dtype, architecture(q.device), self.per_channel, self.groups
        )
        chunk = self.tiles.states.chunk
        self.chunks, self.levels = _cdiv(self.seqlen, chunk), chunk.bit_length() - 1
        self.exact = q.dtype is torch.float32
        self.state_dtype = torch.float32 if q.dtype is torch.float16 else q.dtype
        self.common = {
            "K": self.key_dim,
            "V": self.value_dim,
            "PER_CHANNEL": self.per_channel,
            "EXACT": self.exact,
        }

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def _tiles_of(self, tile: Tile) -> tuple[int, int]:
        return _cdiv(self.key_dim, tile.block_k), _cdiv(self.value_dim, tile.block_v)

    def _grid(self, programs: int) -> tuple[int, int, int]:
        return programs, self.num_kv_heads, self.batch

    def _state_grid(self, tile: Tile) -> tuple[int, int, int]:
        tiles_k, tiles_v = self._tiles_of(tile)
        return self._grid(tiles_k * tiles_v)

    def _borders(self) -> torch.Tensor:
        return self._empty(self.pairs, self.chunks, self.key_dim, self.value_dim, dtype=self.state_dtype)

    def _state(self) -> torch.Tensor:
        return self._empty(self.batch, self.num_kv_heads, self.key_dim, self.value_dim)

    def sums(self):  # type: ignore[no-untyped-def]
        from ._gated_linear_decay import _gated_linear_sums_kernel

        tile, gk = self.tiles.sums, self.g.shape[3]
        sums = self._empty(self.pairs, self.chunks, tile.chunk, gk)
        low = torch.empty_like(sums) if self.exact else sums
        with _on(self.q.device):
            _gated_linear_sums_kernel[self._grid(self.chunks * _cdiv(gk, tile.block_k))](
                self.g, sums, low, *self.g.stride(), self.num_kv_heads, self.seqlen, self.chunks,
                GK=gk, BLOCK_K=tile.block_k, CHUNK=tile.chunk, EXACT=self.exact,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
        return sums, low

    def states(self, sums, s0, final):  # type: ignore[no-untyped-def]
        from ._gated_linear_fwd import _gated_linear_states_kernel

        tile, states = self.tiles.states, self._borders()
        end = self._state() if final else None
        with _on(self.q.device):
            _gated_linear_states_kernel[self._state_grid(tile)](
                self.k, self.v, *sums, states, states if s0 is None else s0, states if end is None else end,
                *self.k.stride(), *self.v.stride(), self.num_kv_heads, self.seqlen, self.chunks,
                **self.common, **_blocks(tile), INITIAL=s0 is not None, FINAL=final,
            )  # fmt: skip
        return states, end

    def outputs(self, sums, states):  # type: ignore[no-untyped-def]
        from ._gated_linear_fwd import _gated_linear_outputs_kernel

        tile = self.tiles.outputs
        out = self._empty(self.batch, self.num_heads, self.seqlen, self.value_dim, dtype=self.q.dtype)
        with _on(self.q.device):
            _gated_linear_outputs_kernel[(self.chunks * self._tiles_of(tile)[1], self.num_heads, self.batch)](
                self.q, self.k, self.v, *sums, states, out, self.options.scale,
                *self.q.stride(), *self.k.stride(), *self.v.stride(),
                self.num_kv_heads, self.seqlen, self.chunks,
                **self.common, **_blocks(tile), GROUPS=self.groups, LEVELS=self.levels,
            )  # fmt: skip
        return out

    def dstates(self, sums, dout, dsT, initial):  # type: ignore[no-untyped-def]
        from ._gated_linear_bwd import _gated_linear_dstates_kernel

        tile, dstates = self.tiles.dstates, self._borders()
        ds0 = self._state() if initial else None
        with _on(self.q.device):
            _gated_linear_dstates_kernel[self._state_grid(tile)](
                self.q, dout, *sums, dstates, dstates if dsT is None else dsT.contiguous(),
                dstates if ds0 is None else ds0, self.options.scale,
                *self.q.stride(), *dout.stride(), self.num_kv_heads, self.seqlen, self.chunks,
                **self.common, **_blocks(tile), GROUPS=self.groups, INITIAL=initial, FINAL=dsT is not None,
            )  # fmt: skip
        return dstates, ds0

    def dqdk(self, sums, states, dstates, dout):  # type: ignore[no-untyped-def]
        from ._gated_linear_bwd import _gated_linear_dqdk_kernel

        tile = self.tiles.dqdk
        tiles_k = self._tiles_of(tile)[0]
        dq, dk = (self._empty(*x.shape, dtype=self.q.dtype) for x in (self.q, self.k))
        dg = self._empty(1 if self.per_channel else tiles_k, *self.g.shape)
        with _on(self.q.device):
            _gated_linear_dqdk_kernel[self._grid(self.chunks * tiles_k)](
                self.q, self.k, self.v, dout, *sums, states, dstates, dq, dk, dg, self.options.scale,
                *self.q.stride(), *self.k.stride(), *self.v.stride(), *dout.stride(),
                self.num_kv_heads, self.pairs, self.seqlen, self.chunks,
                **self.common, **_blocks(tile), GROUPS=self.groups, LEVELS=self.levels,
            )  # fmt: skip
        dg = dg.sum(0) if dg.shape[0] > 1 else dg[0]
        return dq, dk, (dg if self.per_channel else dg[..., 0]).to(self.g.dtype)

    def dv(self, sums, dstates, dout):  # type: ignore[no-untyped-def]
        from ._gated_linear_bwd import _gated_linear_dv_kernel

        tile = self.tiles.dv
        dv = self._empty(*self.v.shape, dtype=self.q.dtype)
        with _on(self.q.device):
            _gated_linear_dv_kernel[self._grid(self.chunks * self._tiles_of(tile)[1])](
                self.q, self.k, dout, *sums, dstates, dv, self.options.scale,
                *self.q.stride(), *self.k.stride(), *dout.stride(), self.num_kv_heads, self.seqlen, self.chunks,
                **self.common, **_blocks(tile), GROUPS=self.groups, LEVELS=self.levels,
            )  # fmt: skip
        return dv


def launches(
    head_dim: int,
    dtype: torch.dtype,
    arch: str,
    *,
    causal: bool = True,
    window: bool = False,
    value_dim: int | None = None,
    per_channel: bool = True,
    groups: int = 1,
) -> list[Launch]:
    """The six kernels of `gated_linear_chunked` with the tiles they get on ``arch`` (``"sm80"``, ...).

    ``head_dim`` channels and ``value_dim`` values (default: as many). Contiguous inputs, float32 decays, no initial
    state.
    """
    if window:
        raise ValueError("window: expected False, got True; gated linear attention has no window")
    if not causal:
        raise ValueError("causal: expected True, got False; a decay has a direction")
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim < 1:
        raise ValueError(f"head_dim: expected an integer of at least 1, got {head_dim!r}")
    from ._gated_linear_bwd import (
        _gated_linear_dqdk_kernel,
        _gated_linear_dstates_kernel,
        _gated_linear_dv_kernel,
    )
    from ._gated_linear_decay import _gated_linear_sums_kernel
    from ._gated_linear_fwd import _gated_linear_outputs_kernel, _gated_linear_states_kernel

    value_dim = head_dim if value_dim is None else value_dim
    tiles = choose_tiles(head_dim, value_dim, dtype, arch, per_channel, groups)
    kernels = [
        ("sums", _gated_linear_sums_kernel, tiles.sums),
        ("states", _gated_linear_states_kernel, tiles.states),
        ("outputs", _gated_linear_outputs_kernel, tiles.outputs),
        ("dstates", _gated_linear_dstates_kernel, tiles.dstates),
        ("dqdk", _gated_linear_dqdk_kernel, tiles.dqdk),
        ("dv", _gated_linear_dv_kernel, tiles.dv),
    ]
    element = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    state = "fp32" if dtype is torch.float16 else element
    kinds = dict.fromkeys(
        ("q_ptr", "k_ptr", "v_ptr", "o_ptr", "do_ptr", "dq_ptr", "dk_ptr", "dv_ptr"), element
    )
    kinds |= dict.fromkeys(("states_ptr", "dstates_ptr"), state)
    gk = head_dim if per_channel else 1
    values = {
        "K": head_dim, "V": value_dim, "GK": gk, "GROUPS": groups, "PER_CHANNEL": per_channel,
        "EXACT": dtype is torch.float32, "INITIAL": False, "FINAL": False,
        "LEVELS": tiles.states.chunk.bit_length() - 1,
    }  # fmt: skip
    rows = []
    for name, kernel, tile in kernels:
        signature: dict[str, str] = {}
        constexprs: dict[str, Any] = {}
        blocks = {"CHUNK": tile.chunk, "BLOCK_K": tile.block_k, "BLOCK_V": tile.block_v}
        for arg in kernel.arg_names:
            if arg.endswith("_ptr"):
                signature[arg] = f"*{kinds.get(arg, 'fp32')}:16"
            elif arg == "scale":
                signature[arg] = "fp32"
            elif arg.startswith("stride_") and arg[-1] in "nd":
                width = {"stride_vn": value_dim, "stride_don": value_dim, "stride_gn": gk}.get(arg, head_dim)
                signature[arg], constexprs[arg] = "constexpr", width if arg[-1] == "n" else 1
            elif arg.startswith("stride_"):
                dim = {"stride_v": value_dim, "stride_do": value_dim, "stride_g": gk}.get(arg[:-1], head_dim)
                signature[arg] = "i32:16" if dim % 16 == 0 else "i32"
            elif arg.isupper():
                signature[arg] = "constexpr"
                constexprs[arg] = {**values, **blocks}[arg]
            else:
                signature[arg] = "i32"
        rows.append(Launch(name, kernel, signature, constexprs, tile))
    return rows
