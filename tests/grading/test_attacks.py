"""The attack suite: a hundred hostile cells against the judge, hostile kernels, and a class with attackers in it.

Each earns nothing, leaves no process and no file, ends in time, and shows by its own words that it ran.
"""

# ruff: noqa: E501
# Attacks, edits and hand-ins are text of others' making: one to a line.

from __future__ import annotations

import itertools
import os
import re
import socket
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import classroom
import hostile
import pytest

from effattn_lab import __version__
from effattn_lab.exercises.registry import get
from effattn_lab.grading import build, compiled, feedback, gradebook, task
from effattn_lab.grading.compiled import compile_error
from effattn_lab.grading.inside.kernel import Refused, take_kernel
from effattn_lab.grading.judge import Boxes, judge
from effattn_lab.grading.model import Assignment, Item, LabPlan, StudentResult, Submission
from effattn_lab.grading.sandbox import Limits, NoBoundary

ROOT = Path(__file__).parents[2]
TOKEN = f"t0k3n{os.getpid()}x"
SEED = f"s33d{os.getpid()}"
LIMITS = Limits(wall=8)
#: Wall seconds that an attack may take beyond what its limits allow: a start of the sandbox on a busy machine.
SPARE = 60.0


# ---- what is left ------------------------------------------------------------------------------------------


def sandboxed(site: Path) -> set[int]:
    """Processes, of any namespace and parent, that live in a sandbox with this site, zombies among our own too."""
    found = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/mountinfo", encoding="utf-8", errors="replace") as file:
                    if str(site) in file.read():
                        found.add(int(entry))
            except OSError:
                pass
    return found | ours()


def ours() -> set[int]:
    found, waiting = set(), [os.getpid()]
    while waiting:
        pid = waiting.pop()
        try:
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                    waiting += [int(n) for n in file.read().split()]
        except OSError:
            continue
        found.add(pid)
    return found


def settled(site: Path, before: set[int]) -> set[int]:
    """Processes that were not there before and stay longer than the kernel needs to end a namespace."""
    end = time.monotonic() + 5
    while (left := sandboxed(site) - before) and time.monotonic() < end:
        time.sleep(0.02)
    return left


def marked() -> list[str]:
    """Files that an attack made outside."""
    places = [
        tempfile.gettempdir(),
        "/tmp",
        "/dev/shm",
        "/dev",
        "/",
        "/usr",
        str(Path.home()),
        str(ROOT),
        "/etc",
    ]
    return [
        f"{p}/{n}" for p in dict.fromkeys(places) if os.path.isdir(p) for n in os.listdir(p) if TOKEN in n
    ]


