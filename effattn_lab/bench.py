"""Speed of a mechanism beside PyTorch's own attention, shown only where it is right.

Every row is checked first: error against float64 at most twice that of the plain same-dtype form. A row that fails
carries no time. Times of different machines or sessions do not compare; the ratio of one run does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from effattn_lab._validate import check_positive_int
from effattn_lab.foundations import cost_model
from effattn_lab.foundations.attention import attention, repeat_kv
from effattn_lab.measure import roofline
from effattn_lab.measure.timing import measure

Attend = Callable[..., torch.Tensor]
BATCH, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 1, 8, 2, 64


def rows(slug: str, seqlens: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Benchmark the causal forward pass (on a GPU the backward too) of ``slug`` at each length.

    Args:
        slug: "flash"; or one whose module describes its rows and defaults, CPU only: "linear_attention"
            (:func:`effattn_lab.linear.linear_attention_bench.rows`), "adamas", a decode step
            (:func:`effattn_lab.sparse.adamas_latency.rows`).
        seqlens: lengths N; default 512 and 2048, on a GPU 1024 and 4096. The float64 check and the naive row
            hold N x N matrices: 16384 wants some 80 GB.

    Returns:
        one dict a row: implementation, device, seqlen, pass, max_error, allowed_error, correct, median_ms,
        vs_sdpa (above 1: faster than SDPA), roofline_ms, of_roofline (share of the bound reached).
    """
    if slug == "linear_attention":
        from effattn_lab.linear import linear_attention_bench

        return linear_attention_bench.rows(seqlens)
    if slug == "adamas":
        from effattn_lab.sparse import adamas_latency

        return adamas_latency.rows(adamas_latency.LENGTHS if seqlens is None else seqlens)
    if slug != "flash":
        raise ValueError(f"slug: expected 'flash', 'linear_attention' or 'adamas', got {slug!r}")
    gpu = torch.cuda.is_available()
    if seqlens is None:
        seqlens = (1024, 4096) if gpu else (512, 2048)
    for seqlen in seqlens:
        check_positive_int("seqlen", seqlen)
    table: list[dict[str, Any]] = []
    for seqlen in seqlens:
        for direction in ("forward", "forward+backward") if gpu else ("forward",):
            table += _at(seqlen, direction, gpu)
    return table


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def _naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """Three steps in the dtype of the input: what one writes before knowing better."""
    groups = q.shape[1] // k.shape[1]
    s = (q @ repeat_kv(k, groups).transpose(-1, -2)) * q.shape[-1] ** -0.5
    if causal:
        n = q.shape[2]
        s = s.masked_fill(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    return torch.softmax(s, dim=-1) @ repeat_kv(v, groups)


def _contenders(gpu: bool) -> dict[str, Attend]:
    if gpu:
        from effattn_kernels.flash import flash_attention as kernel

        return {"sdpa": _sdpa, "naive": _naive, "triton kernel": kernel}
    from effattn_lab.full.flash import flash_attention

    # The kernel's interpreter is left out: it is there to be right and to be counted, not to be fast.
    return {"sdpa": _sdpa, "naive": _naive, "tiled PyTorch": flash_attention}


def _with_backward(fn: Attend) -> Attend:
    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor, *, causal: bool
    ) -> torch.Tensor:
        out = fn(q, k, v, causal=causal)
        return torch.cat([g.flatten() for g in (out, *torch.autograd.grad(out, (q, k, v), do))])

    return run


def _at(seqlen: int, direction: str, gpu: bool) -> list[dict[str, Any]]:
    device = "cuda" if gpu else "cpu"
    dtype = torch.float16 if gpu else torch.float32
    generator = torch.Generator().manual_seed(seqlen)
    shapes = [
        (BATCH, heads, seqlen, HEAD_DIM) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS, NUM_HEADS)
    ]
    # Spread-out scores: with near-uniform attention a wrong mask would hardly show.
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[0] *= 3
    inputs = [x.to(device, dtype) for x in tensors]
    backward = direction == "forward+backward"
    inputs = [x.requires_grad_(i < 3) for i, x in enumerate(inputs)] if backward else inputs[:3]

    def wrap(fn: Attend) -> Attend:
        return _with_backward(fn) if backward else fn

    truth = wrap(attention)(
        *(x.detach().double().requires_grad_(x.requires_grad) for x in inputs), causal=True
    )
    allowed = 2 * _error(wrap(_naive)(*inputs, causal=True), truth)
    flops = cost_model.attention_flops(BATCH, NUM_HEADS, seqlen, seqlen, HEAD_DIM, causal=True)
    nbytes = cost_model.flash_bytes(BATCH, NUM_HEADS, NUM_KV_HEADS, seqlen, seqlen, HEAD_DIM)
    if backward:
        flops *= 3.5
        nbytes *= 3  # Q, K, V, O again, and as many gradients
    bound = _bound(flops, nbytes) if gpu else None
    table = []
    sdpa_s = None
    for name, fn in _contenders(gpu).items():
        error = _error(wrap(fn)(*inputs, causal=True), truth)
        correct = error <= allowed
        seconds = measure(wrap(fn), *inputs, causal=True).median_s if correct else None
        sdpa_s = seconds if name == "sdpa" else sdpa_s
        table.append(
            {
                "implementation": name,
                "device": torch.cuda.get_device_name() if gpu else "cpu",
                "seqlen": seqlen,
                "pass": direction,
                "max_error": error,
                "allowed_error": allowed,
                "correct": correct,
                "median_ms": None if seconds is None else 1e3 * seconds,
                "vs_sdpa": sdpa_s / seconds if seconds and sdpa_s else None,
                "roofline_ms": None if bound is None else 1e3 * bound,
                "of_roofline": bound / seconds if bound and seconds else None,
            }
        )
    return table


def _error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return (got.detach().double() - truth.detach()).abs().max().item()


def _bound(flops: float, nbytes: float) -> float | None:
    """Roofline time on the GPU that is here, if the table knows it."""
    name = torch.cuda.get_device_name()
    for key in sorted(roofline.GPUS, key=len, reverse=True):
        if key.lower() in name.lower():
            return roofline.predict(flops, nbytes, key).time_s
    return None
