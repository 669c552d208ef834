"""Hand-ins of the flash lab for tests: solved, wrong by a registered mistake, partly done, empty, broken, late.

Everything is made from the lab's own source by edits that must apply, so that a change of the lab shows here first.
What a hand-in is worth follows from how it was made; no grader is asked.
"""

# ruff: noqa: E501
# Attacks, edits and hand-ins are text of others' making: one to a line.

from __future__ import annotations

import csv
import functools
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import variants

from effattn_lab import notebooks

LAB = "full/flash"
EXERCISES = tuple(variants.FUNCTIONS)
FUNCTIONS = variants.FUNCTIONS
#: Points of the class, all different in sum: no two sets of exercises are worth the same.
POINTS = {
    "safe_softmax": 1,
    "merge": 2,
    "tile_step": 4,
    "forward": 8,
    "backward_tile": 16,
    "triton_forward": 32,
}

_TORCH_MAX = "torch.maximum(m, s.amax(dim=-1))"
_TL_SEE = "see = see & (offs[None, :] <= rows[:, None] + seqlen_k - seqlen_q)"
_END = "end = min(seqlen_k, int(position[-1]) + 1) if causal else seqlen_k"

#: exercise → name of the registered mutant → (old, new) pairs that make the same mistake in the solved cell.
MISTAKES: dict[str, dict[str, tuple[tuple[str, str], ...]]] = {
    "safe_softmax": {
        "no max": (("torch.exp(s - m)", "torch.exp(s)"),),
        "global max": (("s.amax(dim=-1, keepdim=True)", "s.max()"),),
        "wrong axis": (("s.amax(dim=-1, keepdim=True)", "s.amax(dim=-2, keepdim=True)"),),
        "sum axis": (("p.sum(dim=-1, keepdim=True)", "p.sum(dim=-2, keepdim=True)"),),
        "mean": (("s.amax(dim=-1, keepdim=True)", "s.mean(dim=-1, keepdim=True)"),),
        "no guard": (("    m = torch.where(torch.isneginf(m), 0.0, m)\n", ""),),
        "base 2": (("torch.exp(s - m)", "torch.exp2(s - m)"),),
        "half": (("torch.exp(s - m)", "torch.exp((s - m).half()).float()"),),
    },
    "merge": {
        "average": (("w_a, w_b = torch.exp(lse_a - m), torch.exp(lse_b - m)", "w_a = w_b = torch.ones_like(m)"),),
        "swapped": (("w_a, w_b = torch.exp(lse_a - m), torch.exp(lse_b - m)",
                     "w_b, w_a = torch.exp(lse_a - m), torch.exp(lse_b - m)"),),
        "lse without m": (("m + torch.log(l)", "torch.log(l)"),),
        "lse is a sum": (("m + torch.log(l)", "lse_a + lse_b"),),
        "no max": (("    m = torch.where(torch.isneginf(m), 0.0, m)\n", "    m = torch.zeros_like(m)\n"),),
        "no guard": (("    m = torch.where(torch.isneginf(m), 0.0, m)\n", ""),),
    },
    "tile_step": {
        "acc not rescaled": (("alpha[:, None] * acc", "acc"),),
        "l not rescaled": (("alpha * l", "l"),),
        "tile max only": ((_TORCH_MAX, "s.amax(dim=-1)"),),
        "one max for all rows": ((_TORCH_MAX, "torch.maximum(m, s.max())"),),
        "state replaced": (("alpha * l + p.sum(dim=-1), alpha[:, None] * acc + p @ v", "p.sum(dim=-1), p @ v"),),
        "l counts keys": (("p.sum(dim=-1)", "s.shape[-1]"),),
        "m not returned": (("return m_new,", "return m.clone(),"),),
    },
    "forward": {
        "no scale": (("s = scale * (q_i", "s = (q_i"),),
        "scale by Nk": (("q.shape[3] ** -0.5", "k.shape[2] ** -0.5"),),
        "state not reset": (("    for i in range(0, seqlen_q, block_q):\n",
                             "    m = l = acc = None\n    for i in range(0, seqlen_q, block_q):\n"),
                            ("        m = torch.full_like(q_i[..., 0], float(\"-inf\"))\n"
                             "        l, acc = torch.zeros_like(m), torch.zeros_like(q_i)\n",
                             "        if m is None:\n"
                             "            m = torch.full_like(q_i[..., 0], float(\"-inf\"))\n"
                             "            l, acc = torch.zeros_like(m), torch.zeros_like(q_i)\n"
                             "        n = q_i.shape[2]\n"
                             "        m, l, acc = m[..., :n], l[..., :n], acc[:, :, :n]\n")),
        "mask forgotten": (("            if causal:\n", "            if False:\n"),),
        "mask too strict": (("> position[:, None]", ">= position[:, None]"),),
        "keys local": (("torch.arange(j, j + k_j.shape[2])", "torch.arange(k_j.shape[2])"),),
        "top-left": (("i + seqlen_k - seqlen_q + torch.arange", "i + torch.arange"),),
        "last keys dropped": ((_END, f"{_END}\n        end -= end % block_k"),),
        "masks every tile": ((_END, "end = seqlen_k"),),
        "whole matrix": (("    for i in range(0, seqlen_q, block_q):",
                          "    block_q, block_k = seqlen_q, seqlen_k\n    for i in range(0, seqlen_q, block_q):"),),
        "heads tiled": (("        repeat_kv(k, q.shape[1] // k.shape[1]),", "        k.repeat(1, q.shape[1] // k.shape[1], 1, 1),"),
                        ("        repeat_kv(v, q.shape[1] // v.shape[1]),", "        v.repeat(1, q.shape[1] // v.shape[1], 1, 1),")),
        "lse in base 2": (("= m + torch.log(l)", "= (m + torch.log(l)) / 0.6931471805599453"),),
    },
    "backward_tile": {
        "delta missing": (("dp - delta[:, None]", "dp"),),
        "delta added": (("dp - delta[:, None]", "dp + delta[:, None]"),),
        "delta from the tile": (("    dp = do @ v.T\n", "    dp = do @ v.T\n    delta = (p * dp).sum(dim=-1)\n"),),
        "p outside": (("p * (dp - delta[:, None])", "p * dp - delta[:, None]"),),
        "mask forgotten": ((".masked_fill(~keep, float(\"-inf\"))", ""),),
        "dq unscaled": (("return scale * (ds @ k)", "return (ds @ k)"),),
        "dv from ds": (("dv = p.T @ do", "dv = p.T @ do\n    dv = None"),
                       ("    ds = p * (dp - delta[:, None])\n", "    ds = p * (dp - delta[:, None])\n    dv = ds.T @ do\n")),
    },
    "triton_forward": {
        "no scale": (("scale * tl.dot(", "tl.dot("),),
        "padding counted": (("see = offs[None, :] < seqlen_k", "see = offs[None, :] >= 0"),),
        "mask forgotten": ((_TL_SEE, "pass"),),
        "mask too loose": ((_TL_SEE, _TL_SEE.replace("- seqlen_q)", "- seqlen_q + 1)")),),
        "top-left": ((_TL_SEE, _TL_SEE.replace(" + seqlen_k - seqlen_q", "")),),
        "acc not rescaled": (("acc = alpha[:, None] * acc", "acc = acc"),),
        "no guard": (("origin = tl.where(m_new == float(\"-inf\"), 0.0, m_new)", "origin = m_new"),),
        "m not updated": (("        m = m_new\n", ""),),
        "lse without m": (("m + tl.log(l_safe))", "tl.log(l_safe))"),),
        "reads every tile": (("end = tl.minimum(seqlen_k, last_position + 1)", "end = seqlen_k"),),
        "scores stored": (("        l = alpha * l + tl.sum(p, 1)\n",
                           "        tl.store(out_ptr + q_tile, tl.zeros([BLOCK_M, HEAD_DIM], tl.float32).to(out_ptr.dtype.element_ty), "
                           "mask=rows[:, None] < seqlen_q)\n        l = alpha * l + tl.sum(p, 1)\n"),),
        "no kernel": (("def flash_triton(q, k, v, causal, block_m=32, block_n=32):",
                       "def flash_triton(q, k, v, causal):\n"
                       "    return flash_forward(q.float(), k.float(), v.float(), causal, 32, 32)[0].to(q.dtype), "
                       "flash_forward(q.float(), k.float(), v.float(), causal, 32, 32)[1]\n\n\n"
                       "def unused(q, k, v, causal, block_m=32, block_n=32):"),
                      ("        m = m_new\n", "        pass\n")),
        "plain global": (("@triton.jit\n", "NEG_INF = float(\"-inf\")\n\n\n@triton.jit\n"),
                         ("s = tl.where(see, s, float(\"-inf\"))", "s = tl.where(see, s, NEG_INF)")),
        "plain helper": (("@triton.jit\n", "def weights(s, origin):\n    return tl.exp(s - origin[:, None])\n\n\n@triton.jit\n"),
                         ("p = tl.exp(s - origin[:, None])", "p = weights(s, origin)")),
        "changed dtype": (("l = alpha * l + tl.sum(p, 1)", "l = (alpha * l + tl.sum(p, 1)).to(tl.float64)"),
                          ("    l_safe = ", "    l = l.to(tl.float32)\n    l_safe = ")),
    },
}  # fmt: skip


