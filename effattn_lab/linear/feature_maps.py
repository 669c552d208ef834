"""Feature maps: what stands in the place of softmax's exponential.

Softmax weighs a key by ``exp(q . k)``, which couples q and k, so every pair has to be visited. A feature map phi
gives the weight ``phi(q) . phi(k)`` instead, and a sum over keys can then be taken before any query is known.
A map is worth its price if the weight is never negative (or the sum of weights, the denominator, may vanish), if it
is spiky enough to single out one key, and if ``feature_dim`` is small: the state holds ``feature_dim * value_dim``
numbers a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from effattn_lab._validate import check_positive_int


@dataclass(frozen=True)
class FeatureMap:
    """A named map ``[..., D] -> [..., feature_dim(D)]``.

    Attributes:
        name: what ``feature_map="..."`` calls it.
        fn: the function; it keeps dtype and leading axes.
        feature_dim: length of the mapped vector for a head dimension ``D``.
        positive: is ``phi(q) . phi(k) >= 0`` for all q, k? Only then may the output be divided by the sum of weights.
        source: paper and, where it matters, the code.
    """

    name: str
    fn: Callable[[torch.Tensor], torch.Tensor]
    feature_dim: Callable[[int], int]
    positive: bool
    source: str

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(x)


def elu(x: torch.Tensor) -> torch.Tensor:
    """``elu(x) + 1``: ``x + 1`` right of 0, ``exp(x)`` left of it. Every feature is positive, so no sum vanishes.

    ``[..., D] -> [..., D]``. Source: Katharopoulos et al. 2020, equation 7.
    """
    # Left of 0 elu(x) + 1 would be (exp(x) - 1) + 1, which rounds to 0 below x = -25 ln 2 = -17.33 in float32.
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


def relu(x: torch.Tensor) -> torch.Tensor:
    """``max(x, 0)``: sparse features. A query without a positive entry has weight 0 for every key, and output 0.

    ``[..., D] -> [..., D]``. Source: Kasai et al. 2021 (T2R, there after a trained matrix).
    """
    return torch.relu(x)


def taylor(x: torch.Tensor) -> torch.Tensor:
    """Second-order Taylor polynomial of softmax's exponential: ``1 + s + s^2 / 2`` with ``s = q . k / sqrt(D)``.

    ``phi(x) = [1, x / D^(1/4), vec(x x^T) / (sqrt 2 sqrt D)]``. Features have either sign, the weight never is below
    1/2. Softmax's scale is inside. Use a small D: 16 features become 273.

    ``[..., D] -> [..., 1 + D + D^2]``. Source: Arora et al. 2024 (Based).
    """
    dim = x.shape[-1]
    outer = (x[..., :, None] * x[..., None, :]).flatten(-2) / (math.sqrt(2) * math.sqrt(dim))
    return torch.cat([torch.ones_like(x[..., :1]), x / dim**0.25, outer], dim=-1)


def dpfp(x: torch.Tensor, nu: int = 1) -> torch.Tensor:
    """Deterministic parameter-free projection: products of neighbours in ``r = [relu(x), relu(-x)]``.

    ``phi(x)[i + 2 D (j - 1)] = r[i] r[i - j]`` for ``j = 1..nu``, indices modulo ``2 D``. One of ``relu(x_i)`` and
    ``relu(-x_i)`` is 0, so the features are sparse and inputs in different orthants tend to be orthogonal.

    ``[..., D] -> [..., 2 D nu]``. Source: Schlag, Irie, Schmidhuber 2021, section 5.3.
    """
    check_positive_int("nu", nu)
    r = torch.cat([torch.relu(x), torch.relu(-x)], dim=-1)
    return torch.cat([r * r.roll(j, dims=-1) for j in range(1, nu + 1)], dim=-1)


def hedgehog(x: torch.Tensor) -> torch.Tensor:
    """``softmax([x, -x])`` over the ``2 D`` features of one token: positive, sums to 1, spiky where x is large.

    ``[..., D] -> [..., 2 D]``. Source: Zhang et al. 2024 (Hedgehog), whose map has a trained matrix:
    :class:`Hedgehog`.
    """
    return torch.softmax(torch.cat([x, -x], dim=-1), dim=-1)


class Hedgehog(nn.Module):
    """Trainable Hedgehog map ``softmax([W x, -W x])`` with one ``W [D, D]`` a head, the identity at first.

    Hedgehog trains W so that the linear weights imitate softmax's. It begins as :func:`hedgehog`.

    Args:
        num_heads: heads of the tensor that it maps, at least 1.
        head_dim: D, at least 1.
    """

    positive = True

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        check_positive_int("num_heads", num_heads)
        check_positive_int("head_dim", head_dim)
        self.weight = nn.Parameter(torch.eye(head_dim).repeat(num_heads, 1, 1))

    def feature_dim(self, head_dim: int) -> int:
        """Length of the mapped vector: ``2 D``."""
        return 2 * head_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, N, D] -> [B, H, N, 2 D]``."""
        heads, dim, _ = self.weight.shape
        if x.dim() != 4 or x.shape[1] != heads or x.shape[3] != dim:
            raise ValueError(f"x: expected shape [B, {heads}, N, {dim}], got {tuple(x.shape)}")
        return hedgehog(x @ self.weight.to(x.dtype).transpose(-1, -2))


