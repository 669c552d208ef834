"""Carry a kernel's source, with all it uses, to a process that runs without ``TRITON_INTERPRET``.

Under the interpreter ``@triton.jit`` makes a stand-in that no compiler accepts. So the kernel travels as text:
its own source, the jit functions it calls, the ``tl.constexpr`` globals and modules it names. What lives in an
importable module is imported there instead.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib.util
import inspect
import sys
import textwrap
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

HEADER = "from __future__ import annotations\n\nimport triton as _triton\n"
SIMPLE = (int, float, bool, str, type(None))


@dataclass
class Carried:
    """Where the other process finds the kernel: ``module`` to import, or ``source`` to write to a file."""

    name: str
    module: str | None
    source: str | None
    digest: str  # changes whenever the kernel or anything it uses changes


@dataclass
class _Bag:
    lines: list[str] = field(default_factory=list)
    seen: dict[str, Any] = field(default_factory=dict)  # global name -> value already looked at
    emitted: set[str] = field(default_factory=set)  # and those of them whose line stands in the source
    texts: list[str] = field(default_factory=list)  # everything the digest covers


def is_jit(value: Any) -> bool:
    """Is this a ``@triton.jit`` function, compiled or interpreted?"""
    return type(value).__name__ in ("JITFunction", "InterpretedFunction")


def unwrap(kernel: Any) -> Any:
    """The jit function inside ``@triton.autotune`` and ``@triton.heuristics``."""
    inner = kernel
    while not is_jit(inner) and hasattr(inner, "fn"):
        inner = inner.fn
    if not is_jit(inner):
        raise ValueError(
            f"kernel: expected a function decorated with @triton.jit, got {type(kernel).__name__}"
        )
    return inner


def carry(kernel: Any) -> Carried:
    """Pack a ``@triton.jit`` function.

    Raises:
        ValueError: the source cannot be found, or the kernel uses something that cannot travel; the message
            names the kernel, the name it uses and what that is.
    """
    kernel = unwrap(kernel)
    bag = _Bag()
    name = kernel.fn.__name__
    importable = _importable(kernel, name)
    _add_jit(bag, kernel, name, emit=not importable)
    digest = hashlib.sha256("\n".join(bag.texts).encode()).hexdigest()
    if importable:
        return Carried(name, kernel.fn.__module__, None, digest)
    return Carried(name, None, "\n".join([HEADER, *bag.lines, ""]), digest)


def _importable(value: Any, name: str) -> bool:
    """Can another process get this object with ``from module import name``?"""
    module_name = getattr(getattr(value, "fn", value), "__module__", None)
    module = sys.modules.get(module_name or "")
    if module is None or module_name == "__main__" or getattr(module, "__spec__", None) is None:
        return False
    try:
        if importlib.util.find_spec(module_name or "") is None:
            return False
    except (ImportError, ValueError):
        return False
    return getattr(module, name, None) is value


def _definition(function: Any) -> tuple[str, ast.FunctionDef]:
    """Source text from ``def`` on (decorators off) and its syntax tree."""
    try:
        text = textwrap.dedent("".join(inspect.getsourcelines(function)[0]))
        tree = ast.parse(text)
    except (OSError, TypeError, SyntaxError) as error:
        raise ValueError(
            f"kernel {function.__name__}: its source text cannot be found ({error}); "
            "define it in a file or in a notebook cell"
        ) from error
    node = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function.__name__)
    body = "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
    return textwrap.dedent(body), node


def _free_names(function: Any, node: ast.FunctionDef) -> list[str]:
    """Names the function reads but does not bind, in order of appearance."""
    bound = {a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]}
    for n in ast.walk(node):
        if isinstance(n, ast.Name) and isinstance(n.ctx, (ast.Store, ast.Del)):
            bound.add(n.id)
    names: dict[str, None] = {}
    skip = {id(n) for d in node.decorator_list for n in ast.walk(d)}
    for n in ast.walk(node):
        if (
            isinstance(n, ast.Name)
            and isinstance(n.ctx, ast.Load)
            and id(n) not in skip
            and n.id not in bound
        ):
            names.setdefault(n.id)
        if (
            isinstance(n, ast.arg)
            and isinstance(n.annotation, ast.Constant)
            and isinstance(n.annotation.value, str)
        ):
            for part in ast.walk(ast.parse(n.annotation.value, mode="eval")):
                if isinstance(part, ast.Name):
                    names.setdefault(part.id)
    return [
        n
        for n in names
        if n in function.__globals__ or n in function.__code__.co_freevars or not hasattr(builtins, n)
    ]


def _lookup(function: Any, name: str) -> Any:
    if name in function.__code__.co_freevars:
        cell = function.__closure__[function.__code__.co_freevars.index(name)]
        return cell.cell_contents
    if name in function.__globals__:
        return function.__globals__[name]
    raise ValueError(f"kernel {function.__name__}: it uses {name!r}, which is not defined")


def _add_jit(bag: _Bag, jit: Any, name: str, emit: bool) -> None:
    function = jit.fn
    text, node = _definition(function)
    bag.texts.append(text)
    for used in _free_names(function, node):
        if used == function.__name__:
            continue
        _add_value(bag, function, used, _lookup(function, used), emit)
    if emit:
        bag.lines.append(f"\n@_triton.jit\n{text}\n")
        if name != function.__name__:
            bag.lines.append(f"{name} = {function.__name__}")


def _add_value(bag: _Bag, function: Any, name: str, value: Any, emit: bool) -> None:
    if name in bag.seen:
        if bag.seen[name] is not value and bag.seen[name] != value and emit:
            raise ValueError(
                f"kernel {function.__name__}: the name {name!r} means two different things in the functions it calls"
            )
        # A helper that is imported is only read for the digest: what it names the carried source may still lack.
        if not emit or name in bag.emitted:
            return
    bag.seen[name] = value
    if emit:
        bag.emitted.add(name)
    line = None
    if isinstance(value, ModuleType):
        line = (
            f"import {value.__name__} as {name}"
            if "." not in value.__name__
            else _import_submodule(value, name)
        )
    elif is_jit(value):
        real = value.fn.__name__
        if _importable(value, real):
            line = f"from {value.fn.__module__} import {real} as {name}"
            _add_jit(bag, value, name, emit=False)  # for the digest
        else:
            _add_jit(bag, value, name, emit)
            return
    elif type(value).__name__ == "constexpr":
        line = f"{name} = _triton.language.constexpr({_literal(function, name, value.value)})"
    elif type(value).__name__ == "dtype" or isinstance(value, SIMPLE):
        hint = str(function.__globals__.get("__annotations__", {}).get(name, ""))
        mark = ": _triton.language.constexpr" if "constexpr" in hint else ""
        line = f"{name}{mark} = {_literal(function, name, value)}"
    elif callable(value):
        line = _import_function(value, name)
    if line is None:
        raise ValueError(
            f"kernel {function.__name__}: it uses the global {name!r} ({type(value).__name__}), which cannot be "
            "carried to the compiler's process; pass it as a tl.constexpr argument, or make it a tl.constexpr, "
            "a jit function or a module"
        )
    bag.texts.append(line)
    if emit:
        bag.lines.append(line)


def _import_function(value: Any, name: str) -> str | None:
    """``from triton.language import exp2`` and the like; None if nobody could import this function."""
    real = getattr(value, "__name__", "")
    if _importable(value, real):
        return f"from {value.__module__} import {real} as {name}"
    # The interpreter of older tritons leaves its stand-ins in triton.language: look there for the public name.
    language = sys.modules.get("triton.language")
    same = [n for n in vars(language) if getattr(language, n) is value] if language else []
    if not same and str(value.__module__).startswith("triton.language") and hasattr(language, real):
        same = [real]
    return f"from triton.language import {same[0]} as {name}" if same else None


def _import_submodule(module: ModuleType, name: str) -> str:
    return f"import importlib as _importlib\n{name} = _importlib.import_module({module.__name__!r})"


def _literal(function: Any, name: str, value: Any) -> str:
    if type(value).__name__ == "dtype":
        return f"_triton.language.dtype({value.name!r})"
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return f"float({str(value)!r})"
    if isinstance(value, SIMPLE):
        return repr(value)
    raise ValueError(
        f"kernel {function.__name__}: the constant {name!r} holds a {type(value).__name__}, not a number"
    )
