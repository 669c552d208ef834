"""Would the compiler accept the kernels that a function launches? Asked of the x-ray, from the interpreter."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from effattn_lab.exercises.causes import compiler_cause
from effattn_lab.exercises.core import NotMeasured
from effattn_lab.exercises.judge import compiler_said

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


def launches(fn: Callable[..., Any], *args: Any) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels that ``fn(*args)`` launches in Triton's interpreter, each with its arguments by name."""
    from triton.runtime.interpreter import GridExecutor

    seen: list[tuple[Any, dict[str, Any]]] = []
    original = GridExecutor.__call__

    def call(executor: Any, *values: Any, **named: Any) -> Any:
        kernel = executor.fn.__globals__.get(executor.fn.__name__)
        seen.append((kernel, dict(zip(executor.arg_names, values)) | named))
        return original(executor, *values, **named)

    GridExecutor.__call__ = call
    try:
        fn(*args)
    finally:
        GridExecutor.__call__ = original
    return seen


def described(kernel: Any, values: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], int]:
    """What a compiler asks for: types of the arguments, compile-time constants, number of warps."""
    constants = {p.name for p in kernel.params if p.is_constexpr} if hasattr(kernel, "params") else set()
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    for name in kernel.arg_names:
        value = values.get(name)
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
        elif name in constants or name.isupper() or isinstance(value, bool | str | None):
            constexprs[name] = value
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
    return signature, constexprs, values.get("num_warps", 4)


def refused(fn: Callable[..., Any], *args: Any, gpu: str = "A100") -> tuple[str, str] | None:
    """Compile every kernel that ``fn(*args)`` launches for ``gpu``; None where all of them compile.

    Returns:
        what the compiler said, and the likely cause (or "").

    Raises:
        NotMeasured: no compiler here, or the kernel cannot be found by its name.
    """
    from effattn_lab.measure._carry import is_jit
    from effattn_lab.measure.xray import xray

    for kernel, values in launches(fn, *args):
        if not is_jit(kernel):
            raise NotMeasured("not checked: the kernel was not found by its name")
        signature, constexprs, num_warps = described(kernel, values)
        try:
            xray(kernel, signature, constexprs, gpus=[gpu], num_warps=num_warps)
        except (RuntimeError, ValueError) as error:
            text = str(error)
            if "does not compile" not in text and "cannot be carried" not in text:
                raise NotMeasured("not checked: there is no working compiler here") from None
            if "cuobjdump" in text or ("ptxas" in text and "not found" in text):
                raise NotMeasured("not checked: the compiler's tools are missing here") from None
            return _told(text, gpu)
    return None


def _told(text: str, gpu: str) -> tuple[str, str]:
    cause = compiler_cause(text) or ""
    if "CompilationError: " in text:
        reason, line = compiler_said(text.split("CompilationError: ", 1)[1])
    else:
        reason, line = compiler_said(text.split("): ", 1)[-1] if "(sm_" in text else text)
    # The first sentence says it; what follows is about other uses of the compiler.
    reason = (
        re.sub(r'^\w+\("|"\)$', "", reason)
        .split(". ")[0]
        .split("! ")[0]
        .split(", which cannot be carried")[0]
    )
    at = f"; at the line: {line}" if line else ""
    return f"compiled for {gpu}: {reason}{at}", cause
