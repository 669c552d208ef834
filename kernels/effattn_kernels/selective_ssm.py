"""Mamba-1's selective scan in Triton: `selective_scan_chunked`, forward and backward.

The kernels are in `_selective_ssm_fwd` and `_selective_ssm_bwd`, the tile table in `_selective_ssm_tiles`, the
input checks in `_selective_ssm_validate`. To read first: the PyTorch version of the same name,
``effattn_lab.linear.selective_ssm``. In shapes, B is the batch; E channels, S states a channel, N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import MODE, require
from ._selective_ssm_tiles import Tile, choose_segment, choose_tiles
from ._selective_ssm_validate import check_selective_scan_inputs
from ._tiles import architecture
from .flash import Launch, _cdiv, _on

__all__ = ["launches", "selective_scan_chunked"]


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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t``; ``out_t = (C_t . h_t + D u_t) silu(z_t)``.

    Args:
        u: ``[B, E, N]``, float16, bfloat16 or float32, any strides: neighbouring *channels* side by side in
        memory,
            as a layer's projection leaves them, load best.
        delta: ``[B, E, N]``, at least 0 after bias and softplus.
        A: ``[E, S]``, S up to 256; negative, or the state grows.
        B, C: ``[B, S, N]`` or ``[B, G, S, N]``, G groups of ``E / G`` channels.
        D: ``[E]`` or None. z: ``[B, E, N]`` or None. delta_bias: ``[E]`` or None. delta_softplus: default
        False. initial_state: ``[B, E, S]``, float32, or None: zeros.
        return_state: also return the state after the last token.

    Returns:
        ``out [B, E, N]`` in the dtype of u, and with ``return_state`` the state ``[B, E, S]`` in float32. All
        is differentiable once; gradients are the same bits on every run. Kept for them are the inputs, and one
        state a segment; the others are computed again.

    Raises:
        ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: kernels cannot run here (no triton, or triton imported too early).

    Source: Gu and Dao 2023, section 3.3 and appendix D; how time is cut is our own, see `_selective_ssm_fwd`.
    """
    require()
    check_selective_scan_inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, MODE)
    out, state = _SelectiveScan.apply(
        u, delta, A, B, C, D, z, delta_bias, initial_state, bool(delta_softplus), bool(return_state)
    )
    return (out, state) if return_state else out


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u, delta, A, B, C, D, z, bias, s0, softplus, return_state):  # type: ignore[no-untyped-def]
        case = _Case(u, delta, A, B, C, D, z, bias, softplus)
        starts = case.starts(s0)
        out, final = case.scan(starts, final=return_state)
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, starts)
        ctx.softplus = softplus
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout, dend):  # type: ignore[no-untyped-def]
        *inputs, starts = ctx.saved_tensors
        case = _Case(*inputs, ctx.softplus)
        if dout is None:  # only the state was used
            dout = torch.zeros_like(inputs[0])
        grads = case.backward(starts, dout, dend)
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad)), None, None


