"""What a release tells students: the table in each notebook and the page of instructions."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from effattn_lab.grading.model import Assignment, Item, LabPlan, LateRule
from effattn_lab.grading.text import number

#: The heading of the section that is the instructor's own.
HONESTY = "## Academic honesty\n"


def due_words(due: datetime) -> str:
    """``2026-12-24 23:59 (UTC+01:00)``."""
    offset = due.strftime("%z")
    return f"{due:%Y-%m-%d %H:%M} (UTC{offset[:3]}:{offset[3:5]})"


def late_words(rule: LateRule) -> str:
    """The rule in a sentence or two."""
    if not rule.percent_per_day or not rule.most_percent:
        return "Late submissions lose nothing."
    start = "A late submission loses"
    if rule.grace_minutes:
        start = f"Up to {number(rule.grace_minutes)} minutes late nothing is lost; after that"
    return (
        f"{start} {number(rule.percent_per_day)} % of the points for each day begun since the due time, "
        f"at most {number(rule.most_percent)} %."
    )


def table(assignment: Assignment, plan: LabPlan) -> str:
    """The Markdown cell after a notebook's title."""
    rows = [f"| `{item.function}` | {item.id} | {number(item.points)} |" for item in plan.items]
    lines = [
        f"**{assignment.title}: what is graded**",
        "",
        "| function | exercise | points |",
        "|---|---|---:|",
    ]
    lines += [*rows, f"| **together** | | **{number(sum(item.points for item in plan.items))}** |", ""]
    if assignment.due:
        lines += [f"**Due** {due_words(assignment.due)}. {late_words(assignment.late)}", ""]
    how = "Points are given for an exercise that passes whole."
    if assignment.credit == "properties":
        how = "An exercise earns points in proportion to the properties that hold."
    lines.append(
        f"{how} Grading calls your functions on hidden inputs; printed self-checks are not the grade, and "
        "`reference(...)` earns nothing."
    )
    return "\n".join(lines)


def points_words(items: Sequence[Item]) -> str:
    """``6 points``."""
    total = sum(item.points for item in items)
    return f"{number(total)} {'point' if total == 1 else 'points'}"


def instructions(assignment: Assignment) -> str:
    """``INSTRUCTIONS.md``: one page for the students."""
    from effattn_lab import notebooks

    files = ", ".join(f"`{plan.file}`" for plan in assignment.labs)
    one = len(assignment.labs) == 1
    due = "There is no due date."
    if assignment.due:
        due = f"Due {due_words(assignment.due)}. {late_words(assignment.late)}"
    credit = "An exercise earns its points when all of its properties hold, else nothing."
    if assignment.credit == "properties":
        credit = "An exercise earns points in proportion to the properties that hold."
    rows = "\n".join(
        f"| {plan.file} | `{item.function}` | {item.id} | {number(item.points)} |"
        for plan in assignment.labs
        for item in plan.items
    )
    seeds = " They differ from student to student." if assignment.seed_per_student else ""
    return f"""# {assignment.title}

Hand in: {files}, with {"its" if one else "their"} file {"name" if one else "names"} unchanged. {due}

## Open it

- **Colab.** Go to <https://colab.research.google.com>, File → Upload notebook. A GPU is not needed; if you want
  one, choose it *before* you start (Runtime → Change runtime type). The first cell installs the book's package.
  Save a copy in Drive, and download the notebook at the end (File → Download → .ipynb).
- **Your own machine**, Python 3.10 or newer:
  `pip install "effattn-lab[llm] @ git+{notebooks.repository_url()}" jupyterlab`, then `jupyter lab`.

Before you hand in: restart, run everything from the top, save.

## What is graded

| notebook | function | exercise | points |
|---|---|---|---:|
{rows}
| | | **together** | **{number(assignment.points)}** |

Grading takes these functions by name, with whatever they need from the notebook's other cells, and calls them, with
the notebook's signatures, on **hidden inputs**.{seeds} They have other values than those of the self-checks in the
notebook, and test the same properties. {credit}

- **A printed self-check is not the grade.** `check(...)` is there for you; its output in the file is ignored. Leave
  those cells as they are: a changed one alters no points, but it is reported.
- **`reference(...)`, `take(...)` and `solution(...)` earn nothing.** They let you go on with the lab. A function
  that calls the finished one fails: where grading runs, the finished ones do not exist.
- You may import Python's standard library, NumPy, torch, triton and what the notebook itself imports. There is no
  network and no file of yours.
- Each function has limited time and memory. It must work without a GPU.
- A helper is defined at the top level of a cell (`def`, `import`, `name = ...`), above the cells that use it.

You will get a page that says for each exercise which properties hold, with a hint for those that do not. It shows
no hidden input and no expected value.

{HONESTY}
*(Your instructor fills in this line: what may be discussed, which tools may be used, what must be declared.)*
"""
