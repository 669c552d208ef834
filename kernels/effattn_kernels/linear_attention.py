"""Linear attention in Triton: `linear_attention_chunked`, forward and backward, on mapped queries and keys.

The kernels are in `_linear_attention_fwd` and `_linear_attention_bwd`, the tile table in `_linear_attention_tiles`,
the input checks in `_validate`. To read first: the PyTorch version of the same name,
``effattn_lab.linear.linear_attention``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import MODE, require
from ._linear_attention_tiles import Tile, choose_tiles
from ._tiles import architecture, nearest
from ._validate import check_linear_attention_inputs
from .flash import Launch, _cdiv, _on

__all__ = ["LinearState", "launches", "linear_attention_chunked"]


class LinearState(NamedTuple):
    """``S [B, Hkv, K, V]`` and ``z [B, Hkv, K]``, float32: sums of ``k v^T`` and of ``k``."""

    S: torch.Tensor
    z: torch.Tensor


def linear_attention_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    initial_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, LinearState]:
    """Linear attention ``o_i = sum_j w_ij v_j / (sum_j w_ij + eps)``, ``w_ij = scale q_i . k_j``, chunk by chunk.

    Args:
        q: features of the queries ``[B, Hq, seqlen_q, K]``, float16, bfloat16 or float32, any strides, any K. The
            feature map comes before: ``linear_attention_chunked(phi(q), phi(k), v)``.
        k: features of the keys ``[B, Hkv, seqlen_k, K]``; ``Hq`` is a multiple of ``Hkv`` and query head ``h`` reads
            key head ``h // (Hq // Hkv)``.
        v: ``[B, Hkv, seqlen_k, V]``; V may differ from K.
        causal: a query sees the keys up to its own position. The queries are the *last* positions:
            query ``i`` sees key ``j`` iff ``j <= i + seqlen_k - seqlen_q``.
        scale: factor on the weights; None means ``K ** -0.5``, K being the number of *features*. With ``normalize``
            it cancels, but for eps.
        normalize: divide by the sum of weights, which should then not be negative.
        eps: added to that sum, at least 0.
        initial_state: ``(S, z)``, float32: what every query saw before the first key. None: nothing.
        return_state: also return the state after the last key.

    Returns:
        ``out [B, Hq, seqlen_q, V]`` in the dtype of q, and with ``return_state`` a `LinearState`. A query that sees
        no key has output 0. All is differentiable once; gradients are the same bits on every run.

    Raises:
        ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: kernels cannot run here (no triton, or triton imported too early).

    Source: Katharopoulos et al., arXiv:2006.16236; the two passes as in Yang et al., arXiv:2312.06635, section 4.
    """
    require()
    check_linear_attention_inputs(q, k, v, scale, eps, initial_state, MODE)
    options = _Options(
        bool(causal),
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        bool(normalize),
        float(eps),
        bool(return_state),
    )
    s0, z0 = (None, None) if initial_state is None else initial_state
    out, s, z = _LinearAttention.apply(q, k, v, s0, z0, options)
    return (out, LinearState(s, z)) if return_state else out


class _Options(NamedTuple):
    causal: bool
    scale: float
    normalize: bool
    eps: float
    return_state: bool


class _LinearAttention(torch.autograd.Function):
    """Keeps the inputs, the output and one number a query; the states are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, q, k, v, s0, z0, options):  # type: ignore[no-untyped-def]
        case = _Case(q, k, v, options)
        s0, z0 = (None, None) if s0 is None else (s0.contiguous(), z0.contiguous())
        states = case.states(s0, z0, final=options.return_state)
        out, factor = case.outputs(states)
        ctx.save_for_backward(q, k, v, s0, z0, out, factor)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, states.final_s, states.final_z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout, dsT, dzT):  # type: ignore[no-untyped-def]
        q, k, v, s0, z0, out, factor = ctx.saved_tensors
        case = _Case(q, k, v, ctx.options)
        if dout is None:  # only the state was used
            dout = torch.zeros_like(out)
        need_q, need_k, need_v, need_s, need_z, _ = ctx.needs_input_grad
        dstates = case.dstates(dout, out, factor, dsT, dzT, initial=need_s or need_z)
        dq = dk = dv = None
        if need_q or need_k:
            dq, dk = case.dqdk(case.states(s0, z0, final=False), dstates)
        if need_v:
            dv = case.dv(dstates)
        ds0, dz0 = (dstates.initial_s, dstates.initial_z) if need_s or need_z else (None, None)
        return dq, dk, dv, ds0, dz0, None


class _States(NamedTuple):
    """States at the chunk borders (``weight``: what fp16 ones are divided by), and the one at the far end."""

    s: torch.Tensor
    weight: torch.Tensor
    z: torch.Tensor
    final_s: torch.Tensor | None
    final_z: torch.Tensor | None


