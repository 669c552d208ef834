"""Exercise: the inner loop of a Triton forward kernel. Importing this module does not import triton."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from effattn_lab.exercises.core import Case, Exercise, Kernel, Mutant, NotMeasured, Output, Probe, Tolerance
from effattn_lab.exercises.full._flash_forward import attention_reference, integers
from effattn_lab.exercises.full._flash_rows import FROM_SCRATCH
from effattn_lab.exercises.full._flash_trials import compile_trial, kernel_trial, loads_trial, stores_trial
from effattn_lab.exercises.making import mutants, normal
from effattn_lab.exercises.probes import watch
from effattn_lab.foundations.attention import attention, lse


def flash_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, block_m: int = 32, block_n: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """The model solution, with triton imported when it is called."""
    _require_triton()
    from effattn_lab.exercises.full._flash_triton_solution import flash_triton as launch

    return launch(q, k, v, causal, block_m, block_n)


def _require_triton() -> None:
    import effattn_kernels  # decides between interpreter and compiler before triton is imported

    effattn_kernels.require()


def _source() -> str:
    _require_triton()
    from effattn_lab.exercises.full import _flash_triton_solution

    return inspect.getsource(_flash_triton_solution)


def _device() -> str:
    import effattn_kernels

    return "cuda" if effattn_kernels.MODE == "compiled" and torch.cuda.is_available() else "cpu"


def _triton_inputs(rng: np.random.Generator) -> list[Case]:
    def case(
        name: str, nq: int, nk: int, causal: bool, *, hq: int = 1, hkv: int = 1, batch: int = 1, d: int = 16,
        size: float = 1.0, large: bool = False, dtype: torch.dtype = torch.float32,
    ) -> Case:  # fmt: skip
        if large:
            q, k = integers(rng, batch, hq, nq, d), integers(rng, batch, hkv, nk, d)
        else:
            q, k = normal(rng, batch, hq, nq, d, size=size), normal(rng, batch, hkv, nk, d, size=size)
        v = normal(rng, batch, hkv, nk, d)
        return Case(name, {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "causal": causal})

    # All scores far below 0: a sum that starts from the wrong origin underflows.
    below = [torch.from_numpy(rng.integers(20, 51, (1, 1, n, 16))).float() for n in (16, 40)]
    return [
        case("equals attention", 32, 96, False),
        case("length not a multiple of the block", 37, 75, False),
        case("length 1", 1, 1, False),
        case("spread-out scores", 32, 130, False, size=2.5),
        case("large scores", 16, 70, False, large=True),
        Case(
            "large scores", {"q": below[0], "k": -below[1], "v": normal(rng, 1, 1, 40, 16), "causal": False}
        ),
        case("causal", 70, 70, True),
        case("causal, fewer queries than keys", 20, 80, True),
        case("causal, more queries than keys", 60, 20, True),
        case("batch and grouped heads", 8, 20, False, batch=2, hq=4, hkv=2, d=32),
        case("half-precision inputs", 30, 50, True, d=32, dtype=torch.float16),
    ]


def _fault(fault: str, *args: Any) -> Any:
    _require_triton()
    from effattn_lab.exercises.full._flash_triton_faults import launch

    return launch(fault, *args)


def _no_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return attention(q, k, v, causal=causal), lse(q, k, causal=causal)


_N = 192


def _counted(fn: Callable[..., Any], causal: bool) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """What ``fn`` moves on a fixed input of 192 queries and keys; needs the interpreter."""
    import effattn_kernels

    if effattn_kernels.MODE != "interpreter":
        raise NotMeasured("not measured on a GPU, only in Triton's interpreter")
    from effattn_lab.measure.traffic import count

    rng = np.random.default_rng(11)
    q, k, v = (normal(rng, 1, 1, _N, 16) for _ in range(3))
    with count() as traffic:
        fn(q.clone(), k.clone(), v.clone(), causal)
    return traffic, (q, k, v)


def _kernel_ran(fn: Callable[..., Any]) -> str | None:
    traffic, (q, k, v) = _counted(fn, False)
    inputs = sum(x.numel() * x.element_size() for x in (q, k, v))
    if traffic.loads_bytes < inputs or traffic.flops < 4 * _N * _N * 16:
        return (
            f"kernels loaded {traffic.loads_bytes} bytes and did {traffic.flops} FLOPs of tl.dot; the inputs alone "
            f"have {inputs} bytes and attention takes {4 * _N * _N * 16} FLOPs"
        )
    return None


def _no_square_traffic(fn: Callable[..., Any]) -> str | None:
    traffic, (q, k, v) = _counted(fn, False)
    results = q.numel() * q.element_size() + 4 * _N
    if traffic.stores_bytes > results:
        return f"the kernel stores {traffic.stores_bytes} bytes; out and lse have {results}"
    seen = watch(fn, q, k, v, False)
    if seen.largest >= _N * _N:
        return f"a tensor of shape {seen.shape} was made outside the kernel for N = {_N}"
    return None


def _skips_tiles(fn: Callable[..., Any]) -> str | None:
    full, half = _counted(fn, False)[0], _counted(fn, True)[0]
    # Two tiles a side or more: (T + 1) / 2T <= 3/4 of the key and value tiles, Q is read in full.
    if half.loads_bytes > 0.85 * full.loads_bytes:
        return f"with causal {half.loads_bytes} bytes are loaded, without {full.loads_bytes}: the same tiles are read"
    return None


def _refused(fault: str, *args: Any) -> Any:
    _require_triton()
    from effattn_lab.exercises.full._flash_triton_uncompilable import launch

    return launch(fault, *args)


def _compiles(fn: Callable[..., Any]) -> tuple[str, str] | None:
    """In the interpreter: would the kernel compile, for the shape and types that the lab's x-ray takes too?"""
    import effattn_kernels

    if effattn_kernels.MODE != "interpreter":
        return None  # it was compiled to get here
    from effattn_lab.exercises.compiles import refused

    rng = np.random.default_rng(11)
    q, k, v = (normal(rng, 1, 1, 32, 64).half() for _ in range(3))
    told = refused(fn, q, k, v, True)
    return told and (told[0], told[1] or _REFUSED)


