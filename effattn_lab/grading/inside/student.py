"""A process that holds one student's code: loads the cells, answers calls. Forked by `zygote`, used for one exercise.

Everything it answers is a claim. The grader believes bytes that it compares itself.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any

from effattn_lab.grading.inside import wire
from effattn_lab.grading.inside.cells import run_cells, told


def serve(sock: socket.socket) -> None:
    """Answer requests until the grader closes the socket."""
    state: dict[str, Any] = {}
    operations = {"load": _load, "kernel": _kernel, "call": _call, "launches": _launches}
    while True:
        try:
            frame = wire.receive(sock, max_fds=1, most=wire.REQUEST_BYTES)
        except wire.Broken:
            return
        try:
            header, blobs = operations[frame.header["op"]](state, frame)
        except BaseException as error:  # SystemExit too: a student's code may raise anything
            header, blobs = {"error": told(error), "where": ""}, []
        for fd in frame.fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        wire.send(sock, {**header, "nonce": frame.header.get("nonce")}, blobs)


Answer = tuple[dict[str, Any], list[bytes]]


def _load(state: dict[str, Any], frame: wire.Frame) -> Answer:
    """Run the cells and look for the function."""
    from effattn_lab.exercises.source import blanks

    names, errors = run_cells([(int(n), str(s)) for n, s in frame.header["cells"]], frame.header["function"])
    fn: Any = names.get(frame.header["function"])
    state.update(fn=fn, refuse=frame.header["refuse"])
    found = callable(fn)
    return {
        "found": found,
        "blanks": len(blanks(fn)) if found else 0,
        "errors": [[e.cell, e.message] for e in errors[:20]],
    }, []


def _kernel(state: dict[str, Any], frame: wire.Frame) -> Answer:
    """Take the kernel's text and put our launcher beside it; no cell is run."""
    from effattn_lab.grading.inside.kernel import Refused, take_kernel

    try:
        text = take_kernel([(int(n), str(s)) for n, s in frame.header["cells"]], str(frame.header["kernel"]))
    except Refused as reason:
        return {"refused": str(reason)}, []
    names, errors = run_cells([(0, text), (1, frame.header["launcher"])], frame.header["function"])
    if errors:
        return {"refused": errors[0].message}, []
    state.update(
        fn=names[frame.header["function"]], refuse=[], text=text, kernel=names[frame.header["kernel"]]
    )
    return {"found": True}, []


def _call(state: dict[str, Any], frame: wire.Frame) -> Answer:
    from effattn_lab.exercises import judge
    from effattn_lab.exercises.core import Case

    arguments = wire.arguments_from(frame.header["arguments"], frame.fds[0])
    if frame.header.get("gpu"):
        arguments = {n: v.cuda() if hasattr(v, "cuda") else v for n, v in arguments.items()}
    case = Case("call", arguments)
    with _counting(bool(frame.header.get("count"))) as counted:
        run = judge.run(state["fn"], case, arguments=arguments, from_scratch=state["refuse"])
    if run.error is not None:
        return {"error": run.error.compared, "where": run.error.where}, []
    alias = judge.touched(run)
    header: dict[str, Any] = {"alias": alias is not None and alias.kind == "alias", **counted()}
    described, blobs = _described(run.value)
    return {**header, "results": described, "tuple": isinstance(run.value, tuple | list)}, blobs


def _described(value: Any) -> tuple[list[dict[str, Any]], list[bytes]]:
    """What came back, tensors as blobs, all else as the name of its type."""
    import torch

    described: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for part in (value if isinstance(value, tuple | list) else (value,))[: wire.BLOBS]:
        if isinstance(part, torch.Tensor):
            dtype, array = wire.to_numpy(part.detach().cpu().contiguous())
            described.append({"dtype": dtype})
            blobs.append(wire.npy(array))
        else:
            described.append({"type": type(part).__name__[:40]})
    return described, blobs


@contextlib.contextmanager
def _counting(wanted: bool) -> Any:
    """Traffic of the kernels launched in the block, as a function that gives the numbers."""
    if not wanted:
        yield dict
        return
    from effattn_lab.measure.traffic import count

    with count() as traffic:
        yield lambda: {"traffic": [int(traffic.loads_bytes), int(traffic.stores_bytes), int(traffic.flops)]}


def _launches(state: dict[str, Any], frame: wire.Frame) -> Answer:
    """With which types and constants does our launcher launch the kernel? What a compiler needs to know."""
    from effattn_lab.exercises.compiles import described, launches

    arguments = wire.arguments_from(frame.header["arguments"], frame.fds[0])
    fn: Callable[..., Any] = state["fn"]
    seen = launches(fn, *arguments.values())
    signature, constants, warps = described(*seen[0])
    return {"text": state["text"], "signature": signature, "constants": constants, "num_warps": warps}, []
