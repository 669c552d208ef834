"""Bad input to `zeros_chunked` gets a ValueError that names the argument, what was expected and what came."""

from __future__ import annotations

import torch

from ._validate import _check_device, _check_tensors

FIELDS = ("F", "G", "H", "E", "P", "t", "m")


def check_zeros_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logits: torch.Tensor,
    gate_1: torch.Tensor,
    gate_h: torch.Tensor,
    gate_0: torch.Tensor | None,
    initial_state: tuple[torch.Tensor, ...] | None,
    mode: str,
) -> None:
    """Raise ValueError unless `zeros_chunked` can compute exactly what was asked.

    Args:
        q, k, v: what the caller passed for ``[B, Hq, Nq, K]``, ``[B, Hkv, Nk, K]``, ``[B, Hkv, Nk, V]``.
        logits: for ``[B, Hkv, Nk]``. gate_1, gate_h, gate_0: for ``[B, Hq, Nq]``; gate_0 may be None.
        initial_state: seven float32 tensors, or None.
        mode: ``"interpreter"`` or ``"compiled"``.
    """
    _check_tensors(q, k, v, any_value_dim=True)
    queries, keys = tuple(q.shape[:3]), tuple(k.shape[:3])
    rows = {"logits": (logits, keys), "gate_1": (gate_1, queries), "gate_h": (gate_h, queries)}
    if gate_0 is not None:
        rows["gate_0"] = (gate_0, queries)
    for name, (x, shape) in rows.items():
        if not isinstance(x, torch.Tensor) or tuple(x.shape) != shape or not x.is_floating_point():
            came = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected a floating-point tensor of shape {shape}, got {came}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
    if initial_state is not None:
        if not isinstance(initial_state, tuple) or len(initial_state) != len(FIELDS):
            raise ValueError(
                f"initial_state: expected a ZeroSState ({', '.join(FIELDS)}) or None, "
                f"got {type(initial_state).__name__}"
            )
        for part, x in zip(FIELDS, initial_state):
            shape = (*keys[:2], k.shape[3], v.shape[3]) if part in ("F", "G", "H") else keys[:2]
            if not isinstance(x, torch.Tensor) or tuple(x.shape) != shape or x.dtype != torch.float32:
                came = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
                raise ValueError(f"initial_state: expected {part} in float32 of shape {shape}, got {came}")
            if x.device != q.device:
                raise ValueError(
                    f"initial_state: expected {part} on the device of q, {q.device}, got {x.device}"
                )
    if torch.is_grad_enabled():
        named = {"q": q, "k": k, "v": v, **{name: x for name, (x, _) in rows.items()}}
        named.update(("initial_state", x) for x in initial_state or () if x.requires_grad)
        for name, x in named.items():
            if x.requires_grad:
                raise ValueError(
                    f"{name}: expected a tensor that needs no gradient (this kernel is forward only), got "
                    "requires_grad=True; use torch.no_grad(), or effattn_lab.linear.zeros.zeros_chunked"
                )
    _check_device(q, mode)