_REFUSED = (
    "The interpreter runs any Python; the compiler knows tl.… and a part of Python only: no ordinary globals, no "
    "function without @triton.jit, no @, no indexing of a tile, no variable that changes type or shape in the loop."
)
_EVERY_TILE = (
    "Key tiles above the diagonal are read and then masked. With CAUSAL the loop may end after the key that the "
    "tile's last query sees: position of the last row + seqlen_k - seqlen_q + 1, at most seqlen_k."
)
_STORED = "The kernel writes the weights of every tile to memory and reads them back. Keep p in registers: use it in "
_STORED += "tl.dot at once."
_NO_KERNEL = (
    "The result comes from PyTorch, not from a kernel: call flash_kernel[grid](...) with your loop in it."
)

_KERNEL_RAN = "a kernel did the work"
_NOT_STORED = "nothing of size N x N is stored"
_NOT_READ = "tiles above the diagonal are not read"
_ACCEPTED = "the compiler accepts it (A100)"


def _launcher() -> str:
    _require_triton()
    from effattn_lab.exercises.full import _flash_triton_solution as here

    head = "from __future__ import annotations\n\nimport torch\nimport triton\n\n\n"
    return head + inspect.getsource(here.flash_triton)


TRITON_FORWARD = Exercise(
    id="full/flash/triton_forward",
    title="the inner loop of a Triton kernel",
    signature="flash_triton(q, k, v, causal) -> (out [B, Hq, Nq, D], lse [B, Hq, Nq])",
    outputs=(Output("out", "q"), Output("lse", "float32")),
    make_inputs=_triton_inputs,
    reference=attention_reference,
    solution=flash_triton,
    # torch's own functions may be called, they do not help: the kernel is judged by itself.
    from_scratch=tuple(name for name in FROM_SCRATCH if not name.startswith("torch.")),
    kernel=Kernel("flash_kernel", "flash_triton", _launcher),
    properties={
        "equals attention": "The body of the loop is your tile step: scores, m_new, alpha, p, l, acc, and m = m_new. "
        "On a GPU, tl.dot rounds float32 to TF32 unless input_precision='ieee'.",
        "length not a multiple of the block": "A tile in Triton always has BLOCK_N columns. Those past seqlen_k were "
        "loaded as 0, and a score of 0 counts: set it to -inf.",
        "length 1": "One key: all other columns of the tile are padding and must be -inf.",
        "spread-out scores": "alpha = exp(m - m_new) multiplies l and acc, each once per tile.",
        "large scores": "Subtract the new running maximum before exp.",
        "causal": "Row r sees column c if c <= r, both counted in the whole sequence: rows and offs, not cols.",
        "causal, fewer queries than keys": "The queries are the last positions: add seqlen_k - seqlen_q to rows.",
        "causal, more queries than keys": "Rows that see nothing keep m = -inf: use 0 as the origin of their "
        "exponents.",
        "batch and grouped heads": "kv_base is computed for you from head // groups: use it, not head.",
        "half-precision inputs": "tl.dot wants both operands in one dtype: p.to(v.dtype). The sums l and acc stay in "
        "float32.",
    },
    tolerance=Tolerance(
        5e-5,
        5e-5,
        "float32 products and sums in another order (see full/flash/forward); a float32 tl.dot rounded to TF32 "
        "or an fp16 accumulator is off by 1e-3 and is rejected.",
    ),
    loose={
        "large scores": Tolerance(
            1e-6, 2e-2, "scores up to 10000 with log2(e) folded in are rounded to 1e-3."
        ),
        "half-precision inputs": Tolerance(
            4e-3,
            4e-3,
            "p and out are rounded to fp16 (5e-4 relative each), out is a mean of numbers up to 4.",
        ),
    },
    probes=(
        Probe(_KERNEL_RAN, _kernel_ran, _NO_KERNEL, kernel_trial(_KERNEL_RAN, _triton_inputs)),
        Probe(_NOT_STORED, _no_square_traffic, _STORED, stores_trial(_NOT_STORED)),
        Probe(_NOT_READ, _skips_tiles, _EVERY_TILE, loads_trial(_NOT_READ)),
        Probe(_ACCEPTED, _compiles, _REFUSED, compile_trial(_ACCEPTED, "A100")),
    ),
    mutants=(
        *mutants(
            _fault,
            {
                "no scale": "The scores are not multiplied by scale.",
                "scale twice": "The scores are multiplied by scale twice.",
                "padding counted": "Columns past seqlen_k count: they were loaded as 0, so their score is 0, "
                "not -inf. "
                "Hide offs >= seqlen_k.",
                "last keys dropped": "The last, ragged tile of keys is never visited.",
                "mask forgotten": "The causal mask is missing inside the diagonal tile.",
                "mask too strict": "The causal mask is off by one: a query does not see its own position. Use <=.",
                "mask too loose": "The causal mask is off by one: a query sees the position after its own.",
                "mask local": "The mask compares cols, the index inside the tile. Use offs = start + cols.",
                "top-left": "The mask is aligned to the top-left corner: add seqlen_k - seqlen_q to rows.",
                "diagonal tile skipped": "The loop ends one tile too early: the tile that holds the query's own "
                "position is not visited.",
                "finite mask": "Hidden scores are a large negative number instead of -inf: a query that sees nothing "
                "then averages what it must not see.",
                "no max": "No maximum is subtracted before exp: large scores overflow.",
                "tile max only": "m_new is the maximum of this tile alone; take the larger of it and m.",
                "m starts at 0": "m starts at 0 instead of -inf: rows whose scores are all far below 0 "
                "underflow, and "
                "lse is wrong where nothing is visible.",
                "m not updated": "m is never set to m_new at the end of the loop body.",
                "no guard": "A row that sees nothing becomes NaN: -inf - -inf. Use 0 as the origin there.",
                "origin across columns": "origin is subtracted from the columns: a missing [:, None] broadcasts "
                "along the wrong axis without an error when the tile is square.",
                "acc not rescaled": "acc is not multiplied by alpha = exp(m - m_new).",
                "l not rescaled": "l is not multiplied by alpha = exp(m - m_new).",
                "inverse factor": "The old state is multiplied by exp(m_new - m), the inverse of the factor.",
                "divided inside": "acc is divided by l inside the loop, and so again and again.",
                "no division": "acc is never divided by l.",
                "half": "acc is kept in fp16: three digits are left. Accumulate in float32.",
                "base 2": "tl.exp2 is used on natural scores: use tl.exp, or fold 1/ln 2 into the scale.",
                "heads tiled": "Query head h reads key head h % Hkv; it should be h // groups.",
                "lse without m": "lse lacks the maximum: m + log(l).",
                "lse in base 2": "lse is in base 2; it should be natural.",
                "nothing added": "l and acc are still 0 after the loop: nothing of the tiles was added to them.",
                "end without offset": "The loop ends too early where there are fewer queries than keys: query r "
                "stands at position r + seqlen_k - seqlen_q, not at r.",
                "reads every tile": _EVERY_TILE,
                "scores stored": _STORED,
            },
        ),
        Mutant("no kernel", _no_kernel, _NO_KERNEL),
        *mutants(
            _refused,
            {
                "plain global": "The compiler does not see ordinary global variables: NEG_INF is one.",
                "plain helper": "A kernel may call only tl.… and functions that carry @triton.jit themselves",
                "changed dtype": "The variable l has one type before the loop",
            },
        ),
    ),
    hints=(
        "Two blanks. `end`: at which position does the last query of this program stand, and which key is the last "
        "it sees? The body: your tile step line by line; q, k and v of the tile are loaded already.",
        "`end` is one past that position, never above seqlen_k; rows start at tl.program_id(0) * BLOCK_M. In the "
        "body hide two kinds of columns: padding (offs >= seqlen_k) and, with CAUSAL, offs > rows + seqlen_k - "
        "seqlen_q. amax becomes tl.max(s, 1), @ becomes tl.dot, masked_fill becomes tl.where.",
        "end = tl.minimum(seqlen_k, position of the last row + 1)\n"
        "s = scale * tl.dot(q, tl.trans(k), input_precision='ieee')\nsee = offs[None, :] < seqlen_k\n"
        "... the causal part, then s = tl.where(see, s, float('-inf'))\nm_new = tl.maximum(m, tl.max(s, 1))\n"
        "origin = tl.where(m_new == float('-inf'), 0.0, m_new)\nalpha = tl.exp(m - origin)\n"
        "p = tl.exp(s - origin[:, None])\n... l and acc as before, and m = m_new",
    ),
    device=_device,
    source=_source,
)
