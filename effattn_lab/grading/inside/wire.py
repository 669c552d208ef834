"""Frames on the socket between the grader and the sandbox, and arrays inside frames.

A frame is a length, a JSON header and some blobs whose lengths stand in the header. What comes out of the sandbox
is hostile: every length is checked before anything is read, JSON is the only notation, arrays are ``.npy`` without
pickle whose declared size has to be the size that came.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

HEADER_BYTES = 256 * 1024
#: What the grader sends may be longer: a notebook's cells, with every foreign letter as six.
REQUEST_BYTES = 16 * 2**20
#: One array that comes back, and all arrays of one frame. The grader keeps some dozen of them.
ARRAY_BYTES, FRAME_BYTES = 16 * 2**20, 32 * 2**20
BLOBS = 16

#: NumPy has no bfloat16: it travels as int16.
_AS = {"bfloat16": "int16"}
DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip


class Broken(Exception):
    """The other side sent something that is no frame, closed, or was too slow. The message says which."""


def _broken(error: OSError) -> Broken:
    """The same words whether the end of the other side shows in reading or in writing: that is a race."""
    if isinstance(error, (BrokenPipeError, ConnectionResetError)):
        return Broken("closed")
    return Broken("too slow" if isinstance(error, TimeoutError) else str(error))


@dataclass(frozen=True)
class Frame:
    """A header and its blobs; ``fds`` are file descriptors that came along."""

    header: dict[str, Any]
    blobs: list[bytes] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)


def send(
    sock: socket.socket, header: Mapping[str, Any], blobs: Sequence[bytes] = (), fds: Sequence[int] = ()
) -> None:
    """Write one frame. ``Broken`` where the other side is gone ("closed") or does not read ("too slow")."""
    text = json.dumps({**header, "blobs": [len(b) for b in blobs]}).encode()
    head = struct.pack("<I", len(text)) + text
    try:
        if fds:
            sent = socket.send_fds(sock, [head], list(fds))
            sock.sendall(head[sent:])
        else:
            sock.sendall(head)
        for blob in blobs:
            sock.sendall(blob)
    except OSError as error:
        raise _broken(error) from None


def receive(
    sock: socket.socket,
    seconds: float | None = None,
    max_fds: int = 0,
    most: int = HEADER_BYTES,
    patient: Callable[[], bool] | None = None,
) -> Frame:
    """Read one frame within ``seconds`` of wall time (None: for ever). ``Broken`` says what is wrong with it.

    When the time is over ``patient`` is asked: while it says yes, the time begins again.
    """
    reader = _Reader(sock, seconds, patient)
    first, fds = reader.first(4, max_fds)
    size = struct.unpack("<I", first)[0]
    if size > most:
        raise Broken("the header is too long")
    try:
        header = json.loads(reader.exactly(size))
    except (ValueError, RecursionError):
        raise Broken("the header is not JSON") from None
    lengths = header.pop("blobs", []) if isinstance(header, dict) else None
    if (
        not isinstance(lengths, list)
        or len(lengths) > BLOBS
        or not all(type(n) is int and 0 <= n <= ARRAY_BYTES for n in lengths)
        or sum(lengths) > FRAME_BYTES
    ):
        raise Broken("the header has no acceptable lengths")
    return Frame(header, [reader.exactly(n) for n in lengths], fds)


class _Reader:
    def __init__(
        self, sock: socket.socket, seconds: float | None, patient: Callable[[], bool] | None
    ) -> None:
        self.sock, self.seconds, self.patient = sock, seconds, patient
        self.end = None if seconds is None else time.monotonic() + seconds

    def _wait(self) -> None:
        """Until something can be read, or the time is over."""
        while self.end is not None and self.seconds is not None:
            left = self.end - time.monotonic()
            if left > 0:
                if select.select([self.sock], [], [], left)[0]:
                    break
            elif self.patient is None or not self.patient():
                raise Broken("too slow")
            else:
                self.end += self.seconds
        self.sock.settimeout(None if self.end is None else max(0.001, self.end - time.monotonic()))

    def first(self, count: int, max_fds: int) -> tuple[bytes, list[int]]:
        if not max_fds:
            return self.exactly(count), []
        self._wait()
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, count, max_fds)
        except OSError as error:
            raise _broken(error) from None
        if not data:
            raise Broken("closed")
        return data + self.exactly(count - len(data)), list(fds)

    def exactly(self, count: int) -> bytes:
        parts = []
        while count:
            self._wait()
            try:
                part = self.sock.recv(min(count, 1 << 20))
            except OSError as error:
                raise _broken(error) from None
            if not part:
                raise Broken("closed")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


# ---- arrays ------------------------------------------------------------------------------------------------


def to_numpy(tensor: Any) -> tuple[str, np.ndarray[Any, Any]]:
    """(name of the dtype, array that can travel) of a torch tensor. ValueError for a dtype that cannot."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {name}")
    if name in _AS:
        import torch

        tensor = tensor.view(torch.int16)
    return name, tensor.numpy()


