"""ZeroS in Triton: `zeros_chunked`, forward: three states in one pass over keys and values, then the outputs.

The kernels are in `_zeros_fwd`, the tile table in `_zeros_tiles`, the input checks in `_zeros_validate`. To read
first: the PyTorch version of the same name, ``effattn_lab.linear.zeros``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from . import MODE, require
from ._tiles import architecture
from ._zeros_tiles import Tile, choose_tiles
from ._zeros_validate import check_zeros_inputs
from .flash import Launch, _cdiv, _on

__all__ = ["ZeroSState", "launches", "zeros_chunked"]


class ZeroSState(NamedTuple):
    """``F, G, H [B, Hkv, K, V]`` and ``E, P, t, m [B, Hkv]``, float32: see ``effattn_lab.linear.zeros_state``."""

    F: torch.Tensor
    G: torch.Tensor
    H: torch.Tensor
    E: torch.Tensor
    P: torch.Tensor
    t: torch.Tensor
    m: torch.Tensor


def zeros_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logits: torch.Tensor,
    gate_1: torch.Tensor,
    gate_h: torch.Tensor,
    *,
    gate_0: torch.Tensor | None = None,
    causal: bool = False,
    initial_state: tuple[torch.Tensor, ...] | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ZeroSState]:
    """ZeroS ``o_t = sum_i r_ti cos(q_t, k_i) v_i``, chunk by chunk; the weights ``r`` sum to zero over the keys.

    Forward only: for gradients use the PyTorch form.

    Args:
        q: ``[B, Hq, seqlen_q, K]``, float16, bfloat16 or float32, any strides, any K and any lengths of its vectors:
            the kernels divide by them.
        k: ``[B, Hkv, seqlen_k, K]``; ``Hq`` is a multiple of ``Hkv`` and query head ``h`` reads key head
            ``h // (Hq // Hkv)``.
        v: ``[B, Hkv, seqlen_k, V]``; V may differ from K.
        logits: ``[B, Hkv, seqlen_k]``, a floating dtype, best float32: the weights are their differences.
        gate_1: of the first order, ``[B, Hq, seqlen_q]``. gate_h: of the higher orders, the same.
        gate_0: of the constant ``1/t``, the same shape. Default None: it is removed.
        causal: a query sees the keys up to its own position. The queries are the *last* positions:
            query ``i`` sees key ``j`` iff ``j <= i + seqlen_k - seqlen_q``. Default False.
        initial_state: what every query saw before the first key, float32; a `ZeroSState` or the PyTorch form's.
        return_state: also return the state after the last key. Default False.

    Returns:
        ``out [B, Hq, seqlen_q, V]`` in the dtype of q, and with ``return_state`` a `ZeroSState`. A query that sees
        no key, or one, has output 0.

    Raises:
        ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: kernels cannot run here (no triton, or triton imported too early).

    Source: Lu et al. 2025, arXiv:2602.05230, section 3; no kernel was published with it.
    """
    require()
    check_zeros_inputs(q, k, v, logits, gate_1, gate_h, gate_0, initial_state, MODE)
    rows = [x if x is None else x.detach().contiguous() for x in (logits, gate_1, gate_h, gate_0)]
    q, k, v = q.detach(), k.detach(), v.detach()
    geometry = _Geometry(q, k, v, causal)
    left, state = _states(k, v, rows[0], geometry, initial_state, return_state)
    out = _outputs(q, k, v, rows, left, geometry)
    return out if state is None else (out, state)


class _Geometry:
    """Shapes, tiles and the lie of the chunks, worked out once."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> None:
        self.batch, self.num_heads, self.seqlen_q, self.key_dim = q.shape
        self.num_kv_heads, self.seqlen_k, self.value_dim = k.shape[1], k.shape[2], v.shape[3]
        self.groups = self.num_heads // self.num_kv_heads
        self.causal = bool(causal)
        self.tiles = choose_tiles(self.key_dim, self.value_dim, q.dtype, architecture(q.device))
        chunk = self.tiles.states.chunk
        # See _linear_attention_fwd: where the keys of chunk 0 begin, and how many chunks of keys come before.
        self.offset = self.seqlen_k - self.seqlen_q if causal else self.seqlen_k
        self.early = _cdiv(max(self.offset, 0), chunk)
        self.chunks = _cdiv(self.seqlen_q, chunk)
        self.borders = self.chunks if causal else 1


