"""The delta rule in Triton: `delta_rule_chunked`, forward.

The kernels are in `_delta_rule_fwd`, the tile table in `_delta_rule_tiles`. To read first: the PyTorch version of the
same name, ``effattn_lab.linear.delta_rule``.
"""

from __future__ import annotations

from typing import Any

import torch

from . import MODE, require
from ._delta_rule_tiles import Tile, choose_tiles
from ._tiles import architecture
from ._validate import _check_device, _check_scale, _check_tensors
from .flash import Launch, _cdiv, _on

__all__ = ["MAX_KEY_DIM", "delta_rule_chunked", "launches"]

MAX_KEY_DIM = 256  # a program of the second kernel holds all rows of the state


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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The (gated) delta rule: ``S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T``,
    ``o_t = scale S_t^T q_t``, chunk by chunk.

    Args:
        q: queries ``[B, Hq, N, K]``, float16, bfloat16 or float32, any strides, K up to 256.
        k: keys ``[B, Hkv, N, K]``, of length 1 (normalise before: nothing here does, and longer keys can make the
            state explode); ``Hq`` is a multiple of ``Hkv`` and query head ``h`` reads state ``h // (Hq // Hkv)``.
        v: ``[B, Hkv, N, V]``; V may differ from K.
        beta: how far each write goes, ``[B, Hkv, N]``, from 0 to 2, any floating dtype but float64.
        g: log decay ``[B, Hkv, N]``, at most 0, any floating dtype but float64. None: no decay.
        scale: factor on what is read; None means ``K ** -0.5``.
        initial_state: ``S [B, Hkv, K, V]``, float32. None: zeros.
        return_state: also return the state after the last token, float32.

    Returns:
        ``out [B, Hq, N, V]`` in the dtype of q, and with ``return_state`` the state. Forward only.

    Raises:
        ValueError: an argument is wrong, or wants a gradient; the message names it, what was expected and what came.
        RuntimeError: kernels cannot run here (no triton, or triton imported too early).

    Source: Yang et al., arXiv:2406.06484 (the UT transform) and arXiv:2412.06464 (the gate).
    """
    require()
    _check(q, k, v, beta, g, scale, initial_state)
    from ._delta_rule_fwd import (
        _delta_rule_outputs_kernel,
        _delta_rule_states_kernel,
        _delta_rule_transform_kernel,
    )

    batch, num_heads, seqlen, key_dim = q.shape
    num_kv_heads, value_dim = k.shape[1], v.shape[3]
    tiles = choose_tiles(key_dim, value_dim, q.dtype, architecture(q.device))
    chunks = _cdiv(seqlen, tiles.states.chunk)
    heads = (batch, num_kv_heads)

    def empty(*shape: int, dtype: torch.dtype = q.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    w, u = empty(*heads, seqlen, key_dim), empty(*heads, seqlen, value_dim)
    # X could replace U in place, if it were sure that the threads which read a tile are the ones that write it.
    states, x = empty(*heads, chunks, key_dim, value_dim), empty(*heads, seqlen, value_dim)
    out = empty(*q.shape[:3], value_dim)
    # Without a gate nothing is written there, and nothing read.
    prefix, suffix = empty(2, *heads, seqlen if g is not None else 1, dtype=torch.float32)
    final = empty(*heads, key_dim, value_dim, dtype=torch.float32) if return_state else None
    gate, gate_strides = (beta, (0, 0, 0)) if g is None else (g, g.stride())
    initial = None if initial_state is None else initial_state.contiguous()
    common = {"K": key_dim, "V": value_dim, "GATED": g is not None}
    with _on(q.device):
        _delta_rule_transform_kernel[(chunks, batch * num_kv_heads)](
            k, v, beta, gate, w, u, prefix, suffix, *k.stride(), *v.stride(), *beta.stride(), *gate_strides,
            num_kv_heads, seqlen, **common, **_blocks(tiles.transform),
        )  # fmt: skip
        _delta_rule_states_kernel[(_cdiv(value_dim, tiles.states.block_v), batch * num_kv_heads)](
            k, w, u, prefix, suffix, x, states, w if initial is None else initial, w if final is None else final,
            *k.stride(), num_kv_heads, seqlen, chunks, **common, **_blocks(tiles.states),
            INITIAL=initial is not None, FINAL=final is not None,
        )  # fmt: skip
        _delta_rule_outputs_kernel[(chunks, _cdiv(value_dim, tiles.outputs.block_v), batch * num_heads)](
            q, k, x, prefix, states, out, q.shape[-1] ** -0.5 if scale is None else float(scale),
            *q.stride(), *k.stride(), num_heads, num_heads // num_kv_heads, seqlen, chunks,
            **common, **_blocks(tiles.outputs),
        )  # fmt: skip
    return (out, final) if final is not None else out


def _blocks(tile: Tile) -> dict[str, int]:
    return {
        "CHUNK": tile.chunk, "BLOCK_K": tile.block_k, "BLOCK_V": tile.block_v,
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip


def _check(q, k, v, beta, g, scale, initial_state):  # type: ignore[no-untyped-def]
    _check_tensors(q, k, v, any_value_dim=True)
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k: expected the length of q, {q.shape[2]}, got {k.shape[2]}")
    if q.shape[3] > MAX_KEY_DIM:
        raise ValueError(f"q: expected a head dimension of at most {MAX_KEY_DIM}, got {q.shape[3]}")
    _check_scale(scale)
    shape = tuple(k.shape[:3])
    for name, x in (("beta", beta), ("g", g)):
        if x is None and name == "g":
            continue
        if not isinstance(x, torch.Tensor) or tuple(x.shape) != shape:
            came = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected one number a token and key head, shape {shape}, got {came}")
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"{name}: expected float16, bfloat16 or float32, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
    if initial_state is not None:
        shape = (*k.shape[:2], k.shape[3], v.shape[3])
        x = initial_state
        if not isinstance(x, torch.Tensor) or tuple(x.shape) != shape or x.dtype != torch.float32:
            came = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"initial_state: expected float32 of shape {shape}, got {came}")
        if x.device != q.device:
            raise ValueError(f"initial_state: expected the device of q, {q.device}, got {x.device}")
    if torch.is_grad_enabled():
        inputs = {"q": q, "k": k, "v": v, "beta": beta, "g": g, "initial_state": initial_state}
        for name, x in inputs.items():
            if x is not None and x.requires_grad:
                raise ValueError(
                    f"{name}: expected a tensor that wants no gradient (these kernels have no backward pass; train "
                    "with effattn_lab.linear.delta_rule), got requires_grad=True outside torch.no_grad()"
                )
    _check_device(q, MODE)


def launches(
    head_dim: int,
    dtype: torch.dtype,
    arch: str,
    *,
    causal: bool = True,
    window: bool = False,
    value_dim: int | None = None,
    gated: bool = True,
) -> list[Launch]:
    """The three kernels of `delta_rule_chunked` with the tiles they get on ``arch`` (``"sm80"``, ...).

    ``head_dim`` key and ``value_dim`` value dimensions (default: as many). Contiguous inputs, beta and g in the dtype
    of q, no initial state.
    """
    if window or not causal:
        raise ValueError(
            f"{'window' if window else 'causal'}: expected {not window}, got {window}; the delta rule is causal "
            "and has no window"
        )
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or not 1 <= head_dim <= MAX_KEY_DIM:
        raise ValueError(f"head_dim: expected an integer from 1 to {MAX_KEY_DIM}, got {head_dim!r}")
    from ._delta_rule_fwd import (
        _delta_rule_outputs_kernel,
        _delta_rule_states_kernel,
        _delta_rule_transform_kernel,
    )

    value_dim = head_dim if value_dim is None else value_dim
    tiles = choose_tiles(head_dim, value_dim, dtype, arch)
    kernels = [
        ("transform", _delta_rule_transform_kernel, tiles.transform),
        ("states", _delta_rule_states_kernel, tiles.states),
        ("outputs", _delta_rule_outputs_kernel, tiles.outputs),
    ]
    element = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    in_fp32 = ("prefix_ptr", "suffix_ptr", "s0_ptr", "sT_ptr")
    values = {"K": head_dim, "V": value_dim, "GATED": gated, "INITIAL": False, "FINAL": False}
    rows = []
    for name, kernel, tile in kernels:
        signature: dict[str, str] = {}
        constexprs: dict[str, Any] = {}
        blocks = {"CHUNK": tile.chunk, "BLOCK_K": tile.block_k, "BLOCK_V": tile.block_v}
        for arg in kernel.arg_names:
            if arg.endswith("_ptr"):
                signature[arg] = "*fp32:16" if arg in in_fp32 else f"*{element}:16"
            elif arg == "scale":
                signature[arg] = "fp32"
            elif arg in ("stride_qd", "stride_kd", "stride_vd", "stride_bn", "stride_gn"):
                signature[arg], constexprs[arg] = "constexpr", 1
            elif arg.startswith("stride_"):
                dim = 1 if arg[7] in "bg" else value_dim if arg[7] == "v" else head_dim
                signature[arg] = "i32:16" if dim % 16 == 0 else "i32"
            elif arg.isupper():
                signature[arg] = "constexpr"
                constexprs[arg] = {**values, **blocks}[arg]
            else:
                signature[arg] = "i32"
        rows.append(Launch(name, kernel, signature, constexprs, tile))
    return rows
