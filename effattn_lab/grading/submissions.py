"""What a class handed in: a folder, or the archive that Canvas or Moodle exports, as a list of `Submission`.

Layouts (`collect` tells them apart by the names):

* a folder a student, or a file a student (``alice/flash.ipynb``, ``alice.ipynb``);
* Canvas: ``lastnamefirstname_LATE_123456_7890123_flash-1.ipynb``, the numbers being user and attachment;
* Moodle: ``Full Name_1234567_assignsubmission_file_/flash.ipynb``, or the same without the folder.

Anywhere a student's file may be a zip archive. A hand-in that cannot be read becomes a sentence in ``problems``.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from effattn_lab.grading.archives import CLASS, ArchiveError, Found, is_zip, read_folder, read_zip, unpack
from effattn_lab.grading.model import Assignment, Submission
from effattn_lab.grading.notebook import MAX_BYTES, NotebookError, lab_of
from effattn_lab.grading.text import key_of, tag, visible

#: Times of submission, when the instructor has them: columns ``student`` and ``submitted``.
TIMES = "submitted.csv"
MAX_STUDENT_BYTES = 60_000_000
MAX_NOTEBOOKS = 40  # notebooks that one student may hand in
MAX_PROBLEMS = 20

# No name on Moodle holds an underscore: it writes a blank instead. So the first match is Moodle's own.
_MOODLE = re.compile(r"([^_]+)_(\d{1,12})_assignsubmission_(file|onlinetext)_?(.*)", re.DOTALL)
_CANVAS = re.compile(r"([^\W_]+)(_LATE)?_(\d{1,18})_(\d{1,18})_(.+)", re.DOTALL)
_CANVAS_ANONYMOUS = re.compile(r"(LATE_)?anon_([A-Za-z0-9]{1,20})_(\d{1,18})_(.+)", re.DOTALL)
_AGAIN = re.compile(r"(?:-(\d{1,4})| ?\((\d{1,4})\))$")


@dataclass(frozen=True)
class _Owner:
    """Whose file it is. ``source`` is canvas, moodle or folder; ``id`` the platform's number."""

    source: str
    name: str
    id: str = ""

    @property
    def key(self) -> str:
        return key_of(f"{self.name}_{self.id}" if self.id else self.name)


@dataclass
class _Notebook:
    path: str
    data: bytes
    modified: datetime | None
    number: tuple[int, int]  # attachment, resubmission


@dataclass
class _Hand:
    """What was found for one student so far."""

    late: bool = False
    size: int = 0
    notebooks: list[_Notebook] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # files that are no notebooks

    def add(self, path: str, data: bytes, modified: datetime | None, attachment: int) -> None:
        self.size += len(data)
        if self.size > MAX_STUDENT_BYTES or len(self.notebooks) >= MAX_NOTEBOOKS:
            limit = f"{MAX_STUDENT_BYTES} bytes or {MAX_NOTEBOOKS} notebooks"
            self.problems.append(f"“{visible(path, 80)}” was left out: more than {limit} were handed in")
            return
        again = _AGAIN.search(Path(path).stem[-20:])
        number = int(again[1] or again[2]) if again else 0
        self.notebooks.append(_Notebook(path, data, modified, (attachment, number)))


def collect(where: str | Path, assignment: Assignment, notes: list[str] | None = None) -> list[Submission]:
    """Read what a class handed in.

    Args:
        where: a folder, or a zip archive of the class.
        assignment: what was released; says which notebooks belong to it.
        notes: sentences for the instructor that belong to no one student are appended here.

    Returns:
        One submission a student, sorted by key. ``submitted`` comes from ``submitted.csv`` if there is one; else, for
        plain folders and archives, from the time of the graded file. Canvas and Moodle date the files of their
        archives by the download, so for those it stays None; Canvas's mark LATE is kept in ``late_flag``.

    Raises:
        ValueError: there is no such folder or archive, it is too large, or ``submitted.csv`` is wrong.
    """
    where = Path(where)
    hands: dict[_Owner, _Hand] = {}
    times: dict[str, datetime] = {}
    for found in _found(where):
        if found.parts == (TIMES,):
            if found.data is None:
                raise ValueError(f"{TIMES}: {found.problem}")
            times = _times(found.data, assignment)
            continue
        owner, late, attachment, name = _owner(found.parts)
        if owner is None:
            continue
        # A platform's name says whose a file is, even a PDF. Without one it is the instructor's, beside the hand-ins.
        handed_in = _wanted(found.parts) or found.problem or found.folder or len(found.parts) > 1
        if not handed_in and owner.source == "folder":
            continue
        hand = hands.setdefault(owner, _Hand())
        hand.late |= late
        if found.problem:
            hand.problems.append(found.problem)
        elif found.data is not None and is_zip(found.parts):
            for inner in unpack(found.data, _is_notebook):
                if inner.problem:
                    hand.problems.append(f"in “{visible(name, 80)}”: {inner.problem}")
                elif inner.data is not None:
                    hand.add("/".join(inner.parts), inner.data, inner.modified, attachment)
        elif found.data is not None:
            hand.add(name, found.data, found.modified, attachment)
        elif not found.folder:
            hand.others.append(name)
    return _submissions(hands, times, assignment, notes)


