"""The x-ray's compiler process that also reports loops: how many instructions each body has, matrix-unit ones apart.

A count of the code as it stands sees a loop's body once. Kernels that loop inside a chunk (forward substitution: 15
times) need the bodies to weigh them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile

from effattn_lab.measure import _xray_worker

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T0-9]\w*\s+)?(\S[^;]*);", re.MULTILINE)
_plain = _xray_worker.measure_nvidia


def loops(sass: str) -> list[tuple[int, int]]:
    """``(instructions, matrix-unit ones)`` of each body: from the target of a backward branch to the branch."""
    return [
        (len(body), sum(1 for name in body if _xray_worker.SASS_TENSOR_CORE.match(name)))
        for body in _bodies(sass)
    ]


def stores(sass: str) -> list[int]:
    """Stores to global memory in each body, in the order of :func:`loops`.

    The compiler unrolls loops as it likes: four stores, in a loop that stores once a token, are four tokens.
    """
    return [body.count("STG") for body in _bodies(sass)]


def _bodies(sass: str) -> list[list[str]]:
    """The instructions' names of each loop."""
    code = [(int(address, 16), text) for address, text in _LINE.findall(sass)]
    named = [(address, text.split()[0].split(".")[0], text) for address, text in code]
    named = [line for line in named if line[1] != "NOP"]
    found = []
    for address, name, text in named:
        target = re.search(r"0x([0-9a-f]+)", text)
        if name == "BRA" and target and int(target[1], 16) < address:
            found.append([n for a, n, _ in named if int(target[1], 16) <= a <= address])
    return found


def measure(cubin: bytes) -> dict[str, object]:
    """What the x-ray measures, ``loops`` and ``loop_stores``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_xray_worker.tool("cuobjdump"), "-sass", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {**_plain(cubin), "loops": loops(sass), "loop_stores": stores(sass)}


if __name__ == "__main__":
    _xray_worker.measure_nvidia = measure  # type: ignore[assignment]
    _xray_worker.serve()
