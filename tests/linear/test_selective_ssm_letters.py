"""The recorded experiment of the chapter on selective state spaces, its pictures and its table beside fla."""

import importlib.metadata

import pytest
import torch

from effattn_lab.figures import selective_ssm as figures
from effattn_lab.linear import selective_ssm_letters as letters
from effattn_lab.linear.scans import combines, depth
from effattn_lab.measure import selective_ssm_peers as peers


def test_readers_differ_in_what_they_should():
    """The two selective readers begin with the same weights; the fixed one has as many channels and states."""
    released, exact, fixed = (letters.build(name, 3) for name in letters.READERS)
    for (name, a), (other, b) in zip(released.named_parameters(), exact.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert (released.mixer.rule, exact.mixer.rule, fixed.mixer.rule) == ("euler", "zoh", "euler")
    assert len({reader.mixer.state_elements for reader in (released, exact, fixed)}) == 1
    ids = torch.randint(0, 256, (2, 30))
    assert not torch.equal(released(ids), exact(ids))
    assert fixed.mixer.deltas(fixed.embed(ids)).std(-1).max() == 0
    with pytest.raises(ValueError, match="reader: expected one of selective"):
        letters.build("chosen")


def test_write_factors():
    """1 for the shortest steps; for a long one on a fast state nearly 1 over the step."""
    reader = letters.build("fixed")
    with torch.no_grad():
        reader.mixer.dt_bias.fill_(50.0)
        reader.mixer.A_log[:] = torch.log(torch.tensor([1e-4, 1.0, 2.0, 4.0]))
    factors = letters.write_factors(reader, torch.zeros(1, 3, dtype=torch.long))
    assert factors.unique() == pytest.approx([1 / 200, 1 / 100, 1 / 50, 1 - 50e-4 / 2], rel=1e-4)


def test_training_is_repeatable():
    first, second = (letters.rows(("selective",), (0.02,), (0,), rounds=3) for _ in range(2))
    assert first == second
    assert letters.summary(first)[0]["rate 0.02"] == letters.summary(second, "right")[0]["rate 0.02"]
    assert letters.far({"right": [0.9, 0.1, 0.2, 0.6]}) == pytest.approx(0.3)


def test_the_recorded_run():
    """What the chapter says of it: selection leads up to 0.02, the order turns at 0.04, the exact rule holds."""
    table = letters.recorded()["rows"]
    found = {(row["reader"], row["rate"], row["seed"]): row for row in table}
    assert set(found) == {
        (n, rate, seed) for n in letters.READERS for rate in letters.RATES for seed in (0, 1, 2)
    }
    assert len(found) == len(table)

    def shares(name, rate, field="right"):
        return [letters.far(found[name, rate, seed], field) for seed in (0, 1, 2)]

    for rate in (0.005, 0.01, 0.02):
        assert sum(shares("selective", rate)) > sum(shares("fixed", rate))
    for rate in (0.04, 0.08):
        assert sum(shares("selective", rate)) < sum(shares("fixed", rate))
    assert min(shares("selective, exact", 0.04)) > 0.99
    best = {name: max(sum(shares(name, rate)) / 3 for rate in letters.RATES) for name in letters.READERS}
    assert best["selective, exact"] > best["selective"] > best["fixed"] > 0.9
    assert sum(shares("selective", 0.02, "swapped")) < 0.6 * sum(shares("selective", 0.02))


def test_pictures():
    for picture, panels in ((figures.clocks, 4), (figures.rules, 2), (figures.scans, 2)):
        assert len(picture().axes) == panels
    assert len(figures.letters(letters.recorded()["rows"]).axes) == 1


def test_what_the_clocks_show():
    """Shares of writes are those of the scan: unit writes at the marks, A = -1."""
    from effattn_lab.linear.selective_ssm import selective_scan

    steps = torch.rand(12, dtype=torch.float64)
    marks = [2, 7]
    shares = figures.shares(steps.numpy(), marks)
    for row, mark in zip(shares, marks):
        u = torch.zeros(1, 1, 12, dtype=torch.float64)
        u[..., mark] = 1 / steps[mark]
        one = torch.ones(1, 1, 12, dtype=torch.float64)
        out = selective_scan(u, steps[None, None], -torch.ones(1, 1, dtype=torch.float64), one, one)
        torch.testing.assert_close(torch.from_numpy(row), out[0, 0])


@pytest.mark.parametrize("name", ["hillis-steele", "blelloch"])
def test_networks_are_the_scans(name):
    """As many combinations and rounds as the scans count, and every entry ends up with all before it."""
    for length in (1, 2, 7, 8, 33):
        found = figures.rounds(name, length)
        assert sum(len(pairs) for pairs in found) == combines(name, length)
        assert len(found) == depth(name, length)
        spans = [(i, i) for i in range(length)]
        for pairs in found:
            before = list(spans)
            for early, late in pairs:
                assert before[early][1] + 1 == before[late][0], "neighbouring stretches, in order"
                spans[late] = (before[early][0], before[late][1])
        assert spans == [(0, i) for i in range(length)]
    with pytest.raises(ValueError, match="name: expected 'hillis-steele'"):
        figures.rounds("sequential", 4)


def test_the_recorded_peers():
    """Ours takes the fewest instructions and a tenth of the bytes; one row is compiled again."""
    record = peers.recorded()
    found = {(row["gpu"], row["by"]): row for row in record["rows"]}
    assert set(found) == {
        (g, by) for g in ("A100", "H100") for by in ("ours", "fla fused_recurrent", "fla hgrn")
    }
    for gpu in ("A100", "H100"):
        ours, hgrn = found[gpu, "ours"], found[gpu, "fla hgrn"]
        assert ours["spill_bytes"] == 0
        assert ours["instructions_per_token"] < hgrn["instructions_per_token"]
        assert ours["bytes_per_token"] < hgrn["bytes_per_token"] / 8


def test_one_row_compiled_again():
    """The compiler is deterministic: another result means other kernels, or another compiler, than the book's."""
    pytest.importorskip("fla.ops.hgrn", reason="fla-core is not installed (extra peers)")
    record = peers.recorded()
    versions = {name: importlib.metadata.version(name) for name in record["versions"]}
    if versions != record["versions"]:
        pytest.skip(f"recorded with {record['versions']}, here are {versions}")
    again = peers.rows("A100", record["state_size"], record["dtype"])
    assert again == [row for row in record["rows"] if row["gpu"] == "A100"]


def test_stores_tell_the_tokens_of_a_turn():
    """A loop unrolled twice stores twice; the loop around it has both and one more."""
    from effattn_lab.measure._loop_worker import loops, stores

    code = ["MOV R1, R2", "STG.E [R4.64], R5", "STG.E [R4.64+0x4], R5", "@P0 BRA 0x0010", "STG.E [R4.64], R1",
            "@!P1 BRA 0x0000", "EXIT"]  # fmt: skip
    sass = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(code))
    assert loops(sass) == [(3, 0), (6, 0)]
    assert stores(sass) == [2, 3]
