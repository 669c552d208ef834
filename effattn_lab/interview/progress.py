"""What a learner has practised: reviews, the journal that keeps them, and the file that exchanges them.

The journal is only ever appended to. One review is one line of JSON, written by a single ``write`` and flushed to the
disk while the file is locked. A kill can therefore leave at most a torn last line, which the next opening mends.
Where a question stands (when it is due) is not stored: it follows from its reviews, see `schedule`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from effattn_lab._atomic import sync_folder, write_atomic

EXPORT_FORMAT, JOURNAL_FORMAT, VERSION = "effattn-practice", "effattn-practice-journal", 1
JOURNAL = "practice.jsonl"
_HEADER = json.dumps({"format": JOURNAL_FORMAT, "version": VERSION}).encode() + b"\n"
_EARLIEST = datetime(2000, 1, 1, tzinfo=timezone.utc)
_LATEST = datetime(2200, 1, 1, tzinfo=timezone.utc)
_LONGEST_ID = 200


class ProgressError(ValueError):
    """The saved progress, or a file to import, cannot be used or written; the message names the file and why."""


@dataclass(frozen=True)
class Review:
    """One question answered and judged once.

    Attributes:
        id: a UUID in lower case; it makes merging two histories safe.
        question: id of the question, which the bank may have lost since.
        rating: 1 Again, 2 Hard, 3 Good, 4 Easy.
        reviewed_at: UTC, whole seconds.
        points: for each key point, whether it was said.
        seconds: time spent on the question.
    """

    id: str
    question: str
    rating: int
    reviewed_at: datetime
    points: tuple[bool, ...]
    seconds: int

    @classmethod
    def new(
        cls, question: str, rating: int, reviewed_at: datetime, points: Iterable[bool], seconds: float
    ) -> Review:
        """A review with a fresh id. ``reviewed_at`` must be aware; it is kept in UTC, to the second."""
        at = reviewed_at.astimezone(timezone.utc).replace(microsecond=0)
        return cls(str(uuid.uuid4()), question, rating, at, tuple(points), max(0, round(seconds)))

    def to_json(self) -> dict[str, Any]:
        """The review as the exchange format has it."""
        return {
            "id": self.id,
            "question": self.question,
            "rating": self.rating,
            "reviewed_at": self.reviewed_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "points": list(self.points),
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, data: Any) -> Review:
        """A review from its JSON. Unknown keys are ignored.

        Raises:
            ValueError: the message names the field, what was expected and what came.
        """
        if not isinstance(data, dict):
            raise ValueError(f"expected an object, got {_short(data)}")
        identity = _field(data, "id", str)
        try:
            identity = str(uuid.UUID(identity))
        except ValueError:
            raise ValueError(f"id: expected a UUID, got {_short(identity)}") from None
        question = _field(data, "question", str)
        if not 0 < len(question) <= _LONGEST_ID:
            raise ValueError(f"question: expected 1 to {_LONGEST_ID} characters, got {len(question)}")
        rating = _field(data, "rating", int)
        if rating not in (1, 2, 3, 4):
            raise ValueError(f"rating: expected 1, 2, 3 or 4, got {rating}")
        points = _field(data, "points", list)
        if not all(isinstance(point, bool) for point in points):
            raise ValueError(f"points: expected only true and false, got {_short(points)}")
        seconds = _field(data, "seconds", (int, float))
        if not (math.isfinite(seconds) and 0 <= seconds < 1e9):
            raise ValueError(f"seconds: expected a number from 0 to 1e9, got {seconds}")
        at = _time(_field(data, "reviewed_at", str))
        return cls(identity, question, rating, at, tuple(points), round(seconds))


def data_folder() -> Path:
    """The learner's own folder: ``EFFATTN_DATA``, else where the system keeps a user's data. Not created here."""
    if chosen := os.environ.get("EFFATTN_DATA"):
        return Path(chosen).expanduser()
    import platformdirs

    return platformdirs.user_data_path("effattn-lab", appauthor=False)


class Journal:
    """The reviews of one learner on disk.

    Args:
        path: the file; default ``practice.jsonl`` in `data_folder`. It and its folder are made at the first review.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = data_folder() / JOURNAL if path is None else Path(path)
        #: Lines that could not be understood at the last `read`; they stay in the file as they are.
        self.damaged = 0

    def read(self) -> list[Review]:
        """All reviews, in the order in which they were written. A torn last line is mended.

        Raises:
            ProgressError: the file is of a newer format, is something else, or cannot be read.
        """
        if not self.path.exists():
            self.damaged = 0
            return []
        with self._locked(os.O_RDWR) as handle:
            return self._load(handle)

    def prepare(self) -> None:
        """Make the file if there is none, so that a session which couldn't be saved fails now, not at its end.

        Raises:
            ProgressError: as `append` would.
        """
        with self._locked(os.O_RDWR | os.O_CREAT) as handle:
            self._load(handle)

    def append(self, review: Review) -> None:
        """Add one review; it is on the disk when this returns. Raises ProgressError as `read` and when it can't."""
        with self._locked(os.O_RDWR | os.O_CREAT) as handle:
            self._load(handle)
            self._write(handle, [review])

    def merge(self, reviews: Iterable[Review]) -> int:
        """Add the reviews whose ids are new; returns how many. Doing it twice changes nothing. Errors as `append`."""
        with self._locked(os.O_RDWR | os.O_CREAT) as handle:
            seen = {review.id for review in self._load(handle)}
            new = [review for review in unique(reviews) if review.id not in seen]
            if new:
                self._write(handle, new)
            return len(new)

    @contextlib.contextmanager
    def _locked(self, flags: int) -> Iterator[int]:
        """The file, open and ours alone. An OSError becomes a ProgressError that names the file."""
        try:
            if flags & os.O_CREAT:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, flags | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
            try:
                _lock(handle)
                yield handle
            finally:
                os.close(handle)  # the lock goes with it
        except FileExistsError:
            raise ProgressError(
                f"{self.path}: progress cannot be kept here: {self.path.parent} is no folder"
            ) from None
        except OSError as error:
            raise ProgressError(f"{self.path}: progress cannot be kept here: {error.strerror}") from None

    def _load(self, handle: int) -> list[Review]:
        os.lseek(handle, 0, os.SEEK_SET)
        with os.fdopen(os.dup(handle), "rb") as file:
            data = file.read()
        lines = data.split(b"\n")
        torn = lines.pop()  # what follows the last line end: nothing, unless a write was cut short
        self._check_header(lines[0] if lines else None, torn)
        if torn:
            self._mend(handle, len(data), torn, bool(lines))
            if lines and _parsed(torn):
                lines.append(torn)
        parsed = [_parsed(line) for line in lines[1:]]
        self.damaged = parsed.count(None)
        return [review for review in parsed if review]

    def _check_header(self, first: bytes | None, torn: bytes) -> None:
        if first is None:
            if not _HEADER.startswith(torn):  # not even the beginning of one of our files
                raise ProgressError(
                    f"{self.path}: expected saved progress, found something else; left as it is"
                )
            return
        try:
            header = json.loads(first)
            known = header["format"] == JOURNAL_FORMAT
            version = header["version"]
        except (ValueError, TypeError, KeyError):
            known, version = False, None
        if not known or not isinstance(version, int):
            raise ProgressError(f"{self.path}: expected saved progress, found something else; left as it is")
        _check_version(version, str(self.path))

    def _mend(self, handle: int, size: int, torn: bytes, inside: bool) -> None:
        """Complete a last line that lacks only its end; take any other rest of a write away."""
        if inside and _parsed(torn):
            os.write(handle, b"\n")
        else:
            os.ftruncate(handle, size - len(torn))
        os.fsync(handle)

    def _write(self, handle: int, reviews: list[Review]) -> None:
        size = os.fstat(handle).st_size
        lines = [json.dumps(review.to_json(), separators=(",", ":")).encode() + b"\n" for review in reviews]
        data = (b"" if size else _HEADER) + b"".join(lines)
        written = os.write(handle, data)
        if written != len(data):
            os.ftruncate(handle, size)
            raise ProgressError(
                f"{self.path}: expected to write {len(data)} bytes, only {written} fitted; nothing was saved"
            )
        os.fsync(handle)
        if not size:
            sync_folder(self.path.parent)


