"""What the trusted side makes of results: statuses, properties, causes, points; and what it keeps to itself."""

from __future__ import annotations

import re

import pytest

from effattn_lab.grading import build, judge
from effattn_lab.grading.model import Item
from effattn_lab.grading.sandbox import Limits

MERGE = Item("full/flash/merge", "merge", 4.0)
RIGHT = """import torch
def merge(o_a, lse_a, o_b, lse_b):
    m = torch.maximum(lse_a, lse_b)
    m = torch.where(torch.isneginf(m), 0.0, m)
    w_a, w_b = torch.exp(lse_a - m), torch.exp(lse_b - m)
    l = w_a + w_b
    o = (w_a[..., None] * o_a + w_b[..., None] * o_b) / torch.where(l == 0, 1.0, l)[..., None]
    return o, m + torch.log(l)
"""


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    from effattn_lab.exercises.registry import get

    site = build.build_site(tmp_path_factory.mktemp("site") / "site", get(MERGE.id).from_scratch)
    with judge.Boxes(site, Limits(wall=10)) as open_boxes:
        yield open_boxes


def judged(boxes, *sources, item=MERGE, credit="all", seed="judge"):
    return judge.judge(boxes, item, list(enumerate(sources, start=1)), seed, credit)


def failing(result):
    return {v.property: v for v in result.verdicts if not v.passed}


def test_right(boxes):
    result = judged(boxes, RIGHT)
    assert (result.status, result.points, result.possible) == ("passed", 4.0, 4.0)
    assert failing(result) == {}
    assert {"inputs untouched", "same inputs, same result"} <= {v.property for v in result.verdicts}
    assert (result.cause, result.error) == ("", "")


def test_wrong_names_the_mistake(boxes):
    result = judged(boxes, RIGHT.replace("torch.where(torch.isneginf(m), 0.0, m)", "m"))
    assert (result.status, result.points) == ("failed", 0.0)
    assert set(failing(result)) == {"both parts see nothing"}
    assert "-inf - -inf is NaN" in result.cause
    assert failing(result)["both parts see nothing"].hint


def test_credit_by_property(boxes):
    result = judged(boxes, RIGHT.replace("torch.where(torch.isneginf(m), 0.0, m)", "m"), credit="properties")
    share = sum(v.passed for v in result.verdicts) / len(result.verdicts)
    assert 0.5 < share < 1
    assert result.points == pytest.approx(4 * share, abs=1e-4)


@pytest.mark.parametrize(
    ("source", "property_", "says"),
    [
        (RIGHT.replace("    l = w_a", "    o_a.mul_(2)\n    l = w_a"), "inputs untouched", "o_a was changed in"),
        (
            RIGHT.replace("return o, m", "o_a.copy_(o)\n    return o_a, m"),
            "inputs untouched", "o_a was changed|shares its memory",
        ),
        (
            "N = [0]\n" + RIGHT.replace("return o,", "N[0] += 1\n    return o * (1 + 1e-6 * (N[0] % 2)),"),
            "same inputs, same result", "two calls with the same inputs differ",
        ),
    ],
    ids=["in place", "argument returned", "memory of calls"],
)  # fmt: skip
def test_side_effects(boxes, source, property_, says):
    result = judged(boxes, source)
    assert result.points == 0
    assert re.search(says, failing(result)[property_].detail)


