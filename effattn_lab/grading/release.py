"""``effattn release``: the notebooks of a class, with points and due date, and the manifest that grading needs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from effattn_lab import __version__
from effattn_lab.grading.model import Assignment, Credit, LabPlan, LateRule
from effattn_lab.grading.release_plan import plan_of, read_lab
from effattn_lab.grading.release_text import (
    HONESTY,
    due_words,
    instructions,
    late_words,
    points_words,
    table,
)
from effattn_lab.grading.text import plural

MANIFEST, INSTRUCTIONS = "assignment.json", "INSTRUCTIONS.md"
_MAX_MANIFEST = 5_000_000
_MAX_TITLE = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to `parser`."""
    parser.add_argument("out", metavar="OUT", help="folder to make; refused if it holds something else")
    parser.add_argument("labs", nargs="*", metavar="LAB", help="part/slug; default: all labs")
    parser.add_argument(
        "--due", metavar="DATE", help="2026-12-24T23:59, or with a zone: 2026-12-24T23:59+01:00"
    )
    parser.add_argument(
        "--points", metavar="FILE", help="YAML: title, points, late, credit; default: 1 point each"
    )
    parser.add_argument(
        "--seed-per-student",
        action="store_true",
        help="other hidden inputs for each student; default: the same",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns 0. ValueError or RuntimeError says what is wrong with the options."""
    due = due_date(args.due) if args.due else None
    assignment = release(
        args.out, args.labs, due=due, points_file=args.points, seed_per_student=args.seed_per_student
    )
    out = Path(args.out)
    for plan in assignment.labs:
        print(f"{out / plan.file}: {plural(len(plan.items), 'exercise')}, {points_words(plan.items)}")
    print(f"{out / INSTRUCTIONS}: for the students")
    print(f"{out / MANIFEST}: for grading")
    if due:
        zone = "" if _has_zone(args.due) else " (the time zone of this machine, for none was given)"
        print(f"Due {due_words(due)}{zone}. {late_words(assignment.late)}")
        if due < datetime.now(due.tzinfo):
            print("note: that is in the past")
    else:
        print("No due date: nothing is late.")
    return 0


def release(
    out: str | Path,
    labs: Sequence[str] = (),
    *,
    due: datetime | None = None,
    points_file: str | Path | None = None,
    seed_per_student: bool = False,
) -> Assignment:
    """Write the notebooks of an assignment, its manifest and the students' instructions.

    The folder appears whole or not at all, and the same arguments give the same bytes.

    Args:
        out: folder to make. One that is not empty is refused, unless it is an earlier release with the same title
            and labs, which is replaced; what the instructor wrote under "Academic honesty" is kept.
        labs: ``part/slug``; all labs of the checkout by default.
        due: with a time zone. Default: no due date.
        points_file: YAML with any of ``title``, ``points`` (id: number; 1 each by default, 0 leaves an exercise out),
            ``late`` (grace_minutes, percent_per_day, most_percent) and ``credit`` (all or properties).
        seed_per_student: hidden inputs differ from student to student.

    Raises:
        ValueError: an argument is wrong. RuntimeError: the package is installed without its labs.
    """
    from effattn_lab import notebooks

    known = notebooks.labs()
    chosen = list(dict.fromkeys(labs)) or known
    if unknown := [lab for lab in chosen if lab not in known]:
        raise ValueError(f"LAB: expected some of {', '.join(known)}, got {unknown[0]!r}")
    if due is not None and due.tzinfo is None:
        raise ValueError("due: expected a time with a time zone")
    books = {lab: read_lab(lab) for lab in chosen}
    settings = _settings(points_file, [item.id for book in books.values() for item in book.items])
    assignment = Assignment(
        title=settings.title or "; ".join(book.title for book in books.values())[:_MAX_TITLE],
        version=__version__,
        labs=tuple(plan_of(lab, book, chosen, settings.points) for lab, book in books.items()),
        due=due,
        late=settings.late,
        seed_per_student=seed_per_student,
        credit=settings.credit,
    )
    if not assignment.items:
        raise ValueError("points: every exercise has 0 points; nothing would be graded")
    plans, files = [], {}
    for plan in assignment.labs:
        text = _notebook(assignment, plan)
        plans.append(dataclasses.replace(plan, sha256=hashlib.sha256(text.encode()).hexdigest()))
        files[plan.file] = text
    assignment = dataclasses.replace(assignment, labs=tuple(plans))
    files[INSTRUCTIONS] = _kept_honesty(Path(out), instructions(assignment))
    files[MANIFEST] = json.dumps(assignment.to_json(), indent=1, ensure_ascii=False) + "\n"
    _write(Path(out), files, assignment)
    return assignment


def load_assignment(path: str | Path) -> Assignment:
    """Read an assignment from its manifest, or from the folder that holds it. ValueError where it is none."""
    path = Path(path)
    file = path / MANIFEST if path.is_dir() else path
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_MANIFEST:
            raise ValueError(f"{file}: expected a file of at most {_MAX_MANIFEST} bytes")
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"assignment: {file} cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if isinstance(data, dict) and "nbformat" in data:
        raise ValueError(f"{file}: expected the {MANIFEST} of `effattn release`, got a notebook")
    assignment = Assignment.from_json(data)
    if assignment.due is not None and assignment.due.tzinfo is None:
        raise ValueError(f"{file}: due: expected a time with a time zone")
    if assignment.credit not in ("all", "properties"):
        raise ValueError(f"{file}: credit: expected all or properties, got {assignment.credit!r}")
    return assignment


def default_assignment() -> Assignment:
    """All labs as they stand in the checkout, one point an exercise, nothing is late."""
    from effattn_lab import notebooks

    plans = []
    known = notebooks.labs()
    for lab in known:
        text = notebooks.paths(lab)[0].read_text(encoding="utf-8")
        plan = plan_of(lab, read_lab(lab), known, {})
        plans.append(dataclasses.replace(plan, sha256=hashlib.sha256(text.encode()).hexdigest()))
    return Assignment("Efficient Attention Lab", __version__, tuple(plans))


def release_id(assignment: Assignment) -> str:
    """What the notebooks carry: a digest of everything but the notebooks' own hashes."""
    plans = tuple(dataclasses.replace(plan, sha256="") for plan in assignment.labs)
    return dataclasses.replace(assignment, labs=plans).digest()


# ---- the due date -------------------------------------------------------------------------------------------------


def due_date(text: str) -> datetime:
    """A date from the command line; without a zone, this machine's. ValueError where it is none."""
    try:
        due = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise ValueError(f"--due: expected a date like 2026-12-24T23:59, got {text!r}") from None
    if "T" not in text and " " not in text:
        raise ValueError(f"--due: expected a date with a time, like {text}T23:59, got {text!r}")
    return due if due.tzinfo else due.astimezone()


def _has_zone(text: str) -> bool:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).tzinfo is not None


