"""Elastic Attention: a small router decides for each KV head of a prompt whether it reads all keys or few.

A pretrained model stays as it is. One router a layer looks at the mean key of the prompt's beginning and end, before
RoPE, and answers for each head: full or sparse. How sparse the model runs is then a property of the prompt, not of a
setting. The decision is made once, at prefill; decoding reads everything.

Here class 1 is full and 0 is sparse, as in the released code; the paper's text has it the other way round.

Source: Tang et al. 2026 (Elastic Attention), section 3, and its released code where they differ.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from effattn_lab._validate import check_positive_int, check_qkv
from effattn_lab.foundations.attention import attention
from effattn_lab.sparse.static_patterns_cost import sinks_and_window_pairs
from effattn_lab.sparse.streaming import streaming_attention

#: The router's class for full attention; 0 is sparse.
FULL = 1
Mode = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Route(NamedTuple):
    """What a router says of each KV head.

    Attributes:
        full: ``[B, Hkv]``, 1 for full, 0 for sparse; in training it carries the gradient of the soft decision.
        logits: ``[B, Hkv, 2]``, classes (sparse, full).
    """

    full: torch.Tensor
    logits: torch.Tensor


def boundary_mean(k: torch.Tensor, boundary: int = 100) -> torch.Tensor:
    """Mean of the first and the last ``boundary`` keys, ``[B, Hkv, N, D] -> [B, Hkv, D]``.

    A token that lies in both, in prompts below ``2 boundary``, counts twice. Instructions and questions stand at the
    ends; the middle of a long prompt would drown them.
    """
    check_positive_int("boundary", boundary)
    return torch.cat([k[:, :, :boundary], k[:, :, -boundary:]], dim=2).mean(dim=2)


def gumbel(
    shape: torch.Size, generator: torch.Generator | None = None, *, like: torch.Tensor
) -> torch.Tensor:
    """Standard Gumbel noise, ``-log(-log u)``, ``u`` uniform in (0, 1)."""
    u = torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)
    tiny = torch.finfo(like.dtype).tiny
    return -torch.log((-torch.log(u.clamp_min(tiny))).clamp_min(tiny))


def straight_through(
    logits: torch.Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None
) -> torch.Tensor:
    """A hard choice among the last axis's classes, with the gradient of a soft one.

    ``soft = softmax((z + g) / tau)`` with Gumbel noise for each class; forward gives the one-hot of its largest,
    backward the gradient of ``soft``. The choice has probability ``softmax(z)`` whatever the temperature: dividing
    moves no maximum. Temperature shapes the gradient alone.

    Returns:
        the shape of ``logits``: exactly 0 and 1.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature!r}")
    noisy = logits + gumbel(logits.shape, generator, like=logits)
    soft = torch.softmax(noisy / temperature, dim=-1)
    hard = F.one_hot(soft.argmax(dim=-1), logits.shape[-1]).to(soft.dtype)
    return hard + (soft - soft.detach())


class AttentionRouter(nn.Module):
    """Boundary mean, a task MLP ``D -> 4D -> D``, a router MLP ``D -> 4D -> D -> 2``; shared by all heads of a layer.

    Heads get different answers only because their mean keys differ. For D = 128 it has 263,682 parameters.

    Args:
        head_dim: D.
        boundary: tokens pooled at either end. Default 100.
        expansion: width of the hidden layers over D. Default 4.
    """

    def __init__(self, head_dim: int, *, boundary: int = 100, expansion: int = 4) -> None:
        super().__init__()
        for name, value in (("head_dim", head_dim), ("boundary", boundary), ("expansion", expansion)):
            check_positive_int(name, value)
        self.boundary, wide = boundary, expansion * head_dim
        self.task = nn.Sequential(nn.Linear(head_dim, wide), nn.SiLU(), nn.Linear(wide, head_dim))
        self.router = nn.Sequential(
            nn.Linear(head_dim, wide), nn.SiLU(), nn.Linear(wide, head_dim), nn.SiLU(), nn.Linear(head_dim, 2)
        )

    def forward(
        self, k: torch.Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Route:
        """Decide for each KV head of each prompt.

        Args:
            k: keys **before RoPE** ``[B, Hkv, N, D]``; rotated keys would tell the position, not the task.
            temperature: of the gradient, in training mode only.
            generator: of the noise. In evaluation mode there is none: the larger logit wins.
        """
        logits = self.router(self.task(boundary_mean(k, self.boundary)))
        if self.training:
            r = straight_through(logits, temperature=temperature, generator=generator)
            return Route(r[..., FULL], logits)
        return Route(logits.argmax(dim=-1).to(logits.dtype), logits)


def elastic_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    full: torch.Tensor,
    *,
    full_mode: Mode | None = None,
    sparse_mode: Mode | None = None,
    sinks: int = 128,
    window: int = 1024,
    scale: float | None = None,
) -> torch.Tensor:
    """``r o_full + (1 - r) o_sparse``, head by head; the reference, in which both are computed for all.

    With r exactly 0 or 1 this is the output of the mode that each head was given, and the gradient to r is
    ``<dL/do, o_full - o_sparse>``: to first order the loss with this head full, minus the loss with it sparse.

    Args:
        q: ``[B, Hq, N, D]``, after RoPE.
        k, v: ``[B, Hkv, N, D]``.
        full: ``[B, Hkv]``, see :class:`Route`; the query heads of a KV head share its decision.
        full_mode, sparse_mode: ``(q, k, v) -> out``. Default: causal attention, and sinks with a window. Others give
            the paper's variants: FA-SSA is the default, FA-XA has XAttention as its sparse mode, XA-SSA as its full.
        sinks, window, scale: of the default modes.

    Returns:
        ``[B, Hq, N, D]``.
    """
    check_qkv(q, k, v)
    if full.shape != k.shape[:2]:
        raise ValueError(
            f"full: expected one number a KV head, shape {tuple(k.shape[:2])}, got {tuple(full.shape)}"
        )
    dense = full_mode or partial(attention, causal=True, scale=scale)
    few = sparse_mode or partial(streaming_attention, sinks=sinks, window=window, scale=scale)
    groups = q.shape[1] // k.shape[1]
    r = full.to(q.dtype).repeat_interleave(groups, dim=1)[..., None, None]
    return r * dense(q, k, v) + (1 - r) * few(q, k, v)


