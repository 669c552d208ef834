"""The command ``effattn``: instruments, benchmark, practice, grading, and a check of this machine.

Exit status: 0 all well, 1 a check failed, 2 the command was called wrongly.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

from effattn_lab import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Libraries are imported by the command that needs them."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(given[0] if given else "")
    if not given:
        parser.print_help()
        return 2
    args = parser.parse_args(given)
    try:
        status: int = args.run(args)
        return status
    except (ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"effattn {args.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `effattn ... | head`
        sys.stderr.close()
        return 0
    except OSError as error:  # a full disk, a folder that may not be written
        where = f" ({error.filename})" if error.filename else ""
        print(f"effattn {args.command}: {error.strerror or error}{where}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _parser(asked: str) -> argparse.ArgumentParser:
    """The parser; ``asked`` is the command, whose options alone are filled in where that loads a module."""
    parser = argparse.ArgumentParser(prog="effattn", description="Efficient Attention Lab, from the shell.")
    parser.add_argument("--version", action="version", version=f"effattn-lab {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    xray = commands.add_parser("xray", help="compile a kernel for GPUs that are not here and look inside")
    _kernel_arguments(xray)
    xray.add_argument("--gpu", default="all", help="a GPU, several with commas, or all (default)")
    xray.add_argument(
        "--head-dim", type=int, nargs="+", default=[64, 128], metavar="D", help="default: 64 128"
    )
    xray.add_argument(
        "--dtype", nargs="+", default=["fp16"], choices=["fp16", "bf16", "fp32"], help="default: fp16"
    )
    xray.add_argument(
        "--mask", nargs="+", default=["causal"], choices=["full", "causal", "window"], help="default: causal"
    )
    xray.set_defaults(run=_xray)

    traffic = commands.add_parser(
        "traffic", help="bytes a kernel really moves, counted in Triton's interpreter"
    )
    _kernel_arguments(traffic)
    traffic.set_defaults(run=_traffic)

    bench = commands.add_parser("bench", help="correctness, then speed against SDPA and the roofline")
    _kernel_arguments(bench)
    bench.add_argument(
        "--seqlen", type=int, nargs="+", metavar="N", help="default: the lengths of the mechanism's table"
    )
    bench.set_defaults(run=_bench)

    doctor = commands.add_parser("doctor", help="what this machine can run, and what is missing")
    doctor.add_argument("--json", action="store_true", help="machine-readable output")
    doctor.set_defaults(run=_doctor)

    for name, (module, add, run, text) in _ELSEWHERE.items():
        command = commands.add_parser(name, help=text)
        # Only the command that is called loads its module: the others would cost every start.
        if name == asked:
            home = importlib.import_module(module)
            getattr(home, add)(command)
            command.set_defaults(run=getattr(home, run))
    return parser


#: Commands that live with what they do: module, functions that add the options and that run it, help.
_ELSEWHERE = {
    "quiz": ("effattn_lab.interview.quiz", "add_arguments", "run", "practise interview questions in the terminal"),
    "deck": ("effattn_lab.interview.deck", "add_arguments", "run", "the interview questions as an Anki deck"),
    "release": ("effattn_lab.grading.release", "add_arguments", "run", "student notebooks for a class"),
    "grade": ("effattn_lab.grading.run", "add_arguments", "run", "grade a folder of submissions in a sandbox"),
    "regrade": (
        "effattn_lab.grading.run", "add_regrade_arguments", "run_regrade", "one submission again, with its seed",
    ),
    "report": ("effattn_lab.grading.report", "add_arguments", "run", "what a class found hard, as a page"),
}  # fmt: skip


def _kernel_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "slug",
        help="the mechanism whose kernels are meant, such as flash or delta_rule; a wrong one lists all",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def _xray(args: argparse.Namespace) -> int:
    from effattn_lab.measure.xray import xray_rows

    gpus = "all" if args.gpu == "all" else [name.strip() for name in args.gpu.split(",")]
    rows = xray_rows(args.slug, gpus, tuple(args.head_dim), tuple(args.dtype), tuple(args.mask))
    if not args.json:
        rows = [_essentials(row, args.slug) for row in rows]
    title = f"{args.slug} as shipped. Spills should be 0; only a T4 has no tensor-core path"
    show(rows, args.json, title, always=("spill_bytes", "tensor_core"))
    return 0


def _essentials(row: dict[str, Any], slug: str) -> dict[str, Any]:
    """What one decides by, in short words: a terminal has 80 columns. ``--json`` has everything."""
    return {
        "kernel": _short(row["kernel"], slug),
        "gpu": row["gpu"],
        "D": row["head_dim"],
        **{name: row[name] for name in ("dtype", "mask", "tile")},
        "regs": row["registers"],
        "spill_bytes": row["spill_bytes"],
        "tensor_core": row["tensor_core_instructions"],
        "occupancy": row["occupancy"],
    }


def _traffic(args: argparse.Namespace) -> int:
    from effattn_lab.measure.traffic import traffic_rows

    rows = traffic_rows(args.slug)
    if not args.json:
        rows = [{**row, "kernel": _short(row["kernel"], args.slug)} for row in rows]
    show(rows, args.json, title=f"{args.slug}: bytes in the interpreter against the formula")
    return 0


def _short(kernel: str, slug: str) -> str:
    """``_flash_bwd_dq_kernel`` to ``bwd_dq``."""
    return kernel.removeprefix(f"_{slug}_").removesuffix("_kernel")


def _bench(args: argparse.Namespace) -> int:
    from effattn_lab import bench

    rows = bench.rows(args.slug, seqlens=args.seqlen)
    show(rows, args.json, title=f"{args.slug}: one run on this machine, in ms; compare ratios, not times")
    return 0 if all(row["correct"] for row in rows) else 1


def _doctor(args: argparse.Namespace) -> int:
    from effattn_lab import doctor

    rows = doctor.rows()
    show(rows, args.json, title="this machine")
    return 1 if any(row["status"] == "missing" and row["needed"] for row in rows) else 0


def show(
    rows: Sequence[dict[str, Any]], as_json: bool, title: str, always: Sequence[str] = ("kernel", "what")
) -> None:
    """Print rows as JSON, or as a table. Columns that never vary are said once below it, but for ``always``."""
    if as_json:
        json.dump(rows, sys.stdout, indent=1)
        print()
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    same = [n for n in rows[0] if n not in always and len(rows) > 1 and len({row[n] for row in rows}) == 1]
    shared = " · ".join(f"{name} {_cell(rows[0][name])}" for name in same if rows[0][name] is not None)
    table = Table(
        title=title,
        title_justify="left",
        caption=shared or None,
        caption_justify="left",
        box=SIMPLE_HEAD,  # no bars: eight columns fit into 80 characters
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    varying = [name for name in rows[0] if name not in same]
    for name in varying:
        number = all(isinstance(row[name], int | float | None) for row in rows)
        justify: Literal["right", "left"] = "right" if number else "left"
        table.add_column(name.replace("_", " "), justify=justify, no_wrap=name == varying[0])
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in varying))
    Console().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
