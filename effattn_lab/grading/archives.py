"""Read a folder or a zip archive that nobody vouches for, into memory; nothing is ever unpacked to disk.

Every entry comes back as a `Found`: a path that stays inside, with its bytes, or a sentence that says why it is not
read. Sizes are counted while reading; what an archive says of itself is not believed.
"""

from __future__ import annotations

import io
import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from effattn_lab.grading.text import visible

#: Entries of archives that some tools add.
_CLUTTER = {"__MACOSX", ".ipynb_checkpoints", "__pycache__"}
_CHUNK = 1 << 16
_MAX_PATH = 1_000  # characters
_MAX_NAME = 255
_MAX_LEVELS = 8


class ArchiveError(ValueError):
    """The archive as a whole cannot be read; the message is one sentence."""


@dataclass(frozen=True)
class Limits:
    """How much is read of one archive.

    Args:
        entries: number of entries, folders included.
        entry_bytes: uncompressed bytes of one entry.
        total_bytes: uncompressed bytes of all entries.
        ratio: uncompressed by compressed bytes, for entries of over a megabyte. Deflate reaches 1032; notebooks
            full of repeated output stay under 50.
    """

    entries: int = 1_000
    entry_bytes: int = 20_000_000
    total_bytes: int = 100_000_000
    ratio: int = 200


#: The archive of a whole class, and what a student may hand in.
CLASS = Limits(entries=20_000, entry_bytes=50_000_000, total_bytes=4_000_000_000)
STUDENT = Limits()


@dataclass(frozen=True)
class Found:
    """One entry.

    Args:
        parts: its path; where the name was refused, what may be shown of its beginning.
        data: its bytes; None where it was not read.
        modified: the time that the archive or the file system has for it.
        problem: why it was not read, one clause, where that is worth saying.
        folder: it is a folder.
    """

    parts: tuple[str, ...]
    data: bytes | None = None
    modified: datetime | None = None
    problem: str = ""
    folder: bool = False


def safe_parts(name: str) -> tuple[str, ...]:
    """The parts of an entry's path. `ArchiveError` where it could leave the folder or deceive a reader."""
    shown = f"the entry “{visible(name, 80)}”"
    if not name or len(name) > _MAX_PATH:
        raise ArchiveError(f"{shown} has a name of {len(name)} characters; 1 to {_MAX_PATH} are accepted")
    if visible(name, _MAX_PATH) != name:
        raise ArchiveError(f"{shown} has invisible characters in its name")
    if "\\" in name or name.startswith("/") or (len(name) > 1 and name[1] == ":"):
        raise ArchiveError(f"{shown} has a path that is not relative")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise ArchiveError(f"{shown} has a path that leaves its folder")
    if not parts or len(parts) > _MAX_LEVELS or any(len(part.encode()) > _MAX_NAME for part in parts):
        raise ArchiveError(f"{shown} is nested over {_MAX_LEVELS} deep or has a part over {_MAX_NAME} bytes")
    return parts


# ---- zip archives ------------------------------------------------------------------------------------------


class _Careful:
    """A file that refuses to read a lot at once. A zip's directory is read in one go, and its size is a claim."""

    def __init__(self, file: BinaryIO, most: int) -> None:
        self._file, self._most = file, most
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        enough = self._most + 1
        data = self._file.read(enough if size is None or size < 0 else min(size, enough))
        if len(data) > self._most:
            raise ArchiveError("the archive's directory is too large")
        return data


