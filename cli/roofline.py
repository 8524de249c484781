"""Static estimates under a chip's roof: FLOP/s against FLOPs a byte, our kernels and their peers."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from longwave.cli.estimates import Row
from longwave.kernels.aot import frozen
from longwave.kernels.aot.chips import CHIPS

ROOF, FAINT = "#30343b", "#6b6b6b"
COLOURS = ("#1f5fa8", "#c2571a", "#3c8d40", "#8a4fa3", "#a3832b", "#4f8f9c", "#b0476d", "#5c5c5c")


def draw(operation: str, chip: str, rows: Sequence[Row]) -> bytes:
    """A PNG. Ours are filled, peers hollow; a problem has one colour. What has no FLOPs of note is left out."""
    hardware = CHIPS[chip]
    problems = list(dict.fromkeys(row.entry.problem for row in rows))
    points = [(row, *_point(row)) for row in rows if not isinstance(row.result, str) and _point(row)[0] > 0]

    figure = Figure(figsize=(9.0, 5.5), layout="constrained")
    axes = figure.subplots()
    ridge = hardware.peak / hardware.bandwidth
    intensities = [x for _, x, _ in points] or [ridge]
    x = np.geomspace(min(ridge / 10, *intensities) / 2, max(ridge * 10, *intensities) * 2, 200)
    axes.loglog(x, np.minimum(hardware.peak, hardware.bandwidth * x) / 1e12, color=ROOF, linewidth=1.6)
    for row, intensity, rate in points:
        number = problems.index(row.entry.problem)
        colour = COLOURS[number % len(COLOURS)]
        face = "none" if row.entry.peer else colour
        name = f"{row.entry.problem}: {row.entry.kernel}"
        marker = "os^Dv"[number // len(COLOURS) % 5]
        axes.plot(intensity, rate / 1e12, marker, color=colour, markerfacecolor=face, markersize=7, label=name)
    said = f"static estimates by libtpu {frozen.libtpu()}, nothing was run; "
    said += f"roof: {hardware.peak / 1e12:.0f} TFLOP/s in bf16, {hardware.bandwidth / 1e9:.0f} GB/s"
    axes.set_title(said, fontsize=8, loc="left", color=FAINT)
    axes.set(xlabel="useful FLOPs a byte moved", ylabel="useful TFLOP/s")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if points:
        figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    figure.suptitle(f"{operation} on {chip}", x=0.01, ha="left", fontweight="bold")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()


def _point(row: Row) -> tuple[float, float]:
    """(FLOPs a byte, FLOP/s) of all kernels of a program together."""
    assert not isinstance(row.result, str)
    flops = sum(e.flops for e in row.result)
    return flops / max(sum(e.bytes for e in row.result), 1), flops / sum(e.time for e in row.result)