class _DStates(NamedTuple):
    """Their gradients, and what the backward kernels need of each query: ``r``, ``delta`` and ``dO`` itself."""

    d: torch.Tensor
    weight: torch.Tensor
    z: torch.Tensor
    initial_s: torch.Tensor | None
    initial_z: torch.Tensor | None
    track_z: bool
    plain: bool
    r: torch.Tensor
    delta: torch.Tensor
    dout: torch.Tensor


class _Case:
    """The launches of one call: shapes, tiles and the geometry of the chunks worked out once."""

    def __init__(self, q, k, v, options):  # type: ignore[no-untyped-def]
        self.q, self.k, self.v, self.options = q, k, v, options
        self.batch, self.num_heads, self.seqlen_q, self.key_dim = q.shape
        self.num_kv_heads, self.seqlen_k, self.value_dim = k.shape[1], k.shape[2], v.shape[3]
        self.groups = self.num_heads // self.num_kv_heads
        self.tiles = choose_tiles(self.key_dim, self.value_dim, q.dtype, architecture(q.device), self.groups)
        chunk = self.tiles.states.chunk
        # See _linear_attention_fwd: where the keys of chunk 0 begin, and how many chunks of keys come before.
        self.offset = self.seqlen_k - self.seqlen_q if options.causal else self.seqlen_k
        self.early = _cdiv(max(self.offset, 0), chunk)
        self.chunks = _cdiv(self.seqlen_q, chunk)
        self.borders = self.chunks if options.causal else 1
        self.dborders = self.chunks + 1 if options.causal else 1
        self.scaled = q.dtype is torch.float16
        self.lean = (
            options.causal
            and self.offset == 0
            and _lean(
                self.key_dim, self.value_dim, q.dtype, architecture(q.device), options.normalize, self.groups
            )
        )
        self.common = {"K": self.key_dim, "V": self.value_dim}

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def _state_pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        heads = (self.batch, self.num_kv_heads)
        return self._empty(*heads, self.key_dim, self.value_dim), self._empty(*heads, self.key_dim)

    def _tiles_of(self, tile: Tile) -> tuple[int, int]:
        return _cdiv(self.key_dim, tile.block_k), _cdiv(self.value_dim, tile.block_v)

    def _state_grid(self, tile: Tile) -> tuple[int, int, int]:
        tiles_k, tiles_v = self._tiles_of(tile)
        return tiles_v, tiles_k, self.batch * self.num_kv_heads

    def _chunk_grid(self, tiles: int) -> tuple[int, int, int]:
        return self.early + self.chunks, tiles, self.batch * self.num_kv_heads

    def states(self, s0, z0, final):  # type: ignore[no-untyped-def]
        from ._linear_attention_fwd import _linear_attention_states_kernel

        heads, tile = (self.batch, self.num_kv_heads, self.borders), self.tiles.states
        s = self._empty(*heads, self.key_dim, self.value_dim, dtype=self.q.dtype)
        weight, z = self._empty(*heads), self._empty(*heads, self.key_dim)
        final_s, final_z = self._state_pair() if final else (None, None)
        size = s0.abs().amax((-1, -2)) if self.scaled and s0 is not None else weight
        with _on(self.q.device):
            _linear_attention_states_kernel[self._state_grid(tile)](
                self.k, self.v, s, weight, z,
                weight if s0 is None else s0, weight if z0 is None else z0, size,
                weight if final_s is None else final_s, weight if final_z is None else final_z,
                *self.k.stride(), *self.v.stride(),
                self.num_kv_heads, self.seqlen_k, self.offset, self.early, self.borders,
                **self.common, **_blocks(tile), EARLY=self.early > 0, LEAN=self.lean,
                TRACK_Z=self.options.normalize or final, SCALED=self.scaled,
                INITIAL=s0 is not None, FINAL=final,
            )  # fmt: skip
        return _States(s, weight, z, final_s, final_z)

    def outputs(self, states):  # type: ignore[no-untyped-def]
        from ._linear_attention_fwd import _linear_attention_outputs_kernel

        tile, options = self.tiles.outputs, self.options
        out = self._empty(self.batch, self.num_heads, self.seqlen_q, self.value_dim, dtype=self.q.dtype)
        factor = self._empty(self.batch, self.num_heads, self.seqlen_q) if options.normalize else None
        with _on(self.q.device):
            _linear_attention_outputs_kernel[(self.chunks, self._tiles_of(tile)[1], self.batch * self.num_heads)](
                self.q, self.k, self.v, states.s, states.weight, states.z, out,
                states.weight if factor is None else factor, options.scale, options.eps,
                *self.q.stride(), *self.k.stride(), *self.v.stride(),
                self.num_heads, self.groups, self.seqlen_q, self.seqlen_k, self.offset, self.borders,
                **self.common, **_blocks(tile),
                CAUSAL=options.causal, NORMALIZE=options.normalize, SCALED=self.scaled, LEAN=self.lean,
            )  # fmt: skip
        return out, factor

    def dstates(self, dout, out, factor, dsT, dzT, initial):  # type: ignore[no-untyped-def]
        from ._linear_attention_bwd import _linear_attention_delta_kernel, _linear_attention_dstates_kernel

        options, tile = self.options, self.tiles.dstates
        heads = (self.batch, self.num_kv_heads, self.dborders)
        d = self._empty(*heads, self.key_dim, self.value_dim, dtype=self.q.dtype)
        weight, z = self._empty(*heads), self._empty(*heads, self.key_dim)
        delta = weight
        if options.normalize:
            delta = torch.empty_like(factor)
            t = self.tiles.delta
            with _on(self.q.device):
                _linear_attention_delta_kernel[(_cdiv(self.seqlen_q, t.chunk), 1, self.batch * self.num_heads)](
                    out, dout, delta, *dout.stride(), self.num_heads, self.seqlen_q,
                    V=self.value_dim, BLOCK_V=t.block_v, CHUNK=t.chunk,
                    num_warps=t.num_warps, num_stages=t.num_stages,
                )  # fmt: skip
        final = dsT is not None or dzT is not None
        if final:
            zeros = self._state_pair()
            dsT = zeros[0].zero_() if dsT is None else dsT.contiguous()
            dzT = zeros[1].zero_() if dzT is None else dzT.contiguous()
        size = dsT.abs().amax((-1, -2)) if final and self.scaled else weight
        initial_s, initial_z = self._state_pair() if initial else (None, None)
        track_z = options.normalize or final
        plain = self.lean and not final  # see _linear_attention_bwd
        r = weight if factor is None else factor
        with _on(self.q.device):
            _linear_attention_dstates_kernel[self._state_grid(tile)](
                self.q, dout, r, delta, d, weight, z, options.scale,
                dsT if final else weight, dzT if final else weight, size,
                initial_s if initial else weight, initial_z if initial else weight,
                *self.q.stride(), *dout.stride(), self.num_kv_heads, self.seqlen_q, self.chunks, self.dborders,
                **self.common, **_blocks(tile), GROUPS=self.groups, CAUSAL=options.causal,
                NORMALIZE=options.normalize, TRACK_Z=track_z, SCALED=self.scaled, INITIAL=initial, FINAL=final,
                PLAIN=plain, LEAN=self.lean,
            )  # fmt: skip
        return _DStates(d, weight, z, initial_s, initial_z, track_z, plain, r, delta, dout)

    def dqdk(self, states, dstates):  # type: ignore[no-untyped-def]
        from ._linear_attention_bwd import _linear_attention_dqdk_kernel

        tile, options, dout = self.tiles.dqdk, self.options, dstates.dout
        dq = self._empty(*self.q.shape, dtype=self.q.dtype)
        dk = self._empty(*self.k.shape, dtype=self.q.dtype)
        with _on(self.q.device):
            _linear_attention_dqdk_kernel[self._chunk_grid(self._tiles_of(tile)[0])](
                self.q, self.k, self.v, dout, dstates.r, dstates.delta,
                states.s, states.weight, states.z, dstates.d, dstates.weight, dstates.z, dq, dk, options.scale,
                *self.q.stride(), *self.k.stride(), *self.v.stride(), *dout.stride(),
                self.num_kv_heads, self.seqlen_q, self.seqlen_k, self.offset, self.early, self.borders, self.dborders,
                **self.common, **_blocks(tile), GROUPS=self.groups, CAUSAL=options.causal,
                NORMALIZE=options.normalize, TRACK_Z=dstates.track_z, SCALED=self.scaled, LEAN=self.lean,
                PLAIN=dstates.plain,
            )  # fmt: skip
        return dq, dk

    def dv(self, dstates):  # type: ignore[no-untyped-def]
        from ._linear_attention_bwd import _linear_attention_dv_kernel

        tile, options, dout = self.tiles.dv, self.options, dstates.dout
        dv = self._empty(*self.v.shape, dtype=self.q.dtype)
        with _on(self.q.device):
            _linear_attention_dv_kernel[self._chunk_grid(self._tiles_of(tile)[1])](
                self.q, self.k, dout, dstates.r, dstates.d, dstates.weight, dv, options.scale,
                *self.q.stride(), *self.k.stride(), *dout.stride(),
                self.num_kv_heads, self.seqlen_q, self.seqlen_k, self.offset, self.early, self.dborders,
                **self.common, **_blocks(tile), GROUPS=self.groups, CAUSAL=options.causal,
                NORMALIZE=options.normalize, SCALED=self.scaled, LEAN=self.lean, PLAIN=dstates.plain,
            )  # fmt: skip
        return dv


