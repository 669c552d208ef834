"""What a budget of keys costs a real model: SmolLM2-135M decodes with each method, and is judged.

``python -m effattn_lab.sparse.budget_study --out FILE`` runs what FILE lacks and keeps each run in it as it ends.
``--part`` chooses one of:

* ``loss``: perplexity of the tokens after a prompt, on real text, against the budget; apart for tokens that can be
  looked up far back;
* ``mass``: share of the softmax that a choice holds, and recall of the best keys, for each layer and head; and where
  the model's own attention sinks are;
* ``codes``: both for variants of Adamas: transform, thresholds, mean key;
* ``needle``: a fact in a long text. *Late*, the text is read first and the question arrives token by token, when
  methods that drop tokens have dropped them; early, the question is part of the prompt;
* ``tasks``: RULER's other tasks with full attention, which says what the model can do at all, and those of the
  recipe's ``compared`` with all methods at one budget, question late.

The prompt is read with full attention by all methods, and the first layers read everything, as Quest and Adamas do
it: the same for each method.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from effattn_lab._atomic import write_atomic
from effattn_lab._command import bad_values, file_to_write, positive
from effattn_lab.models.decode import Decoder, Prompt, read_prompt, steps_together
from effattn_lab.models.smollm2 import SmolLM2
from effattn_lab.sparse.budget_methods import BEST, METHODS, VARIANTS, judge, key_statistics, recalled, sinks
from effattn_lab.tasks import ruler
from effattn_lab.tasks.text import stdlib_source, topics

PARTS = ("check", "loss", "mass", "codes", "needle", "tasks")
#: Texts: source and first token. Thresholds are set on another place of the first.
TEXTS = {
    "docs": ("topics", 2_000),
    "code": ("argparse", 4_000),
    "docs_2": ("topics", 40_000),
    "code_2": ("tarfile", 4_000),
}
CALIBRATION = ("topics", 80_000, 512)


@dataclass(frozen=True)
class Recipe:
    """Everything a row depends on besides the code.

    Attributes:
        prompt, tokens: of ``loss``: read at once, and then one by one through the caches.
        budgets: tokens a query head may read in a layer.
        far: a token is far if its pair with the token before it came last more than so many tokens ago.
        dense_layers: first layers that read everything.
        mass_budgets, mass_tokens, mass_every: of ``mass``: see :func:`effattn_lab.sparse.budget_methods.judge`.
        needles, needle_length, needle_budgets: of ``needle``; prompt and answer take at most so many tokens.
        early: methods that are also asked with the question in the prompt.
        task_length, task_budget: of ``tasks``.
        compared: of ``tasks``, those that all methods are asked, question late; default none. Worth it for tasks to
            which full attention has an answer.
    """

    prompt: int = 1024
    tokens: int = 128
    budgets: tuple[int, ...] = (64, 128, 256, 512)
    far: int = 64
    dense_layers: int = 2
    mass_budgets: tuple[int, ...] = (64, 256)
    mass_tokens: int = 64
    mass_every: int = 8
    needles: tuple[str, ...] = ("niah_single_1", "niah_single_2")
    needle_length: int = 1024
    needle_budgets: tuple[int, ...] = (64, 128, 256)
    early: tuple[str, ...] = ("snapkv", "h2o")
    task_length: int = 1024
    task_budget: int = 128
    compared: tuple[str, ...] = ()


class Study:
    """The runs, the record they are kept in, and the model they share."""

    def __init__(self, path: Path, recipe: Recipe, lm: SmolLM2) -> None:
        self.path, self.recipe, self.lm = path, recipe, lm
        self.record: dict[str, Any] = {"recipe": json.loads(json.dumps(asdict(recipe))), "rows": []}
        if path.is_file():
            kept = _read(path)
            if kept["recipe"] != self.record["recipe"]:
                raise ValueError(f"--out: {path} holds runs of another recipe; give another file")
            self.record = kept
        self.record["versions"] = versions()
        if "keys" not in self.record:
            source, begin, count = CALIBRATION
            statistics = key_statistics(read_prompt(lm.model, self.ids(source, begin, count)))
            self.record["keys"] = {
                k: v if isinstance(v, float) else [round(x, 4) for x in v]
                for k, v in asdict(statistics).items()
            }
            self.record["thresholds"] = [round(x, 3) for x in statistics.thresholds()]
        self.makers = {
            name: method.make(lm.model, tuple(self.record["thresholds"]))
            for name, method in {**METHODS, **VARIANTS}.items()
        }

    def ids(self, source: str, begin: int, count: int) -> torch.Tensor:
        """``[1, count]`` tokens of a text from a place."""
        text = topics() if source == "topics" else stdlib_source(source)
        return self.lm.ids(text)[:, begin : begin + count]

    def has(self, **wanted: Any) -> bool:
        return any(all(r.get(k) == v for k, v in wanted.items()) for r in self.record["rows"])

    def add(self, **row: Any) -> None:
        """Keep a row, in the file too."""
        self.record["rows"].append(row)
        rows = ",\n  ".join(json.dumps(r) for r in self.record["rows"])
        head = {k: v for k, v in self.record.items() if k != "rows"}
        text = f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'
        write_atomic(self.path, text.encode())
        shown = {
            k: v for k, v in row.items() if k not in ("mass", "oracle", "recall", "error", "first", "layers")
        }
        print(" ".join(f"{k}={v!r}" for k, v in shown.items()), flush=True)

    def decoder(self, method: str, budget: int | None) -> Decoder:
        return Decoder(self.lm.model, self.makers[method], budget, dense_layers=self.recipe.dense_layers)

    def wanted(self, budgets: Sequence[int]) -> Iterator[tuple[str, list[int | None]]]:
        """Methods and their budgets; full attention has none."""
        for name in METHODS:
            yield name, [None] if name == "full" else list(budgets)

    def losses(
        self, kind: str, text: str, prompt: int, tokens: int, runs: Iterable[tuple[str, list[int | None]]]
    ) -> None:
        """Loss of ``tokens`` tokens after a prompt, a row for each method and budget."""
        source, begin = TEXTS[text]
        ids = self.ids(source, begin, prompt + tokens + 1)
        far = torch.tensor(recalled(ids[0].tolist(), prompt + 1, self.recipe.far))
        read: Prompt | None = None
        for method, own in runs:
            key = {"kind": kind, "text": text, "method": method}
            todo = [b for b in own if not self.has(**key, budget=b)]
            if not todo:
                continue
            read = read or read_prompt(self.lm.model, ids[:, :prompt])
            begun = self.decoder(method, None)
            begun.start(read)
            for budget in todo:
                since, decoder = time.process_time(), begun.fork(budget)
                logits = decoder.steps(ids[:, prompt:-1])
                each = F.cross_entropy(logits.float(), ids[0, prompt + 1 :], reduction="none")
                self.add(
                    **key,
                    budget=budget,
                    nats=round(each.mean().item(), 5),
                    tokens=tokens,
                    far_nats=round(each[far].mean().item(), 5) if far.any() else 0.0,
                    far_tokens=int(far.sum()),
                    read=round(decoder.read(), 2),
                    seconds=round(time.process_time() - since, 1),
                )

    def masses(self, kind: str, text: str, runs: Iterable[tuple[str, list[int | None]]]) -> None:
        """Mass, recall and error of each method's choice, a row for each budget."""
        recipe, (source, begin) = self.recipe, TEXTS[text]
        read: Prompt | None = None
        for method, own in runs:
            for budget in own:
                key = {"kind": kind, "text": text, "method": method, "budget": budget}
                if budget is None or self.has(**key):
                    continue
                if read is None:
                    ids = self.ids(source, begin, recipe.prompt + recipe.mass_tokens)
                    read = read_prompt(self.lm.model, ids)
                found = judge(self.makers[method], read, recipe.prompt, budget, recipe.mass_every)
                if method != "oracle":
                    del found["oracle"]  # the same for all: kept once
                self.add(**key, **found)

    def sinks(self, text: str) -> None:
        """Where a text's queries put most weight, and what stands there."""
        key = {"kind": "sinks", "text": text}
        if not self.has(**key):
            source, begin = TEXTS[text]
            ids = self.ids(source, begin, self.recipe.prompt + self.recipe.mass_tokens)
            layers = sinks(read_prompt(self.lm.model, ids), ids)
            for row in layers:
                row["token"] = self.lm.tokenizer.decode([int(ids[0, row["place"]])])
            self.add(**key, layers=layers)

    def codes(self, text: str) -> None:
        """Variants of Adamas, judged and their loss, at the smallest budget; the best of them at all budgets."""
        recipe = self.recipe
        best: list[int | None] = [*recipe.budgets]
        self.losses("codes_loss", text, recipe.prompt, recipe.tokens, [(BEST, best)])
        self.masses("codes", text, [(name, [recipe.mass_budgets[0]]) for name in VARIANTS])
        others: list[tuple[str, list[int | None]]] = [
            (name, [recipe.budgets[0]])
            for name in VARIANTS
            if "_one" not in name and "_centred" not in name  # the first are in ``loss``
        ]
        self.losses("codes_loss", text, recipe.prompt, recipe.tokens, others)

    def needle(self, task: str, seed: int) -> None:
        """One sample, all methods and budgets at once, question late and early."""
        recipe = self.recipe
        runs = list(self.wanted(recipe.needle_budgets))
        early = [(method, own) for method, own in runs if method in recipe.early]
        self._ask({"kind": "needle", "task": task, "seed": seed}, recipe.needle_length, runs, early)

    def task(self, task: str, seed: int, *, compare: bool) -> None:
        """One sample of a task, question late: full attention alone, or all methods at one budget."""
        runs = list(self.wanted((self.recipe.task_budget,)))[: None if compare else 1]
        self._ask({"kind": "tasks", "task": task, "seed": seed}, self.recipe.task_length, runs, [])

    def _ask(
        self, key: dict[str, Any], length: int,
        late_runs: list[tuple[str, list[int | None]]], early_runs: list[tuple[str, list[int | None]]],
    ) -> None:  # fmt: skip
        todo = [
            (late, method, budget)
            for late, runs in ((True, late_runs), (False, early_runs))
            for method, own in runs
            for budget in own
            if not self.has(**key, late=late, method=method, budget=budget)
        ]
        if not todo:
            return
        sample = self.sample(key["task"], length, key["seed"])
        context, question = self.lm.ids(sample.context), self.lm.ids(sample.question)
        whole = read_prompt(self.lm.model, torch.cat([context, question], dim=1))
        for late in (True, False):
            asked = [(method, budget) for when, method, budget in todo if when == late]
            if not asked:
                continue
            read = whole.first(context.shape[1]) if late else whole
            begun = {method: self.decoder(method, None) for method, _ in asked}
            for decoder in begun.values():
                decoder.start(read)
            decoders = [begun[method].fork(budget) for method, budget in asked]
            if late:
                logits = steps_together(decoders, question.expand(len(decoders), -1))[:, -1]
            else:
                logits = whole.logits[-1:].expand(len(decoders), -1)
            for (method, budget), output in zip(asked, self.answers(decoders, logits, sample)):
                score = round(sample.score(output), 4)
                self.add(**key, late=late, method=method, budget=budget, tokens=sample.tokens, score=score,
                         output=output, wanted=list(sample.references))  # fmt: skip

    def sample(self, task: str, length: int, seed: int) -> ruler.Sample:
        return ruler.make(task, length, self.count, seed=seed)

    def count(self, text: str) -> int:
        return int(self.lm.ids(text).shape[1])

    def answers(self, decoders: Sequence[Decoder], logits: torch.Tensor, sample: ruler.Sample) -> list[str]:
        """Greedy answers of decoders that have read the question, from the logits ``[n, vocabulary]`` after it.

        An answer ends with the end of text, after the tokens that its task reserves for it, or once it has all that
        is wanted: scores look for what appears, so more text could change nothing.
        """
        made: list[list[int]] = [[] for _ in decoders]
        live = list(range(len(decoders)))
        for place in range(sample.reserve):
            after = []
            for i, token in zip(live, logits.argmax(-1).tolist()):
                if token == self.lm.model.config.eos_token_id:
                    continue
                made[i].append(token)
                if sample.score(self.lm.tokenizer.decode(made[i])) < 1:
                    after.append(i)
            live = after
            if not live or place == sample.reserve - 1:
                break
            new = torch.tensor([[made[i][-1]] for i in live])
            logits = steps_together([decoders[i] for i in live], new)[:, -1]
        return [self.lm.tokenizer.decode(tokens) for tokens in made]

    def run(self, parts: Sequence[str], texts: int, samples: int) -> None:
        """What is asked for and not there yet, in an order that gives a whole picture early."""
        recipe = self.recipe
        if "check" in parts:
            self.losses("check", "docs", 96, 8, self.wanted((48,)))
        for text in list(TEXTS)[:texts]:
            if "loss" in parts:
                self.losses("loss", text, recipe.prompt, recipe.tokens, self.wanted(recipe.budgets))
            if "mass" in parts and text in ("docs", "code"):
                self.sinks(text)
                self.masses("mass", text, self.wanted(recipe.mass_budgets))
            if "codes" in parts and text in ("docs", "code"):
                self.codes(text)
        for seed in range(samples):
            for task in recipe.needles if "needle" in parts else ():
                self.needle(task, seed)
        for compare in (False, True) if "tasks" in parts else ():
            for seed in range(samples):
                for task in recipe.compared if compare else ruler.TASKS:
                    if task not in recipe.needles:
                        self.task(task, seed, compare=compare)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--out: expected a record of this study in {path}, got no JSON: {error}") from None
    if not isinstance(found, dict) or not {"recipe", "rows"} <= found.keys():
        raise ValueError(
            f"--out: expected a record of this study in {path}, got other JSON; give another file"
        )
    return found


def versions() -> dict[str, str]:
    """What the numbers depend on besides the recipe."""
    import transformers

    import effattn_lab

    text = topics() + "".join(stdlib_source(source) for source, _ in TEXTS.values() if source != "topics")
    return {
        "model": "SmolLM2-135M-Instruct, float32",
        "effattn_lab": effattn_lab.__version__,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "text": hashlib.sha256(text.encode()).hexdigest()[:16],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the record lacks."""
    parser = argparse.ArgumentParser(prog="python -m effattn_lab.sparse.budget_study", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "--out", type=file_to_write, required=True, metavar="FILE", help="the record, JSON; kept up to date"
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--texts", type=positive, default=len(TEXTS), help="of loss; default: all")
    parser.add_argument("--samples", type=positive, default=8, help="of each needle and task; default 8")
    args = parser.parse_args(arguments)
    if args.out.is_file():
        with bad_values(parser):
            _read(args.out)  # before the model is loaded
    from effattn_lab.models import smollm2

    torch.set_num_threads(1)
    with bad_values(parser):
        study = Study(args.out, Recipe(), smollm2.load())
    study.run(args.part, args.texts, args.samples)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
