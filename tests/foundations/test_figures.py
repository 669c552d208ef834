"""The chapters' pictures draw, and the numbers written into them come from the cost model."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytest
import torch

from effattn_lab.figures import foundations as figures
from effattn_lab.figures.table import Table

DRAWN = {
    "one_query": lambda: figures.one_query(*torch.ones(3, 1, 1, 3, 4)),
    "logit_scale": lambda: figures.logit_scale(dims=(4, 16, 64)),
    "offset_masks": figures.offset_masks,
    "mask_gallery": figures.mask_gallery,
    "gqa_map": lambda: figures.gqa_map(12, 4),
    "flop_share": figures.flop_share,
    "roofline": lambda: figures.roofline(("T4", "B200")),
    "memory_levels": figures.memory_levels,
    "decode_time": lambda: figures.decode_time("SmolLM2-135M", "L4"),
}


@pytest.mark.parametrize("name", DRAWN)
def test_pictures_draw_without_warnings(name):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = DRAWN[name]()
        figure.canvas.draw()
    plt.close(figure)


def test_operations_have_the_derived_intensities():
    ops = dict(figures.operations(seqlen=8192, head_dim=128))
    assert ops["decode MHA"] == pytest.approx(1, rel=1e-3)
    assert ops["decode GQA, g = 4"] == pytest.approx(4, rel=1e-3)
    assert ops["decode MQA, 32 heads"] == pytest.approx(32, rel=1e-2)
    assert ops["decode MLA, 128 heads"] == pytest.approx(128 * 1088 / 576)
    assert ops["prefill, naive"] == pytest.approx(128 / 2, rel=0.02)
    assert ops["prefill, flash, causal"] == pytest.approx(8192 / 4, rel=0.01)
    assert [ops[f"dense layers, batch {b}"] for b in (1, 64, 512)] == [1, 64, 512]
    assert list(ops.values()) == sorted(ops.values())


def test_table_escapes_and_names_a_short_row():
    table = Table(["a", "b<c"], [["x", 1]], "A & B")
    assert "b&lt;c" in table._repr_html_()
    assert 'aria-label="A &amp; B"' in table._repr_html_()
    assert repr(table).splitlines()[0] == "A & B"
    with pytest.raises(ValueError, match="row 0"):
        Table(["a"], [["x", 1]], "t")
