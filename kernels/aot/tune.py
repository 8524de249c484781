"""The static autotuner: compiles candidate block sizes, ranks them by static estimate, freezes the fastest in a table.

An operation takes part through one module of two functions, `kernels/<operation>/report.py`:

    def cases(chip: str) -> list[Entry]        # what the report shows: our kernels at their block sizes, and peers
    def candidates(chip: str) -> list[Entry]   # what the tuner compares: problem -> candidate block sizes

    table = tune("longwave.kernels.attention.report", "v5e")      # compiles, writes kernels/attention/blocks.json
    blocks(file, "v5e")["causal d=128 bfloat16"]                  # {"q": 1024, "k": 1024}: what a chooser reads

The functions are called again in the compiler's own process, so that nothing of a Case must be pickled; they should be
quick, and say the same each time.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from longwave.kernels.aot import frozen
from longwave.kernels.aot.estimate import Case, CaseError, estimates
from longwave.kernels.aot.timing import Estimate

Kind = Literal["cases", "candidates"]
Result = list[Estimate] | CaseError  # of the kernels of one program, or why there is none

# Programs that one process compiles: starting one costs as much as a kernel or two, and results are kept after each.
_BATCH = 4
# No verdicts on a candidate: mistakes of its `Launch` or of the reader, and a process that somebody else ended.
_NO_VERDICT = re.compile(r"\b(LaunchError|ScheduleFormatError|SIGKILL|SIGTERM|SIGINT)\b")
_OUT_OF_VMEM = re.compile(
    r"Scoped allocation with size \S+ and limit \S+ exceeded scoped vmem limit by [\d.]+\w"
    r"|Allocation \(size=\d+\) would exceed memory \(size=\d+\)"
)


@dataclass(frozen=True)
class Candidate:
    """One program, and the block sizes by which a table would name it; none where there is nothing to choose."""

    case: Case
    blocks: Mapping[str, int] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.blocks.items())


@dataclass(frozen=True)
class Entry:
    """One kernel at one problem. The fastest of its candidates counts.

    problem: what entries that compare have in common, e.g. "forward causal n=4096 d=128 bfloat16".
    kernel:  whose it is, e.g. "longwave" or "jax splash_attention".
    peer:    somebody else's, to be held against ours.
    """

    problem: str
    kernel: str
    candidates: Sequence[Candidate]
    peer: bool = False


def seconds(result: Result) -> float:
    """Of all kernels of a program, one after the other; infinite where it was refused."""
    return float("inf") if isinstance(result, CaseError) else sum(e.time for e in result)


def reason(error: CaseError) -> str:
    """Why a program has no estimate, in a line: what the compiler says of memory, else how its message begins."""
    text = " ".join(str(error).split())
    match = _OUT_OF_VMEM.search(text)
    return match[0] if match else text[:200]


def measure(
    operation: str, kind: Kind, chip: str, picks: Sequence[tuple[int, int]], *, jobs: int = 2
) -> Iterator[tuple[tuple[int, int], Result]]:
    """((entry, candidate), result) for each pick, as they come; progress and time left go to stderr.

    operation: the module with `cases` and `candidates`.    jobs: processes side by side, of about a GB each.
    """
    batches = [tuple(picks[i : i + _BATCH]) for i in range(0, len(picks), _BATCH)]
    progress = _Progress(f"{operation.removesuffix('.report').rpartition('.')[2]} on {chip}", len(picks))
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        running = {
            pool.submit(estimates, _build, operation, kind, chip, batch, return_errors=True): batch for batch in batches
        }
        for done in concurrent.futures.as_completed(running):
            progress.advance(len(running[done]))
            yield from zip(running[done], done.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)
        progress.end()


def _build(operation: str, kind: Kind, chip: str, picks: Sequence[tuple[int, int]]) -> list[Case]:
    entries = getattr(importlib.import_module(operation), kind)(chip)
    return [entries[i].candidates[j].case for i, j in picks]


def tune(
    operation: str, chip: str, *, file: Path | None = None, again: bool = False, jobs: int = 2
) -> Mapping[str, Mapping[str, Any]]:
    """Compiles the candidates that the table lacks, and returns the chip's part of it: problem -> row.

    A row holds the `blocks` that were fastest (none if all were refused), and of every candidate `tried` its seconds, a
    static estimate, or the reason for which the compiler refused it. The file is written after every few programs: what
    was interrupted goes on where it stopped.

    file:  the table; by default `blocks.json` beside the module.
    again: compile everything, also what the table knows. Without it, rows of another libtpu stay, and stderr says so.

    Raises:
      CaseError: a candidate's `Launch` is wrong, its schedule cannot be read, or its process was killed (memory).
    """
    module = importlib.import_module(operation)
    file = file or Path(str(module.__file__)).with_name("blocks.json")
    entries: list[Entry] = module.candidates(chip)
    table = frozen.read(file)
    rows: dict[str, dict[str, Any]] = table.setdefault(chip, {})
    for entry in entries:
        old = rows.get(entry.problem, {"libtpu": frozen.libtpu(), "tried": {}})
        left = {c.label: old["tried"][c.label] for c in entry.candidates if c.label in old["tried"]}
        stale = old["libtpu"] != frozen.libtpu() and len(left) < len(entry.candidates)
        if again or stale:  # times of two compilers do not compare
            old, left = {"libtpu": frozen.libtpu()}, {}
        rows[entry.problem] = _row(entry, left, old["libtpu"])
    if others := {row["libtpu"] for row in rows.values()} - {frozen.libtpu()}:
        print(f"{file}: rows of libtpu {', '.join(sorted(others))} stay as they are", file=sys.stderr)

    tried = lambda i: rows[entries[i].problem]["tried"]
    picks = [(i, j) for i, e in enumerate(entries) for j, c in enumerate(e.candidates) if c.label not in tried(i)]
    for (i, j), result in measure(operation, "candidates", chip, picks, jobs=jobs):
        if isinstance(result, CaseError) and _NO_VERDICT.search(str(result)):
            raise result
        outcome = reason(result) if isinstance(result, CaseError) else seconds(result)
        rows[entries[i].problem] = _row(
            entries[i], {**tried(i), entries[i].candidates[j].label: outcome}, frozen.libtpu()
        )
        frozen.write(file, table)
    return rows


def _row(entry: Entry, tried: Mapping[str, float | str], libtpu: str) -> dict[str, Any]:
    row: dict[str, Any] = {"libtpu": libtpu, "tried": dict(tried)}
    times = [(time, c) for c in entry.candidates if isinstance(time := tried.get(c.label), float)]
    if times:
        row["blocks"] = dict(min(times, key=lambda pair: pair[0])[1].blocks)
    return row


class _Progress:
    """One line on stderr that is written over; where stderr is no terminal, a line each time."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done, self.start = what, total, 0, time.perf_counter()
        self.terminal = sys.stderr.isatty()
        self._say(f"{what}: compiling {total} programs")

    def advance(self, programs: int) -> None:
        self.done += programs
        left = (time.perf_counter() - self.start) / self.done * (self.total - self.done)
        about = f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
        self._say(f"{self.what}: {self.done} of {self.total} programs compiled, about {about} left")

    def end(self) -> None:
        if self.total and self.terminal:
            print(file=sys.stderr)

    def _say(self, text: str) -> None:
        if self.total:
            line = f"\r{text}\x1b[K" if self.terminal else f"{text}\n"
            print(line, end="", file=sys.stderr, flush=True)
