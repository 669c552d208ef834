"""What every exercise on a Triton kernel asks, as probes: a kernel did the work, stored no more than its results, and
the compiler takes it. Importing this module does not import triton.

Each probe watches the learner's function while it runs; its trial judges the kernel alone, taken out of the notebook.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from effattn_lab.exercises.core import Case, NotMeasured, Outcome, Probe, Trial, Value
from effattn_lab.exercises.probes import watch

#: Draws the arguments of one call.
Sample = Callable[[np.random.Generator], Mapping[str, Value]]
_SEED = 11

RAN, STORED, ACCEPTED = (
    "a kernel did the work",
    "nothing but the results is stored",
    "the compiler accepts it",
)
REFUSED = (
    "The interpreter runs any Python; the compiler knows tl.… and a part of Python only: no ordinary globals, no "
    "function without @triton.jit, no @, no indexing of a tile, no variable that changes type or shape in the loop."
)


def require_triton() -> None:
    """Decide between interpreter and compiler before triton is imported; an ImportError says what is missing."""
    import effattn_kernels

    effattn_kernels.require()


def device() -> str:
    """Where a kernel's tensors live, for `Exercise.device`."""
    import effattn_kernels

    return "cuda" if effattn_kernels.MODE == "compiled" and torch.cuda.is_available() else "cpu"


def source(module: str) -> str:
    """Text of a module that holds a model solution with its kernel. Needs triton."""
    require_triton()
    return inspect.getsource(importlib.import_module(module))


def launcher(module: str, function: str, head: str = "import torch\nimport triton\n") -> str:
    """Text of the function that launches the kernel, with its imports, for `Kernel.source`."""
    require_triton()
    text = inspect.getsource(getattr(importlib.import_module(module), function))
    return f"from __future__ import annotations\n\n{head}\n\n{text}"


def probes(
    reference: Callable[..., tuple[torch.Tensor, ...]],
    make_inputs: Callable[[np.random.Generator], list[Case]],
    sample: Sample,
    *,
    kernel: str,
    loads_bytes: int,
    flops: int,
    stores_bytes: int,
    largest: int,
    compiled: Sample,
    hints: Mapping[str, str],
    gpu: str = "A100",
) -> tuple[Probe, ...]:
    """The three probes `RAN`, `STORED` and `ACCEPTED`.

    Args:
        reference, make_inputs: the exercise's own; the kernel alone has to pass the cases too.
        sample: the call whose traffic is counted.
        kernel: the kernel's name, for messages.
        loads_bytes, flops: what the kernel moves and multiplies (tl.dot) on ``sample`` at least.
        stores_bytes: what it may store on ``sample``.
        largest: elements of the largest tensor that PyTorch may make around the kernel on ``sample``.
        compiled: the call whose types and sizes the compiler gets.
        hints: for `RAN` and `STORED`.
        gpu: for which the kernel is compiled.
    """
    accepted = f"{ACCEPTED} ({gpu})"

    def one(name: str, draw: Sample) -> Callable[[np.random.Generator], list[Case]]:
        return lambda rng: [Case(name, draw(rng))]

    def ran(fn: Callable[..., Any]) -> str | None:
        moved = counted(fn, sample)
        if moved.loads_bytes < loads_bytes or moved.flops < flops:
            return (
                f"kernels loaded {moved.loads_bytes} bytes and did {moved.flops} FLOPs of tl.dot; at least "
                f"{loads_bytes} bytes and {flops} FLOPs are needed"
            )
        return None

    def stored(fn: Callable[..., Any]) -> str | None:
        moved = counted(fn, sample)
        if moved.stores_bytes > stores_bytes:
            return f"{kernel} stores {moved.stores_bytes} bytes; the results have {stores_bytes}"
        seen = watch(fn, *_fixed(sample).values())
        if seen.largest > largest:
            return f"a tensor of shape {seen.shape} was made outside the kernel"
        return None

    def accepts(fn: Callable[..., Any]) -> tuple[str, str] | None:
        import effattn_kernels

        if effattn_kernels.MODE != "interpreter":
            return None  # it was compiled to get here
        from effattn_lab.exercises.compiles import refused

        told = refused(fn, *_fixed(compiled).values(), gpu=gpu)
        return told and (told[0], told[1] or REFUSED)

    def alone(outcomes: Sequence[Outcome]) -> str | None:
        for outcome in outcomes:
            for got, want in zip(outcome.values, reference(**_wide(outcome.case))):
                # Each case has a tolerance of its own; here it is asked whether, not how well.
                if not near(got, want, 2e-2):
                    return (
                        f"{kernel}, launched by the notebook's own launcher, does not compute what is asked"
                    )
        return None

    def frugal(outcomes: Sequence[Outcome]) -> str | None:
        moved = outcomes[0].stores_bytes
        return (
            None
            if moved <= stores_bytes
            else f"the kernel stores {moved} bytes; the results have {stores_bytes}"
        )

    def cases(rng: np.random.Generator) -> list[Case]:
        return [Case(RAN, case.kwargs) for case in make_inputs(rng)]

    return (
        Probe(RAN, ran, hints[RAN], Trial(cases, alone, kernel=True)),
        Probe(STORED, stored, hints[STORED], Trial(one(STORED, sample), frugal, kernel=True)),
        Probe(
            accepted, accepts, REFUSED, Trial(one(accepted, compiled), lambda _: None, kernel=True, gpu=gpu)
        ),
    )


def counted(fn: Callable[..., Any], sample: Sample) -> Any:
    """Bytes and FLOPs of the kernels that ``fn`` launches on a fixed draw of ``sample``; needs the interpreter."""
    import effattn_kernels

    if effattn_kernels.MODE != "interpreter":
        raise NotMeasured("not measured on a GPU, only in Triton's interpreter")
    from effattn_lab.measure.traffic import count

    with count() as traffic:
        fn(*_fixed(sample).values())
    return traffic


def near(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> bool:
    """Equal, or within ``tolerance`` times 1 + abs(want)."""
    if got.shape != want.shape:
        return False
    got = got.double()
    return bool(((got == want) | ((got - want).abs() <= tolerance * (1 + want.abs()))).all())


def _fixed(sample: Sample) -> dict[str, Value]:
    return Case("", sample(np.random.default_rng(_SEED))).arguments()


def _wide(case: Case) -> dict[str, Value]:
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in case.kwargs.items()
    }