@functools.cache
def _model() -> dict[str, str]:
    return variants.model()


def solution(exercise: str) -> str:
    """The solved cell of an exercise."""
    return _model()[exercise]


def wrong(exercise: str, mistake: str) -> str:
    """The solved cell with one registered mistake; every edit must apply."""
    source = solution(exercise)
    for old, new in MISTAKES[exercise][mistake]:
        assert old in source, f"{exercise}, {mistake}: {old!r} is not in the solution"
        source = source.replace(old, new)
    return source


def notebook(parts: Mapping[str, str], extra: Sequence[str] = (), **edits: str) -> bytes:
    """A hand-in: the released notebook with cells replaced.

    Args:
        parts: exercise → source of its cell; an exercise that is not named stays blank.
        extra: cells put before the first exercise.
        edits: check_<exercise> → source in place of the self-check; "" deletes it.
    """
    book = json.loads(_released())
    given = {name: _blank(name) for name in EXERCISES}
    cells = []
    for cell in book["cells"]:
        text = "".join(cell["source"])
        for name, blank in given.items():
            if text == blank:
                cell["source"] = parts.get(name, text)
            elif cell["cell_type"] == "code" and text == f'check("{LAB}/{name}", {FUNCTIONS[name]})':
                cell["source"] = edits.get(f"check_{name}", text)
        cells.append(cell)
    first = next(n for n, cell in enumerate(cells) if "".join(cell["source"]).startswith("## Step 1"))
    cells[first:first] = [
        {
            "cell_type": "code",
            "id": f"extra{n}",
            "metadata": {},
            "outputs": [],
            "execution_count": None,
            "source": s,
        }
        for n, s in enumerate(extra)
    ]
    book["cells"] = [cell for cell in cells if "".join(cell["source"])]
    return json.dumps(book).encode()