def to_torch(name: str, array: np.ndarray[Any, Any]) -> Any:
    """The reverse of `to_numpy`; shares the array's memory."""
    import torch

    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if name == "bfloat16" else tensor


def npy(array: np.ndarray[Any, Any]) -> bytes:
    """An array as the bytes of an ``.npy`` file."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
    return out.getvalue()


def array_of(data: bytes, dtype: str) -> np.ndarray[Any, Any]:
    """The array in untrusted ``.npy`` bytes. `Broken` unless it is plain, of ``dtype`` and as large as it says."""
    if dtype not in DTYPES:
        raise Broken("an array has a dtype that cannot travel")
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, found = read[version](file)
    except Exception:  # NumPy's parser raises much more than it says
        raise Broken("an array is not in .npy format") from None
    rest = data[file.tell() :]
    if found != np.dtype(_AS.get(dtype, dtype)) or found.hasobject:
        raise Broken("an array is not of the dtype that it claims")
    if len(shape) > 16 or any(n < 0 or n > ARRAY_BYTES for n in shape):
        raise Broken("an array has an impossible shape")
    if math.prod(shape) * found.itemsize != len(rest):
        raise Broken("an array has another size than it claims")
    flat = np.frombuffer(rest, dtype=found)
    try:
        return flat.reshape(shape[::-1]).T.copy() if fortran else flat.reshape(shape).copy()
    except ValueError:  # no entries, and yet too many
        raise Broken("an array has an impossible shape") from None


# ---- arguments, in memory that both sides see ----------------------------------------------------------------


@dataclass
class Arguments:
    """Arguments of one call, their arrays in a memory file that the callee gets as well.

    So the grader itself can see afterwards whether an argument was changed, without asking anybody.
    """

    header: list[dict[str, Any]]
    fd: int
    before: bytes

    @staticmethod
    def of(kwargs: Mapping[str, Any]) -> Arguments:
        """Write the arguments of a case (tensors, numbers, bools, strings, None) to a new memory file."""
        import torch

        header: list[dict[str, Any]] = []
        parts: list[bytes] = []
        offset = 0
        for name, value in kwargs.items():
            if isinstance(value, torch.Tensor):
                dtype, array = to_numpy(value.detach().contiguous())
                data = array.tobytes()
                header.append({"name": name, "dtype": dtype, "shape": list(array.shape), "offset": offset})
                data += b"\0" * (-len(data) % 64)
                parts.append(data)
                offset += len(data)
            else:
                header.append({"name": name, "value": value})
        before = b"".join(parts) or b"\0" * 64
        fd = os.memfd_create("arguments", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(before)
        _seal(fd)
        return Arguments(header, fd, before)

    def changed(self) -> list[str]:
        """Names of the arguments whose bytes differ from what was sent."""
        after = os.pread(self.fd, len(self.before), 0)
        names = []
        arrays = [h for h in self.header if "offset" in h]
        for here, following in zip(arrays, [*arrays[1:], {"offset": len(self.before)}]):
            part = slice(here["offset"], following["offset"])
            if after[part] != self.before[part]:
                names.append(here["name"])
        return names

    def close(self) -> None:
        os.close(self.fd)


def _seal(fd: int) -> None:
    """Nobody may change the size: a shrunken file would kill its reader with SIGBUS."""
    import fcntl

    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)


def arguments_from(header: Sequence[Mapping[str, Any]], fd: int) -> dict[str, Any]:
    """On the callee's side: the arguments, tensors in the shared memory of ``fd``."""
    memory = mmap.mmap(fd, 0)
    values: dict[str, Any] = {}
    for entry in header:
        if "dtype" not in entry:
            values[entry["name"]] = entry["value"]
            continue
        kind = np.dtype(_AS.get(entry["dtype"], entry["dtype"]))
        count = math.prod(entry["shape"])
        flat = np.frombuffer(memory, dtype=kind, count=count, offset=entry["offset"])
        values[entry["name"]] = to_torch(entry["dtype"], flat.reshape(entry["shape"]))
    return values