@pytest.mark.parametrize(
    ("source", "status", "says"),
    [
        ("x = 1", "missing", ""),
        ("def merge(:", "missing", "cell 1: SyntaxError"),
        ("merge = 3", "missing", ""),
        ("import nowhere\n" + RIGHT, "passed", ""),
        ("import torch\ndef merge(o_a, lse_a, o_b, lse_b):\n    ...  # your code", "not written", ""),
        ("import os\ndef merge(*a): os._exit(0)", "stopped", "ended before it answered"),
        ("def merge(*a):\n    while True: pass", "stopped", "no answer within"),
        ("def merge(*a): raise SystemExit", "failed", "SystemExit"),
        ("def merge(o, *a): return o.nothing", "failed", "AttributeError"),
        ("merge = reference('full/flash/merge')", "missing", "NameError"),
        (
            "from effattn_lab.exercises import reference\nmerge = reference('full/flash/merge')", "failed",
            "the reference was taken for full/flash/merge: it earns no points",
        ),
        (
            "from effattn_lab.full.flash import merge_attention as merge", "failed",
            "merge_attention of effattn_lab.full.flash is what this exercise asks you to write",
        ),
    ],
    ids=["nothing", "no Python", "no function", "broken import", "blank", "exit", "loop", "SystemExit", "exception",
         "reference unknown", "reference", "library"],
)  # fmt: skip
def test_statuses(boxes, source, status, says):
    boxes.limits = Limits(wall=2)
    result = judged(boxes, source)
    assert result.status == status, result
    assert result.points == (4.0 if status == "passed" else 0.0)
    assert says in result.error


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ("None", "returned None"),
        ("o", "one Tensor; expected 2"),
        ("(o, lse, o)", "3 values; expected 2"),
        ("(o, 1.0)", "lse is a float"),
        ("(o.double(), lse)", "o has dtype float64; expected float32"),
        ("(o[..., :1], lse)", "o has shape"),
        ("(lse, o)", "another order"),
        ("(o * float('nan'), lse)", "NaN"),
        ("(o.to_sparse(), lse)", ""),
        ("(o.to('meta'), lse)", ""),
        ("(o.cfloat(), lse)", ""),
        ("{'o': o, 'lse': lse}", "one dict; expected 2"),
        ("(o.numpy(), lse.numpy())", "o is a ndarray"),
    ],
)
def test_strange_results(boxes, returned, says):
    boxes.limits = Limits(wall=10)
    source = RIGHT.replace(
        "    return o, m + torch.log(l)", f"    lse = m + torch.log(l)\n    return {returned}"
    )
    result = judged(boxes, source)
    assert (result.status, result.points) == ("failed", 0.0), result
    assert says in result.cause + " ".join(v.detail for v in result.verdicts)


def test_last_definition_counts_and_experiments_do_not_run(boxes):
    """As after Run All; what no graded function needs is left alone, however it ends."""
    noise = "import sys\nrows = [1, 2]\nsys.exit(3)\nwhile True: pass\n"
    helper = "LOG2 = {'e': 1.0}\nLOG2['e'] = 1.4426950408889634\nfrom math import log2\n"
    uses = RIGHT.replace("m + torch.log(l)", "m + torch.log2(l) / LOG2['e']")
    result = judged(boxes, "def merge(): pass", helper, noise, uses)
    assert result.status == "passed", result
    assert judged(boxes, RIGHT, "def merge(*a): return None").status == "failed"


def test_magics_do_not_hurt(boxes):
    source = "%matplotlib inline\n!pip install x\nmerge?\n" + RIGHT
    assert judged(boxes, "%%time\n" + source, "%%bash\nrm -rf /").status == "passed"


def test_hidden_inputs_do_not_come_out(boxes):
    """A student's exception may carry the inputs as text; the feedback doesn't."""
    source = "def merge(o_a, lse_a, o_b, lse_b):\n    raise ValueError(str(lse_a.flatten().tolist()))"
    result = judged(boxes, source)
    assert result.error.startswith("ValueError")
    assert not re.search(r"\d\.\d", result.error + "".join(v.detail for v in result.verdicts))


def test_a_kernel_is_judged_where_nothing_else_runs(boxes):
    """A process that a student left behind costs the sandbox its place."""
    box = boxes.alone()
    assert boxes.alone() is box
    daemon = (
        "import os, time\ndef merge(*a):\n    if os.fork() == 0:\n        time.sleep(60)\n    return None\n"
    )
    assert judged(boxes, daemon).status == "failed"
    fresh = boxes.alone()
    assert fresh is not box
    assert fresh.processes() == 1


def test_inputs_follow_from_the_seed():
    one, same, other = (
        [c.kwargs["o_a"] for c, _ in judge.drawn.__wrapped__(MERGE.id, seed)] for seed in ("a", "a", "b")
    )
    assert all((x == y).all() for x, y in zip(one, same))
    # A part that saw nothing is all zeros whatever the seed is.
    assert not any((x == y).any() for x, y in zip(one, other) if x.any())
    assert judge.generator("a", "x").random() != judge.generator("a", "y").random()
