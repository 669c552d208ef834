"""Take a Triton kernel out of a notebook, and nothing else: no cell is run, no launcher of the student's is used.

Whether *a kernel* did the work cannot be asked of a process in which the student's Python ran. So the kernel's text
is taken, held against the subset of Python that Triton compiles (which can't touch the interpreter it runs in), and
launched in a fresh process by a launcher of ours.
"""

from __future__ import annotations

import ast
from types import ModuleType
from typing import Any

from effattn_lab.grading.inside.cells import parse

_STATEMENTS = (
    ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.If, ast.For, ast.While, ast.Return, ast.Pass, ast.Assert,
)  # fmt: skip
_EXPRESSIONS = (
    ast.BinOp, ast.BoolOp, ast.UnaryOp, ast.Compare, ast.IfExp, ast.Call, ast.Name, ast.Attribute, ast.Subscript,
    ast.Slice, ast.Tuple, ast.List, ast.Constant, ast.keyword, ast.operator, ast.boolop, ast.unaryop, ast.cmpop,
    ast.expr_context,
)  # fmt: skip
_BUILTINS = {"range", "min", "max", "abs", "float", "int", "bool", "len", "tuple"}
#: Attributes that values inside a kernel have.
_ATTRIBUTES = {
    "to", "dtype", "element_ty", "shape", "type", "T", "scalar", "trans", "reshape", "permute", "cast", "sum", "max",
    "min", "is_floating", "primitive_bitwidth", "constexpr",
}  # fmt: skip


class Refused(Exception):
    """The kernel cannot be taken; the message is one sentence for the student."""


def take_kernel(cells: list[tuple[int, str]], name: str) -> str:
    """Source text of a module with the kernel ``name``, the jit functions it calls and the constants it names.

    Raises:
        Refused: there is no such kernel, or it holds what Triton would not compile.
    """
    functions, constants, languages = _definitions(cells)
    if name not in functions:
        raise Refused(f"there is no function {name} with @triton.jit in the notebook")
    needed = [name]
    lines: list[str] = []
    for wanted in needed:  # grows while it is walked
        for used in _checked(functions[wanted], functions, constants, languages):
            if used not in needed:
                needed.append(used)
    for constant in sorted({c for n in needed for c in _names(functions[n]) if c in constants}):
        # In quotes, for inf and nan are no names.
        value = constants[constant]
        text = f"float({str(value)!r})" if isinstance(value, float) else repr(value)
        lines.append(f"{constant} = _tl.constexpr({text})")
    for wanted in reversed(needed):
        node = functions[wanted]
        node.decorator_list = []
        lines.append(f"@_triton.jit\n{ast.unparse(node)}\n")
    head = [
        "from __future__ import annotations",
        "import triton as _triton",
        "import triton.language as _tl",
        "from triton.language import math",
    ]
    return "\n".join([*head, *(f"{alias} = _tl" for alias in sorted(languages)), "", *lines])


def _definitions(
    cells: list[tuple[int, str]],
) -> tuple[dict[str, ast.FunctionDef], dict[str, Any], set[str]]:
    """The last jit function of each name, literal constants, and the names that stand for triton.language."""
    functions: dict[str, ast.FunctionDef] = {}
    constants: dict[str, Any] = {}
    languages = {"tl"}
    for _, source in cells:
        tree = parse(source)
        for node in tree.body if tree else []:
            if isinstance(node, ast.FunctionDef):
                functions.pop(node.name, None)
                if any(_is_jit(d) for d in node.decorator_list):
                    functions[node.name] = node
            elif isinstance(node, ast.Import):
                languages |= {a.asname for a in node.names if a.name == "triton.language" and a.asname}
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                value = node.value
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if (
                    isinstance(value, ast.Call)
                    and ast.unparse(value.func).endswith("constexpr")
                    and value.args
                ):
                    value = value.args[0]
                elif not (isinstance(node, ast.AnnAssign) and "constexpr" in ast.unparse(node.annotation)):
                    continue
                for target in targets:
                    literal = _literal(value)
                    if isinstance(target, ast.Name) and literal is not None:
                        constants[target.id] = literal
    return functions, constants, languages


def _literal(node: ast.expr | None) -> Any:
    if node is None:
        return None
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "float" and len(node.args) == 1:
        argument = getattr(node.args[0], "value", None)
        return float(argument) if argument in ("inf", "-inf", "nan") else None
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Call):
        argument = _literal(node.operand)
        return None if argument is None else -argument
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    return value if isinstance(value, int | float | bool) else None


def _is_jit(node: ast.expr) -> bool:
    target = node.func if isinstance(node, ast.Call) else node
    return ast.unparse(target) in ("triton.jit", "jit")


