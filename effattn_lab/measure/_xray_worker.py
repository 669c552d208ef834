"""Compiles kernels for GPUs that aren't there. Started by `xray` as a process of its own.

It must run without ``TRITON_INTERPRET`` and knows nothing of effattn_lab: one JSON job a line on
standard input, one JSON answer a line on standard output.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Mnemonics of matrix units: HMMA/IMMA/QMMA/OMMA (warp-wide), HGMMA and kin (Hopper, warp-group-wide),
# UTCHMMA and kin (Blackwell, tensor memory).
SASS_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]\w*\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE
)
SASS_TENSOR_CORE = re.compile(r"^(?:[HIQOD]G?MMA|UTC[A-Z]*MMA)$")
AMD_INSTRUCTION = re.compile(r"^\s+([a-z][a-z0-9_]*_[a-z0-9_]+)\b", re.MULTILINE)
AMD_TENSOR_CORE = re.compile(r"^v_(?:s?mfmac?|wmma|swmmac)_")


def load_kernel(job: dict[str, Any]) -> Any:
    """The @triton.jit function a job asks for: by module name, from a file of carried source, or from the source."""
    if job.get("source"):
        with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
            file.write(job["source"])
        job = {**job, "path": file.name}
    if job.get("path"):
        spec = importlib.util.spec_from_file_location(job["module"], job["path"])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[job["module"]] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(job["module"])
    return getattr(module, job["name"])


def decode(value: Any) -> Any:
    """Undo the JSON form of a compile-time value ({"dtype": "fp16"} is ``tl.float16``)."""
    if isinstance(value, dict):
        import triton.language as tl

        return tl.dtype(value["dtype"])
    return value


def tool(name: str) -> str:
    """Path of one of the NVIDIA tools that triton's wheel carries."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(bundled) if bundled.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(
            f"{name} was found neither in triton's wheel ({bundled}) nor on PATH; "
            "install triton from PyPI or the CUDA toolkit"
        )
    return found


def measure_nvidia(cubin: bytes) -> dict[str, int]:
    """Registers, spills and instruction counts of a cubin, read with cuobjdump."""
    cuobjdump = tool("cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run(
            [cuobjdump, "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers = re.search(r"REG:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]!r}")
    names = [name for name in SASS_INSTRUCTION.findall(sass) if name != "NOP"]
    return {
        "registers": int(registers[1]),
        "spill_bytes": int(stack[1]),
        "instructions": len(names),
        "tensor_core_instructions": sum(1 for name in names if SASS_TENSOR_CORE.match(name)),
    }


def measure_amd(assembly: str) -> dict[str, int]:
    """The same from the text of an AMD kernel and the metadata at its end."""

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    code = assembly.split(".amdgpu_metadata")[0]
    names = [
        name
        for name in AMD_INSTRUCTION.findall(code)
        if name[:2] in ("v_", "s_") or name.split("_")[0] in AMD_MEMORY
    ]
    return {
        "registers": number("vgpr_count"),  # the unified file: accumulation registers are counted in
        "spill_bytes": number("private_segment_fixed_size"),  # scratch memory a lane
        "instructions": len(names),
        "tensor_core_instructions": sum(1 for name in names if AMD_TENSOR_CORE.match(name)),
    }


AMD_MEMORY = ("global", "buffer", "ds", "flat", "scratch")


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """Compile one kernel for one target and measure what came out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = load_kernel(job)
    names = list(kernel.arg_names)
    signature: dict[str, str] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for name in names:
        kind, _, divisor = job["signature"][name].partition(":")
        signature[name] = kind
        if divisor:
            attrs[(names.index(name),)] = [["tt.divisibility", int(divisor)]]
    constexprs = {name: decode(value) for name, value in job["constexprs"].items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": job["num_warps"], "num_stages": job["num_stages"]}
    compiled = triton.compile(source, target=GPUTarget(*job["target"]), options=options)
    measured = (
        measure_nvidia(compiled.asm["cubin"])
        if "cubin" in compiled.asm
        else measure_amd(compiled.asm["amdgcn"])
    )
    return {
        **measured,
        "shared_bytes": int(compiled.metadata.shared),
        "tensor_memory_columns": int(getattr(compiled.metadata, "tmem_size", 0) or 0),
    }


def serve(compile_one: Callable[[dict[str, Any]], dict[str, Any]] = compile_job) -> None:
    """Answer jobs until standard input ends. Anything a compiler prints goes to standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = {"id": job["id"], "result": compile_one(job)}
        except Exception as error:
            answer = {"id": job["id"], "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
