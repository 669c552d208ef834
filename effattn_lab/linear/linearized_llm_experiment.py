"""How much of SmolLM2 survives when some of its layers are linearized? Perplexity on real text, before and after.

``python -m effattn_lab.linear.linearized_llm_experiment --json out.json`` (half an hour on one core that has nothing
else to do); :func:`measured` has the rows of the recorded run, which is kept beside this file.

Every chosen layer learns to give what the softmax attention in its place gave on the same inputs (attention
transfer, Zhang et al. 2024, LoLCATs): the targets are the model's own, so no run gains by learning the text's
subject. The paper trains on the language-model loss, 1,000 steps of 64 sequences of 4,096 tokens; ``--lm-steps`` adds
a little of that, beside a control that gives softmax layers the same steps. Four settings: local attention alone,
with the global branch, with the masked convolution, with both.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from effattn_lab._command import bad_values, file_to_write, natural, positive
from effattn_lab._validate import check_positive_int
from effattn_lab.linear.linearized_llm_layer import LinearizedAttention
from effattn_lab.linear.linearized_llm_swap import check_layers, from_attention, linearized
from effattn_lab.tasks.text import stdlib_source, topics

SETTINGS: dict[str, dict[str, Any]] = {
    "local": {"grouped": False, "conv_taps": 0},
    "local + global": {"grouped": True, "conv_taps": 0},
    "local + conv": {"grouped": False, "conv_taps": 32},
    "local + global + conv": {"grouped": True, "conv_taps": 32},
}
LAYERS = tuple(range(2, 30, 4))  # 7 of SmolLM2's 30
HELD_OUT = 400_000  # characters of the language reference: what comes after is read for testing only


RECORD = Path(__file__).with_suffix(".json")


def measured() -> list[dict[str, Any]]:
    """The rows of the recorded run, as :func:`run` returns them."""
    rows: list[dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))["rows"]
    return rows


def pieces(lm: Any, text: str, count: int, length: int) -> torch.Tensor:
    """``[count, length]`` token ids: consecutive pieces of ``text``."""
    check_positive_int("count", count)
    check_positive_int("length", length)
    ids = lm.ids(text[: 12 * count * length])[0]
    if len(ids) < count * length:
        raise ValueError(f"text: expected at least {count * length} tokens, got {len(ids)}")
    return ids[: count * length].reshape(count, length)


def training_text() -> str:
    return topics()[:HELD_OUT]


def test_texts() -> dict[str, str]:
    """Held-out text: the end of Python's language reference, and program text of another kind."""
    return {"reference": topics()[HELD_OUT:], "code": stdlib_source("argparse")}


@torch.no_grad()
def capture(
    lm: Any, ids: torch.Tensor, layers: Sequence[int]
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """What the attention of each layer gets and gives on ``ids [B, N]``: ``{layer: (x, y)}``, both ``[B, N, M]``."""
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {i: [] for i in layers}

    def hook(layer: int) -> Any:
        def keep(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            seen[layer].append((x, out[0]))

        return keep

    with ExitStack() as stack:
        for i in layers:
            handle = lm.model.model.layers[i].self_attn.register_forward_hook(hook(i), with_kwargs=True)
            stack.callback(handle.remove)
        for row in ids:
            lm.model.model(row[None], use_cache=False)
    return {i: (torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])) for i, rows in seen.items()}


def transfer(
    layer: LinearizedAttention,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    steps: int,
    lr: float = 1e-3,
    seed: int = 0,
) -> list[float]:
    """Train ``layer`` to give ``y`` for ``x``, one sequence a step; returns the losses, ``|out - y|^2 / |y|^2``.

    Adam. Projections learn at ``lr``, the convolution and the global weight, which start at 0, at ten times that;
    both fall to 0 along a cosine.
    """
    check_positive_int("steps", steps)
    generator = torch.Generator().manual_seed(seed)
    new = [p for p in (layer.alpha, layer.conv_weight) if p is not None]
    old = [p for name, p in layer.named_parameters() if name.endswith("proj.weight")]
    groups: list[dict[str, Any]] = [{"params": old, "lr": lr}]
    if new:
        groups.append({"params": new, "lr": 10 * lr})
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / steps))
    )
    losses, order = [], torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) == 0:
            order = torch.randperm(len(x), generator=generator)
        row, order = order[0], order[1:]
        out = layer(x[row][None])
        assert isinstance(out, torch.Tensor)
        loss = (out[0] - y[row]).square().sum() / y[row].square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def perplexity(lm: Any, ids: torch.Tensor) -> float:
    """``exp`` of the mean negative log-likelihood of tokens 2..N of each row of ``ids [B, N]``."""
    total = 0.0
    for row in ids:
        logits = lm.model(row[None], use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, row[1:]).item()
    return math.exp(total / len(ids))


