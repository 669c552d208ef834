"""The package's own experiments, called wrongly: a message with the option's name, status 2, and before any work."""

import importlib
import json
import re
import subprocess
import sys

import pytest

WRONG = {
    "recall: no folder": ("linear.recall", ["--out", "{tmp}/none/r.json"], r"--out: .* there is no folder"),
    "recall: a folder": ("linear.recall", ["--out", "{tmp}"], "--out: expected the name of a file"),
    "recall: no record": (
        "linear.recall",
        ["--out", "{tmp}/text"],
        "--out: expected a record .* got no JSON",
    ),
    "recall: other JSON": (
        "linear.recall",
        ["--out", "{tmp}/list"],
        "--out: expected a record .* other JSON",
    ),
    "recall: size": ("linear.recall", ["--out", "{tmp}/r", "--sizes", "-3"], "--sizes: expected an integer"),
    "budget: no record": (
        "sparse.budget_study",
        ["--out", "{tmp}/list"],
        "--out: expected a record .* other JSON",
    ),
    "budget: part": ("sparse.budget_study", ["--out", "{tmp}/r", "--part", "lose"], "--part: invalid choice"),
    "zeros: no seed": (
        "linear.zeros_experiment",
        ["--seeds", "0", "--write"],
        "--seeds: expected an integer",
    ),
    "zeros: words": ("linear.zeros_experiment", ["--steps", "many"], "--steps: expected .* 1, got 'many'"),
    "delta: no seed": ("linear.delta_rule_tracking", ["--seeds", "0"], "--seeds: expected an integer"),
    "letters: no seed": ("linear.selective_ssm_letters", ["--seeds", "0", "--write"], "--seeds: expected an"),
    "speculative": ("linear.speculative_smollm2", ["--new-tokens", "0"], "--new-tokens: expected an integer"),
    "latency": ("linear.linearized_llm_latency", ["--json", "{tmp}/none/x"], "--json: .* there is no folder"),
    "bench: file": ("linear.linear_attention_bench", ["--json", "{tmp}/none/x"], "--json: .* no folder"),
    "bench: time": ("linear.linear_attention_bench", ["--seconds", "-1"], "--seconds: expected a positive"),
    "linearized": ("linear.linearized_llm_experiment", ["--lm-steps", "-1"], "--lm-steps: .* at least 0"),
    "elastic: no folder": ("sparse.elastic_experiment", ["--out", "{tmp}/none/r"], "--out: .* no folder"),
    "elastic: no record": ("sparse.elastic_experiment", ["--out", "{tmp}/text"], "--out: .* got no JSON"),
    "elastic: other": ("sparse.elastic_experiment", ["--out", "{tmp}/list"], "--out: .* got other JSON"),
    "elastic: seed": (
        "sparse.elastic_experiment",
        ["--out", "{tmp}/r", "--seeds", "-1"],
        "--seeds: expected an integer",
    ),
    "elastic: model": (
        "sparse.elastic_experiment",
        ["--out", "{tmp}/r", "--backbone", "{tmp}"],
        "--backbone: expected the name of a file",
    ),
    "peers: file": ("measure.zeros_peers", ["--json", "{tmp}/none/x"], "--json: .* there is no folder"),
    "peers: dim": ("measure.gated_linear_peers", ["--head-dim", "-1"], "--head-dim: expected an integer"),
    "peers: GPU": ("measure.zeros_peers", ["--gpu", "A1000"], "gpus: expected 'all' or some of"),
    "peers: value": ("measure.delta_rule_peers", ["--head-dim", "48"], "head_dim: expected 32 or 64"),
    "peers: lags": ("measure.linearized_llm_peers", ["--lags", "0"], "--lags: expected an integer"),
    "peers: scan": ("measure.selective_ssm_peers", ["--gpu", "A1000"], "gpus: expected 'all' or some of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_named_before_any_work(case, tmp_path, capsys):
    name, arguments, message = WRONG[case]
    if "--gpu" in arguments or "48" in arguments:
        pytest.importorskip("fla", reason="fla-core is not installed (extra peers)")
    (tmp_path / "text").write_text("not JSON", encoding="utf-8")
    (tmp_path / "list").write_text(json.dumps([1]), encoding="utf-8")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"effattn_lab.{name}").main([a.format(tmp=tmp_path) for a in arguments])
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert re.search(message, said.err.replace("\n", " ")), said.err
    assert said.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_file_that_may_not_be_written(tmp_path, monkeypatch):
    from argparse import ArgumentTypeError

    from effattn_lab import _command

    new = tmp_path / "new.json"
    assert _command.file_to_write(str(new)) == new
    assert not new.exists()
    monkeypatch.setattr(_command.os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ArgumentTypeError, match="cannot be written"):
        _command.file_to_write(str(new))


def test_a_table_on_the_cpu_begins_without_a_warning_of_fla():
    """It says that there is no GPU, which the first lines of `effattn bench linear_attention` need not."""
    pytest.importorskip("fla", reason="fla-core is not installed (extra peers)")
    code = "from effattn_lab.linear import linear_attention_bench as b; assert b._fla() is not None"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
