"""From a failure that is not about numbers (an error, a wrong shape, the wrong order) to its likely cause."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import permutations
from typing import Any

import torch

from effattn_lab.exercises.core import Case, Exercise, Failure, Kernel
from effattn_lab.exercises.source import kernels_of, returns, text_of

_ALL_AXES = (
    ".T turns all axes of a tensor around, the batch and the heads too; .mT, or transpose(-1, -2), swaps the last "
    "two."
)
#: Kinds of failure that outrank any guess from numbers.
STRUCTURAL = ("exception", "none", "type", "shape", "dtype")

_SIZES = re.compile(
    r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\)|"
    r"[Ss]hape mismatch|could not be broadcast|Cannot make_shape_compatible|incompatible dimensions"
)
_PRODUCT = re.compile(r"mat1 and mat2|batch1|batch2|[Ee]xpected size for first two|matmul:|must be equal")


def structural(exercise: Exercise, fn: Callable[..., Any] | None, case: Case, failure: Failure) -> str | None:
    """The likely cause of a failure of one of the kinds in `STRUCTURAL`; None where nothing is known.

    ``fn`` is None where only its results are at hand, as in a grader.
    """
    if failure.kind == "none":
        if fn is None:
            return "The function, or a branch of it, ends without a return statement."
        if not returns(fn):
            return "There is no `return` in the function: without one Python returns None."
        return "A branch of the function ends without a return statement."
    if failure.kind == "type":
        return f"The function should be {exercise.signature}."
    if failure.kind == "shape":
        if fn is not None and _transposes(text_of(fn), case):
            return _ALL_AXES
        return (
            "A reduction without keepdim, a missing [..., None], or an axis too many. Print the shapes line by "
            f"line; the function should be {exercise.signature}."
        )
    if failure.kind == "dtype":
        return "A cast in between (.half(), .double(), a tensor made without dtype=) changed the type of the result."
    if failure.kind == "exception":
        in_kernel = kernels_of(fn) if fn is not None else exercise.kernel
        told = _in_kernel(failure, exercise.kernel) if in_kernel else None
        return told or _in_torch(exercise, fn, case, failure)
    return None


def _in_kernel(failure: Failure, kernel: Kernel | None) -> str | None:
    """Errors of Triton, compiled or interpreted."""
    message, line = failure.compared, failure.where
    if re.search(r"\b(?:torch|np|math)\.", line) and not line.startswith("raised"):
        return "A kernel knows neither torch nor NumPy: its operations are those of triton.language, tl.something."
    if " @ " in line:
        return "There is no @ inside a kernel: the matrix product has a name of its own, tl.dot."
    picked = "not iterable" in message and re.search(r"\w\[[^\]:]*\](?!\s*\()", line)
    if picked or re.search(r"\w\[\s*-?\d+\s*\]", line) or "unsupported tensor index" in message:
        return (
            "A tile inside a kernel cannot be indexed: [:, None] and [None, :] add an axis, nothing picks an entry. "
            "Compute the number from tl.program_id and the block sizes."
        )
    if "same dtype" in message or "Both operands" in message:
        return "tl.dot wants both operands in one type. " + two_types(message, line)
    if _SIZES.search(message):
        text = (
            "Two tiles on that line do not line up. A vector goes down the rows as x[:, None] and along the columns "
            "as x[None, :]; tl.sum(x, 0) leaves one number a column, tl.sum(x, 1) one a row."
        )
        return f"{text} {kernel.layout}".strip() if kernel else text
    return compiler_cause(message)


def two_types(message: str, line: str) -> str:
    """Which operand of a tl.dot is to be cast: from Triton's "Got fp16 and fp32" and the line, if it is there."""
    types = re.search(r"Got (\w+) and (\w+)", message)
    if types is None:
        return "Cast one of them: x.to(y.dtype)."
    wide = 0 if types[1] == "fp32" else 1  # sums are float32, and inputs may not be
    place = ("first", "second")
    text = f"Here the {place[wide]} is {types[1 + wide]}, the {place[1 - wide]} {types[2 - wide]}"
    dots = _arguments(line, "tl.dot")
    if len(dots) == 1 and len(dots[0]) >= 2:
        names = [x if re.fullmatch(r"[\w.]+(\(.*\))?", x) else f"({x})" for x in dots[0]]
        return f"{text}: {names[wide]}.to({names[1 - wide]}.dtype)."
    return f"{text}: cast the {place[wide]} one, x.to(y.dtype)."


def _arguments(line: str, name: str) -> list[list[str]]:
    """Arguments of each call of ``name`` on a line of code, those that stand on that line."""
    found = []
    for call in re.finditer(re.escape(name) + r"\(", line):
        depth, parts = 0, [""]
        for sign in line[call.end() :]:
            depth += (sign in "([") - (sign in ")]")
            if depth < 0:
                break
            if sign == "," and depth == 0:
                parts.append("")
            else:
                parts[-1] += sign
        found.append([part.strip() for part in parts if part.strip()])
    return found


