"""Tokens that one pass of SmolLM2-135M yields with drafts that a laptop makes: real text, greedy and sampled.

``python -m effattn_lab.linear.speculative_smollm2 --write`` runs the experiment (minutes) and records it beside this
file; :func:`measured` reads the record, for chapter and lab. Three kinds of real text:

* ``docs``: the model goes on with a page of Python's reference;
* ``code``: it goes on with a file of the standard library;
* ``copy``: it has read some code and begins to write it again, as when it edits a file or quotes a document.

The greedy text doesn't depend on the drafts: it is generated once, and every draft and gamma is counted against it
(:func:`speculative_decode.replay`); one live run for each draft checks that the tokens are the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from effattn_lab._command import positive
from effattn_lab.linear.speculative_decode import Generation, replay, speculate, summary
from effattn_lab.linear.speculative_drafts import Draft, EarlyExit, NGram, PromptLookup, fit_exit
from effattn_lab.models.smollm2 import SmolLM2
from effattn_lab.tasks.text import stdlib_source, topics

RECORD = Path(__file__).with_suffix(".json")
GAMMAS = (1, 2, 4, 8)
EXIT_LAYERS = 2
FREQUENT = 2048  # tokens that the early exit knows
TRAIN_FROM = (
    20_000  # tokens of the reference before this one are for prompts, those after for counting and fitting
)
PLACES = {"docs": (600, 5_000), "code": (700, 6_000), "copy": (1_200, 4_200)}


def prompts(lm: SmolLM2, length: int = 192) -> dict[str, list[list[int]]]:
    """Two prompts of ``length`` tokens for each kind of text."""
    text = {
        "docs": lm.ids(topics())[0].tolist(),
        "code": lm.ids(stdlib_source("argparse"))[0].tolist(),
        "copy": lm.ids(stdlib_source("textwrap") + stdlib_source("shlex") + stdlib_source("bisect"))[
            0
        ].tolist(),
    }
    found: dict[str, list[list[int]]] = {}
    for kind, places in PLACES.items():
        found[kind] = []
        for at in places:
            at = at % (len(text[kind]) - length)
            if kind == "copy":  # the page, then its first 24 tokens again
                page = text[kind][at : at + length - 24]
                found[kind].append([*page, *page[:24]])
            else:
                found[kind].append(text[kind][at : at + length])
    return found


def drafts(lm: SmolLM2, fit_tokens: int = 3072) -> list[Draft]:
    """Lookup as it is, trigrams counted in the reference, an early exit fitted on ``fit_tokens`` of it."""
    text = lm.ids(topics())[0][TRAIN_FROM:]
    known = torch.tensor(most_frequent(text.tolist(), FREQUENT))
    rows = text[: fit_tokens // 256 * 256].view(-1, 256)
    exit_map = fit_exit(lm.model, EXIT_LAYERS, rows)
    return [
        PromptLookup(),
        NGram(text.tolist(), vocab_size=lm.model.config.vocab_size),
        EarlyExit(lm.model, EXIT_LAYERS, exit_map, known),
    ]


def most_frequent(text: Sequence[int], count: int) -> list[int]:
    """The ``count`` most frequent tokens of a text, ascending; ties to the smaller id."""
    values, counts = torch.tensor(text).unique(return_counts=True)
    order = torch.argsort(counts, descending=True, stable=True)[:count]
    return sorted(values[order].tolist())


def cost_ratio(draft: Draft, lm: SmolLM2) -> float:
    """``c`` where reading weights is all the time: the draft's weights over the target's (lookups: 0)."""
    if not isinstance(draft, EarlyExit):
        return 0.0
    return draft.parameters_read() / sum(p.numel() for p in lm.model.parameters())


def run(
    lm: SmolLM2, new_tokens: int = 96, sampled_tokens: int = 64, log: Any = None
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """All rows of the experiment, see the module's head.

    Returns:
        one dict for each kind of text, draft, temperature and gamma: what :func:`speculative_decode.summary` gives,
        ``by_depth`` (acceptance at each place, given the places before) and ``c``; and for each kind of text
        :func:`repetition` of its greedy texts.
    """
    say = (lambda *x: print(*x, file=log, flush=True)) if log else (lambda *x: None)
    made, asked, table = drafts(lm), prompts(lm), []
    say("drafts ready")
    made_texts = iter(greedy_texts(lm, [prompt for given in asked.values() for prompt in given], new_tokens))
    texts = {kind: [next(made_texts) for _ in given] for kind, given in asked.items()}
    say("greedy texts ready")
    for kind, given in asked.items():
        greedy = texts[kind]
        for draft in made:
            live = speculate(lm.model, draft, given[0], 16, 4).tokens
            if live != greedy[0][:16]:
                raise RuntimeError(f"{draft.name}: speculation changed the greedy text of {kind}")
            for gamma in GAMMAS:
                runs = [replay(draft, prompt, text, gamma) for prompt, text in zip(given, greedy)]
                table.append(_row(lm, draft, kind, 0.0, gamma, runs))
            generator = torch.Generator().manual_seed(0)
            runs = [
                speculate(lm.model, draft, given[0], sampled_tokens, 4, temperature=1.0, generator=generator)
            ]
            table.append(_row(lm, draft, kind, 1.0, 4, runs))
            say(kind, draft.name, "done")
    return table, _repetitions(asked, texts)


@torch.no_grad()
def greedy_texts(lm: SmolLM2, given: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    """The target's greedy text after each prompt, all in one batch: prompts of the same length."""
    new, cache = torch.tensor(list(given)), None
    made: list[torch.Tensor] = []
    for _ in range(new_tokens):
        out = lm.model(new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        new, cache = out.logits[:, -1].argmax(dim=-1, keepdim=True), out.past_key_values
        made.append(new)
    return [row.tolist() for row in torch.cat(made, dim=1)]


def repetition(prompt: Sequence[int], text: Sequence[int], n: int = 4) -> tuple[float, float]:
    """Shares of ``text``'s n-grams that occurred earlier in ``text``, and in ``prompt``: what lookup lives on."""
    grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
    if not grams:
        raise ValueError(f"text: expected at least n = {n} tokens, got {len(text)}")
    before = {tuple(prompt[i : i + n]) for i in range(len(prompt) - n + 1)}
    own = sum(gram in grams[:i] for i, gram in enumerate(grams))
    return own / len(grams), sum(gram in before for gram in grams) / len(grams)


def greedy_repetition() -> dict[str, dict[str, float]]:
    """For each kind of text, mean :func:`repetition` of the recorded run's greedy texts: ``own`` and ``prompt``."""
    found: dict[str, dict[str, float]] = json.loads(RECORD.read_text(encoding="utf-8"))["greedy"]
    return found


def _repetitions(
    asked: dict[str, list[list[int]]], texts: dict[str, list[list[int]]]
) -> dict[str, dict[str, float]]:
    table = {}
    for kind, given in asked.items():
        pairs = [repetition(prompt, text) for prompt, text in zip(given, texts[kind])]
        own, prompt = (sum(x) / len(pairs) for x in zip(*pairs))
        table[kind] = {"own": round(own, 3), "prompt": round(prompt, 3)}
    return table


def _row(
    lm: SmolLM2, draft: Draft, kind: str, temperature: float, gamma: int, runs: Iterable[Generation]
) -> dict[str, Any]:
    rounds = [r for one in runs for r in one.rounds]
    numbers = {name: round(value, 4) for name, value in summary(rounds, gamma).items()}
    return {
        "text": kind,
        "draft": draft.name,
        "temperature": temperature,
        "gamma": gamma,
        **numbers,
        "by_depth": by_depth(rounds, gamma),
        "c": round(cost_ratio(draft, lm), 4),
    }


def by_depth(rounds: Sequence[tuple[int, int]], gamma: int) -> list[float | None]:
    """Share of accepted drafts at each place, among rounds that judged one there; None where there was none."""
    rates: list[float | None] = []
    for place in range(gamma):
        judged = [accepted > place for n, accepted in rounds if n > place and accepted >= place]
        rates.append(round(sum(judged) / len(judged), 4) if judged else None)
    return rates


def measured() -> list[dict[str, Any]]:
    """The rows of the recorded run."""
    rows: list[dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))["rows"]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiment, print the table, write the record if asked."""
    from effattn_lab.measure.xray import show
    from effattn_lab.models import smollm2

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--new-tokens", type=positive, default=96, help="greedy tokens a prompt")
    parser.add_argument("--sampled-tokens", type=positive, default=64, help="tokens at temperature 1")
    parser.add_argument("--write", action="store_true", help=f"record the rows in {RECORD.name}")
    chosen = parser.parse_args(arguments)
    table, repeated = run(smollm2.load(), chosen.new_tokens, chosen.sampled_tokens, log=sys.stderr)
    show([{k: v for k, v in row.items() if k != "by_depth"} for row in table])
    if chosen.write:
        about = {"model": "SmolLM2-135M-Instruct, float32", "torch": torch.__version__.split("+")[0],
                 "new_tokens": chosen.new_tokens, "sampled_tokens": chosen.sampled_tokens}  # fmt: skip
        lines = ",\n  ".join(json.dumps(row) for row in table)
        head = f'{{"about": {json.dumps(about)},\n "greedy": {json.dumps(repeated)},\n'
        RECORD.write_text(f'{head} "rows": [\n  {lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