def export_reviews(path: Path | str, reviews: Iterable[Review]) -> int:
    """Write the exchange file, which ``--import`` and the book's practice page read; returns how many reviews.

    Reviews are sorted by time and id, so equal histories give equal files.

    Raises:
        ProgressError: it can't be written, or a file of another kind has this name; what was there stays as it was.
    """
    chosen = sorted(unique(reviews), key=lambda review: (review.reviewed_at, review.id))
    head = json.dumps({"format": EXPORT_FORMAT, "version": VERSION})[:-1]
    lines = ",\n".join(json.dumps(review.to_json()) for review in chosen)
    if not _replaceable(Path(path)):
        raise ProgressError(f"{path}: is there already and no exported progress; choose another name")
    try:
        write_atomic(path, f'{head}, "reviews": [\n{lines}\n]}}\n'.encode())
    except OSError as error:
        raise ProgressError(f"{path}: cannot be written: {error.strerror or error}") from None
    return len(chosen)


def _replaceable(path: Path) -> bool:
    """Whether an export may take this name: nothing is lost that is not progress, exported earlier."""
    if not path.is_file():
        return True  # nothing there, or writing will say what is wrong
    try:
        with path.open("rb") as file:
            start = file.read(200)
    except OSError:
        return True
    exported = rb'\s*\{\s*"format"\s*:\s*"%b"' % EXPORT_FORMAT.encode()
    return not start.strip() or re.match(exported, start) is not None