def compiler_cause(message: str) -> str | None:
    """What the compiler forbids and the interpreter allows, from the compiler's message."""
    found = re.search(r"Cannot access global variable (\w+)", message)
    if found:
        return (
            f"The compiler does not see ordinary global variables: {found[1]} is one. Write the value where it is "
            "needed, or make it a tl.constexpr."
        )
    found = re.search(r"global '(\w+)' \((?:function|method|builtin)", message)
    if found or "Unsupported function referenced" in message or "not a triton function" in message:
        found = found or re.search(r"referenced: (?:<[\w-]+ (?:function |method )?)?(\w+)", message)
        name = found[1] if found else "what it calls"
        return (
            f"A kernel may call only tl.… and functions that carry @triton.jit themselves; {name} is ordinary "
            "Python, which the interpreter runs and the compiler refuses."
        )
    found = re.search(
        r"Loop-carried variable (\w+) has initial type (.*?) but is re-assigned to (.*?) in", message
    )
    if found:
        return (
            f"The variable {found[1]} has one type before the loop ({found[2]}) and another after a turn of it "
            f"({found[3]}). A compiled loop keeps the type and the shape of what it carries."
        )
    if "is not defined" in message and "NameError" in message:
        return "A name is used that has no value here: a slip in its spelling, or it is set further down."
    return None


def _in_torch(exercise: Exercise, fn: Callable[..., Any] | None, case: Case, failure: Failure) -> str | None:
    message, line = failure.compared, failure.where
    if message.startswith("NotAllowed"):
        return f"It has to be written from simpler operations. {exercise.hints[0]}"
    sizes = _SIZES.search(message)
    if (sizes or _PRODUCT.search(message)) and _transposes(line, case):
        return _ALL_AXES
    called = re.search(r"; inside (\w+)", line)
    if called and (sizes or _PRODUCT.search(message)):
        return (
            f"The sizes meet inside {called[1]}, and do not fit. Are its arguments in the order of its signature, "
            "and has each the shape that it is written for? (What made one of them may have been called wrongly.)"
        )
    if sizes:
        tensors = [x for x in case.kwargs.values() if isinstance(x, torch.Tensor)]
        rank = max((x.dim() for x in tensors), default=0)
        blocks = {v for n, v in case.kwargs.items() if n.startswith("block") and isinstance(v, int)}
        ragged = any(x.dim() > 1 and x.shape[-2] % block for x in tensors for block in blocks)
        numbers = {int(x) for x in sizes.groups() if x}
        if ragged and numbers & blocks and min(numbers) < max(numbers & blocks):
            return (
                "A tile at the end is shorter than the block, and something on that line has the full width. The "
                "slice itself knows how long it is."
            )
        if "[:, None]" in line and rank > 2:
            return (
                "[:, None] puts the new axis in second place, which is the last one only for a vector. The tensors "
                "here have more axes in front; [..., None] adds it at the end whatever stands before."
            )
        text = (
            "Two tensors on that line do not line up. A number per row needs a last axis of length 1 before it "
            "meets a whole row: keepdim=True in a reduction, or [..., None]."
        )
        if rank > 2 and fn is not None and "[:, None]" in text_of(fn):
            text += " ([:, None] does that for a vector only.)"
        return text
    if _PRODUCT.search(message):
        return "The inner sizes of a product differ: print both shapes; one side may have to be transposed."
    if "truth value" in message or "Boolean value of Tensor" in message:
        return (
            "and, or, not, chained comparisons (0 <= x <= y), min() and max() ask a whole tensor for one truth "
            "value. Use &, | and ~ with brackets around each comparison; torch.minimum, torch.maximum or clamp."
        )
    if "not implemented for 'Bool'" in message:
        return "Truth values cannot be multiplied or summed up in a product of matrices: .float() first."
    if re.search(r"'(?:int|float)' object has no attribute", message):
        return "A tensor is expected on that line, and a plain number came: torch.tensor([x]) makes one."
    if "NameError" in message or "UnboundLocalError" in message:
        return "A name is used that has no value here: a slip in its spelling, or it is set further down."
    if line.startswith("raised while calling"):
        return f"The function should be {exercise.signature}."
    return None


def _transposes(text: str, case: Case) -> bool:
    """Is there a .T in the code although tensors have more than two axes?"""
    rank = max((x.dim() for x in case.kwargs.values() if isinstance(x, torch.Tensor)), default=0)
    return rank > 2 and re.search(r"\.T\b", text) is not None


def reordered(exercise: Exercise, value: Any, want: tuple[torch.Tensor, ...], case: Case) -> str | None:
    """Are the results right but in another order? The sentence that says so, or None."""
    count = len(exercise.outputs)
    if not isinstance(value, tuple | list) or len(value) != count or count > 4:
        return None
    for order in permutations(range(count)):
        if order != tuple(range(count)) and exercise.compare([value[n] for n in order], want, case) is None:
            names = [""] * count
            for output, place in zip(exercise.outputs, order):
                names[place] = output.name
            expected = ", ".join(o.name for o in exercise.outputs)
            return (
                f"The results come in another order: yours are ({', '.join(names)}), expected ({expected})."
            )
    return None