def _found(where: Path) -> Iterator[Found]:
    try:
        if where.is_dir():
            yield from read_folder(where, _wanted)
        elif where.is_file() and is_zip((where.name,)):
            with where.open("rb") as file:
                yield from _stripped(read_zip(file, _wanted, CLASS), where.stem)
        else:
            raise ValueError(f"submissions: expected a folder or a .zip archive, got {str(where)!r}")
    except ArchiveError as error:
        raise ValueError(f"{where.name}: {error}") from None


def _stripped(entries: Iterator[Found], stem: str) -> Iterator[Found]:
    """An archive made of the folder ``submissions`` holds everything below that name; take the name off."""
    for found in entries:
        parts = found.parts
        if parts[0].casefold() == stem.casefold() and (len(parts) > 1 or found.folder):
            parts = parts[1:]
        if parts:
            yield replace(found, parts=parts)


def _is_notebook(parts: tuple[str, ...]) -> bool:
    return bool(parts) and parts[-1].lower().endswith(".ipynb")


def _wanted(parts: tuple[str, ...]) -> bool:
    return _is_notebook(parts) or is_zip(parts) or parts[-1] == TIMES


def _owner(parts: tuple[str, ...]) -> tuple[_Owner | None, bool, int, str]:
    """(whose it is, marked late, number of the attachment, the file's own name). None: nobody's."""
    first, rest = parts[0], "/".join(parts[1:])
    if moodle := _MOODLE.fullmatch(first):
        owner = _Owner("moodle", " ".join(moodle[1].split()), moodle[2])
        return owner, False, 0, rest or moodle[4] or first
    if anonymous := _CANVAS_ANONYMOUS.fullmatch(first):
        owner = _Owner("canvas anonymous", f"anon_{anonymous[2]}")
        return owner, bool(anonymous[1]), int(anonymous[3]), rest or anonymous[4]
    if canvas := _CANVAS.fullmatch(first):
        owner = _Owner("canvas", canvas[1], canvas[3])
        return owner, bool(canvas[2]), int(canvas[4]), rest or canvas[5]
    name = first if rest else re.sub(r"(?i)\.(ipynb|zip)$", "", first)
    return (_Owner("folder", name) if name else None), False, 0, rest or first


# ---- from files to submissions -----------------------------------------------------------------------------


