"""Ask a compiler, in a sandbox of its own, whether it takes a kernel that was taken out of a notebook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from effattn_lab.grading.sandbox import SITE, Limits, NoBoundary, Stopped, python, run_once

_EMPTY_KERNEL = "import triton\n\n\n@triton.jit\ndef empty():\n    return\n"
_compiled: dict[str, str | None] = {}


def compile_error(site: Path, limits: Limits, name: str, job: dict[str, Any], gpu: str) -> str | None:
    """What the compiler says against a kernel whose text was taken from a notebook; None where it takes it."""
    from effattn_lab.measure._gpu_limits import targets

    target = targets([gpu])[0]
    types, constants = job.get("signature"), job.get("constants")
    if not isinstance(types, dict) or not isinstance(constants, dict):
        raise Stopped("its answer cannot be read: no types")
    # As `xray` does: compile-time values marked as such, pointers aligned as torch aligns them.
    signature = {n: f"{t}:16" if str(t).startswith("*") else str(t) for n, t in types.items()}
    signature |= dict.fromkeys(constants, "constexpr")
    message = {
        "id": 0,
        "name": name,
        "module": "carried",
        "source": job.get("text"),
        "signature": signature,
        "constexprs": constants,
        "num_warps": job.get("num_warps"),
        "num_stages": 2,
        "target": list(target.target),
    }
    key = json.dumps(message, sort_keys=True)
    if key in _compiled:
        return _compiled[key]
    worker = f"{SITE}/effattn_lab/measure/_xray_worker.py"
    said = run_once(
        python(worker), site, limits, given=(key + "\n").encode(), seconds=90,
        environment={"TRITON_INTERPRET": "0"},
    )  # fmt: skip
    try:
        answer = json.loads(said)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        if job.get("text") == _EMPTY_KERNEL:
            raise NoBoundary("the compiler did not answer in its sandbox; is triton whole?")
        # A kernel can crash the compiler. Is it this one, or is there none that it takes?
        empty = {"text": _EMPTY_KERNEL, "signature": {}, "constants": {}, "num_warps": 4}
        compile_error(site, limits, "empty", empty, gpu)
        answer = {"error": "the compiler ended without an answer"}
    # Its end holds the reason; the rest may be as long as a kernel.
    _compiled[key] = None if "result" in answer else str(answer.get("error", "no reason given"))[-8000:]
    return _compiled[key]
