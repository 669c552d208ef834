"""The package as a student's code finds it inside the sandbox: without answers, checks, bank and grader.

What an exercise asks to write from scratch is taken out of the text itself, not hidden: a call fails with a clear
word, and there is nothing on disk to read.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterable
from pathlib import Path

import effattn_lab

#: Never inside: answers and mutants, questions with their answers, the grader, and what only an author needs.
LEFT_OUT = ("exercises", "grading", "interview", "notebooks.py", "cli.py", "bench.py", "doctor.py")
#: What inside/ needs of the exercises package: how to call a function and describe its errors.
KEPT = ("core.py", "judge.py", "source.py", "scratch.py", "compiles.py", "causes.py", "probes.py")

_STAND_INS = '''"""Stand-ins while grading: self-checks and references belong to the notebook, and earn nothing."""

from effattn_lab.exercises.scratch import NotAllowed


def check(exercise_id, fn=None, **_):
    return None


hint = solution = check


def take(exercise_id, fn):
    return fn


def reference(exercise_id):
    def taken(*args, **kwargs):
        raise NotAllowed(f"the reference was taken for {exercise_id}: it earns no points")

    return taken
'''

_MODULE = '''"""Left out while grading: it is what an exercise asks to write."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args, **kwargs):
        from effattn_lab.exercises.scratch import NotAllowed

        raise NotAllowed(f"{name} of %s is what this exercise asks you to write")

    return absent
'''


def packages() -> dict[str, Path]:
    """Folders of the two packages that notebooks import."""
    found = {"effattn_lab": Path(effattn_lab.__file__).parent}
    import effattn_kernels

    found["effattn_kernels"] = Path(effattn_kernels.__file__).parent
    return found


def build_site(target: Path, from_scratch: Iterable[str]) -> Path:
    """Write the package for students into ``target`` (which must not exist).

    Args:
        target: becomes an entry of the path inside.
        from_scratch: dotted names as in `Exercise.from_scratch`; those of torch are not this function's business.

    Raises:
        ValueError: a name is neither a module nor a function at the top of one.
    """
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name, source in packages().items():
        shutil.copytree(source, target / name, ignore=ignore)
    lab = target / "effattn_lab"
    own = packages()["effattn_lab"]
    for name in LEFT_OUT:
        path = lab / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    shutil.copytree(own / "grading" / "inside", lab / "grading" / "inside", ignore=ignore)
    (lab / "grading" / "__init__.py").write_text("", encoding="utf-8")
    (lab / "exercises").mkdir()
    (lab / "exercises" / "__init__.py").write_text(_STAND_INS, encoding="utf-8")
    for name in KEPT:
        shutil.copyfile(own / "exercises" / name, lab / "exercises" / name)
    for name in sorted(set(from_scratch)):
        if not name.startswith("torch."):
            _take_out(target, name)
    return target


def full_site(target: Path) -> Path:
    """The whole package, for replaying notebooks: no point depends on what happens there."""
    for name, source in packages().items():
        shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "bank"))
    return target


def _take_out(site: Path, name: str) -> None:
    module = site.joinpath(*name.split(".")).with_suffix(".py")
    if module.is_file():
        module.write_text(_MODULE % name, encoding="utf-8")
        # Private parts beside it: _flash_fwd.py belongs to flash.py.
        for part in module.parent.glob(f"_{module.stem}_*.py"):
            part.unlink()
        return
    owner, function = name.rsplit(".", 1)
    file = site.joinpath(*owner.split(".")).with_suffix(".py")
    if not file.is_file():
        raise ValueError(f"from_scratch: expected a module or a function of this project, got {name!r}")
    file.write_text(_without(file.read_text(encoding="utf-8"), function, name), encoding="utf-8")


def _without(text: str, function: str, name: str) -> str:
    """The module's text with one function replaced by a refusal."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            lines = text.splitlines()
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            refusal = [
                f"def {function}(*args, **kwargs):",
                "    from effattn_lab.exercises.scratch import NotAllowed",
                "",
                f'    raise NotAllowed("{name} is what this exercise asks you to write")',
            ]
            return "\n".join([*lines[: first - 1], *refusal, *lines[node.end_lineno :], ""])
    raise ValueError(f"from_scratch: expected a module or a function of this project, got {name!r}")