def _states(k, v, logits, case, initial, final):  # type: ignore[no-untyped-def]
    from ._zeros_fwd import _zeros_states_kernel

    heads, tile = (case.batch, case.num_kv_heads), case.tiles.states
    wide = {"dtype": torch.float32, "device": k.device}
    borders = torch.empty(
        *heads, case.borders, 3, case.key_dim, case.value_dim, dtype=k.dtype, device=k.device
    )
    scalars = torch.empty(*heads, case.borders, 4, **wide)  # E, mean logit, t, m
    inv_k = torch.empty(*heads, case.seqlen_k, **wide)
    state = None
    if final:
        sums = (torch.empty(*heads, case.key_dim, case.value_dim, **wide) for _ in range(3))
        state = ZeroSState(*sums, *(torch.empty(heads, **wide) for _ in range(4)))
    unused = (scalars,) * 7
    start = unused if initial is None else [x.detach().contiguous() for x in initial]
    grid = (
        _cdiv(case.value_dim, tile.block_v),
        _cdiv(case.key_dim, tile.block_k),
        case.batch * case.num_kv_heads,
    )
    with _on(k.device):
        _zeros_states_kernel[grid](
            k, v, logits, borders, scalars, inv_k, *start, *(unused if state is None else state),
            *k.stride(), *v.stride(),
            case.num_kv_heads, case.seqlen_k, case.offset, case.early, case.borders,
            K=case.key_dim, V=case.value_dim, **_blocks(tile), INITIAL=initial is not None, FINAL=final,
        )  # fmt: skip
    return (borders, scalars, inv_k), state


def _outputs(q, k, v, rows, left, case):  # type: ignore[no-untyped-def]
    from ._zeros_fwd import _zeros_outputs_kernel

    logits, gate_1, gate_h, gate_0 = rows
    tile = case.tiles.outputs
    out = torch.empty(
        case.batch, case.num_heads, case.seqlen_q, case.value_dim, dtype=q.dtype, device=q.device
    )
    grid = (case.chunks, _cdiv(case.value_dim, tile.block_v), case.batch * case.num_heads)
    with _on(q.device):
        _zeros_outputs_kernel[grid](
            q, k, v, logits, gate_1, gate_h, gate_h if gate_0 is None else gate_0, *left, out,
            *q.stride(), *k.stride(), *v.stride(),
            case.num_heads, case.groups, case.seqlen_q, case.seqlen_k, case.offset, case.borders,
            K=case.key_dim, V=case.value_dim, **_blocks(tile), CAUSAL=case.causal, ZEROTH=gate_0 is not None,
        )  # fmt: skip
    return out


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
) -> list[Launch]:
    """The two kernels of `zeros_chunked` with the tiles they get on ``arch`` (``"sm80"``, ...).

    Contiguous inputs, logits and gates in float32, no ``gate_0``, no initial state, no state returned.
    """
    if window:
        raise ValueError("window: expected False, got True; ZeroS has no window")
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim < 1:
        raise ValueError(f"head_dim: expected an integer of at least 1, got {head_dim!r}")
    from ._zeros_fwd import _zeros_outputs_kernel, _zeros_states_kernel

    value_dim = head_dim if value_dim is None else value_dim
    tiles = choose_tiles(head_dim, value_dim, dtype, arch)
    element = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    in_dtype = {"q_ptr", "k_ptr", "v_ptr", "o_ptr", "borders_ptr"}
    values = {
        "K": head_dim, "V": value_dim, "CAUSAL": causal, "ZEROTH": False, "INITIAL": False, "FINAL": False,
    }  # fmt: skip
    rows = []
    for name, kernel, tile in (
        ("states", _zeros_states_kernel, tiles.states),
        ("outputs", _zeros_outputs_kernel, tiles.outputs),
    ):
        signature: dict[str, str] = {}
        constexprs: dict[str, Any] = {}
        blocks = {"CHUNK": tile.chunk, "BLOCK_K": tile.block_k, "BLOCK_V": tile.block_v}
        for arg in kernel.arg_names:
            if arg.endswith("_ptr"):
                signature[arg] = f"*{element}:16" if arg in in_dtype else "*fp32:16"
            elif arg.startswith("stride_") and arg.endswith("d"):
                signature[arg], constexprs[arg] = "constexpr", 1
            elif arg.startswith("stride_"):
                dim = value_dim if arg == "stride_vn" else head_dim
                signature[arg] = "i32:16" if dim % 16 == 0 else "i32"
            elif arg.isupper():
                signature[arg], constexprs[arg] = "constexpr", {**values, **blocks}[arg]
            else:
                signature[arg] = "i32"
        rows.append(Launch(name, kernel, signature, constexprs, tile))
    return rows