def model_sparsity(full: torch.Tensor) -> torch.Tensor:
    """``Omega_MSR``: share of heads that are sparse, for each prompt.

    Args:
        full: ``[L, B, Hkv]`` (or ``[B, Hkv]``) of 0 and 1, all layers.

    Returns:
        ``[B]``, 0 for all full, 1 for all sparse; differentiable.
    """
    heads = full if full.dim() == 3 else full[None]
    return 1 - heads.mean(dim=(0, 2))


def pruned_share(seqlen: int, sinks: int, window: int, *, queries: str = "last") -> float:
    """``rho`` of a head with sinks and a window: share of the tokens it does not read.

    Args:
        seqlen: N.
        sinks, window: s and w; a budget of ``s + w``.
        queries: "last", ``1 - (s + w) / N`` as in the paper's figures, or "all": of the pairs that all causal queries
            of a prompt would read. The second is what saves time, and it is smaller.
    """
    check_positive_int("seqlen", seqlen)
    if queries == "last":
        return max(0.0, 1 - (sinks + window) / seqlen)
    if queries == "all":
        return 1 - sinks_and_window_pairs(seqlen, sinks, window) / (seqlen * (seqlen + 1) / 2)
    raise ValueError(f"queries: expected last or all, got {queries!r}")


def effective_sparsity(full: torch.Tensor, rho_sparse: float, rho_full: float = 0.0) -> torch.Tensor:
    """``Omega_ESR``: mean share of tokens not read, over all heads and layers; ``[B]``.

    ``Omega_MSR rho_sparse + (1 - Omega_MSR) rho_full``. The paper's equation 5, as printed, takes the last layer
    alone; its figures fit the mean over all.

    Args:
        full: see :func:`model_sparsity`.
        rho_sparse: share that a sparse head leaves out, see :func:`pruned_share`.
        rho_full: the same of a head in full mode: 0 unless that is XAttention.
    """
    for name, value in (("rho_sparse", rho_sparse), ("rho_full", rho_full)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a share from 0 to 1, got {value!r}")
    sparse = model_sparsity(full)
    return sparse * rho_sparse + (1 - sparse) * rho_full


class SparsityMultipliers(nn.Module):
    """One pair of multipliers a task, which push each task's sparsity towards its target.

    ``L_reg = mean over tasks of mean over prompts (lambda_1 d + lambda_2 d^2)``, ``d = Omega_MSR - t``. The model
    descends; the multipliers *ascend*: give them to an optimizer of their own with ``maximize=True``.

    Signed: lambda_1 grows while a task is too sparse, shrinks while it is too full, and can turn back.
    Absolute, as in the released code: ``|d|`` is never negative, so both can only grow: a penalty, not a price.

    Args:
        targets: t of each task, from 0 to 1.
        signed: the paper's linear term. Default True.
        start: initial value of all multipliers. Default 0; the released code draws from 0 to 0.5.
    """

    def __init__(self, targets: list[float], *, signed: bool = True, start: float = 0.0) -> None:
        super().__init__()
        if not targets or not all(0 <= t <= 1 for t in targets):
            raise ValueError(f"targets: expected at least one share from 0 to 1, got {targets!r}")
        self.signed = signed
        self.register_buffer("targets", torch.tensor(targets, dtype=torch.get_default_dtype()))
        self.linear = nn.Parameter(torch.full((len(targets),), start))
        self.square = nn.Parameter(torch.full((len(targets),), start))

    def forward(self, sparsity: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
        """The term to add to the loss.

        Args:
            sparsity: Omega_MSR of each prompt ``[B]``.
            task: its task ``[B]``, int64.

        Returns:
            a scalar: the mean over the tasks that occur, of the mean over their prompts.
        """
        if sparsity.shape != task.shape:
            raise ValueError(
                f"task: expected one for each of {tuple(sparsity.shape)} prompts, got {tuple(task.shape)}"
            )
        targets: torch.Tensor = self.targets  # type: ignore[assignment]
        d = sparsity - targets[task]
        term = self.linear[task] * (d if self.signed else d.abs()) + self.square[task] * d.square()
        sums = torch.zeros_like(targets).index_add(0, task, term)
        counts = torch.zeros_like(targets).index_add(0, task, torch.ones_like(term))
        present = counts > 0
        return (sums[present] / counts[present]).mean()