def listing(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*"))


_times = itertools.count()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A site, secrets that attacks look for, and somebody who listens."""
    folder = tmp_path_factory.mktemp("world")
    site = build.build_site(folder / "site", get("full/flash/safe_softmax").from_scratch)
    secret = folder / "results" / "gradebook.csv"
    secret.parent.mkdir()
    secret.write_text(TOKEN)
    heard: list[object] = []
    servers = []
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))  # torch makes it, used or not
    # A name of its own each time: a process may come to this module more than once.
    abstract = f"{TOKEN}{next(_times)}"
    for family, address in ((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_UNIX, f"\0{abstract}")):
        server = socket.socket(family)
        server.bind(address)
        server.listen()
        servers.append(server)
        threading.Thread(target=_listen, args=(server, heard), daemon=True).start()
    words = {
        "@TOKEN@": TOKEN,
        "@DEES@": SEED[::-1],
        "@PORT@": str(servers[0].getsockname()[1]),
        "@ABSTRACT@": abstract,
        "@PATHS@": ":".join(
            map(str, (secret, ROOT / "README.md", ROOT / "labs/src/full/flash.py", Path.home()))
        ),
        f"/tmp/{hostile.TOKEN}": f"/tmp/{TOKEN}",
    }
    yield site, words, heard
    for server in servers:
        server.close()


def _listen(server, heard):
    while True:
        try:
            heard.append(server.accept())
        except OSError:
            return


def filled(source: str, words: dict[str, str]) -> str:
    for word, value in words.items():
        source = source.replace(word, value)
    return source


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Temporary files of the grader go here and nowhere else."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


ALONE = [a for a in hostile.ATTACKS if a.family != "values"]


@pytest.mark.parametrize("attack", ALONE, ids=[f"{a.family}: {a.id}" for a in ALONE])
def test_earns_nothing_and_leaves_nothing(attack, world, scratch, monkeypatch):
    site, words, heard = world
    monkeypatch.setenv("GRADER_PASSWORD", TOKEN)
    limits = replace(LIMITS, **attack.limits)
    before = sandboxed(site)
    begun = time.monotonic()
    cells = [(1, "import torch\n"), (2, filled(attack.source, words))]
    with Boxes(site, limits) as boxes:
        result = judge(boxes, Item("full/flash/safe_softmax", "safe_softmax", 5.0), cells, SEED, "all")
        after = judge(boxes, Item("full/flash/merge", "merge", 5.0), MERGE, SEED)
    took = time.monotonic() - begun
    said = "; ".join([result.error, *(v.detail for v in result.verdicts)])
    assert result.points == 0.0, said
    assert result.status in attack.status, said
    assert attack.says in said
    assert "FOUND" not in said
    assert TOKEN not in said
    assert not settled(site, before)
    assert not marked()
    assert not list(scratch.iterdir())
    assert not heard
    assert took < 5 * limits.wall + SPARE
    if attack.family not in ("bombs", "signals", "timers"):  # those may go on against their own author
        assert after.points == 5.0, after
    shown_harmlessly(result)


def test_strange_values_earn_nothing_and_leave_nothing(world, scratch):
    """These only hand something back, so they share a sandbox (until one breaks it), each in its own process."""
    site, words, _ = world
    before = sandboxed(site)
    with Boxes(site, LIMITS) as boxes:
        for attack in (a for a in hostile.ATTACKS if a.family == "values"):
            cells = [(1, "import torch\n"), (2, filled(attack.source, words))]
            result = judge(boxes, Item("full/flash/safe_softmax", "safe_softmax", 5.0), cells, SEED)
            said = "; ".join([result.error, *(v.detail for v in result.verdicts)])
            assert result.points == 0.0, (attack.id, said)
            assert result.status in attack.status, (attack.id, said)
            assert attack.says in said, (attack.id, said)
            shown_harmlessly(result)
    assert not settled(site, before)
    assert not marked()
    assert not list(scratch.iterdir())


MERGE = [(1, "import torch\n"), (2, classroom.solution("merge"))]
ASSIGNMENT = Assignment(
    "Lab",
    "1",
    (LabPlan("full/flash", "flash.ipynb", "", (Item("full/flash/safe_softmax", "safe_softmax", 5),), ()),),
)


def shown_harmlessly(result):
    """The feedback page has no markup but its own, nothing invisible, and no number that may be a hidden input."""
    page = feedback.page(ASSIGNMENT, StudentResult("=cmd()", "<b>\u202eEve</b>", "", (result,)))
    assert not re.search(r"<(script|img|b>|iframe)", page.split("</style>")[-1])
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e]", page)
    assert not re.search(r"\d\.\d\d", result.error)
    row = gradebook.gradebook_csv(
        ASSIGNMENT, [StudentResult("=cmd()", "@SUM(A1)", "", (result,))]
    ).splitlines()[1]
    assert row.startswith("'=cmd(),'@SUM")


# ---- what no grader stops ----------------------------------------------------------------------------------

_BLIND = "torch.where(torch.isneginf(s).all(-1, keepdim=True), 0.0, {})"


@pytest.mark.parametrize(
    "expression",
    ["torch.ops.aten._softmax(s, -1, False)", "torch._softmax(s, -1, False)", "quiet(s)"],
)
def test_known_limit_another_spelling_of_the_library_function(expression, world, scratch):
    """From scratch is a word to the honest: torch is there, and so is what it can do. The book says so."""
    source = f"""
def quiet(s):
    with torch._C.DisableTorchFunction():
        return torch.softmax(s, -1)


def safe_softmax(s):
    return {_BLIND.format(expression)}
"""
    with Boxes(world[0], LIMITS) as boxes:
        result = judge(boxes, Item("full/flash/safe_softmax", "safe_softmax", 5.0), [(1, "import torch\n"), (2, source)],
                       SEED)  # fmt: skip
    assert result.status == "passed", result


# ---- kernels -----------------------------------------------------------------------------------------------


def kernel(body: str, head: str = "x_ptr, N: tl.constexpr", before: str = "") -> str:
    return f"{before}\n@triton.jit\ndef flash_kernel({head}):\n    {body}\n"


REFUSED = {
    "a module of the language": kernel("x = tl.core.builtins"),
    "the module under another name": kernel("t = tl\n    t.core"),
    "a module as an argument": kernel("x = abs(tl)"),
    "math as a value": kernel("m = tl.math\n    m.libdevice"),
    "the handle of a tensor": kernel("x_ptr.handle.data[0] = 1"),
    "attributes with underscores": kernel("x_ptr.__class__.__base__.__subclasses__()"),
    "attributes of the language with underscores": kernel("tl._semantic"),
    "an unknown attribute": kernel("x_ptr.data"),
    "getattr": kernel("getattr(x_ptr, 'handle')"),
    "eval": kernel("eval('1')"),
    "open": kernel("open('/etc/passwd')"),
    "an ordinary global": kernel("torch.softmax(x_ptr, 0)", before="import torch"),
    "a helper without jit": kernel("helper(x_ptr)", before="def helper(x):\n    import os\n"),
    "an import": kernel("import os"),
    "an import of names": kernel("from os import system"),
    "a function inside": kernel("def f():\n        pass"),
    "a class inside": kernel("class A:\n        pass"),
    "a lambda": kernel("f = lambda: 0"),
    "a comprehension": kernel("x = [i for i in range(3)]"),
    "a formatted string": kernel("x = f'{x_ptr}'"),
    "a format method": kernel("x = '{0.handle}'.format(x_ptr)"),
    "a walrus": kernel("(x := 1)"),
    "global": kernel("global x\n    x = 1"),
    "with": kernel("with x_ptr:\n        pass"),
    "try": kernel("try:\n        pass\n    except Exception:\n        pass"),
    "raise": kernel("raise ValueError"),
    "del": kernel("del x_ptr"),
    "yield": kernel("yield 1"),
    "await": kernel("x = 1\n    [*x]"),
    "tl given another meaning": kernel("tl = x_ptr\n    tl.store(1)"),
    "tl as a parameter": kernel("tl.exp(1)", head="tl"),
    "a built-in given another meaning": kernel("min = x_ptr\n    min(1)"),
    "a kernel given another meaning": kernel("other = 1", before="@triton.jit\ndef other(x):\n    return x\n"),
    "a default that calls": kernel("pass", head="x_ptr, y=print(1)"),
    "a default of a helper": kernel("h(x_ptr)", before="@triton.jit\ndef h(x, y=open('/tmp/x', 'w')):\n    return x\n"),
    "a keyword default": kernel("pass", head="x_ptr, *, y=[].append(1)"),
    "star arguments": kernel("pass", head="*x"),
    "matmul": kernel("x = x_ptr @ x_ptr"),
    "not a kernel any more": kernel("pass") + "\ndef flash_kernel(*x):\n    pass\n",
    "a kernel under an alias": "j = triton.jit\n@j\ndef flash_kernel(x):\n    pass\n",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_kernels_that_hold_python_are_refused(name):
    with pytest.raises(Refused) as error:
        take_kernel([(1, REFUSED[name])], "flash_kernel")
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)


def test_nothing_around_a_kernel_is_taken():
    source = f"""
import os
os.system("touch /tmp/{TOKEN}")
SIDE = tl.constexpr(os.system("touch /tmp/{TOKEN}"))
GOOD = tl.constexpr(-float("inf"))
HALF: tl.constexpr = 0.5
@evil(os.system("touch"))
@triton.jit(do_not_specialize=[os.system("touch")])
def flash_kernel(x_ptr: os.system("touch"), N: tl.constexpr) -> os.system("touch"):
    y = GOOD
    z = HALF
"""
    text = take_kernel([(1, source)], "flash_kernel")
    assert "os" not in re.findall(r"\w+", text)
    assert "touch" not in text
    space: dict[str, object] = {}
    lines = [line for line in text.splitlines() if line.startswith(("GOOD", "HALF", "import", "from"))]
    exec("\n".join(lines), space)
    assert space["GOOD"].value == float("-inf")  # type: ignore[attr-defined]


_TORCH = """
def flash_triton(q, k, v, causal, block_m=32, block_n=32):
    parts = flash_forward(q.float(), k.float(), v.float(), causal, 32, 32)
    return parts[0].to(q.dtype), parts[1]
"""
SHAMS = {
    "a kernel that is never launched and computes nothing": _TORCH,
    "modules left where the next process might look": """
import os, sys
text = "import os; open('/tmp/@TOKEN@', 'w').close()\\nfrom effattn_lab.measure import traffic\\n"
for name in ("sitecustomize", "usercustomize", "numpy", "torch", "triton", "json", "dis", "inspect", "textwrap", "random",
             "effattn_lab", "effattn_kernels", "sympy", "fractions", "decimal", "<cell 0>", "<cell 1>", "_distutils_hack"):
    with open(f"/tmp/{name}.py", "w") as file:
        file.write(text)
left = os.listdir("/tmp")
def flash_triton(q, k, v, causal, block_m=32, block_n=32):
    parts = flash_forward(q.float(), k.float(), v.float(), causal, 32, 32)
    assert left
    return parts[0].to(q.dtype), parts[1]
""",
    "counters and launches patched": """
from effattn_lab.measure import traffic
from effattn_lab.exercises import compiles
from triton.runtime import interpreter
traffic.KernelTraffic.loads_bytes = traffic.Traffic.loads_bytes = 10**9
compiles.described = compiles.launches = lambda *a: [({}, {}, 4)]
interpreter.GridExecutor.__call__ = lambda *a, **k: None
def flash_triton(q, k, v, causal, block_m=32, block_n=32):
    traffic, compiles, interpreter
    parts = flash_forward(q.float(), k.float(), v.float(), causal, 32, 32)
    return parts[0].to(q.dtype), parts[1]
""",
}


@pytest.mark.parametrize("name", SHAMS)
def test_kernels_that_are_none(name, world, scratch):
    """PyTorch gives the right numbers; the kernel beside it is blank."""
    site, words, _ = world
    parts = {"forward": classroom.solution("forward"), "kernel": classroom.wrong("triton_forward", "no kernel"),
             "sham": filled(SHAMS[name], words)}  # fmt: skip
    item = Item("full/flash/triton_forward", "flash_triton", 5.0)
    with Boxes(site, Limits()) as boxes:
        result = judge(boxes, item, classroom.cells(**parts), SEED)
    failed = {v.property for v in result.verdicts if not v.passed}
    assert (result.status, result.points) == ("failed", 0.0), result
    assert "a kernel did the work" in failed
    # By its numbers alone it would have passed: the attack is what it says.
    assert failed <= {"a kernel did the work", "nothing of size N x N is stored", "tiles above the diagonal are not read",
                      "the compiler accepts it (A100)"}  # fmt: skip
    assert not marked()


def test_naive_attention_that_computes_only_rows_that_might_be_looked_at(world, scratch):
    """Which rows of the long input are compared is drawn with the inputs."""
    source = (
        classroom.wrong("forward", "whole matrix").replace("def flash_forward(", "def plain(")
        + """

def flash_forward(q, k, v, causal, block_q, block_k):
    if q.shape[2] < 4000:
        return plain(q, k, v, causal, block_q, block_k)
    out, lse = torch.zeros_like(q), torch.zeros_like(q[..., 0])
    for row in (0, 257, 8191):
        end = row + 1 if causal else k.shape[2]
        out[:, :, row : row + 1] = plain(q[:, :, row : row + 1], k[:, :, :end], v[:, :, :end], False, 1, end)[0]
    return out, lse
"""
    )
    with Boxes(world[0], LIMITS) as boxes:
        result = judge(
            boxes, Item("full/flash/forward", "flash_forward", 5.0), classroom.cells(forward=source), SEED
        )
    assert "never holds an N x N tensor" in {v.property for v in result.verdicts if not v.passed}
    assert result.points == 0.0


def test_masked_tiles_whose_nan_is_swept_away(world, scratch):
    source = classroom.wrong("forward", "masks every tile")
    source = source.replace("    out, lse = ", "    v = torch.nan_to_num(v)\n    out, lse = ")
    with Boxes(world[0], LIMITS) as boxes:
        result = judge(
            boxes, Item("full/flash/forward", "flash_forward", 5.0), classroom.cells(forward=source), SEED
        )
    assert {v.property for v in result.verdicts if not v.passed} == {"skips the tiles above the diagonal"}
    assert result.points == 0.0


# ---- one student's misfortune is not the class's -----------------------------------------------------------


def test_a_kernel_that_crashes_the_compiler(world, scratch, monkeypatch):
    """It costs its author the property. Only where the compiler takes no kernel at all is nothing graded."""
    site = world[0]
    monkeypatch.setattr(compiled, "_compiled", {})
    job = {"text": "flash", "signature": {}, "constants": {}, "num_warps": 4}
    with Boxes(site, LIMITS) as boxes:
        real = compiled.run_once
        monkeypatch.setattr(
            compiled,
            "run_once",
            lambda *a, given, **k: b"7" if b"flash" in given else real(*a, given=given, **k),
        )
        assert (
            compile_error(boxes.site, boxes.limits, "flash_kernel", job, "A100")
            == "the compiler ended without an answer"
        )
        compiled._compiled.clear()
        monkeypatch.setattr(compiled, "run_once", lambda *a, **k: b"")
        with pytest.raises(NoBoundary, match="is triton whole"):
            compile_error(boxes.site, boxes.limits, "flash_kernel", job, "A100")


def test_a_submission_on_which_the_grader_fails_is_given_up(monkeypatch):
    def fails(_):
        raise OverflowError("int too large")

    monkeypatch.setattr(task, "_grade", fails)
    monkeypatch.setattr(task, "checked_boundary", lambda: "0.8")
    one = task.Task(
        Submission("eve", "Eve", {}),
        replace(ASSIGNMENT, version=__version__),
        task.Options(SEED, replay=False),
    )
    result = task.grade(one).result
    assert result.total == 0
    assert result.problems == (
        "the grader failed on it (OverflowError: int too large); a person has to look at it",
    )


# ---- and honest work is not taken for an attack ------------------------------------------------------------


@pytest.mark.parametrize("constant", ['tl.constexpr(float("-inf"))', 'tl.constexpr(-float("inf"))'])
def test_a_constant_that_is_infinite(constant):
    cell = classroom.wrong("triton_forward", "plain global").replace(
        'NEG_INF = float("-inf")', f"NEG_INF = {constant}"
    )
    assert "NEG_INF = _tl.constexpr(float('-inf'))" in take_kernel([(1, cell)], "flash_kernel")


def test_long_notes_and_infinite_constants_pass(world, scratch):
    notes = "# " + "заметки о мягком максимуме " * 3000 + "\n"
    cell = classroom.wrong("triton_forward", "plain global").replace(
        'NEG_INF = float("-inf")', 'NEG_INF = tl.constexpr(float("-inf"))'
    )
    with Boxes(world[0], Limits()) as boxes:
        item = Item("full/flash/triton_forward", "flash_triton", 5.0)
        result = judge(boxes, item, classroom.cells(kernel=notes + cell), SEED)
    assert result.status == "passed", result