def finetune(
    lm: Any,
    parameters: Sequence[torch.nn.Parameter],
    ids: torch.Tensor,
    *,
    steps: int,
    lr: float,
    seed: int,
) -> list[float]:
    """Adam on the language-model loss, these parameters alone, one sequence a step."""
    before = [(p, p.requires_grad) for p in lm.model.parameters()]
    for p, _ in before:
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr)
    generator, losses = torch.Generator().manual_seed(seed), []
    try:
        for _ in range(steps):
            row = ids[torch.randint(len(ids), (), generator=generator)]
            logits = lm.model(row[None], use_cache=False).logits[0, :-1].float()
            loss = F.cross_entropy(logits, row[1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    finally:
        for p, grad in before:
            p.requires_grad_(grad)
    return losses


def run(
    lm: Any,
    *,
    layers: Sequence[int] = LAYERS,
    settings: Sequence[str] = tuple(SETTINGS),
    steps: int = 200,
    lr: float = 1e-3,
    sequences: int = 16,
    length: int = 512,
    test_sequences: int = 8,
    group_size: int = 64,
    seeds: Sequence[int] = (0,),
    lm_steps: int = 0,
    lm_lr: float = 1e-4,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """One dict a setting and seed: perplexity with these layers linearized, before any training and after.

    Keys: setting, seed, layers, group_size, steps, for each test text ``ppl_<name>`` (trained) and
    ``ppl_<name>_before``, ``transfer_loss`` (mean over the layers of the last ten steps), ``alpha`` (each layer's),
    seconds; with ``lm_steps`` also ``ppl_<name>_tuned``. The first row is the model as it is, softmax everywhere.
    """
    if unknown := [name for name in settings if name not in SETTINGS]:
        raise ValueError(f"settings: expected some of {', '.join(SETTINGS)}, got {unknown[0]!r}")
    check_layers(layers, len(lm.model.model.layers))
    train = pieces(lm, training_text(), sequences, length)
    tests = {name: pieces(lm, text, test_sequences, length) for name, text in test_texts().items()}

    def measure(suffix: str) -> dict[str, float]:
        return {f"ppl_{name}{suffix}": perplexity(lm, ids) for name, ids in tests.items()}

    base: dict[str, Any] = {"setting": "softmax", "seed": None, "layers": [], **measure("")}
    if lm_steps:
        attentions = [lm.model.model.layers[i].self_attn for i in layers]
        kept = [{k: v.clone() for k, v in a.state_dict().items()} for a in attentions]
        finetune(lm, [p for a in attentions for p in a.parameters()], train, steps=lm_steps, lr=lm_lr, seed=0)
        base.update(measure("_tuned"))
        for attention, weights in zip(attentions, kept):
            attention.load_state_dict(weights)
    rows = [base]
    if progress:
        print(json.dumps(base), flush=True)
    seen = capture(lm, train, layers)
    with linearized(lm.model, layers, group_size=group_size):
        before = measure("_before")  # the new branches start at 0, so this is the same for all settings
    for seed in seeds:
        for setting in settings:
            start = time.perf_counter()
            fresh = [
                from_attention(
                    lm.model.model.layers[i].self_attn,
                    lm.model.config,
                    group_size=group_size,
                    **SETTINGS[setting],
                )
                for i in layers
            ]
            row: dict[str, Any] = {
                "setting": setting, "seed": seed, "layers": list(layers), "group_size": group_size, "steps": steps,
                **before,
            }  # fmt: skip
            losses = [
                transfer(layer, *seen[i], steps=steps, lr=lr, seed=seed) for i, layer in zip(layers, fresh)
            ]
            row["transfer_loss"] = sum(sum(x[-10:]) / len(x[-10:]) for x in losses) / len(losses)
            row["alpha"] = [None if x.alpha is None else x.alpha.item() for x in fresh]
            with linearized(lm.model, layers, fresh):
                row.update(measure(""))
                if lm_steps:
                    parameters = [p for x in fresh for p in x.parameters()]
                    finetune(lm, parameters, train, steps=lm_steps, lr=lm_lr, seed=seed)
                    row.update(measure("_tuned"))
            row["seconds"] = time.perf_counter() - start
            rows.append(row)
            if progress:
                print(json.dumps(row), flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print the rows, and write them with what they were run with."""
    from effattn_lab.measure.xray import show
    from effattn_lab.models import smollm2

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=positive, default=200, help="of transfer, for each layer")
    parser.add_argument("--sequences", type=positive, default=16, help="to train on")
    parser.add_argument("--test-sequences", type=positive, default=8, help="of each test text")
    parser.add_argument("--length", type=positive, default=512)
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS))
    parser.add_argument("--group-size", type=positive, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--lm-steps", type=natural, default=0, help="then this many on the language-model loss"
    )
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--json", type=file_to_write, help="where to write the rows")
    chosen = parser.parse_args(arguments)
    with bad_values(parser):
        rows = run(
            smollm2.load(), layers=chosen.layers, settings=chosen.settings, steps=chosen.steps, seeds=chosen.seeds,
            sequences=chosen.sequences, test_sequences=chosen.test_sequences, length=chosen.length,
            group_size=chosen.group_size, lm_steps=chosen.lm_steps, progress=True,
        )  # fmt: skip
    show([{k: v for k, v in row.items() if k not in ("layers", "alpha")} for row in rows])
    if chosen.json:
        options = {k: v for k, v in vars(chosen).items() if k != "json"}
        chosen.json.write_text(json.dumps({"options": options, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