class _Case:
    """The launches of one call: shapes, strides and tiles worked out once."""

    def __init__(self, u, delta, A, B, C, D, z, bias, softplus):  # type: ignore[no-untyped-def]
        self.u, self.delta, self.z, self.A, self.D, self.bias = u, delta, z, A, D, bias
        self.shared_shape = B.shape
        self.B, self.C = (x if x.dim() == 4 else x[:, None] for x in (B, C))  # [B, G, S, N]
        self.batch, self.channels, self.seqlen = u.shape
        self.groups, self.size = self.B.shape[1], self.B.shape[2]
        self.per_group = self.channels // self.groups
        arch = architecture(u.device)
        self.tiles = choose_tiles(self.size, u.dtype, arch, self.per_group)
        programs = self.batch * self.groups * self._blocks(self.tiles.scan)
        self.segment = choose_segment(self.seqlen, programs, arch)
        self.segments = _cdiv(self.seqlen, self.segment)
        # Channels on the fast axis, in float32: what the kernels hold across the whole sequence.
        self.A_t = A.detach().float().t().contiguous()
        self.D_f, self.bias_f = (None if x is None else x.detach().float().contiguous() for x in (D, bias))
        self.flags = {
            "HAS_D": D is not None, "HAS_Z": z is not None, "HAS_BIAS": bias is not None, "SOFTPLUS": softplus,
        }  # fmt: skip

    def _blocks(self, tile: Tile) -> int:
        return _cdiv(self.per_group, tile.block_e)

    def _grid(self, tile: Tile, segments: int) -> tuple[int, int, int]:
        return segments, self.groups * self._blocks(tile), self.batch

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.u.device)

    def _states(self, *lead: int) -> torch.Tensor:
        return self._empty(*lead, self.size, self.channels)

    def _like_u(self) -> torch.Tensor:
        """Laid out as u, unless u repeats itself in memory (then there is nothing to imitate)."""
        return torch.empty_like(self.u)

    def _inputs(self) -> tuple[Any, ...]:
        absent = self.A_t
        return (
            self.u, self.delta, self.A_t, self.B, self.C, absent if self.D_f is None else self.D_f,
            absent if self.z is None else self.z, absent if self.bias_f is None else self.bias_f,
        )  # fmt: skip

    def _strides(self) -> tuple[int, ...]:
        z = self.u if self.z is None else self.z
        return *self.u.stride(), *self.delta.stride(), *self.B.stride(), *self.C.stride(), *z.stride()

    def _run_scan(self, segments, start, out, end, total):  # type: ignore[no-untyped-def]
        from ._selective_ssm_fwd import _selective_scan_kernel

        tile, absent = self.tiles.scan, self.A_t
        with _on(self.u.device):
            _selective_scan_kernel[self._grid(tile, segments)](
                *self._inputs(), *(absent if x is None else x for x in (start, out, end, total)),
                *self._strides(), *(self.u if out is None else out).stride(),
                self.channels, self.per_group, self._blocks(tile), self.seqlen, self.segment, self.segments,
                S=self.size, **_blocks(tile, UNROLL=tile.unroll), **self.flags,
                START=start is not None, OUT=out is not None, END=end is not None, SUM=total is not None,
            )  # fmt: skip

    def starts(self, s0: torch.Tensor | None) -> torch.Tensor | None:
        """What each segment finds, ``[B, segments, S, E]``; None: there is one segment, and it finds
        nothing."""
        first = None if s0 is None else s0.detach().transpose(1, 2).contiguous()[:, None]
        if self.segments == 1:
            return first
        from ._selective_ssm_fwd import _selective_scan_carry_kernel

        states, total = (
            self._states(self.batch, self.segments),
            self._empty(self.batch, self.segments, self.channels),
        )
        self._run_scan(self.segments - 1, None, None, states, total)  # nobody asks what the last one adds
        tile = self.tiles.carry
        with _on(self.u.device):
            _selective_scan_carry_kernel[self._grid(tile, 1)](
                states, total, self.A_t, states if first is None else first,
                self.channels, self.per_group, self._blocks(tile), self.segments,
                S=self.size, **_blocks(tile), START=first is not None,
            )  # fmt: skip
        return states

    def scan(self, starts, final):  # type: ignore[no-untyped-def]
        out = self._like_u()
        end = self._states(self.batch) if final else None
        self._run_scan(self.segments, starts, out, end, None)
        return out, None if end is None else end.transpose(1, 2).contiguous()

    def backward(self, starts, dout, dend):  # type: ignore[no-untyped-def]
        """Gradients of u, delta, A, B, C, D, z, the bias and the initial state."""
        from ._selective_ssm_bwd import _selective_scan_dreads_kernel, _selective_scan_dwrites_kernel

        reads, writes = self.tiles.dreads, self.tiles.dwrites
        chunks, absent = _cdiv(self.seqlen, reads.chunk), self.A_t
        du, ddelta = self._like_u(), self._like_u()
        dz = None if self.z is None else self._like_u()
        borders = self._states(self.batch, chunks)
        dC, dB = (
            self._empty(self.batch, self.groups * self._blocks(t), self.seqlen, self.size)
            for t in (reads, writes)
        )
        dD = None if self.D is None else self._empty(self.batch, self.segments, self.channels)
        dbias = None if self.bias is None else self._empty(self.batch, self.channels)
        dA, dstart = self._states(self.batch), self._states(self.batch)
        end = None if dend is None else dend.transpose(1, 2).contiguous()
        strides = *self._strides(), *dout.stride(), *du.stride()
        common = self.channels, self.per_group
        with _on(self.u.device):
            _selective_scan_dreads_kernel[self._grid(reads, self.segments)](
                *self._inputs(), absent if starts is None else starts, dout, borders,
                *(absent if x is None else x for x in (dz, dC, dD)),
                *strides, *common, self._blocks(reads), self.seqlen, self.segment, chunks,
                S=self.size, **_blocks(reads, CHUNK=reads.chunk), **self.flags, START=starts is not None,
            )  # fmt: skip
            _selective_scan_dwrites_kernel[self._grid(writes, 1)](
                *self._inputs(), borders, dout, absent if end is None else end, du, ddelta, dA, dB,
                absent if dbias is None else dbias, dstart,
                *strides, *common, self._blocks(writes), self.seqlen, chunks,
                S=self.size, **_blocks(writes, CHUNK=writes.chunk), **self.flags, END=end is not None,
            )  # fmt: skip
        dD = None if dD is None else dD.sum((0, 1)).to(self.D.dtype)
        dbias = None if dbias is None else dbias.sum(0).to(self.bias.dtype)
        dA = dA.sum(0).t().to(self.A.dtype)
        return du, ddelta, dA, self._add(dB), self._add(dC), dD, dz, dbias, dstart.transpose(1, 2)

    def _add(self, parts: torch.Tensor) -> torch.Tensor:
        """``[B, G blocks, N, S]`` to the gradient of B or C, in its shape and dtype."""
        whole = parts.unflatten(1, (self.groups, -1)).sum(2).transpose(2, 3)
        return whole.reshape(self.shared_shape).to(self.u.dtype)