def _lean(key_dim: int, value_dim: int, dtype: torch.dtype, arch: str, normalize: bool, groups: int) -> bool:
    """May checks that cannot fail be left out? Only in the case in which no kernel was found to spill for it.

    They cost 5 % of the instructions, but keep the compiler from holding more in flight than there are registers.
    Without them an A100 spills 32 bytes a thread with the denominator and 40 with grouped heads, an H100 32 at 128
    dimensions, a B200 8 with fp16.
    """
    case = key_dim == value_dim == 64 and dtype is torch.bfloat16 and not normalize and groups == 1
    return case and nearest(arch) in ("interpreter", "sm80", "sm90")


def _blocks(tile: Tile) -> dict[str, int]:
    return {
        "CHUNK": tile.chunk, "BLOCK_K": tile.block_k, "BLOCK_V": tile.block_v,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip


def launches(
    head_dim: int,
    dtype: torch.dtype,
    arch: str,
    *,
    causal: bool = True,
    window: bool = False,
    value_dim: int | None = None,
    normalize: bool = True,
    groups: int = 1,
) -> list[Launch]:
    """The six kernels of `linear_attention_chunked` with the tiles they get on ``arch`` (``"sm80"``, ...).

    ``head_dim`` features and ``value_dim`` values (default: as many). Contiguous inputs, no keys before the first
    query (unless not causal: then all), no initial state.
    """
    if window:
        raise ValueError("window: expected False, got True; linear attention has no window")
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim < 1:
        raise ValueError(f"head_dim: expected an integer of at least 1, got {head_dim!r}")
    from ._linear_attention_bwd import (
        _linear_attention_delta_kernel,
        _linear_attention_dqdk_kernel,
        _linear_attention_dstates_kernel,
        _linear_attention_dv_kernel,
    )
    from ._linear_attention_fwd import _linear_attention_outputs_kernel, _linear_attention_states_kernel

    value_dim = head_dim if value_dim is None else value_dim
    tiles = choose_tiles(head_dim, value_dim, dtype, arch, groups)
    kernels = [
        ("states", _linear_attention_states_kernel, tiles.states),
        ("outputs", _linear_attention_outputs_kernel, tiles.outputs),
        ("delta", _linear_attention_delta_kernel, tiles.delta),
        ("dstates", _linear_attention_dstates_kernel, tiles.dstates),
        ("dqdk", _linear_attention_dqdk_kernel, tiles.dqdk),
        ("dv", _linear_attention_dv_kernel, tiles.dv),
    ]  # fmt: skip
    element = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    in_dtype = {
        "q_ptr",
        "k_ptr",
        "v_ptr",
        "o_ptr",
        "do_ptr",
        "dq_ptr",
        "dk_ptr",
        "dv_ptr",
        "states_ptr",
        "dstates_ptr",
    }
    lean = causal and _lean(head_dim, value_dim, dtype, arch, normalize, groups)
    values = {
        "K": head_dim, "V": value_dim, "GROUPS": groups, "CAUSAL": causal, "NORMALIZE": normalize,
        "TRACK_Z": normalize, "SCALED": dtype is torch.float16, "EARLY": not causal,
        "INITIAL": False, "FINAL": False,
        "PLAIN": lean, "LEAN": lean,
    }  # fmt: skip
    rows = []
    for name, kernel, tile in kernels:
        signature: dict[str, str] = {}
        constexprs: dict[str, Any] = {}
        blocks = {"CHUNK": tile.chunk, "BLOCK_K": tile.block_k, "BLOCK_V": tile.block_v}
        for arg in kernel.arg_names:
            if arg.endswith("_ptr"):
                signature[arg] = f"*{element}:16" if arg in in_dtype else "*fp32:16"
            elif arg in ("scale", "eps"):
                signature[arg] = "fp32"
            elif arg.startswith("stride_") and arg.endswith("d"):
                signature[arg], constexprs[arg] = "constexpr", 1
            elif arg.startswith("stride_"):
                dim = value_dim if arg in ("stride_vn", "stride_don") else head_dim
                signature[arg] = "i32:16" if dim % 16 == 0 else "i32"
            elif arg.isupper():
                signature[arg] = "constexpr"
                constexprs[arg] = {**values, **blocks}[arg]
            else:
                signature[arg] = "i32"
        rows.append(Launch(name, kernel, signature, constexprs, tile))
    return rows