# ---- the settings ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Settings:
    title: str = ""
    points: dict[str, float] = dataclasses.field(default_factory=dict)
    late: LateRule = dataclasses.field(default_factory=LateRule)
    credit: Credit = "all"


def _settings(file: str | Path | None, ids: Sequence[str]) -> _Settings:
    if file is None:
        return _Settings()
    import yaml

    path = Path(file)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--points: {path} cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--points: {path} is not YAML ({' '.join(str(error).split())[:200]})") from None
    data = {} if data is None else data
    _known(data, ("title", "points", "late", "credit"), path.name)
    title = data.get("title", "")
    if not isinstance(title, str) or len(title) > _MAX_TITLE or not title.isprintable():
        raise ValueError(f"title: expected a line of at most {_MAX_TITLE} characters, got {title!r:.120}")
    points = data.get("points") or {}
    _known(points, ids, "points")
    late = data.get("late") or {}
    rule = [field.name for field in dataclasses.fields(LateRule)]
    _known(late, rule, "late")
    credit = data.get("credit", "all")
    if credit not in ("all", "properties"):
        raise ValueError(f"credit: expected all or properties, got {credit!r}")
    most = {"percent_per_day": 100.0, "most_percent": 100.0}
    return _Settings(
        title.strip(),
        {key: _amount(value, f"points of {key}", 1000) for key, value in points.items()},
        LateRule(**{key: _amount(value, f"late, {key}", most.get(key, 1e6)) for key, value in late.items()}),
        credit,
    )


