"""What comes out of the sandbox is hostile: only whole frames and plain arrays get through."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import struct
import threading
import time

import numpy as np
import pytest
import torch

from effattn_lab.grading.inside import wire


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def frame(header, *blobs):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + b"".join(blobs)


def test_there_and_back(pair):
    wire.send(pair[0], {"op": "x", "n": 1}, [b"abc", b""])
    got = wire.receive(pair[1], 1)
    assert (got.header, got.blobs, got.fds) == ({"op": "x", "n": 1}, [b"abc", b""], [])


def test_a_descriptor_travels(pair):
    arguments = wire.Arguments.of({"q": torch.arange(6.0).reshape(2, 3), "causal": True, "scale": None})
    wire.send(pair[0], {"arguments": arguments.header}, fds=[arguments.fd])
    got = wire.receive(pair[1], 1, max_fds=1)
    values = wire.arguments_from(got.header["arguments"], got.fds[0])
    assert list(values) == ["q", "causal", "scale"]
    assert torch.equal(values["q"], torch.arange(6.0).reshape(2, 3))
    assert (values["causal"], values["scale"]) == (True, None)
    assert arguments.changed() == []
    values["q"][1, 2] = -1.0
    assert arguments.changed() == ["q"]
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(got.fds[0], 0)  # a shrunken file would end the grader with SIGBUS
    os.close(got.fds[0])
    arguments.close()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "closed"),
        (b"\x01\x00", "closed"),
        (struct.pack("<I", 2**31), "too long"),
        (frame(b"{"), "not JSON"),
        (frame(b"[" * 100_000), "not JSON"),
        (frame(b"\xff\xfe"), "not JSON"),
        (frame([1]), "lengths"),
        (frame({"blobs": 3}), "lengths"),
        (frame({"blobs": [-1]}), "lengths"),
        (frame({"blobs": [True]}), "lengths"),
        (frame({"blobs": [1.0]}), "lengths"),
        (frame({"blobs": [10**18]}), "lengths"),
        (frame({"blobs": [0] * 100}), "lengths"),
        (frame({"blobs": [wire.ARRAY_BYTES] * 3}), "lengths"),
        (frame({"blobs": [5]}, b"abc"), "closed"),
    ],
    ids=["nothing", "half a length", "huge header", "no JSON", "deep JSON", "no text", "a list", "no list", "below 0",
         "a bool", "a float", "huge", "many", "too much", "cut off"],
)  # fmt: skip
def test_refused(pair, data, reason):
    pair[0].sendall(data)
    pair[0].close()
    with pytest.raises(wire.Broken, match=reason):
        wire.receive(pair[1], 5)


def test_a_trickle_ends_in_time(pair):
    """A byte now and then does not put the deadline off."""
    stop = threading.Event()

    def drip():
        pair[0].sendall(struct.pack("<I", 1000))
        while not stop.wait(0.05):
            pair[0].sendall(b" ")

    thread = threading.Thread(target=drip)
    thread.start()
    begun = time.monotonic()
    with pytest.raises(wire.Broken, match="too slow"):
        wire.receive(pair[1], 0.5)
    assert time.monotonic() - begun < 2
    stop.set()
    thread.join()


@pytest.mark.parametrize("with_fd", [False, True])
def test_a_closed_line_has_one_name_whenever_it_is_closed(pair, with_fd):
    """Before the request, before it is read, or after it: which of them it was, is a race that no test may see."""
    ours, theirs = pair
    fds = [ours.fileno()] if with_fd else []
    wire.send(ours, {"op": "x"}, fds=fds)
    theirs.close()  # with the request unread: reading gives ECONNRESET
    with pytest.raises(wire.Broken, match=r"^closed$"):
        wire.receive(ours, 1, max_fds=len(fds))
    with pytest.raises(wire.Broken, match=r"^closed$"):  # EPIPE
        wire.send(ours, {"op": "x"}, fds=fds)


def test_nobody_reads(pair):
    pair[0].settimeout(0.2)
    with pytest.raises(wire.Broken, match=r"^too slow$"):
        wire.send(pair[0], {"op": "x"}, [bytes(16 * 2**20)])


def test_patience_is_asked_when_the_time_is_over(pair):
    """While it says yes the time begins again; a frame that comes meanwhile is read."""
    asked = []

    def patient():
        asked.append(time.monotonic())
        if len(asked) == 3:
            wire.send(pair[0], {"late": True})
        return len(asked) < 5

    assert wire.receive(pair[1], 0.1, patient=patient).header == {"late": True}
    assert len(asked) == 3
    with pytest.raises(wire.Broken, match="too slow"):
        wire.receive(pair[1], 0.1, patient=patient)
    assert len(asked) == 5


@pytest.mark.parametrize("dtype", wire.DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 3, 5)], ids=str)
def test_arrays(dtype, shape):
    tensor = torch.ones(shape).to(getattr(torch, dtype))
    name, array = wire.to_numpy(tensor)
    assert name == dtype
    back = wire.to_torch(dtype, wire.array_of(wire.npy(array), dtype))
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)


def test_fortran_order_keeps_its_values():
    array = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    assert b"'fortran_order': True" in out.getvalue()
    assert (wire.array_of(out.getvalue(), "float32") == array).all()


def npy(descr, shape, body=b"", order=False):
    head = f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    head += b" " * (-(10 + len(head) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + body


@pytest.mark.parametrize(
    ("data", "dtype", "reason"),
    [
        (b"", "float32", "not in .npy"),
        (b"PK\x03\x04" + b"0" * 100, "float32", "not in .npy"),
        (pickle.dumps([1]), "float32", "not in .npy"),
        (npy("|O", "(1,)", pickle.dumps([1])), "float32", "dtype that it claims"),
        (npy("<f8", "(1,)", b"0" * 8), "float32", "dtype that it claims"),
        (npy("<f4", "(1,)", b"0" * 4), "complex64", "cannot travel"),
        (npy("<f4", "(2,)", b"0" * 4), "float32", "another size"),
        (npy("<f4", "(1000000, 1000000)"), "float32", "another size"),
        (npy("<f4", "(-1,)"), "float32", "impossible|not in .npy"),
        (npy("<f4", "(10000000000000000000000,)"), "float32", "impossible|not in .npy"),
        (npy("<f4", "__import__('os').abort()"), "float32", "not in .npy"),
        (npy("<f4", "(" * 500 + ")" * 500), "float32", "not in .npy"),
    ],
    ids=["nothing", "zip", "pickle", "objects", "other dtype", "complex", "short", "huge", "negative", "overflow",
         "code", "deep"],
)  # fmt: skip
def test_arrays_refused(data, dtype, reason):
    with pytest.raises(wire.Broken, match=reason):
        wire.array_of(data, dtype)
