"""The published accuracies on recall tasks, each with its source and how sure we are of it: read from `published.toml`,
and printed as the tables of docs/recall.md.

    python -m longwave.tasks.recall.published
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".toml")

READ, FIGURE = "read in the source", "read off a figure"
GRADES = (READ, FIGURE, "quoted by another text", "from memory, not verified")
OUT_OF_MEMORY = "out of memory"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a table. scores: column -> per cent, None where memory ran out; what was not reported is missing."""

    task: str
    model: str
    scores: Mapping[str, float | None]
    source: str
    grade: str
    notes: str = ""


def load(path: Path = FILE) -> tuple[Row, ...]:
    """The rows in the order of the file. Raises ValueError with all that is wrong in it."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    wrong = [f"unknown key {key!r}" for key in content if key != "row"]
    rows: dict[tuple[str, str], Row] = {}
    for number, entry in enumerate(content.get("row", []), start=1):
        name = (entry.get("task", "?"), entry.get("model", f"row {number}"))
        faults = [*_faults(entry), *(["a second row of this name"] if name in rows else [])]
        wrong += [f"{', '.join(name)}: {fault}" for fault in faults]
        if not faults:
            scores = {key: None if value == OUT_OF_MEMORY else float(value) for key, value in entry["scores"].items()}
            rows[name] = Row(scores=scores, **{key: value for key, value in entry.items() if key != "scores"})
    if wrong:
        raise ValueError(f"{path}:\n  " + "\n  ".join(wrong))
    return tuple(rows.values())


def _faults(entry: Mapping[str, Any]) -> list[str]:
    needed = {field.name for field in dataclasses.fields(Row)} - {"notes"}
    faults = [f"unknown key {key!r}" for key in entry if key not in needed | {"notes"}]
    faults += [f"{key} is missing" for key in sorted(needed) if not entry.get(key)]
    if entry.get("grade", GRADES[0]) not in GRADES:
        faults.append(f"grade = {entry['grade']!r}: expected one of {', '.join(GRADES)}")
    return faults + [
        f"{column} = {value!r}: expected 0 to 100, or {OUT_OF_MEMORY!r}"
        for column, value in entry.get("scores", {}).items()
        if value != OUT_OF_MEMORY and not (isinstance(value, int | float) and 0 <= value <= 100)
    ]


def markdown(rows: Sequence[Row]) -> str:
    """A table of rows of one task, and where its numbers are from."""
    columns = list(dict.fromkeys(column for row in rows for column in row.scores))
    show = lambda row, column: "" if (score := row.scores.get(column)) is None else f"{score:g}"
    lines = [["model", *(f"{int(c):,}" if c.isdigit() else c for c in columns)], ["---"] * (len(columns) + 1)]
    lines += [[row.model, *(show(row, column) for column in columns)] for row in rows]
    sources = dict.fromkeys(f"{row.source}: {row.grade}" for row in rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n({'; '.join(sources)}.)\n"


if __name__ == "__main__":
    every = load()
    for task in dict.fromkeys(row.task for row in every):
        print(f"**{task}**\n\n{markdown([row for row in every if row.task == task])}")
