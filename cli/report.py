"""Print what the TPU compiler's schedule says of an operation's kernels, and of its peers.

    longwave report attention                            # on v5e; also draws attention-v5e.png
    longwave report attention --chip v5e v6e --save tables
    longwave report attention --only 'forward t=4096 d=128'
    longwave report attention --chip v6e --tune          # first choose block sizes, into kernels/attention/blocks.json
    longwave report my_package.my_report                 # a module of your own with `cases(chip)`

Every figure is a static estimate: kernels are compiled for the chip, and nothing runs. What the figures are, and what
they cannot show, is said in docs/proving_ground.md. Exit code: 0, 1 if the TPU compiler is missing or a kernel of ours
has no estimate, 2 if an argument is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longwave.cli.usage import UsageError, nearest

if TYPE_CHECKING:
    from longwave.kernels.aot.tune import Entry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("operation", metavar="OPERATION", help="e.g. attention, or a module with `cases(chip)`")
    parser.add_argument("--chip", nargs="+", action="extend", metavar="NAME", help="v5e (default), v5p, v6e")
    parser.add_argument("--save", type=Path, default=Path(), metavar="DIR", help="of the roofline plots (default: .)")
    parser.add_argument("--only", default="", metavar="WORDS", help="of the problems, e.g. 'forward d=128'")
    parser.add_argument("--tune", action="store_true", help="first compile the block sizes that the table lacks")
    parser.add_argument("--again", action="store_true", help="with --tune: also those that it has")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="compilers side by side (default: 2)")


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # read when JAX is imported; nothing here runs on an accelerator
    from longwave.kernels import aot
    from longwave.kernels.aot.chips import CHIPS

    module = find(args.operation, "cases", *(["candidates"] if args.tune else []))
    chips = list(dict.fromkeys(args.chip or ["v5e"]))
    for chip in chips:
        if chip not in CHIPS:
            raise UsageError(f"--chip {chip}: expected one of {', '.join(CHIPS)}{nearest(chip, CHIPS)}")
    if args.jobs < 1:
        raise UsageError(f"--jobs {args.jobs}: expected at least 1")
    if args.again and not args.tune:
        raise UsageError("--again: only with --tune")
    if reason := aot.missing():
        print(f"longwave report: {reason}", file=sys.stderr)
        return 1
    refused = [_report(args, module, chip) for chip in chips]
    return 1 if any(refused) else 0


def find(operation: str, *needed: str) -> str:
    """The name of the module that says what an operation's kernels are, and has the functions `needed`."""
    from longwave import kernels

    files = [path for folder in kernels.__path__ for path in Path(folder).glob("*/report.py")]
    known = sorted(path.parent.name for path in files if path.parent.name != "aot")
    name = f"longwave.kernels.{operation}.report" if operation in known else operation
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not name.startswith(str(error.name)):  # something that the module needs
            raise
        listed = ", ".join([*known, "or a module with `cases(chip)`"])
        raise UsageError(f"OPERATION {operation!r}: expected {listed}{nearest(operation, known)}") from error
    for function in needed:
        if not callable(getattr(module, function, None)):
            raise UsageError(f"OPERATION {operation!r}: {name} has no function `{function}(chip)`")
    return name


def _report(args: argparse.Namespace, module: str, chip: str) -> bool:
    """Whether a kernel of ours has no estimate."""
    from longwave.cli import estimates, roofline
    from longwave.kernels.aot import tune
    from longwave.kernels.aot.estimate import CaseError

    if args.tune:
        tune.tune(module, chip, again=args.again, jobs=args.jobs)
    entries: Sequence[Entry] = importlib.import_module(module).cases(chip)
    rows = estimates.contest(module, chip, entries, jobs=args.jobs, only=args.only)
    if not rows:
        problems = "; ".join(dict.fromkeys(entry.problem for entry in entries))
        raise UsageError(f"--only {args.only!r}: expected words of one of: {problems}")
    name = args.operation.removesuffix(".report").rpartition(".")[2]
    print(estimates.table(name, chip, rows))
    args.save.mkdir(parents=True, exist_ok=True)
    path = args.save / f"{name}-{chip}.png"
    path.write_bytes(roofline.draw(name, chip, rows))
    print(f"written {path}", file=sys.stderr)
    refused = [row.result for row in rows if isinstance(row.result, CaseError) and not row.entry.peer]
    for error in refused:
        print(f"longwave report: {error}", file=sys.stderr)
    return bool(refused)
