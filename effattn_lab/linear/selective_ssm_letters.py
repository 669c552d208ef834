"""Which capital letter came last? A selective scan against a fixed one, at several learning rates and seeds.

``python -m effattn_lab.linear.selective_ssm_letters`` trains three readers of the lab's kind (one mixer without its
convolution, a linear map, real text byte by byte) at five rates with three seeds and asks each held-out text;
``--write`` keeps the result where the book reads it. Ten to thirty seconds of one core a reader.

Readers differ in the mixer alone: "selective", as released; "selective, exact", with the paper's rule for the
input (zero-order hold) in place of its first term; "fixed", with step, B and C that do not depend on the token.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from effattn_lab._command import positive
from effattn_lab.figures.selective_ssm_lab import Reader, learn, recall
from effattn_lab.linear.selective_ssm_layer import Mamba
from effattn_lab.tasks.language import ByteText

READERS: dict[str, dict[str, Any]] = {
    "selective": {},
    "selective, exact": {"rule": "zoh"},
    "fixed": {"selective": False},
}
RATES = (0.005, 0.01, 0.02, 0.04, 0.08)
EDGES = (0, 4, 16, 64)  # how many bytes ago the letter was: none, up to 4, up to 16, up to 64
WIDTH, STATES, LENGTH, ROUNDS = 24, 4, 96, 300
RECORDED = Path(__file__).with_suffix(".json")


def build(reader: str, seed: int = 0) -> Reader:
    """The untrained reader; the same seed gives "selective" and "selective, exact" the same weights."""
    if reader not in READERS:
        raise ValueError(f"reader: expected one of {'; '.join(READERS)}, got {reader!r}")
    torch.manual_seed(seed)
    return Reader(Mamba(WIDTH, state_size=STATES, conv_width=1, **READERS[reader]))


@torch.no_grad()
def write_factors(reader: Reader, ids: torch.Tensor) -> torch.Tensor:
    """What the exact rule would write over what Euler's writes, ``(exp(x) - 1) / x`` at ``x = delta A``: sorted.

    Of every token, channel and state of ``ids [n, N]``, one number each: 1 where steps are short, towards 0 where
    they are long.
    """
    delta = reader.mixer.deltas(reader.embed(ids))  # [n, E, N]
    x = delta[..., None] * -torch.exp(reader.mixer.A_log)[:, None]
    return (torch.expm1(x) / x).flatten().sort().values


def rows(
    readers: Sequence[str] = tuple(READERS),
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = (0, 1, 2),
    rounds: int = ROUNDS,
) -> list[dict[str, Any]]:
    """One dict a reader, rate and seed: reader, rate, seed, rounds, loss (bits, mean of the last 20 rounds), and
    ``right``, the share of right answers by how long ago the letter was (`EDGES`).

    "selective" also has ``swapped``, the same shares when the trained reader runs with the exact rule, and
    ``factors``: the median and the hundredth part of :func:`write_factors` that is smallest.
    """
    text = ByteText()
    unseen = text.validation(256, 40).inputs
    table = []
    for name in readers:
        for rate in rates:
            for seed in seeds:
                reader = build(name, seed)
                losses = learn(reader, text, rounds=rounds, length=LENGTH, lr=rate)
                row: dict[str, Any] = {
                    "reader": name, "rate": rate, "seed": seed, "rounds": rounds,
                    "loss": round(float(sum(losses[-20:])) / len(losses[-20:]), 4), "right": _shares(reader, unseen),
                }  # fmt: skip
                if name == "selective":
                    factors = write_factors(reader, unseen)
                    reader.mixer.rule = "zoh"
                    row["swapped"] = _shares(reader, unseen)
                    row["factors"] = {
                        "median": round(factors[len(factors) // 2].item(), 4),
                        "smallest hundredth": round(factors[len(factors) // 100].item(), 4),
                    }
                table.append(row)
                if sys.stderr.isatty():
                    print(f"{name}, rate {rate}, seed {seed}: {row['right']}", file=sys.stderr)
    return table


def _shares(reader: Reader, ids: torch.Tensor) -> list[float]:
    return [round(share, 4) for share in recall(reader, ids, EDGES)]


def far(row: dict[str, Any], field: str = "right") -> float:
    """The share that takes memory: the mean over the three groups in which the letter is past."""
    shares: list[float] = row[field][1:]
    return sum(shares) / len(shares)


def summary(table: Sequence[dict[str, Any]], field: str = "right") -> list[dict[str, Any]]:
    """Mean and range over seeds of :func:`far`, one dict a reader: a column a rate, as "0.99 (0.98 to 1.00)"."""
    out = []
    for reader in dict.fromkeys(row["reader"] for row in table if field in row):
        line: dict[str, Any] = {"reader": reader}
        for rate in dict.fromkeys(row["rate"] for row in table):
            found = [far(row, field) for row in table if (row["reader"], row["rate"]) == (reader, rate)]
            line[f"rate {rate}"] = f"{sum(found) / len(found):.2f} ({min(found):.2f} to {max(found):.2f})"
        out.append(line)
    return out


def recorded() -> dict[str, Any]:
    """The last run with ``--write``: ``command``, ``python`` (whose documentation is the text) and ``rows``."""
    found: dict[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print the summary, keep the rows if asked."""
    from effattn_lab.measure.xray import show

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--rounds", type=positive, default=ROUNDS)
    parser.add_argument("--write", action="store_true", help=f"keep the rows in {RECORDED.name}")
    chosen = parser.parse_args(arguments)
    table = rows(seeds=range(chosen.seeds), rounds=chosen.rounds)
    show(summary(table))
    if chosen.write:
        command = f"python -m {__spec__.name} --seeds {chosen.seeds} --rounds {chosen.rounds} --write"
        record = {"command": command, "python": platform.python_version(), "rows": table}
        RECORDED.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