def _submissions(
    hands: dict[_Owner, _Hand],
    times: dict[str, datetime],
    assignment: Assignment,
    notes: list[str] | None,
) -> list[Submission]:
    keys = Counter(owner.key.casefold() for owner in hands)
    ids = Counter((owner.source, owner.id) for owner in hands if owner.id)
    out = []
    known: set[str] = set()
    for owner, hand in hands.items():
        key = owner.key
        if keys[key.casefold()] > 1:
            key = f"{key[:60]}-{tag(repr(owner))}"
            hand.problems.append(f"another student's name gives the same key, so this one is “{key}”")
        if owner.id and ids[owner.source, owner.id] > 1:
            hand.problems.append(f"two names came with the {owner.source} number {owner.id}: compare by hand")
        chosen = _choose(hand, assignment)
        names = [_folded(x) for x in (owner.name, owner.id, key, owner.key) if x]
        known.update(names)
        submitted = next((times[name] for name in names if name in times), None)
        if submitted is None and owner.source == "folder":
            submitted = max((n.modified for n in chosen.values() if n.modified), default=None)
        problems = hand.problems[:MAX_PROBLEMS]
        if len(hand.problems) > MAX_PROBLEMS:
            problems.append(f"and {len(hand.problems) - MAX_PROBLEMS} more problems")
        if not hand.notebooks and not problems:
            only = ", ".join(f"“{visible(other, 60)}”" for other in sorted(hand.others)[:5])
            problems.append("no notebook was handed in" + (f", only {only}" if only else ""))
        out.append(
            Submission(
                student=key,
                name=visible(owner.name, 100),
                notebooks={lab: chosen[lab].data for lab in sorted(chosen)},
                submitted=submitted,
                late_flag=hand.late,
                problems=tuple(problems),
                ids={owner.source: owner.id} if owner.id else {},
            )
        )
    if notes is not None and (strangers := sorted(set(times) - known)):
        shown = ", ".join(f"“{visible(name, 60)}”" for name in strangers[:5])
        more = f" and {len(strangers) - 5} more" if len(strangers) > 5 else ""
        notes.append(f"{TIMES}: nobody who handed in is called {shown}{more}; those times count for nobody")
    return sorted(out, key=lambda s: s.student)


def _choose(hand: _Hand, assignment: Assignment) -> dict[str, _Notebook]:
    """Which notebook counts for which lab: of several the newest by the platform's number, resubmission, time."""
    offered: dict[str, list[_Notebook]] = {}
    for notebook in hand.notebooks:
        shown = f"“{visible(notebook.path, 80)}”"
        if len(notebook.data) > MAX_BYTES:
            hand.problems.append(f"{shown} has more than {MAX_BYTES} bytes")
            continue
        lab, problem = _lab(notebook, assignment)
        if problem:
            hand.problems.append(f"{shown}: {problem}")
        if lab is None:
            hand.problems.append(f"{shown} belongs to no lab of this assignment and was not graded")
        else:
            offered.setdefault(lab, []).append(notebook)
    chosen = {}
    for lab, notebooks in offered.items():
        oldest = datetime.min.replace(tzinfo=datetime.now().astimezone().tzinfo)
        notebooks.sort(key=lambda n: (n.number, n.modified or oldest, n.path))
        chosen[lab] = notebooks[-1]
        if len(notebooks) > 1:
            left = ", ".join(f"“{visible(n.path, 60)}”" for n in notebooks[:-1][:5])
            newest = visible(notebooks[-1].path, 60)
            hand.problems.append(
                f"{len(notebooks)} notebooks for {lab}: “{newest}” counts as the newest, not {left}"
            )
    return chosen


def _lab(notebook: _Notebook, assignment: Assignment) -> tuple[str | None, str]:
    """(lab, what is wrong with the notebook): by its metadata, else by its file name, else the only lab."""
    labs = {plan.lab: plan for plan in assignment.labs}
    problem = ""
    try:
        said = lab_of(notebook.data)
        if said is not None:
            return (said, "") if said in labs else (None, "")
    except NotebookError as error:
        problem = str(error)
    name = _AGAIN.sub("", Path(notebook.path).stem.casefold())
    named = [plan.lab for plan in assignment.labs if name.startswith(Path(plan.file).stem.casefold())]
    if named:
        return max(named, key=len), problem
    return (next(iter(labs)) if len(labs) == 1 else None), problem


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _times(data: bytes, assignment: Assignment) -> dict[str, datetime]:
    """``submitted.csv``: student (key, name, folder or the platform's number) and an ISO 8601 time."""
    try:
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{TIMES}: expected CSV in UTF-8 ({error})") from None
    out = {}
    for line, row in enumerate(rows, start=2):
        student, submitted = row.get("student"), row.get("submitted")
        if student is None or submitted is None:
            raise ValueError(f"{TIMES}, line {line}: expected the columns student and submitted")
        if not submitted.strip():
            continue
        try:
            time = datetime.fromisoformat(submitted.strip().replace("Z", "+00:00"))
        except ValueError:
            shown = visible(submitted, 40)
            raise ValueError(
                f"{TIMES}, line {line}: expected a time like 2026-12-24T23:59, got “{shown}”"
            ) from None
        if time.tzinfo is None:
            zone = assignment.due.tzinfo if assignment.due else None
            time = time.replace(tzinfo=zone) if zone else time.astimezone()
        out[_folded(student)] = time
    return out
