"""Static estimates of an operation's kernels and of its peers, measured and set side by side as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from longwave.kernels.aot import frozen
from longwave.kernels.aot.chips import CHIPS
from longwave.kernels.aot.estimate import CaseError
from longwave.kernels.aot.timing import Estimate
from longwave.kernels.aot.tune import Candidate, Entry, Result, measure, reason, seconds

HEAD = ("", "blocks", "steps", "bundles/step", "MXU", "VALU", "EUP", "load", "store", "HBM", "spills/step")
HEAD += ("compute us", "DMA us", "MiB", "bound by", "peak", "time us", "x ours")
_LEFT = 2  # columns of words
LEGEND = """\
Static estimates: the compiler's schedule, weighed by a model of time; no chip ran any of it. MXU to HBM: how much of
each is used. MiB: moved between HBM and VMEM (~: not exactly). peak: useful FLOPs against the chip's. x ours: time
over that of our kernel at the same problem. * is somebody else's kernel, at the fastest of the blocks tried."""


class Row(NamedTuple):
    """An entry at the fastest of its candidates, or the error of its first one if none has an estimate."""

    entry: Entry
    candidate: Candidate
    result: Result


def contest(operation: str, chip: str, entries: Sequence[Entry], *, jobs: int, only: str = "") -> list[Row]:
    """Compiles every candidate of every entry whose problem holds the words `only`; ours stand first in a problem."""
    asked = [i for i, entry in enumerate(entries) if set(only.split()) <= set(entry.problem.split())]
    picks = [(i, j) for i in asked for j in range(len(entries[i].candidates))]
    results = dict(measure(operation, "cases", chip, picks, jobs=jobs))
    rows = []
    for i in asked:
        entry = entries[i]
        best = min(range(len(entry.candidates)), key=lambda j: seconds(results[i, j]))
        rows.append(Row(entry, entry.candidates[best], results[i, best]))
    order = list(dict.fromkeys(entry.problem for entry in entries))
    return sorted(rows, key=lambda row: (order.index(row.entry.problem), row.entry.peer))


def table(operation: str, chip: str, rows: Sequence[Row]) -> str:
    """The report as text: a line a kernel, below the problem that it solves."""
    hardware = CHIPS[chip]
    title = f"{operation} on {chip}, static estimates by libtpu {frozen.libtpu()}: "
    title += f"{hardware.peak / 1e12:.0f} TFLOP/s in bf16, {hardware.bandwidth / 1e9:.0f} GB/s"
    lines: list[tuple[str, ...] | str] = [HEAD]
    for problem in dict.fromkeys(row.entry.problem for row in rows):
        group = [row for row in rows if row.entry.problem == problem]
        ours = [seconds(row.result) for row in group if not row.entry.peer and not isinstance(row.result, CaseError)]
        lines.append(problem)
        for row in group:
            lines += _lines(row, min(ours, default=float("nan")))
    cells = [line for line in lines if not isinstance(line, str)]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    return "\n".join([title, "", *(_text(line, widths) for line in lines), "", LEGEND])


def _lines(row: Row, ours: float) -> Iterator[tuple[str, ...] | str]:
    name = f"  {row.entry.kernel}{' *' if row.entry.peer else ''}"
    if isinstance(row.result, CaseError):
        yield "  ".join(filter(None, (name, row.candidate.label, f"no estimate: {reason(row.result)}")))
        return
    several = len(row.result) > 1
    for number, e in enumerate(row.result):
        last = number == len(row.result) - 1
        whole = seconds(row.result) / ours if last else float("nan")
        yield (
            f"{name}: {e.kernel}" if several else name,
            row.candidate.label,
            *_figures(e),
            f"{whole:.2f}" if whole == whole else "",
        )


def _figures(e: Estimate) -> Iterator[str]:
    yield f"{e.steps:,}"
    yield f"{e.bundles:,.0f}"
    yield from (f"{share:.0%}" for share in (e.mxu, e.valu, e.eup, e.load, e.store, e.dma / e.time))
    yield f"{e.spills:,.0f}"
    yield f"{e.compute * 1e6:,.1f}"
    yield f"{e.dma * 1e6:,.1f}"
    yield f"{'' if e.bytes_exact else '~'}{e.bytes / 2**20:,.1f}"
    yield e.bound
    yield f"{e.peak:.1%}" if e.flops else "-"
    yield f"{e.time * 1e6:,.1f}"


def _text(line: tuple[str, ...] | str, widths: Sequence[int]) -> str:
    if isinstance(line, str):
        return line
    cells = [
        cell.ljust(width) if column < _LEFT else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
