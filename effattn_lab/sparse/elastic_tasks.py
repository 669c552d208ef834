"""Two tasks of one vocabulary, 64 tokens a prompt: one needs the far past, the other the last few tokens.

    recall   R  . . p . p p . ... p .  .  .  .  .  k3 k1 k8 ...    the last 8 tokens ask 8 keys; answers v3 v1 v8 ...
    local    L  . . . . . . . ... . .  .  a  b  c  .  .  .         the last 8 tokens ask what stood three before

A token p names a key *and* its value; the 8 of them stand anywhere from 1 to 40, between noise. With sinks and a
window of 8, two layers look back 14 tokens: no route leads from a question to a pair, so all-sparse is chance (1/8).
The targets are not in the prompt, so a router that reads its end learns nothing of the answers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from effattn_lab._validate import check_positive_int
from effattn_lab.tasks._draw import IGNORE
from effattn_lab.tasks.mqar import Batch

TASKS = ("recall", "local")
LENGTH, ASKED, KEYS, BACK, LAST_PAIR = 64, 8, 8, 3, 40
NOISE = 24


class Vocabulary(NamedTuple):
    """First token of each kind; markers are 0 (recall) and 1 (local)."""

    pairs: int = 2
    keys: int = 2 + KEYS * KEYS
    values: int = 2 + KEYS * KEYS + KEYS
    noise: int = 2 + KEYS * KEYS + 2 * KEYS
    size: int = 2 + KEYS * KEYS + 2 * KEYS + NOISE


VOCABULARY = Vocabulary()


def prompts(task: str, examples: int, generator: torch.Generator) -> Batch:
    """Draw prompts of one task.

    Args:
        task: "recall" or "local".
        examples: n.
        generator: of all draws.

    Returns:
        ``inputs [n, 64]`` and ``targets [n, 64]``, int64; targets are -100 but for the last 8 positions.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    check_positive_int("examples", examples)
    v = VOCABULARY
    ids = torch.randint(v.noise, v.size, (examples, LENGTH), generator=generator)
    targets = torch.full_like(ids, IGNORE)
    ids[:, 0] = TASKS.index(task)
    if task == "local":
        targets[:, -ASKED:] = ids[:, LENGTH - ASKED - BACK : LENGTH - BACK]
        return Batch(ids, targets)
    places = 1 + torch.rand(examples, LAST_PAIR, generator=generator).argsort(-1)[:, :KEYS]
    values = torch.randint(KEYS, (examples, KEYS), generator=generator)  # of key 0, 1, ..., may repeat
    ids.scatter_(1, places, v.pairs + KEYS * torch.arange(KEYS) + values)
    order = torch.rand(examples, KEYS, generator=generator).argsort(-1)
    ids[:, -ASKED:] = v.keys + order
    targets[:, -ASKED:] = v.values + values.gather(1, order)
    return Batch(ids, targets)


def mixed(examples: int, generator: torch.Generator) -> tuple[Batch, torch.Tensor]:
    """Half of the prompts of either task, and the number of each prompt's task ``[n]``; ``examples`` is even."""
    check_positive_int("examples", examples)
    if examples % 2:
        raise ValueError(f"examples: expected an even number, got {examples}")
    parts = [prompts(task, examples // 2, generator) for task in TASKS]
    batch = Batch(*(torch.cat(pair) for pair in zip(*parts)))
    return batch, torch.arange(len(TASKS)).repeat_interleave(examples // 2)
