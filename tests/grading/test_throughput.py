"""The figures of the page for instructors are those of a run, and say what the page says of them."""

from __future__ import annotations

import pytest

from effattn_lab.figures import grading as figures
from effattn_lab.grading import throughput
from effattn_lab.grading.model import ExerciseResult, StudentResult


def test_the_recorded_run():
    found = throughput.recorded()
    assert found["submissions"] == 60
    ways = found["ways"]
    assert list(ways) == ["1 process", "2 processes", "Dask, 2 workers"]
    assert all(row["a_minute"] == pytest.approx(60 * 60 / row["seconds"]) for row in ways.values())
    from effattn_lab.exercises import all_exercises

    # Of the lab that was handed in then; a lab that came later changes nothing of that run.
    assert found["labs"] == ["full/flash"]
    measured = {e.id for e in all_exercises() if e.id.rsplit("/", 1)[0] in found["labs"]}
    assert set(found["overhead"]) == measured
    # What a warm sandbox adds to an exercise; the bar is 150 ms.
    extra = {name: row["sandbox"] - row["here"] for name, row in found["overhead"].items()}
    assert all(seconds < 0.150 for seconds in extra.values()), extra


def test_pictures():
    boundary = figures.boundary()
    texts = {text.get_text() for text in boundary.axes[0].texts}
    assert {"Grader", "Sandbox", "arrays, .npy"} <= texts
    overhead = figures.overhead(throughput.recorded())
    axes = overhead.axes[0]
    assert axes.get_xlabel().startswith("milliseconds")
    rows = throughput.recorded()["overhead"]
    bars = [patch.get_width() for patch in axes.patches]
    assert bars[: len(rows)] == pytest.approx([1000 * row["here"] for row in reversed(rows.values())])


def test_grades_that_differ_give_no_figure(monkeypatch, tmp_path):
    row = {"seconds": 1.0, "a_minute": 60.0}
    monkeypatch.setattr(throughput, "checked_boundary", lambda: "0.8")
    monkeypatch.setattr(throughput, "tasks_of", lambda *a: [])
    monkeypatch.setattr(throughput, "_exercises", lambda labs: {})
    monkeypatch.setattr(
        throughput, "classes", lambda tasks: {"a": {**row, "grades": [1]}, "b": {**row, "grades": [2]}}
    )
    with pytest.raises(RuntimeError, match="other grades"):
        throughput.measure(tmp_path, False)
    monkeypatch.setattr(
        throughput, "classes", lambda tasks: {"a": {**row, "grades": [1]}, "b": {**row, "grades": [1]}}
    )
    assert throughput.measure(tmp_path, False)["ways"] == {"a": row, "b": row}


def test_an_outcome_is_what_must_not_differ():
    def result(seconds, points):
        exercise = ExerciseResult("full/flash/merge", "passed", points, 1.0, seconds=seconds)
        return StudentResult("a", "A", "0", (exercise,))

    assert throughput.outcome(result(0.1, 1.0)) == throughput.outcome(result(9.9, 1.0))
    assert throughput.outcome(result(0.1, 1.0)) != throughput.outcome(result(0.1, 0.0))
