"""Examine a mixer by the mixer contract and print its certificate.

    longwave check longwave.layers:S4D --set N=16
    longwave check my_mixer:MinGRU --width 32 --long

MIXER is a class or function that is called as MIXER(width, rngs=...), in an installed package or in a file
of the current folder. It runs on the CPU unless JAX_PLATFORMS is set. Exit code: 0 if it keeps every promise
that it makes, 1 if not, 2 if an argument is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from longwave.cli.usage import UsageError, assignments, check_accepts, nearest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mixer", metavar="PACKAGE:MIXER", help="where it is, e.g. longwave.layers:S4D")
    parser.add_argument("--width", type=int, metavar="D", help="of the sequences it is given (default: 16)")
    parser.add_argument("--long", action="store_true", help="longer sequences and optimised code")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="hyper-parameters of the mixer",
    )


def run(args: argparse.Namespace) -> int:
    # Read when JAX is imported: the CPU, of which eight virtual devices serve the promise about sharding.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    from longwave.layers import contract

    make = find(args.mixer)
    hyper = assignments(args.set, "--set")
    check_accepts(make, hyper, "--set")
    settings = contract.LONG if args.long else contract.Settings()
    width = settings.width if args.width is None else args.width
    try:
        settings = dataclasses.replace(settings, width=width)
        make(width, rngs=_rngs(), **hyper)
    except (TypeError, ValueError) as error:
        given = f"--width {width}" + (f" --set {' '.join(args.set)}" if args.set else "")
        raise UsageError(f"{args.mixer} cannot be built with {given}: {error}") from error
    checks = contract.examine(functools.partial(make, **hyper), settings)
    shown = ", ".join([f"width={width}", *(f"{name}={value!r}" for name, value in hyper.items())])
    print(contract.certificate(checks, f"{args.mixer} ({shown}), {'long' if args.long else 'short'} form"))
    return 0 if all(check.passed for check in checks) else 1


def find(where: str) -> Callable[..., Any]:
    """The object at "package.module:Name"; the current folder is searched too."""
    module_name, colon, name = where.partition(":")
    if not (module_name and colon and name):
        raise UsageError(f"PACKAGE:MIXER {where!r}: expected module:Name, e.g. longwave.layers:S4D")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(f"PACKAGE:MIXER {where!r}: no module {error.name!r}") from error
    if not callable(found := getattr(module, name, None)):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise UsageError(f"PACKAGE:MIXER {where!r}: {module_name} has no {name!r}{nearest(name, classes)}")
    return found


def _rngs() -> Any:
    from flax import nnx

    return nnx.Rngs(0)