def _known(data: Any, names: Sequence[str], where: str) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected names with values, got {type(data).__name__}")
    if unknown := [name for name in data if name not in names]:
        raise ValueError(f"{where}: expected some of {', '.join(names)}, got {str(unknown[0])!r:.80}")


def _amount(value: Any, what: str, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise ValueError(f"{what}: expected a number from 0 to {most:g}, got {value!r:.40}")
    return float(value)


# ---- what is written ---------------------------------------------------------------------------------------


def _notebook(assignment: Assignment, plan: LabPlan) -> str:
    import nbformat

    from effattn_lab import notebooks

    book = notebooks.student_notebook(plan.lab)
    text = table(assignment, plan)
    cell = nbformat.v4.new_markdown_cell(text)
    cell.id = hashlib.sha256(f"{plan.lab}\n{text}".encode()).hexdigest()[:8]
    book.cells.insert(1, cell)
    book.metadata.effattn = {"lab": plan.lab, "assignment": release_id(assignment)}
    return str(nbformat.writes(book, version=4)).rstrip("\n") + "\n"


def _write(out: Path, files: dict[str, str], assignment: Assignment) -> None:
    """All files or none: a new folder beside `out` takes its name at the end."""
    old = out.parent / f".{out.name}.replaced"
    existing = _replaceable(out, assignment)
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for name, text in files.items():
            with open(fresh / name, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        fresh.chmod(0o755)
        shutil.rmtree(old, ignore_errors=True)
        if existing:
            os.rename(out, old)
        os.rename(fresh, out)  # also onto an empty folder
    except BaseException:
        if existing and not out.exists():
            with contextlib.suppress(OSError):
                os.rename(old, out)
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _kept_honesty(out: Path, text: str) -> str:
    """``text`` with the section that the instructor wrote into an earlier one. ValueError where more was edited."""
    try:
        earlier, there = load_assignment(out), (out / INSTRUCTIONS).read_text(encoding="utf-8")
    except (ValueError, OSError):  # nothing to keep; `_replaceable` says what else may be wrong
        return text
    above, heading, theirs = there.partition(HONESTY)
    if not heading or above != instructions(earlier).partition(HONESTY)[0]:
        raise ValueError(
            f"OUT: {str(out / INSTRUCTIONS)!r} was edited, or another version wrote it; name a new folder, or move "
            "the file away"
        )
    return text.partition(HONESTY)[0] + HONESTY + theirs


def _replaceable(out: Path, assignment: Assignment) -> bool:
    """Is there an earlier release of this assignment? ValueError where there is anything else."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"OUT: expected a folder to make, got {str(out)!r}, which is something else")
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if not there:
        return False
    try:
        earlier = load_assignment(out)
    except ValueError:
        raise ValueError(f"OUT: {str(out)!r} is not empty and holds no earlier release") from None
    ours = {plan.file for plan in earlier.labs} | {MANIFEST, INSTRUCTIONS}
    if foreign := sorted(there - ours):
        raise ValueError(f"OUT: {str(out)!r} holds more than a release: {foreign[0]!r:.80}")
    same = {plan.lab for plan in earlier.labs} == {plan.lab for plan in assignment.labs}
    if earlier.title != assignment.title or not same:
        raise ValueError(
            f"OUT: {str(out)!r} holds another assignment, {earlier.title!r:.120}; name a new folder"
        )
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="effattn release")
    add_arguments(parser)
    raise SystemExit(run(parser.parse_args()))
