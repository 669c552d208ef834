"""Evaluate the arithmetic behind a number in an answer, and nothing else.

An expression such as ``kv_cache_bytes(32, 8, 128, 1) / 2**10`` is parsed and walked node by node: numbers,
arithmetic, calls of the functions in `namespace`, attributes of ``math`` and fields of a GPU or a model. There is no
``eval``, so a bank file cannot reach anything that is not on the list.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import math
import operator
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
_BUILTINS: dict[str, Callable[..., Any]] = {"abs": abs, "max": max, "min": min}
_RECORDS = {"derate", "with_kv_heads"}  # functions that return a GPU or a model, whose fields may be read
_LONGEST = 800
_MAX_EXPONENT = 1024


@functools.cache
def namespace() -> dict[str, Any]:
    """What an expression may name: cost model and serving, ``GPUS``, ``MODELS``, ``crossover_length``, ``math``.

    And the costs of each mechanism under its slug: ``linear_attention.state_bytes(...)``.
    """
    from effattn_lab.foundations import cost_model, presets, serving
    from effattn_lab.measure.roofline import GPUS

    names: dict[str, Any] = {
        name: member
        for module in (cost_model, serving)
        for name, member in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_") and member.__module__ == module.__name__
    }
    models = {"MODELS": presets.MODELS, "crossover_length": presets.crossover_length}
    return {**names, **models, **_BUILTINS, **_costs(), "GPUS": GPUS, "math": math}


@functools.cache
def _costs() -> dict[str, SimpleNamespace]:
    """Slug to the public functions of ``effattn_lab/<part>/<slug>_cost.py``, and to nothing else of the module."""
    import effattn_lab

    found = {}
    for file in sorted(Path(effattn_lab.__path__[0]).glob("*/*_cost.py")):
        module = importlib.import_module(f"effattn_lab.{file.parent.name}.{file.stem}")
        found[file.stem.removesuffix("_cost")] = SimpleNamespace(
            **{
                name: member
                for name, member in inspect.getmembers(module, inspect.isfunction)
                if not name.startswith("_") and member.__module__ == module.__name__
            }
        )
    return found


def parse(expr: str) -> ast.expr:
    """Syntax tree of `expr`.

    Raises:
        ValueError: not an expression, too long, or holding anything but arithmetic, calls and look-ups.
    """
    if len(expr) > _LONGEST:
        raise ValueError(f"expression of {len(expr)} characters; expected at most {_LONGEST}")
    try:
        tree = ast.parse(expr.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"not a Python expression: {expr!r} ({error.msg})") from None
    for node in ast.walk(tree):
        _check(node, expr)
    return tree


def evaluate(expr: str) -> float:
    """Value of `expr` in `namespace`.

    Raises:
        ValueError: what `parse` refuses, an unknown name, a call that fails, or a result that is not a finite number.
    """
    tree = parse(expr)
    try:
        result = _value(tree)
    except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{expr!r}: {type(error).__name__}: {error}") from error
    if isinstance(result, bool) or not isinstance(result, int | float) or not math.isfinite(result):
        raise ValueError(f"{expr!r}: expected a finite number, got {result!r}")
    return float(result)


_ALLOWED = (
    ast.BinOp,
    ast.UnaryOp,
    ast.Constant,
    ast.Name,
    ast.Attribute,
    ast.Subscript,
    ast.Call,
    ast.keyword,
    ast.Load,
    *_BINARY,
    *_UNARY,
)


def _check(node: ast.AST, expr: str) -> None:
    if not isinstance(node, _ALLOWED):
        raise ValueError(f"{expr!r}: {type(node).__name__} is not allowed in an expression")
    if isinstance(node, ast.Constant) and not isinstance(node.value, int | float | str):
        raise ValueError(f"{expr!r}: constant {node.value!r} is not allowed")
    if isinstance(node, ast.Attribute):
        # Only math.x, slug.x, TABLE["name"].x and derate(...).x: text and numbers have methods that reach further.
        owner = node.value.func if isinstance(node.value, ast.Call) else node.value
        named = isinstance(owner, ast.Name) and owner.id in (
            {"math", *_costs()} if owner is node.value else _RECORDS
        )
        if node.attr.startswith("_") or not (named or isinstance(node.value, ast.Subscript)):
            raise ValueError(f"{expr!r}: attribute {node.attr!r} is not allowed")
    if isinstance(node, ast.keyword) and node.arg is None:
        raise ValueError(f"{expr!r}: ** in a call is not allowed")


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _value(left), _value(right)
            if isinstance(a, str) or isinstance(b, str):
                raise TypeError("arithmetic on text")
            if isinstance(op, ast.Pow) and (abs(b) > _MAX_EXPONENT or abs(a) > 1e6):
                raise ValueError(f"{a} ** {b} is too large")
            return _BINARY[type(op)](a, b)
        case ast.UnaryOp(op=op, operand=operand):
            return _UNARY[type(op)](_value(operand))
        case ast.Name(id=name):
            if name not in namespace():
                raise ValueError(f"unknown name {name!r}; known: {', '.join(sorted(namespace()))}")
            return namespace()[name]
        case ast.Attribute(value=owner, attr=attr):
            return getattr(_value(owner), attr)
        case ast.Subscript(value=owner, slice=key):
            return _value(owner)[_value(key)]
        case ast.Call(func=func, args=args, keywords=keywords):
            return _value(func)(
                *[_value(a) for a in args], **{k.arg: _value(k.value) for k in keywords if k.arg is not None}
            )
    raise ValueError(f"{type(node).__name__} is not allowed in an expression")