def identity(x: torch.Tensor) -> torch.Tensor:
    """x itself: weights ``q . k`` of either sign, so only without the denominator. RetNet and its kin use it."""
    return x


FEATURE_MAPS: dict[str, FeatureMap] = {
    m.name: m
    for m in (
        FeatureMap("elu", elu, lambda d: d, True, "Katharopoulos et al. 2020, eq. 7"),
        FeatureMap("relu", relu, lambda d: d, True, "Kasai et al. 2021 (T2R)"),
        FeatureMap("taylor", taylor, lambda d: 1 + d + d * d, True, "Arora et al. 2024 (Based)"),
        FeatureMap("dpfp", dpfp, lambda d: 2 * d, True, "Schlag et al. 2021, section 5.3 (nu = 1)"),
        FeatureMap("hedgehog", hedgehog, lambda d: 2 * d, True, "Zhang et al. 2024 (Hedgehog)"),
        FeatureMap("identity", identity, lambda d: d, False, "Sun et al. 2023 (without the denominator)"),
    )
}

# A name of the table; a map; any function or module on the last axis (its maker vouches for positive weights);
# None: q and k are features already.
FeatureMapLike = str | FeatureMap | Callable[[torch.Tensor], torch.Tensor] | None


def resolve_feature_map(
    feature_map: FeatureMapLike, normalize: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function behind ``feature_map``; ``ValueError`` for an unknown one, or a signed one with a denominator."""
    if feature_map is None:
        return identity
    found: Callable[[torch.Tensor], torch.Tensor] | None = (
        FEATURE_MAPS.get(feature_map) if isinstance(feature_map, str) else feature_map
    )
    if found is None or not callable(found):
        raise ValueError(
            f"feature_map: expected one of {', '.join(FEATURE_MAPS)}, a callable or None, got {feature_map!r}"
        )
    if normalize and not getattr(found, "positive", True):
        raise ValueError(
            f"feature_map: expected a map with non-negative weights for normalize=True, got {feature_map!r}, "
            "whose sum of weights can be 0 or negative; pass normalize=False"
        )
    return found


def apply_feature_map(
    phi: Callable[[torch.Tensor], torch.Tensor], name: str, x: torch.Tensor
) -> torch.Tensor:
    """``phi(x)``, checked: all axes but the last are kept."""
    mapped = phi(x)
    if not isinstance(mapped, torch.Tensor) or mapped.shape[:-1] != x.shape[:-1]:
        came = tuple(mapped.shape) if isinstance(mapped, torch.Tensor) else type(mapped).__name__
        raise ValueError(f"feature_map: expected {name} mapped to {(*x.shape[:-1], 'd_phi')}, got {came}")
    return mapped
