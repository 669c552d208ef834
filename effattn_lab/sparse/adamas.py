"""Adamas: rank single tokens by the L1 distance of two-bit codes, then attend exactly to the nearest.

A key costs 2 bits a coordinate beside its 16: a sixteenth of the cache's bytes is read to choose, then the chosen
tokens. Everything is kept, and the choice still looks at all N codes: linear in N, with a small constant.

Why a distance can rank: ``|q - k|^2 = |q|^2 + |k|^2 - 2 q . k``, so near keys are those of large product *if all keys
have about the same length*. Why the transform: a coarse code gives each coordinate the same few steps, and a product
is decided by the channels of large energy; after the rotation every coordinate carries a part of each channel.

Source: Yan et al. 2025 (Adamas) and its released code, which differ: accuracy runs use L1; the last form of the
kernel counts the pair {1, 2} as 3. Both are here, by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effattn_lab._validate import check_positive_int
from effattn_lab.sparse.cache import DecodeCache, gather_attention, shared_by_group
from effattn_lab.sparse.codes import THRESHOLDS, bucketize, hadamard, l1_packed, pack, released_distance

ESTIMATORS = {"l1": l1_packed, "released": released_distance}


def encode(
    x: torch.Tensor, *, thresholds: Sequence[float] = THRESHOLDS, transform: bool = True
) -> torch.Tensor:
    """Packed codes of vectors after RoPE: transform, thresholds, words.

    Args:
        x: ``[..., D]``, D a power of two and a multiple of 16.
        thresholds: see :func:`effattn_lab.sparse.codes.bucketize`.
        transform: apply the Hadamard transform. Default True.

    Returns:
        int32 ``[..., D / 16]``: 2 bits a coordinate.
    """
    return pack(bucketize(hadamard(x) if transform else x, thresholds))


def code_distances(q_codes: torch.Tensor, k_codes: torch.Tensor, *, estimator: str = "l1") -> torch.Tensor:
    """Distance of each query head's code from all codes of its KV head.

    Args:
        q_codes: int32 ``[B, Hq, 1, W]``, see :func:`encode`.
        k_codes: int32 ``[B, Hkv, N, W]``; query head ``h`` reads key head ``h // (Hq // Hkv)``.
        estimator: "l1", the default: ``sum_i |a_i - b_i|``; or "released", which counts the pair {1, 2} as 3.

    Returns:
        int16 ``[B, Hq, N]``, 0 to ``48 W``: half of what int32 would cost to write and to select from.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    for name, x in (("q_codes", q_codes), ("k_codes", k_codes)):
        if x.dim() != 4 or x.dtype != torch.int32 or 0 in x.shape:
            raise ValueError(
                f"{name}: expected a non-empty int32 tensor [B, H, N, W], got {x.dtype} {tuple(x.shape)}"
            )
    batch, heads, one, words = q_codes.shape
    if one != 1:
        raise ValueError(f"q_codes: expected one query [B, Hq, 1, W], got shape {tuple(q_codes.shape)}")
    if (k_codes.shape[0], k_codes.shape[3]) != (batch, words) or heads % k_codes.shape[1]:
        raise ValueError(
            f"k_codes: expected [{batch}, a divisor of {heads}, N, {words}], got shape {tuple(k_codes.shape)}"
        )
    grouped = q_codes.unflatten(1, (k_codes.shape[1], -1))  # [B, Hkv, G, 1, W]
    return ESTIMATORS[estimator](grouped, k_codes[:, :, None]).flatten(1, 2).to(torch.int16)


def select_nearest(distance: torch.Tensor, count: int) -> torch.Tensor:
    """The last token, and the ``count - 1`` others of least distance; of equal ones the more recent.

    Ties are the rule, not the exception: there are ``3 D + 1`` distances for any number of tokens.

    Args:
        distance: integers ``[B, Hq, N]``.
        count: tokens to read, at least 1; all, if there are no more.

    Returns:
        int64 ``[B, Hq, min(count, N)]``, ascending.
    """
    check_positive_int("count", count)
    n = distance.shape[-1]
    place = torch.arange(n, device=distance.device)
    order = distance.long() * n + (n - 1 - place)  # unique: distance first, then age
    order[..., -1] = -1
    return torch.topk(order, min(count, n), dim=-1, largest=False).indices.sort(dim=-1).values


class AdamasCache(DecodeCache):
    """Keeps everything and a code of each key; a query reads the ``budget`` tokens of nearest code and itself.

    The current token counts in the budget and is always read, as in the released kernel.

    Args:
        thresholds: see :func:`effattn_lab.sparse.codes.bucketize`. The default is made for keys of
            Llama-2's size; for others set them by the spread of the transformed keys.
        transform: apply the Hadamard transform. Default True.
        estimator: "l1", the default, or "released".
        share: query heads of one KV head read the same tokens, by their least distance. Default False: each its own.
            The paper's models have a KV head for each query head; later commits of its code share so.
        scale: default ``D ** -0.5``.

    Keys are coded after RoPE and once: a rotation by absolute position never changes. (Positions counted inside a
    cache would.)
    """

    def __init__(
        self,
        *,
        thresholds: Sequence[float] = THRESHOLDS,
        transform: bool = True,
        estimator: str = "l1",
        share: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__(scale=scale)
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {estimator!r}")
        bucketize(torch.zeros(1), thresholds)  # refuses bad thresholds now, not at the first key
        self.thresholds, self.transform = tuple(thresholds), transform
        self.estimator, self.share = estimator, share
        self.codes = torch.empty(0)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        return encode(x, thresholds=self.thresholds, transform=self.transform)

    def _take(self, k: torch.Tensor, v: torch.Tensor) -> None:
        fresh = self._encode(k)
        self.codes = fresh if self.length == 0 else torch.cat([self.codes, fresh], dim=2)
        super()._take(k, v)

    def distances(self, q: torch.Tensor) -> torch.Tensor:
        """``[B, Hq, N]``: each query head's code against its KV head's."""
        return code_distances(self._encode(q), self.codes, estimator=self.estimator)

    def _attend(self, q: torch.Tensor, budget: int) -> torch.Tensor:
        distance = self.distances(q)
        if self.share:
            distance = -shared_by_group(-distance, self.k.shape[1])
        index = select_nearest(distance, budget)
        self.read = float(index.shape[-1])
        return gather_attention(q, self.k, self.v, index, scale=self.scale)
