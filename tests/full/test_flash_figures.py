"""The flash chapter's pictures draw, and their tile counts are those of the cost model."""

from __future__ import annotations

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import pytest

from effattn_lab.figures import flash as figures
from effattn_lab.foundations.cost_model import keys_read

NAMES = ("memory_path", "online_row", "causal_tiles", "traffic_curves", "roofline_points", "two_tricks")


@pytest.mark.parametrize("name", NAMES)
def test_figure_draws(name):
    with plt.rc_context():
        figure = getattr(figures, name)()
        figure.canvas.draw()
        for axes in figure.axes:
            if axes.axison:
                assert axes.get_xlabel() or axes.get_xticklabels(), name
                assert axes.get_ylabel(), name
        plt.close(figure)


@pytest.mark.parametrize(("nq", "nk", "bm", "bn"), [(256, 256, 64, 64), (100, 260, 32, 48), (65, 65, 64, 16)])
def test_tile_classes_agree_with_the_cost_model(nq, nk, bm, bn):
    kinds = figures.tile_classes(nq, nk, bm, bn)
    keys = sum(min(int(visited) * bn, nk) for visited in (kinds > 0).sum(axis=1))
    assert keys == keys_read(nq, nk, bm, bn, causal=True)


def test_one_tile_saves_nothing_and_many_save_half():
    assert (figures.tile_classes(128, 128, 128, 128) > 0).mean() == 1.0
    assert (figures.tile_classes(4096, 4096, 128, 128) > 0).mean() == pytest.approx(0.5 + 1 / 64)
