"""What sinks and their positions are worth to a real model: SmolLM2-135M that reads a text through a short cache.

``python -m effattn_lab.sparse.streaming_experiment --write`` (some five minutes on one core) reads 1,024 tokens of
Python's documentation in every setting and keeps the record beside this module, ``streaming_experiment.json``.

A setting is a budget (tokens a query reads, its own among them), a number of sinks, and where the sinks are said to
stand: ``text``, at their positions in the text; ``cache``, counted inside the cache as StreamingLLM does; or
``far``, as the model would see them if the stream had begun some 65,000 tokens earlier, eight times the positions
that it was made for. Only the distances to sinks differ between the three.

All queries are run at once (:func:`effattn_lab.sparse.streaming.streaming_attention_reindexed`); a test holds that
against the decoder that takes token after token through a :class:`~effattn_lab.sparse.streaming.StreamingCache`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from effattn_lab._command import positive
from effattn_lab._validate import check_positive_int
from effattn_lab.foundations.attention import repeat_kv
from effattn_lab.models import hf, smollm2
from effattn_lab.models.decode import rope_base
from effattn_lab.sparse.static_patterns import dense_mask, sinks_and_window
from effattn_lab.sparse.streaming import streaming_attention_reindexed
from effattn_lab.tasks.text import topics

RECORD = Path(__file__).with_name("streaming_experiment.json")
TOKENS, BUDGET = 1024, 256
#: Tokens that the stream is said to have had between the sinks and the rest, for ``far``.
FAR = 65_536
SINKS = (0, 1, 2, 4, 8)
#: Losses in the record are means over runs of so many tokens.
RUN = 16


class Setting(NamedTuple):
    """``budget`` None: full attention. ``positions``: text, cache or far."""

    budget: int | None
    sinks: int = 0
    positions: str = "text"


def settings(budget: int = BUDGET) -> list[Setting]:
    """Full attention; each number of sinks with either count of positions; four sinks far away."""
    found = [Setting(None), Setting(budget, 0, "text")]
    found += [Setting(budget, s, where) for where in ("text", "cache", "far") for s in SINKS if s]
    return found


@torch.no_grad()
def losses(model: Any, ids: torch.Tensor, setting: Setting) -> torch.Tensor:
    """Negative log-likelihood in nats of tokens 1..N-1 of ``ids [1, N]``, read in this setting: ``[N - 1]``."""
    budget, sinks, where = setting
    if where not in ("text", "cache", "far"):
        raise ValueError(f"positions: expected one of text, cache, far, got {where!r}")
    n = ids.shape[1]
    at = torch.arange(n)
    if where == "far":
        at = at + FAR * (at >= sinks)
    base = rope_base(model)
    keep = None if budget is None else dense_mask(sinks_and_window(sinks, budget - sinks), n, n)[0]

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float | None
    ) -> torch.Tensor:
        if where == "cache" and budget is not None:
            return streaming_attention_reindexed(
                q, k, v, sinks=sinks, budget=budget, rope_base=base, scale=scale
            )
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=keep, is_causal=keep is None, scale=scale, enable_gqa=True
        )

    with hf.use(model, attend, "effattn_streaming"):
        # With a mask transformers does not take the jump in positions for the border of a packed document.
        seen = torch.ones_like(ids)
        logits = model(ids, attention_mask=seen, position_ids=at[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1].float(), ids[0, 1:], reduction="none")


@torch.no_grad()
def sink_layers(model: Any, ids: torch.Tensor, first: int = 4) -> list[dict[str, float]]:
    """For each layer, under full attention: what the first tokens get and hold.

    Returns:
        ``mass``: mean softmax weight of the first ``first`` keys over heads and the queries of the second half;
        ``token_0``: of the first key alone; ``heads``: share of heads that give the first ``first`` more than half;
        ``value``: length of token 0's value over the median length, mean over KV heads.
    """
    n, found = ids.shape[1], []
    half = n // 2
    past = torch.ones(n - half, n, dtype=torch.bool).tril(half)

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float | None
    ) -> torch.Tensor:
        factor = q.shape[3] ** -0.5 if scale is None else scale
        s = factor * q[:, :, half:] @ repeat_kv(k, q.shape[1] // k.shape[1]).transpose(-1, -2)
        p = torch.softmax(s.masked_fill(~past, float("-inf")), dim=-1)[0]
        mass = p[..., :first].sum(-1).mean(-1)
        length = v[0].norm(dim=-1)
        found.append(
            {
                "mass": round(mass.mean().item(), 4),
                "token_0": round(p[..., 0].mean().item(), 4),
                "heads": round((mass > 0.5).double().mean().item(), 4),
                "value": round((length[:, 0] / length.median(dim=-1).values).mean().item(), 4),
            }
        )
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    with hf.use(model, attend, "effattn_sinks"):
        model(ids, use_cache=False)
    return found


def study(tokens: int = TOKENS, budget: int = BUDGET) -> dict[str, Any]:
    """All settings on the first ``tokens`` tokens of the text, and the layers' sinks on the first 512."""
    check_positive_int("tokens", tokens)
    check_positive_int("budget", budget)
    if not max(SINKS) < budget < tokens - 1:
        raise ValueError(f"budget: expected more than {max(SINKS)} and less than {tokens - 1}, got {budget}")
    lm = smollm2.load()
    ids = lm.ids(topics(8 * tokens), tokens)
    rows = []
    for setting in settings(budget):
        nats = losses(lm.model, ids, setting)
        after = nats[budget:]  # from the first query on whose past does not fit
        runs = [round(x.mean().item(), 3) for x in nats.split(RUN)]
        rows.append(
            {
                **setting._asdict(),
                "nats": round(after.mean().item(), 4),
                "perplexity": round(math.exp(after.mean().item()), 3),
                "early": round(nats[: budget // 2].mean().item(), 4),
                "runs": runs,
            }
        )
        print({key: x for key, x in rows[-1].items() if key != "runs"}, flush=True)
    return {
        "model": "SmolLM2-135M-Instruct", "text": "pydoc_data.topics", "tokens": tokens, "budget": budget,
        "far": FAR, "run": RUN, "torch": torch.__version__.split("+")[0], "rows": rows,
        "layers": sink_layers(lm.model, ids[:, :512]),
    }  # fmt: skip


def recorded() -> dict[str, Any]:
    """The study that the book shows, kept beside this module."""
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def perplexities(record: dict[str, Any]) -> dict[Setting, float]:
    """Perplexity of each setting over the tokens whose past does not fit into the budget."""
    return {Setting(r["budget"], r["sinks"], r["positions"]): r["perplexity"] for r in record["rows"]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study; ``--write`` keeps the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=positive, default=TOKENS)
    parser.add_argument("--budget", type=positive, default=BUDGET)
    parser.add_argument("--write", action="store_true", help=f"keep the record in {RECORD.name}")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = study(chosen.tokens, chosen.budget)
    if chosen.write:
        rows = ",\n".join(f"    {json.dumps(row)}" for row in found.pop("rows"))
        layers = ",\n".join(f"    {json.dumps(row)}" for row in found.pop("layers"))
        head = json.dumps(found)[1:-1]
        text = f'{{\n  {head},\n  "rows": [\n{rows}\n  ],\n  "layers": [\n{layers}\n  ]\n}}\n'
        RECORD.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
