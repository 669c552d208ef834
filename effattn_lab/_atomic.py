"""Write a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def write_atomic(path: Path | str, data: bytes, mode: int | None = None) -> None:
    """Write `data` to `path` so that a reader, or a kill at any moment, finds the old file or the new one.

    The bytes go to a temporary file in the same folder and reach the disk before its name is changed. A link is
    followed: the file that it names is replaced, not the link. ``mode`` is the file's; by default that of the file
    that is replaced, or of any new one.

    Raises:
        OSError: the folder is missing or not writable, the disk is full, or `path` is a folder. The old file is
            untouched and no temporary file stays behind.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path}: expected the name of a file, got a folder")
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        try:
            view = memoryview(data)
            while view:  # a write may take fewer bytes than it was given
                view = view[os.write(handle, view) :]
            _set_mode(handle, target, mode)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    sync_folder(target.parent)


def sync_folder(folder: Path | str) -> None:
    """Make new names in `folder` survive a power cut. Systems that can't open a folder do this by themselves."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _set_mode(handle: int, target: Path, mode: int | None) -> None:
    """The temporary file is private: give it the mode that was asked for, or that of an ordinary file."""
    if os.name != "posix":
        return
    if mode is not None:
        os.fchmod(handle, mode)
    elif target.exists():
        os.fchmod(handle, target.stat().st_mode & 0o777)
    else:
        mask = os.umask(0)
        os.umask(mask)
        os.fchmod(handle, 0o666 & ~mask)
