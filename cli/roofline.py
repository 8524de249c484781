"""Static estimates under a chip's roof: FLOP/s against FLOPs a byte, our kernels and their peers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter
from matplotlib.typing import ColorType

from longwave.cli.estimates import Row
from longwave.kernels.aot import frozen
from longwave.kernels.aot.chips import CHIPS
from longwave.kernels.aot.estimate import CaseError

ROOF, FAINT = "#30343b", "#6b6b6b"
MARKERS = "os^Dvp"


def draw(operation: str, chip: str, rows: Sequence[Row]) -> bytes:
    """A PNG: a colour a problem, a shape a kernel, hollow for peers. Kernels that state no FLOPs are left out."""
    hardware = CHIPS[chip]
    problems = list(dict.fromkeys(row.entry.problem for row in rows))
    colours = dict(zip(problems, colormaps["turbo"](np.linspace(0.08, 0.92, len(problems))), strict=True))
    kernels = {row.entry.kernel: row.entry.peer for row in rows}
    points = [(row, *_point(row)) for row in rows if not isinstance(row.result, CaseError) and _point(row)[0] > 0]

    figure = Figure(figsize=(9.0, 5.5), layout="constrained")
    axes = figure.subplots()
    ridge = hardware.peak / hardware.bandwidth
    intensities = [ridge, *(x for _, x, _ in points)]
    x = np.array([min(intensities) / 8, ridge, max(intensities) * 8])
    axes.loglog(x, np.minimum(hardware.peak, hardware.bandwidth * x) / 1e12, color=ROOF, linewidth=1.6)
    for row, intensity, rate in points:
        axes.plot(intensity, rate / 1e12, **_marker(row.entry.kernel, kernels, colours[row.entry.problem]))
    said = f"static estimates by libtpu {frozen.libtpu()}, nothing was run; "
    said += f"roof: {hardware.peak / 1e12:.0f} TFLOP/s in bf16, {hardware.bandwidth / 1e9:.0f} GB/s"
    axes.set_title(said, fontsize=8, loc="left", color=FAINT)
    axes.set(xlabel="useful FLOPs a byte moved", ylabel="useful TFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.set_minor_formatter(NullFormatter())
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if points:
        handles = [Line2D([], [], label=name, linestyle="", **_marker(name, kernels, ROOF)) for name in kernels]
        handles += [Line2D([], [], color=colours[name], label=name) for name in problems]
        figure.legend(handles=handles, loc="outside right upper", fontsize=7, frameon=False)
    figure.suptitle(f"{operation} on {chip}", x=0.01, ha="left", fontweight="bold")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()


def _marker(kernel: str, kernels: Mapping[str, bool], colour: ColorType) -> dict[str, Any]:
    """A shape a kernel; kernels: name -> whether it is a peer."""
    shape = MARKERS[list(kernels).index(kernel) % len(MARKERS)]
    return {
        "marker": shape,
        "color": colour,
        "markerfacecolor": "none" if kernels[kernel] else colour,
        "markersize": 7,
    }


def _point(row: Row) -> tuple[float, float]:
    """(FLOPs a byte, FLOP/s) of all kernels of a program together."""
    assert not isinstance(row.result, CaseError)
    flops = sum(e.flops for e in row.result)
    return flops / max(sum(e.bytes for e in row.result), 1), flops / sum(e.time for e in row.result)