def read_zip(file: BinaryIO, wanted: Callable[[tuple[str, ...]], bool], limits: Limits) -> Iterator[Found]:
    """The entries of a zip archive, one at a time, in the order of their names.

    Args:
        file: the archive, open for reading in binary.
        wanted: which entries to read; of the others only the path comes back.
        limits: `STUDENT` or `CLASS`.

    Raises:
        ArchiveError: it is no zip archive or has too many entries, or, in the middle, too many bytes.
    """
    try:
        # An entry of the directory takes 46 bytes and its name.
        archive = zipfile.ZipFile(_Careful(file, max(_CHUNK * 4, limits.entries * 256)))
        infos = archive.infolist()
    except ArchiveError:
        raise
    except Exception as error:  # hostile bytes: zipfile raises a dozen types
        raise ArchiveError(f"not a readable zip archive ({_reason(error)})") from None
    if len(infos) > limits.entries:
        raise ArchiveError(f"the archive has {len(infos)} entries; at most {limits.entries} are accepted")
    total = 0
    for info in sorted(infos, key=lambda i: (i.filename, i.header_offset)):
        try:
            parts = safe_parts(_name(info))
        except ArchiveError as error:
            yield Found(_beginning(_name(info)), problem=str(error))
            continue
        if _clutter(parts):
            continue
        if info.is_dir():
            yield Found(parts, folder=True)
            continue
        found = _entry(archive, info, parts, wanted, limits)
        total += len(found.data or b"")
        if total > limits.total_bytes:
            raise ArchiveError(f"the archive holds more than {limits.total_bytes} bytes")
        yield found


def _beginning(name: str) -> tuple[str, ...]:
    return (visible(name.split("/")[0] or name or "an entry without a name", 100),)


def _name(info: zipfile.ZipInfo) -> str:
    """The entry's name. Many tools write UTF-8 without saying so; zipfile then took it for code page 437."""
    raw = info.orig_filename  # `filename` is cut at a NUL
    if info.flag_bits & 0x800:
        return raw
    try:
        return raw.encode("cp437").decode("utf-8")
    except UnicodeError:
        return raw


