"""The folder of results: every file appears whole or not at all, and a killed run goes on where it stopped.

::

    RESULTS/
      assignment.json         what was graded
      run.json                versions, hash of the seed, and the seed itself once the run is complete
      students/KEY.json       one result a student, written the moment it is known
      sources/KEY.py          the student's own cells, for `effattn report`
      feedback/KEY.html .json what a student may see
      gradebook.csv canvas.csv moodle.csv
      .state/                 the lock, the sealed seeds, the package as the sandbox sees it
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effattn_lab._atomic import write_atomic
from effattn_lab.grading.model import Assignment, StudentResult


class StoreError(ValueError):
    """The results folder cannot be used; the message says why and what to do."""


def commitment(seed: str) -> str:
    """Hash of a seed: says which one it was without telling it."""
    return hashlib.sha256(f"effattn seed {seed}".encode()).hexdigest()


def student_seed(seed: str, student: str, per_student: bool) -> str:
    """The seed that draws a student's inputs: the run's, or one of the student's own that follows from it."""
    if not per_student:
        return seed
    return hashlib.sha256(f"effattn student {seed} {student}".encode()).hexdigest()[:32]


class Store:
    """An open results folder; use it in a ``with`` block, which holds a lock.

    Args:
        root: the folder; made if it is not there.
        assignment: what is graded. Another one than before is refused.

    Raises:
        StoreError: another run holds the folder, it belongs to another assignment, or it is no results folder.
    """

    def __init__(self, root: Path, assignment: Assignment) -> None:
        self.root, self.assignment = root, assignment
        self._lock: int | None = None

    def __enter__(self) -> Store:
        import fcntl

        if self.root.exists() and not self.root.is_dir():
            raise StoreError(f"--out: expected a folder, got the file {self.root}")
        state = self.root / ".state"
        if self.root.is_dir() and any(self.root.iterdir()) and not state.is_dir():
            raise StoreError(
                f"--out: {self.root} holds other files; name a new folder, or one of an earlier run"
            )
        for name in (".state", "students", "sources", "feedback"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        state.chmod(0o700)
        self._lock = os.open(state / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise StoreError(f"--out: another `effattn grade` is writing to {self.root}") from None
        try:
            self._begin()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def _begin(self) -> None:
        for folder in (self.root, *(self.root / n for n in (".state", "students", "sources", "feedback"))):
            for left in folder.glob(".*.tmp"):
                left.unlink()
        path = self.root / "assignment.json"
        if path.is_file():
            earlier = Assignment.from_json(json.loads(path.read_text(encoding="utf-8")))
            if earlier.digest() != self.assignment.digest():
                raise StoreError(
                    f"--out: {self.root} holds the results of another assignment or another version of it "
                    f"({earlier.title!r}); name a new folder"
                )
        else:
            write_atomic(path, (json.dumps(self.assignment.to_json(), indent=1) + "\n").encode())

    # ---- seeds -------------------------------------------------------------------------------------------

    def seeds(self) -> list[str]:
        """All seeds of this folder, the newest last."""
        path = self.root / ".state" / "seeds.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        return [str(seed) for seed in found]

    def seed(self, given: str | None = None) -> str:
        """The seed of this run: that of the unfinished one, else a new one; a told seed is never used again.

        Args:
            given: use this one, to reproduce a run.
        """
        seeds = self.seeds()
        if given is None and seeds and not self.told(seeds[-1]):
            return seeds[-1]
        seed = given or secrets.token_hex(16)
        if seed not in seeds:
            text = json.dumps([*seeds, seed]) + "\n"
            write_atomic(self.root / ".state" / "seeds.json", text.encode(), 0o600)
        return seed

    def told(self, seed: str) -> bool:
        return seed in self.run().get("seeds", [])

    def seed_of(self, result: StudentResult) -> str:
        """The seed that reproduces a result; StoreError where it is lost."""
        for seed in self.seeds():
            mine = student_seed(seed, result.student, self.assignment.seed_per_student)
            if commitment(mine) == result.sealed:
                return mine
        raise StoreError(f"the seed of {result.student}'s result is not in {self.root / '.state'}")

    # ---- results -----------------------------------------------------------------------------------------

    def results(self) -> dict[str, StudentResult]:
        """What is known so far, by student. A file that is no result is reported, not overlooked."""
        found = {}
        for path in sorted((self.root / "students").glob("*.json")):
            try:
                result = StudentResult.from_json(json.loads(path.read_text(encoding="utf-8")))
            except ValueError as error:
                raise StoreError(f"{path}: {error}; delete it to grade this student again") from None
            found[result.student] = result
        return found

    def add(self, result: StudentResult, source: str) -> None:
        """Keep a result. The sources come first: a result says that all of a student's files are there."""
        write_atomic(self.root / "sources" / f"{result.student}.py", source.encode())
        text = json.dumps(result.to_json(), indent=1, ensure_ascii=True) + "\n"
        write_atomic(self.root / "students" / f"{result.student}.json", text.encode())

    def run(self) -> dict[str, Any]:
        """``run.json``, or an empty dictionary."""
        path = self.root / "run.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def write(self, name: str, text: str) -> None:
        write_atomic(self.root / name, text.encode())


@contextlib.contextmanager
def reading(root: Path) -> Iterator[Store]:
    """A results folder to read from, without the lock. StoreError where it is none."""
    path = root / "assignment.json"
    if not path.is_file():
        raise StoreError(f"RESULTS: expected a folder made by `effattn grade`, got {root}")
    yield Store(root, Assignment.from_json(json.loads(path.read_text(encoding="utf-8"))))