def _names(node: ast.FunctionDef) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _checked(
    node: ast.FunctionDef, functions: dict[str, Any], constants: dict[str, Any], languages: set[str]
) -> list[str]:
    """Refuse what a kernel cannot hold; the jit functions that it calls."""
    arguments = node.args
    if arguments.vararg or arguments.kwarg:
        raise Refused(f"{node.name} takes *args or **kwargs, which a kernel cannot")
    bound = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    bound |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    shadowed = bound & ({*languages, *_BUILTINS, "math", "triton"} | set(functions))
    if shadowed:
        raise Refused(f"{node.name} gives the name {sorted(shadowed)[0]} another meaning")
    used: list[str] = []
    for default in (*arguments.defaults, *arguments.kw_defaults):
        if default is not None and not isinstance(default, ast.Constant):
            raise Refused(f"{node.name} has a default value that is not a plain constant")
    for part in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        part.annotation = _annotation(part.annotation, languages)
    node.returns = None
    for statement in node.body:
        for n in ast.walk(statement):
            _allowed(n, node.name)
            if isinstance(n, ast.Attribute):
                _attribute(n, node.name, languages)
            elif isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load):
                if n.id in functions:
                    used.append(n.id)
                elif n.id not in bound | constants.keys() | languages | _BUILTINS | {"math"}:
                    raise Refused(f"{node.name} uses {n.id[:40]}, which a compiled kernel does not see")
            if isinstance(n, ast.AnnAssign):
                n.annotation = _annotation(n.annotation, languages) or ast.Constant(None)
    _bare_modules(node, languages)
    return used


def _annotation(node: ast.expr | None, languages: set[str]) -> ast.expr | None:
    """Annotations are evaluated when a function is made: only ``tl.constexpr`` is kept."""
    text = ast.unparse(node) if node else ""
    if text.split(".")[-1] == "constexpr":
        return ast.Attribute(ast.Name("tl", ast.Load()), "constexpr", ast.Load())
    return None


def _allowed(n: ast.AST, kernel: str) -> None:
    if isinstance(n, ast.stmt) and not isinstance(n, _STATEMENTS):
        raise Refused(f"{kernel} holds a {type(n).__name__} statement, which Triton does not compile")
    if not isinstance(n, ast.stmt) and not isinstance(n, _EXPRESSIONS):
        raise Refused(f"{kernel} holds a {type(n).__name__}, which Triton does not compile")
    if isinstance(n, ast.Name) and n.id.startswith("_") and n.id.strip("_") == "":
        return  # an unused loop variable
    if isinstance(n, ast.Name) and n.id.startswith("__"):
        raise Refused(f"{kernel} uses the name {n.id[:40]}")
    if isinstance(n, ast.BinOp) and isinstance(n.op, ast.MatMult):
        raise Refused(f"{kernel} uses @, for which a kernel has tl.dot")


def _attribute(n: ast.Attribute, kernel: str, languages: set[str]) -> None:
    """``tl.name`` where that is no module, ``tl.math.name``, or one of the attributes that values have."""
    import triton.language as tl

    text = ast.unparse(n)
    parts = text.split(".")
    if n.attr.startswith("_"):
        raise Refused(f"{kernel} uses the attribute {n.attr[:40]}")
    if isinstance(n.value, ast.Name) and n.value.id in languages:
        found = getattr(tl, n.attr, None)
        if n.attr != "math" and (found is None or isinstance(found, ModuleType)):
            raise Refused(f"{kernel} uses {text[:60]}, which is no operation of triton.language")
    elif parts[0] in languages and len(parts) == 3 and parts[1] == "math":
        if isinstance(getattr(tl.math, n.attr, None), ModuleType) or not hasattr(tl.math, n.attr):
            raise Refused(f"{kernel} uses {text[:60]}, which is no operation of triton.language")
    elif n.attr not in _ATTRIBUTES:
        raise Refused(f"{kernel} uses the attribute {n.attr[:40]}, which values in a kernel do not have")


def _bare_modules(node: ast.FunctionDef, languages: set[str]) -> None:
    """``tl`` and ``tl.math`` stand only before a dot: as values they would open everything behind them."""
    behind = {id(n.value) for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    for n in ast.walk(node):
        is_module = (isinstance(n, ast.Name) and n.id in {*languages, "math"}) or (
            isinstance(n, ast.Attribute)
            and n.attr == "math"
            and isinstance(n.value, ast.Name)
            and n.value.id in languages
        )
        if is_module and id(n) not in behind:
            raise Refused(f"{node.name} uses a module as a value")
