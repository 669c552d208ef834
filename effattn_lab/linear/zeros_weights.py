"""The weights of ZeroS: softmax expanded around equal scores, its constant removed, the rest gated.

Around equal scores softmax is ``1/t + delta/t + (delta^2 - mean delta^2) / 2t + ...`` with ``delta = s - mean(s)``
over t visible keys. The first term knows nothing about the scores; every later one sums to zero. ZeroS drops the
first and gates the second apart from all that follows. Source: Lu et al. 2025 (ZeroS), sections 3.1 to 3.3.
"""

from __future__ import annotations

import torch

from effattn_lab._validate import DTYPES

# exp(tau) is a number of imaginary tokens; the authors' code clips tau before the exponential, so do we.
TAU_RANGE = (-50.0, 30.0)


def expand_softmax(
    scores: torch.Tensor, keep: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``softmax(scores)`` as a sum: the constant, the first order, and all that remains.

    ``1/t``, ``delta / t`` and ``softmax - 1/t - delta / t``, with ``t`` visible keys, ``delta = s - mean(s)``. The
    last two sum to zero over the keys. The remainder is never expanded further: it is exact.

    Args:
        scores: ``[..., seqlen_k]``, any floating dtype.
        keep: bool, broadcastable to ``scores``, True where a key is visible. Default: everywhere. A row without
            a visible key is 0 in all three.

    Returns:
        three tensors in the shape of ``scores``, in at least float32; 0 where a key is hidden.
    """
    _check("scores", scores)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    keep = torch.ones_like(scores, dtype=torch.bool) if keep is None else _expand(keep, scores)
    count = keep.sum(dim=-1, keepdim=True).clamp(min=1).to(scores.dtype)
    blind = ~keep.any(dim=-1, keepdim=True)
    softmax = torch.softmax(scores.masked_fill(~keep, float("-inf")).masked_fill(blind, 0.0), dim=-1)
    mean = scores.masked_fill(~keep, 0.0).sum(dim=-1, keepdim=True) / count
    zeroth = keep / count
    first = (scores - mean).masked_fill(~keep, 0.0) / count
    higher = softmax.masked_fill(~keep, 0.0) - zeroth - first
    return zeroth, first, higher


def zero_sum_weights(
    scores: torch.Tensor,
    gate_1: torch.Tensor,
    gate_h: torch.Tensor,
    *,
    gate_0: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """The radial weight ``r_ti = gate_1_t delta_ti / t + gate_h_t (softmax - 1/t - delta_ti / t)``.

    For any gates and scores ``sum_i r_ti = 0``, so some weights are negative: the head can subtract. With both gates
    1 it is ``softmax - 1/t``. One visible key has weight 0: nothing else can sum to zero.

    Args:
        scores: ``[..., seqlen_q, seqlen_k]``: ``s_i`` repeated for each query (ZeroS) or ``q_t . k_i`` (ZeroS-SM).
        gate_1: of the first order, ``[..., seqlen_q]``.
        gate_h: of the higher orders, the same shape.
        gate_0: of the constant, the same shape; with it the weights sum to ``gate_0``. Default None: the constant is
            removed.
        keep: bool, True where a query may look, see :func:`expand_softmax`.

    Returns:
        ``[..., seqlen_q, seqlen_k]`` in at least float32. A query that sees no key has weights 0.
    """
    zeroth, first, higher = expand_softmax(scores, keep)
    weights = gate_1[..., None] * first + gate_h[..., None] * higher
    return weights if gate_0 is None else weights + gate_0[..., None] * zeroth


def popular_weights(scores: torch.Tensor) -> torch.Tensor:
    """The formula that summaries print, ``(exp(s_i) - w) / sum_j (exp(s_j) - w)`` with ``w`` the mean of ``exp(s)``.

    It divides by ``sum_j exp(s_j) - t w``, which is 0: what comes out is rounding noise, infinite or NaN. It stands
    here to be shown wrong. Dividing by one's own sum makes the sum 1; zero-sum weights sum to 0; both cannot be.
    """
    _check("scores", scores)
    centred = torch.exp(scores) - torch.exp(scores).mean(dim=-1, keepdim=True)
    return centred / centred.sum(dim=-1, keepdim=True)


def unit(x: torch.Tensor) -> torch.Tensor:
    """``x / |x|`` over the last axis, so that a product of two is a cosine; 0 stays 0.

    The floor under ``|x|`` is the smallest normal number's root: far below any vector that means something.
    """
    floor = torch.finfo(x.dtype).tiny ** 0.5
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=floor)


def deviation_logits(
    u: torch.Tensor,
    mu: torch.Tensor,
    tau: torch.Tensor,
    *,
    causal: bool = True,
    before: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Logits that need no query: a token that points away from the mean of those so far gets a larger one.

    ``s_i = -u_i . mean_i / sqrt(D)`` with ``mean_i = (e^tau mu + sum_{j <= i} u_j) / (e^tau + i)``: a running mean,
    itself included, that begins with ``e^tau`` imaginary tokens at ``mu``.

    Args:
        u: ``[B, H, N, D]``, any floating dtype.
        mu: what the mean is before the first token, ``[H, D]``.
        tau: log of the weight of ``mu``, ``[H]``; clipped to -50..30.
        causal: the running mean. False: the mean of all N tokens, the same for each. Default True.
        before: ``(sum of u [B, H, D], how many [B, H])`` of tokens that came earlier. Default: none.

    Returns:
        ``[B, H, N]`` in at least float32.

    Raises:
        ValueError: for inputs that do not fit together; the message names the argument.
    """
    _check("u", u)
    if u.dim() != 4:
        raise ValueError(f"u: expected 4 dimensions [B, H, N, D], got shape {tuple(u.shape)}")
    batch, heads, length, dim = u.shape
    wanted: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = {
        "mu": (mu, (heads, dim)),
        "tau": (tau, (heads,)),
    }
    for name, (x, shape) in wanted.items():
        if not isinstance(x, torch.Tensor) or tuple(x.shape) != shape:
            came = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected shape {shape}, got {came}")
    dtype = torch.promote_types(u.dtype, torch.float32)
    u, mu, tau = u.to(dtype), mu.to(dtype), tau.to(dtype)
    prior = torch.exp(tau.clamp(*TAU_RANGE))[:, None, None]  # [H, 1, 1]
    total, count = prior * mu[:, None], prior.expand(batch, heads, 1, 1)
    if before is not None:
        shapes = ((batch, heads, dim), (batch, heads))
        if not isinstance(before, tuple) or len(before) != 2:
            raise ValueError(
                f"before: expected a pair (sum of u, count) or None, got {type(before).__name__}"
            )
        for x, needed in zip(before, shapes):
            if not isinstance(x, torch.Tensor) or tuple(x.shape) != needed:
                came = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
                raise ValueError(f"before: expected shapes {shapes[0]} and {shapes[1]}, got {came}")
        total, count = total + before[0].to(dtype)[:, :, None], count + before[1].to(dtype)[..., None, None]
    if causal:
        steps = torch.arange(1, length + 1, device=u.device, dtype=dtype)[:, None]
        mean = (total + u.cumsum(dim=2)) / (count + steps)
    else:
        mean = (total + u.sum(dim=2, keepdim=True)) / (count + length)
    return -(u * mean).sum(dim=-1) * dim**-0.5


def _check(name: str, x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() == 0 or 0 in x.shape:
        raise ValueError(f"{name}: expected every dimension to be at least 1, got shape {tuple(x.shape)}")


def _expand(keep: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    if not isinstance(keep, torch.Tensor) or keep.dtype != torch.bool:
        came = keep.dtype if isinstance(keep, torch.Tensor) else type(keep).__name__
        raise ValueError(f"keep: expected a bool tensor (True = may look), got {came}")
    try:
        return keep.expand(scores.shape)
    except RuntimeError:
        raise ValueError(
            f"keep: expected a shape that broadcasts to {tuple(scores.shape)}, got {tuple(keep.shape)}"
        ) from None
