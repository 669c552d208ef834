"""How a grader judges *how* a result was computed: with inputs that only the right way survives.

A grader cannot look into the student's process. So memory is limited by the operating system, values that must not be
read are NaN, and a kernel is taken out of the notebook and launched by ourselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Outcome, Trial
from effattn_lab.exercises.making import normal
from effattn_lab.foundations.attention import attention, lse

_LONG, _TILE, _DIM = 8192, 256, 16
#: Rows that are compared, at random, beside three fixed ones: the reference is too slow for all.
_ROWS = 24
#: Measured: this forward pass needs 4 MB beside its arguments. One bool per pair would take 64 MB, one float 256 MB.
_SPARE = 32 * 2**20


def _qkv(rng: np.random.Generator, n: int) -> dict[str, torch.Tensor]:
    return {name: normal(rng, 1, 1, n, _DIM) for name in ("q", "k", "v")}


def memory_trial(name: str) -> Trial:
    """Tiles fit into the memory that is left; a matrix of all scores, or of all masks, does not."""

    def inputs(rng: np.random.Generator) -> list[Case]:
        tiles = {"block_q": _TILE, "block_k": _TILE}
        # Who knows which rows are looked at needs no others.
        return [
            Case(
                name,
                {**_qkv(rng, _LONG), "causal": causal, **tiles},
                tuple(rng.integers(0, _LONG, _ROWS).tolist()),
            )
            for causal in (False, True)
        ]

    def judge(outcomes: Sequence[Outcome]) -> str | None:
        for outcome in outcomes:
            q, k, v = (_tensor(outcome.case, n) for n in "qkv")
            causal = bool(outcome.case.kwargs["causal"])
            for row in (0, _TILE + 1, _LONG - 1, *outcome.case.secret):
                seen = row + 1 if causal else _LONG  # the last query of the prefix stands at `row`
                want = _row(q, k, v, row, seen)
                if not _near(outcome.values[0][0, 0, row], want):
                    return f"with N = {_LONG} and tiles of {_TILE} the results are wrong"
        return None

    return Trial(inputs, judge, memory_bytes=_SPARE)


def _row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: int, seen: int) -> torch.Tensor:
    one = q[:, :, row : row + 1].double()
    return attention(one, k[:, :, :seen].double(), v[:, :, :seen].double())[0, 0, 0]


def skip_trial(name: str) -> Trial:
    """Values above the diagonal are NaN: a tile that is computed and then masked leaves 0 · NaN in its rows."""
    n, block = 160, 32

    def inputs(rng: np.random.Generator) -> list[Case]:
        cases = []
        for first in (block, n - block):
            qkv = _qkv(rng, n)
            qkv["v"][:, :, first:] = float("nan")
            cases.append(Case(name, {**qkv, "causal": True, "block_q": block, "block_k": block}))
        return cases

    def judge(outcomes: Sequence[Outcome]) -> str | None:
        for outcome in outcomes:
            q, k, v = (_tensor(outcome.case, n_) for n_ in "qkv")
            clean = int((~v[0, 0, :, 0].isnan()).sum())
            want = attention(*(x[:, :, :clean].double() for x in (q, k, v)), causal=True)
            if not _near(outcome.values[0][:, :, :clean], want):
                return "values of keys above the diagonal reach the output of queries that may not see them"
            # Otherwise NaN in v could be swept away, and every tile read as before.
            if not outcome.values[0][:, :, clean:].isnan().all():
                return "values of NaN do not reach the output of queries that see them"
        return None

    return Trial(inputs, judge)


# ---- the kernel --------------------------------------------------------------------------------------------

_N = 192


def kernel_trial(name: str, make_inputs: Callable[[np.random.Generator], list[Case]]) -> Trial:
    """The kernel alone, with our launcher, passes the exercise's own cases."""

    def inputs(rng: np.random.Generator) -> list[Case]:
        return [Case(name, case.kwargs) for case in make_inputs(rng)]

    def judge(outcomes: Sequence[Outcome]) -> str | None:
        for outcome in outcomes:
            want = attention_and_lse(outcome.case)
            # Half-precision and large scores have tolerances of their own; here it is asked whether, not how well.
            for got, right in zip(outcome.values, want):
                if not _near(got, right, 2e-2):
                    return "flash_kernel, launched by the notebook's own launcher, does not compute attention"
        return None

    return Trial(inputs, judge, kernel=True)


def attention_and_lse(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (_tensor(case, n).double() for n in "qkv")
    causal = bool(case.kwargs["causal"])
    return attention(q, k, v, causal=causal), lse(q, k, causal=causal)


def stores_trial(name: str) -> Trial:
    """Out and log-sum-exp are stored, and nothing else."""

    def inputs(rng: np.random.Generator) -> list[Case]:
        return [Case(name, {**_qkv(rng, _N), "causal": False})]

    def judge(outcomes: Sequence[Outcome]) -> str | None:
        results = 4 * _N * _DIM + 4 * _N
        stored = outcomes[0].stores_bytes
        if stored > results:
            return f"the kernel stores {stored} bytes; out and lse have {results}"
        return None

    return Trial(inputs, judge, kernel=True)


def loads_trial(name: str) -> Trial:
    """With causal the kernel loads fewer bytes."""

    def inputs(rng: np.random.Generator) -> list[Case]:
        qkv = _qkv(rng, _N)
        return [Case(name, {**qkv, "causal": causal}) for causal in (False, True)]

    def judge(outcomes: Sequence[Outcome]) -> str | None:
        full, half = (outcome.loads_bytes for outcome in outcomes)
        # Two tiles a side or more: (T + 1) / 2T <= 3/4 of the key and value tiles, Q is read in full.
        if half > 0.85 * full:
            return f"with causal {half} bytes are loaded, without {full}: the same tiles are read"
        return None

    return Trial(inputs, judge, kernel=True)


def compile_trial(name: str, gpu: str) -> Trial:
    """The compiler takes the kernel, for the shape and types that the lab's x-ray takes too."""

    def inputs(rng: np.random.Generator) -> list[Case]:
        q, k, v = (normal(rng, 1, 1, 32, 64).half() for _ in range(3))
        return [Case(name, {"q": q, "k": k, "v": v, "causal": True})]

    return Trial(inputs, lambda outcomes: None, kernel=True, gpu=gpu)


def _tensor(case: Case, name: str) -> torch.Tensor:
    value = case.kwargs[name]
    assert isinstance(value, torch.Tensor)
    return value


def _near(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-4) -> bool:
    if got.shape != want.shape:
        return False
    got = got.double()
    same = got == want  # both -inf, for a query that sees no key
    return bool((same | ((got - want).abs() <= tolerance * (1 + want.abs()))).all())
