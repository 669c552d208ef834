"""The decoding methods that are compared at equal budgets, what each reads, and how much softmax that holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from effattn_lab._validate import check_positive_int, resolve_scale
from effattn_lab.foundations.attention import repeat_kv, visible
from effattn_lab.models.decode import Make, Prompt, rope_base
from effattn_lab.sparse.adamas import AdamasCache, code_distances, encode, select_nearest
from effattn_lab.sparse.cache import DecodeCache, FullCache, captured_mass, decode_scores
from effattn_lab.sparse.codes import THRESHOLDS, hadamard
from effattn_lab.sparse.eviction import H2OCache, SnapKVCache
from effattn_lab.sparse.quest import OracleCache, QuestCache, page_scores, select_pages
from effattn_lab.sparse.streaming import StreamingCache

#: Where a normal variable of spread 1 is cut into four for least squared error (Max 1960): at 0 and plus-minus this.
FOUR_LEVELS = 0.9816
#: Channels counted as strongest in :class:`KeyStatistics`.
TOP = 4


class Method(NamedTuple):
    """A label, and ``make(model, thresholds)``, which gives what a decoder calls for a cache."""

    label: str
    make: Callable[[Any, Sequence[float]], Make]


METHODS: dict[str, Method] = {
    "full": Method("full attention", lambda model, thresholds: FullCache),
    "oracle": Method("oracle", lambda model, thresholds: OracleCache),
    "adamas": Method("Adamas", lambda model, thresholds: lambda: AdamasCache(thresholds=thresholds)),
    "adamas_raw": Method(
        "Adamas without Hadamard",
        lambda model, thresholds: lambda: AdamasCache(thresholds=thresholds, transform=False),
    ),
    "quest": Method("Quest, pages of 16", lambda model, thresholds: QuestCache),
    "snapkv": Method("SnapKV", lambda model, thresholds: SnapKVCache),
    "h2o": Method("H2O", lambda model, thresholds: H2OCache),
    "streaming": Method("StreamingLLM", lambda model, thresholds: _streaming(model)),
}


class FittedAdamasCache(AdamasCache):
    """Codes whose thresholds the prompt sets, in each layer apart and for queries and keys apart.

    The outer thresholds are plus and minus the median size of a coordinate, so that all four codes are equally
    frequent if coordinates are symmetric.

    Args:
        fit: False leaves ``thresholds`` for both.
        centre: code keys without the mean key of the prompt: what all keys share moves all products alike.
        thresholds, transform, scale: as in :class:`effattn_lab.sparse.adamas.AdamasCache`.
    """

    def __init__(
        self, *, fit: bool = True, centre: bool = False, thresholds: Sequence[float] = (-1.0, 0.0, 1.0),
        transform: bool = True, scale: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(thresholds=thresholds, transform=transform, scale=scale)
        self.fit, self.centre = fit, centre
        self.mean = torch.zeros(())
        self.query_thresholds = self.thresholds

    def prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        if self.centre:
            self.mean = k.mean(dim=2, keepdim=True)
        if self.fit:
            self.query_thresholds, self.thresholds = (
                (-t, 0.0, t) for t in (self._median(q), self._median(k - self.mean))
            )
        super().prefill(q, k, v)

    def _median(self, x: torch.Tensor) -> float:
        return float((hadamard(x) if self.transform else x).abs().median())

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        return super()._encode(x - self.mean)

    def distances(self, q: torch.Tensor) -> torch.Tensor:
        codes = encode(q, thresholds=self.query_thresholds, transform=self.transform)
        return code_distances(codes, self.codes)


#: How the thresholds of a variant are set, in words: as released, ``thresholds`` for all, or by the prompt.
CHOICES = {"released": "thresholds ±10", "one": "one pair of thresholds", "fit": "thresholds of the layer"}


def _variant(transform: bool, choice: str, centre: bool) -> Method:
    code = "codes of kH" if transform else "codes of k"

    def make(model: Any, thresholds: Sequence[float]) -> Make:
        pair = THRESHOLDS if choice == "released" else thresholds
        return lambda: FittedAdamasCache(
            fit=choice == "fit", centre=centre, thresholds=pair, transform=transform
        )

    return Method(f"{code}, {CHOICES[choice]}{', mean key taken off' if centre else ''}", make)


#: What may be at fault where the transform doesn't help: Adamas with one thing changed at a time.
VARIANTS: dict[str, Method] = {
    f"{'hadamard' if transform else 'raw'}_{choice}{'_centred' * centre}": _variant(transform, choice, centre)
    for choice, centre in (("released", False), ("one", False), ("fit", False), ("fit", True))
    for transform in (False, True)
}


#: The variant whose loss is measured at all budgets, and how pictures and tables call it and the methods.
BEST = "hadamard_fit"
LABELS = {name: method.label for name, method in METHODS.items()} | {BEST: "Adamas, layers' own thresholds"}


def _streaming(model: Any) -> Make:
    base = rope_base(model)
    return lambda: StreamingCache(rope_base=base)


@dataclass(frozen=True)
class KeyStatistics:
    """What decides how well codes of keys can rank, for each layer (means over heads but for ``spread``).

    Attributes:
        spread: root mean square of a key's coordinates; the transform doesn't change it.
        top: share of a head's energy in its :data:`TOP` strongest channels of D, keys as they are.
        top_transformed: the same after the Hadamard transform.
        constant: share of the energy that is the head's mean key, the same for all tokens.
        norms: standard deviation of the keys' lengths over their mean; distances can rank only if this is small.
        equal: what ``top`` would be if all channels were equal, ``TOP / D``.
    """

    spread: tuple[float, ...]
    top: tuple[float, ...]
    top_transformed: tuple[float, ...]
    constant: tuple[float, ...]
    norms: tuple[float, ...]
    equal: float

    def thresholds(self) -> tuple[float, float, float]:
        """For all layers alike, as in the released code: 0 and the edges of a four-level code of this spread."""
        edge = FOUR_LEVELS * float(torch.tensor(self.spread).square().mean().sqrt())
        return (-edge, 0.0, edge)


def key_statistics(prompt: Prompt) -> KeyStatistics:
    """Of the keys, after RoPE, of a text that a model has read."""
    rows = []
    for _, keys, _ in prompt.layers:
        k = keys[0].double()  # [Hkv, N, D]
        norm = k.norm(dim=-1)
        rows.append(
            (
                k.square().mean().sqrt().item(),
                _top_share(k),
                _top_share(hadamard(k)),
                (k.mean(dim=1).square().sum(-1) / k.square().sum(-1).mean(-1)).mean().item(),
                (norm.std(dim=-1, correction=0) / norm.mean(dim=-1)).mean().item(),
            )
        )
    spread, top, transformed, constant, norms = (tuple(column) for column in zip(*rows))
    equal = TOP / prompt.layers[0][1].shape[3]
    return KeyStatistics(spread, top, transformed, constant, norms, equal)


def _top_share(k: torch.Tensor) -> float:
    energy = k.square().sum(dim=1)  # [Hkv, D]
    return (energy.topk(TOP, dim=-1).values.sum(-1) / energy.sum(-1)).mean().item()


def recalled(tokens: Sequence[int], begin: int, beyond: int) -> list[bool]:
    """For each token from ``begin`` on: has it followed its predecessor before, last time over ``beyond`` tokens ago?

    Such a token can be looked up in the text, and not in its last ``beyond`` tokens (Arora et al. 2024, Zoology, call
    it a recall of a pair).
    """
    check_positive_int("begin", begin)
    last: dict[tuple[int, int], int] = {}
    found = []
    for t, pair in enumerate(pairwise(tokens), 1):
        if t >= begin:
            found.append(pair in last and t - last[pair] > beyond)
        last[pair] = t
    return found


def chosen(cache: DecodeCache, q: torch.Tensor, budget: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which tokens ``cache.attend(q, budget)``, just called, read.

    What an evicting cache keeps has lost its positions: to find them, the first channel of the values that it was
    given must hold each token's position.

    Returns:
        ``(index, valid)``: int64 ``[B, Hq, n]``, positions in the text, and which of them count (None: all).
    """
    if isinstance(cache, OracleCache):
        scores = decode_scores(q, cache.k, scale=cache.scale)
        return scores.topk(min(budget, cache.kept), dim=-1).indices, None
    if isinstance(cache, AdamasCache):
        return select_nearest(cache.distances(q), budget), None
    if isinstance(cache, QuestCache):
        scores = page_scores(q, cache.least, cache.greatest)
        pages = select_pages(scores, scores.shape[-1] if budget >= cache.kept else budget // cache.page_size)
        index = (pages[..., None] * cache.page_size + torch.arange(cache.page_size)).flatten(2)
        return index.clamp_max(cache.kept - 1), index < cache.kept
    places = cache.v[..., 0].round().long()
    return places.repeat_interleave(q.shape[1] // places.shape[1], dim=1), None


def sinks(prompt: Prompt, ids: torch.Tensor, last: int = 64) -> list[dict[str, Any]]:
    """Where the last queries of a text put most weight, in each layer, as a mean over them and the heads.

    Args:
        prompt: a text read by the model.
        ids: its tokens ``[1, N]``.
        last: queries at its end.

    Returns:
        a row for each layer: ``place`` of the token of most weight before the first of those queries, ``weight`` on
        it, ``same`` on all tokens of the same kind, ``first`` on token 0, and ``value``: the length of its value over
        the mean one.
    """
    check_positive_int("last", last)
    if last >= prompt.length:
        raise ValueError(f"last: expected fewer than the {prompt.length} tokens of the text, got {last}")
    rows = []
    for q, k, v in prompt.layers:
        keys = repeat_kv(k, q.shape[1] // k.shape[1])
        s = resolve_scale(prompt.scale, q.shape[3]) * q[:, :, -last:] @ keys.transpose(-1, -2)
        s = s.masked_fill(~visible(last, prompt.length, causal=True), float("-inf"))
        weight = torch.softmax(s, dim=-1).mean(dim=(0, 1, 2))  # [N]
        place = int(weight[:-last].argmax())
        length = v[0].norm(dim=-1).mean(dim=0)
        row = {
            "weight": weight[place],
            "same": weight[ids[0] == ids[0, place]].sum(),
            "first": weight[0],
            "value": length[place] / length.mean(),
        }
        rows.append({"place": place, **{name: round(x.item(), 4) for name, x in row.items()}})
    return rows


def judge(make: Make, prompt: Prompt, begin: int, budget: int, every: int = 8) -> dict[str, Any]:
    """How much of the full softmax a method's choice holds, for each layer and query head.

    The model's own queries and keys are used, from its run with full attention: the choice alone is judged, not what
    earlier mistakes did to later layers. All layers have the budget.

    Args:
        make: gives a fresh cache.
        prompt: a text read by the model.
        begin: tokens read as the prompt; the others arrive one by one.
        budget: tokens a head may read.
        every: judge each such token.

    Returns:
        ``mass``: share of the softmax held, ``[layers][Hq]``; ``oracle``: the most that ``budget`` keys hold;
        ``recall``: share of those keys that were read; ``error``: of the output, root of the mean square over that
        of full attention's; ``first``: how often the first token was read, a number for each layer; ``read``:
        tokens read, a mean.
    """
    for name, value in (("begin", begin), ("budget", budget), ("every", every)):
        check_positive_int(name, value)
    if begin >= prompt.length:
        raise ValueError(f"begin: expected fewer than the {prompt.length} tokens of the text, got {begin}")
    out: dict[str, Any] = {"mass": [], "oracle": [], "recall": [], "error": []}
    first = []
    read, judged = 0.0, 0
    for q, k, v in prompt.layers:
        v = v.clone()
        v[..., 0] = torch.arange(prompt.length, dtype=v.dtype)
        cache = make()
        cache.scale = prompt.scale
        cache.prefill(q[:, :, :begin], k[:, :, :begin], v[:, :, :begin])
        sums, off = torch.zeros(3, q.shape[1]), torch.zeros(2, q.shape[1])
        count, sink = 0, 0.0
        for t in range(begin, prompt.length):
            query = q[:, :, t : t + 1]
            cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
            got = cache.attend(query, budget)
            if (t - begin) % every:
                continue
            seen = k[:, :, : t + 1]
            want = F.scaled_dot_product_attention(
                query, seen, v[:, :, : t + 1], scale=prompt.scale, enable_gqa=True
            )
            # Without the channel that holds positions.
            off += torch.stack([x[0, :, 0, 1:].square().sum(dim=-1) for x in (got - want, want)])
            index, valid = chosen(cache, query, budget)
            best = decode_scores(query, seen, scale=prompt.scale).topk(min(budget, t + 1), dim=-1).indices
            taken = torch.zeros(q.shape[1], t + 1, dtype=torch.bool)
            taken.scatter_(1, index[0] if valid is None else index[0].masked_fill(~valid[0], t), True)
            sums[0] += captured_mass(query, seen, index, valid=valid, scale=prompt.scale)[0]
            sums[1] += captured_mass(query, seen, best, scale=prompt.scale)[0]
            sums[2] += taken.gather(1, best[0]).float().mean(dim=1)
            sink += taken[:, 0].float().mean().item()
            read, count = read + cache.read, count + 1
        judged += count
        first.append(round(sink / count, 4))
        for name, row in zip(out, [*(sums / count), (off[0] / off[1]).sqrt()]):
            out[name].append([round(x, 4) for x in row.tolist()])
    out["first"] = first
    out["read"] = round(read / judged, 2)
    return out