def import_reviews(path: Path | str) -> list[Review]:
    """Reviews of an exchange file, every one of them checked.

    Raises:
        ProgressError: the file can't be read, is something else, is newer, or one review is wrong.
    """
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ProgressError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ProgressError(f"{path}: expected a JSON file made by --export, found something else") from None
    if not isinstance(data, dict) or data.get("format") != EXPORT_FORMAT:
        raise ProgressError(f"{path}: expected a file with format {EXPORT_FORMAT!r}, found something else")
    version = data.get("version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise ProgressError(f"{path}: version: expected {VERSION}, got {_short(version)}")
    _check_version(version, str(path))
    if not isinstance(data.get("reviews"), list):
        raise ProgressError(f"{path}: reviews: expected a list, got {_short(data.get('reviews'))}")
    found = []
    for number, entry in enumerate(data["reviews"]):
        try:
            found.append(Review.from_json(entry))
        except ValueError as error:
            raise ProgressError(f"{path}: reviews[{number}]: {error}; nothing was imported") from None
    return found


def unique(reviews: Iterable[Review]) -> list[Review]:
    """`reviews` without repeated ids; the first of each stays."""
    kept: dict[str, Review] = {}
    for review in reviews:
        kept.setdefault(review.id, review)
    return list(kept.values())


def _check_version(version: int, where: str) -> None:
    if version > VERSION:
        raise ProgressError(
            f"{where}: format {version}, and this effattn knows format {VERSION}: a newer one wrote it. "
            "Update effattn; the file is left as it is"
        )
    if version < 1:
        raise ProgressError(f"{where}: version: expected {VERSION}, got {version}")


def _parsed(line: bytes) -> Review | None:
    try:
        return Review.from_json(json.loads(line))
    except (ValueError, RecursionError):
        return None


def _field(data: dict[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    if name not in data:
        raise ValueError(f"{name}: missing")
    value = data[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        words = {str: "text", int: "a whole number", float: "a number", list: "a list"}
        raise ValueError(f"{name}: expected {words[kinds[-1]]}, got {_short(value)}")
    return value


def _time(text: str) -> datetime:
    try:
        # Python 3.10 does not know the letter Z.
        at = datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith(("Z", "z")) else text)
        if at.tzinfo is None:
            raise ValueError
        at = at.astimezone(timezone.utc).replace(microsecond=0)
    except (ValueError, OverflowError):
        raise ValueError(
            f"reviewed_at: expected a time like 2026-11-28T10:00:00Z, got {_short(text)}"
        ) from None
    if not _EARLIEST <= at < _LATEST:
        raise ValueError(
            f"reviewed_at: expected a time from 2000 to {(_LATEST - timedelta(1)).year}, got {text}"
        )
    return at


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _lock(handle: int) -> None:
    """Wait until no other process has the file; the system lets go of it when the process ends, however it ends."""
    if os.name == "posix":
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)
    else:
        import msvcrt

        # Far beyond the data, since Windows would keep others from reading the locked bytes.
        os.lseek(handle, 1 << 40, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]