@functools.cache
def _released() -> str:
    import nbformat

    return str(nbformat.writes(notebooks.student_notebook(LAB)))


@functools.cache
def _blank(exercise: str) -> str:
    source = next(
        c.source
        for c in notebooks.parse(LAB).cells
        if c.cell_type == "code" and f"def {FUNCTIONS[exercise]}(" in c.source
    )
    return notebooks.blanked(source)


def solved(*names: str, **changed: str) -> bytes:
    """Everything solved, or only the exercises named; ``changed`` replaces cells."""
    return notebook({**{n: solution(n) for n in names or EXERCISES}, **changed})


def student() -> bytes:
    """The notebook as it was released."""
    return notebook({})


def cells(**parts: str) -> list[tuple[int, str]]:
    """(number, source) as the judge takes them: imports, then the cells of these exercises."""
    head = "import torch\nimport triton\nimport triton.language as tl\n"
    head += "from effattn_lab.foundations.attention import repeat_kv\n"
    return [(0, head), *enumerate(parts.values(), 1)]


# ---- a class -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HandIn:
    """One student: files, when, and the exercises that are right by construction.

    Args:
        key: name of the student's folder.
        files: name → bytes.
        right: exercises that are solved.
        late: handed in so long after the due date.
        why: in a word, for messages.
    """

    key: str
    files: Mapping[str, bytes]
    right: tuple[str, ...] = ()
    late: timedelta = timedelta(minutes=-5)
    why: str = ""
    percent: float = field(default=0.0)

    @property
    def raw(self) -> float:
        return float(sum(POINTS[name] for name in self.right))

    @property
    def total(self) -> float:
        return round(self.raw - round(self.raw * self.percent / 100, 2), 2)


def hand_in(key: str, data: bytes, right: Sequence[str] = (), **more: object) -> HandIn:
    return HandIn(key, {"flash.ipynb": data}, tuple(right), **more)  # type: ignore[arg-type]


def write(folder: Path, hand_ins: Sequence[HandIn], due: datetime) -> Path:
    """The class's folder, with ``submitted.csv``."""
    times = io.StringIO()
    rows = csv.writer(times)
    rows.writerow(["student", "submitted"])
    for one in hand_ins:
        (folder / one.key).mkdir(parents=True)
        for name, data in one.files.items():
            (folder / one.key / name).write_bytes(data)
        rows.writerow([one.key, (due + one.late).isoformat()])
    (folder / "submitted.csv").write_text(times.getvalue(), encoding="utf-8")
    return folder


def release(folder: Path, due: str = "2026-03-01T12:00+00:00") -> tuple[Path, datetime]:
    """Run ``effattn release`` with the class's points: (folder of the release, the due date)."""
    from effattn_lab.grading.release import release as make

    folder.mkdir(parents=True, exist_ok=True)
    points = folder / "points.yml"
    lines = [f"  {LAB}/{name}: {value}" for name, value in POINTS.items()]
    points.write_text("\n".join(["title: Flash", "points:", *lines, ""]), encoding="utf-8")
    when = datetime.fromisoformat(due)
    make(folder / "release", [LAB], due=when, points_file=points)
    return folder / "release", when


def gradebook(text: str) -> dict[str, dict[str, str]]:
    """student → row."""
    return {row["student"]: row for row in csv.DictReader(io.StringIO(text))}


def mutants_named() -> set[tuple[str, str]]:
    return {(exercise, name) for exercise, table in MISTAKES.items() for name in table}


def functions_of(source: str) -> list[str]:
    return re.findall(r"(?m)^def (\w+)", source)
