"""What static estimates decided, kept beside a kernel as JSON: budgets to hold, and block sizes to launch with.

A row is a line, so that a change reads well in a diff; every row says which libtpu it stems from.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def libtpu() -> str:
    """The version of the TPU compiler that is installed; "none" without one."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def read(file: Path) -> dict[str, Any]:
    """The table of a file; empty where there is none yet."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write(file: Path, table: Mapping[str, Any]) -> None:
    """All of it or, if interrupted, what was there before."""
    part = file.with_suffix(".part")
    part.write_text(_text(table) + "\n", encoding="utf-8")
    os.replace(part, file)
    blocks.cache_clear()


@functools.cache
def blocks(file: Path, chip: str) -> dict[str, dict[str, int]]:
    """Problem -> block sizes that the autotuner found fastest on a chip: a chooser asks here, then follows a rule.

    Problems that no candidate could serve are left out; so is a chip that was never tuned for.
    """
    return {problem: row["blocks"] for problem, row in read(file).get(chip, {}).items() if "blocks" in row}


def _text(tree: Any, indent: str = "") -> str:
    if not isinstance(tree, Mapping) or not any(isinstance(value, Mapping) for value in tree.values()):
        return json.dumps(_rounded(tree))
    inner = indent + "  "
    lines = [f"{inner}{json.dumps(key)}: {_text(value, inner)}" for key, value in sorted(tree.items())]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _rounded(value: Any) -> Any:
    """Five digits: what lies below is no difference between kernels."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value