def _blocks(tile: Tile, **more: int) -> dict[str, int]:
    return {
        "BLOCK_S": tile.block_s, "BLOCK_E": tile.block_e, "num_warps": tile.num_warps, "num_stages": tile.num_stages,
        **more,
    }  # fmt: skip


def launches(
    head_dim: int,
    dtype: torch.dtype,
    arch: str,
    *,
    causal: bool = True,
    window: bool = False,
    state_size: int = 16,
) -> list[Launch]:
    """The kernels of `selective_scan_chunked` with the tiles they get on ``arch`` (``"sm80"``, ...).

    Channels are not compiled in: of ``head_dim``, here their number, it matters alone whether 16 divides it.
    Channels side by side in memory, as in a layer; every option in use (D, z, bias, softplus). "states" and
    "scan" are one kernel with two settings: what a segment adds, and the outputs.
    """
    if window:
        raise ValueError("window: expected False, got True; a scan has no window")
    if not causal:
        raise ValueError("causal: expected True, got False; a scan runs forwards")
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim < 1:
        raise ValueError(f"head_dim: expected an integer of at least 1, got {head_dim!r}")
    from ._selective_ssm_bwd import _selective_scan_dreads_kernel, _selective_scan_dwrites_kernel
    from ._selective_ssm_fwd import _selective_scan_carry_kernel, _selective_scan_kernel

    tiles = choose_tiles(state_size, dtype, arch, head_dim)
    off = {"START": False, "OUT": False, "END": False, "SUM": False}
    kernels: list[tuple[str, Any, Tile, dict[str, Any]]] = [
        ("states", _selective_scan_kernel, tiles.scan, {**off, "END": True, "SUM": True}),
        ("carry", _selective_scan_carry_kernel, tiles.carry, off),
        ("scan", _selective_scan_kernel, tiles.scan, {**off, "START": True, "OUT": True}),
        ("dreads", _selective_scan_dreads_kernel, tiles.dreads, {**off, "START": True}),
        ("dwrites", _selective_scan_dwrites_kernel, tiles.dwrites, off),
    ]
    element = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    in_dtype = {"u", "delta", "B", "C", "z", "out", "do", "du", "ddelta", "dz"}
    rows = []
    for name, kernel, tile, flags in kernels:
        values = {
            "S": state_size, "BLOCK_S": tile.block_s, "BLOCK_E": tile.block_e, "CHUNK": tile.chunk,
            "UNROLL": tile.unroll, "HAS_D": True, "HAS_Z": True, "HAS_BIAS": True, "SOFTPLUS": True, **flags,
        }  # fmt: skip
        signature: dict[str, str] = {}
        constexprs: dict[str, Any] = {}
        for arg in kernel.arg_names:
            if arg.endswith("_ptr"):
                signature[arg] = f"*{element}:16" if arg.removesuffix("_ptr") in in_dtype else "*fp32:16"
            elif arg.startswith("stride_") and arg[-1] in "es":
                signature[arg], constexprs[arg] = "constexpr", 1
            elif arg.startswith("stride_") or arg in ("channels", "per_group"):
                signature[arg] = "i32:16" if head_dim % 16 == 0 else "i32"
            elif arg == "segment":
                signature[arg] = "i32:16"
            elif arg in values:
                signature[arg], constexprs[arg] = "constexpr", values[arg]
            else:
                signature[arg] = "i32"
        rows.append(Launch(name, kernel, signature, constexprs, tile))
    return rows