def _entry(
    archive: zipfile.ZipFile,
    info: zipfile.ZipInfo,
    parts: tuple[str, ...],
    wanted: Callable[[tuple[str, ...]], bool],
    limits: Limits,
) -> Found:
    shown = visible("/".join(parts), 80)
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        return Found(parts, problem=f"“{shown}” is a link or a special file; it was not followed")
    if not wanted(parts):
        return Found(parts)
    if info.flag_bits & 1:
        return Found(parts, problem=f"“{shown}” is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # The others may ask for gigabytes of memory before the first byte comes out.
        return Found(parts, problem=f"“{shown}” is compressed in a way that is not accepted (deflate is)")
    data = bytearray()
    most = limits.entry_bytes
    try:
        with archive.open(info) as stream:
            while chunk := stream.read(_CHUNK):
                data += chunk
                if len(data) > most:
                    return Found(parts, problem=f"“{shown}” unpacks to more than {most} bytes")
                if len(data) > 1_000_000 and len(data) > limits.ratio * max(info.compress_size, 1):
                    return Found(parts, problem=f"“{shown}” unpacks to over {limits.ratio} times its size")
    except Exception as error:  # see read_zip
        return Found(parts, problem=f"“{shown}” cannot be unpacked ({_reason(error)})")
    return Found(parts, bytes(data), _zip_time(info))


def _zip_time(info: zipfile.ZipInfo) -> datetime | None:
    """Zip archives keep local time without a zone, and 1980 where they know nothing."""
    try:
        return None if info.date_time[0] <= 1980 else datetime(*info.date_time).astimezone()
    except (ValueError, OverflowError, OSError):
        return None


def _clutter(parts: tuple[str, ...]) -> bool:
    return any(part in _CLUTTER for part in parts) or parts[-1].startswith(".")


def _reason(error: Exception) -> str:
    return visible(str(error).splitlines()[0], 80) if str(error) else type(error).__name__


# ---- folders -----------------------------------------------------------------------------------------------


def read_folder(
    folder: Path, wanted: Callable[[tuple[str, ...]], bool], limits: Limits = CLASS
) -> Iterator[Found]:
    """The files below ``folder``, in the order of their names. No symbolic link is followed, at any level; only
    regular files are opened. `ArchiveError` where there are too many."""
    count = [0]
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield from _walk(top, (), wanted, limits, count)
    finally:
        os.close(top)


def _walk(
    descriptor: int,
    above: tuple[str, ...],
    wanted: Callable[[tuple[str, ...]], bool],
    limits: Limits,
    count: list[int],
) -> Iterator[Found]:
    for name in sorted(os.listdir(descriptor)):
        count[0] += 1
        if count[0] > limits.entries:
            raise ArchiveError(f"the folder has more than {limits.entries} entries")
        if name in _CLUTTER or name.startswith("."):
            continue
        try:
            safe = safe_parts(os.fsencode(name).decode("utf-8"))
        except UnicodeDecodeError:
            shown = visible(os.fsencode(name).decode("utf-8", "replace"), 80)
            yield Found(above or (shown,), problem=f"“{shown}” has a name that is not UTF-8")
            continue
        except ArchiveError as error:
            yield Found(above or _beginning(name), problem=str(error))
            continue
        parts = (*above, *safe)
        shown = visible("/".join(parts), 80)
        mode = os.lstat(name, dir_fd=descriptor).st_mode
        if stat.S_ISDIR(mode):
            if len(parts) >= _MAX_LEVELS:
                yield Found(parts, problem=f"“{shown}” is nested over {_MAX_LEVELS} deep")
                continue
            try:
                below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            except OSError as error:
                yield Found(parts, problem=f"“{shown}” cannot be opened ({error.strerror})")
                continue
            yield Found(parts, folder=True)
            try:
                yield from _walk(below, parts, wanted, limits, count)
            finally:
                os.close(below)
        elif not stat.S_ISREG(mode):
            yield Found(parts, problem=f"“{shown}” is a link or a special file; it was not followed")
        elif wanted(parts):
            yield _file(descriptor, name, parts, shown, limits)
        else:
            yield Found(parts)


def _file(descriptor: int, name: str, parts: tuple[str, ...], shown: str, limits: Limits) -> Found:
    try:
        # O_NONBLOCK: should a pipe stand here by now, opening it must not wait.
        opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=descriptor)
        with open(opened, "rb") as file:
            status = os.fstat(opened)
            if not stat.S_ISREG(status.st_mode):
                return Found(parts, problem=f"“{shown}” is not a regular file")
            data = file.read(limits.entry_bytes + 1)
    except OSError as error:
        return Found(parts, problem=f"“{shown}” cannot be read ({error.strerror})")
    if len(data) > limits.entry_bytes:
        return Found(parts, problem=f"“{shown}” has more than {limits.entry_bytes} bytes")
    return Found(parts, data, datetime.fromtimestamp(status.st_mtime).astimezone())


def unpack(data: bytes, wanted: Callable[[tuple[str, ...]], bool], depth: int = 2) -> Iterator[Found]:
    """The entries of an archive that a student handed in, and of archives inside it, ``depth`` levels in all.

    A problem stands as a `Found` without data; this never raises `ArchiveError`.
    """
    budget = STUDENT.total_bytes
    queue: list[tuple[tuple[str, ...], bytes, int]] = [((), data, depth)]
    while queue:
        above, archive, left = queue.pop(0)
        try:
            for found in read_zip(io.BytesIO(archive), lambda p: wanted(p) or is_zip(p), STUDENT):
                budget -= len(found.data or b"")
                if budget < 0:
                    raise ArchiveError(f"the archive holds more than {STUDENT.total_bytes} bytes")
                parts = (*above, *found.parts)
                if found.data is None or not is_zip(found.parts):
                    yield Found(parts, found.data, found.modified, found.problem)
                elif left > 1:
                    queue.append((parts, found.data, left - 1))
                else:
                    shown = visible("/".join(parts), 80)
                    yield Found(parts, problem=f"“{shown}” is an archive nested too deep")
        except ArchiveError as error:
            yield Found(above, problem=str(error))


def is_zip(parts: tuple[str, ...]) -> bool:
    """Does the name say that it is a zip archive?"""
    return bool(parts) and parts[-1].lower().endswith(".zip")
