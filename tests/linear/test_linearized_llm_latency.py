"""Latency and memory beside softmax: what is kept is counted exactly, and the model is left as it was."""

from __future__ import annotations

import pytest

from effattn_lab.linear.linearized_llm_latency import rows
from effattn_lab.models.smollm2 import load


@pytest.fixture(scope="module")
def lm():
    return load()


def test_bytes_are_those_of_the_formula_and_reductions_those_of_the_row(lm):
    kinds = [type(block.self_attn) for block in lm.model.model.layers]
    (row,) = rows(lm, [66], new_tokens=2, repeats=1)
    layers, heads, dim = len(kinds), 3, 64
    token = 2 * heads * dim * 4
    assert row["eager"]["cache_bytes"] == row["sdpa"]["cache_bytes"] == layers * token * 68
    # The first layer stays; in each other S, the four tokens of the open group, and what convolution looks back at.
    state = row["linearized"]["cache_bytes"] - token * 68
    least = (layers - 1) * (heads * dim * dim * 4 + token * 4)
    assert least <= state < least + (layers - 1) * heads * dim * 64 * 4
    for base in ("eager", "sdpa"):
        for what in ("prompt", "step"):
            share = row["linearized"][f"{what}_s"] / row[base][f"{what}_s"]
            assert row[f"{what}_less_than_{base}"] == pytest.approx(100 * (1 - share))
    assert 0 < row["model_bytes_less"] < row["cache_bytes_less"] < 100
    assert [type(block.self_attn) for block in lm.model.model.layers] == kinds
    assert lm.model.config._attn_implementation == "sdpa"


def test_bad_options(lm):
    with pytest.raises(ValueError, match="seqlens: expected"):
        next(rows(lm, [0]))
    with pytest.raises(ValueError, match="repeats: expected"):
        next(rows(lm, [8], repeats=0))
