"""The pictures of choosing blocks show what the package computes."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest

from effattn_lab.figures import block_sparse as figures
from effattn_lab.sparse import block_sparse_layers as study
from effattn_lab.sparse.block_sparse_cost import expected_hit_rate


def test_antidiagonals_miss_the_even_slash():
    titles = [ax.get_title(loc="left") for ax in figures.antidiagonals().axes]
    assert [int(t.split("\n")[1].split()[0]) for t in titles] == [3, 5, 0]


def test_three_choices_hide_the_future_and_keep_the_diagonal():
    for ax in figures.three_choices().axes:
        level = np.asarray(ax.images[0].get_array())
        assert not level[np.triu_indices(64, 1)].any()
        assert (np.diag(level) >= 2).all()
    block = np.asarray(figures.three_choices().axes[0].images[0].get_array())
    for row in range(0, 64, 8):  # queries of a block read alike
        past = block[row : row + 8, :row]
        assert (past == past[:1]).all()


def test_dilution_draws_formula_and_simulation():
    lines = figures.dilution(deltas=(8,)).axes[0].lines
    assert lines[0].get_ydata()[2] == pytest.approx(100 * expected_hit_rate(8, 16))
    assert np.abs(np.asarray(lines[0].get_ydata()) - np.asarray(lines[1].get_ydata())).max() < 4


def test_pictures_of_the_study_show_its_numbers():
    record = study.recorded()
    table = study.summary(record)
    shown = {line.get_label(): line.get_ydata() for line in figures.masses(table).axes[0].lines}
    assert set(shown) == set(figures.LOOKS) <= set(study.RULES)
    for row in table:
        if row["rule"] in shown:
            assert shown[row["rule"]][study.BUDGETS.index(row["budget"])] == pytest.approx(100 * row["mass"])
    top, low = figures.layers(record).axes
    assert len(top.lines) == 4
    assert [bar.get_height() for bar in low.patches] == [layer["effective"] for layer in record["layers"]]
    dots = figures.heads_at(record).axes[0].lines[:2]
    assert [len(line.get_xdata()) for line in dots] == [72, 198]
