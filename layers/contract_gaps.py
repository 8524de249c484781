"""How far two results are apart, how far they may be, and where they part."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from longwave.layers.contract_bench import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolerances:
    """Allowed differences of two float32 forms of one function, relative to the largest magnitude expected.

    forward:  of outputs. Forms sum in other orders; an FFT rounds against its largest term.
    gradient: of gradients. Where one is nearly zero (a bias that the softmax cancels) it is measured against
              `floor` times the largest among the parameters.
    bfloat16: error of a bfloat16 call over the error of rounding only parameters, inputs and outputs to
              bfloat16, root mean squares against float32: what rounding in between may add.
    """

    forward: float = 2e-5
    gradient: float = 2e-4
    floor: float = 1e-2
    bfloat16: float = 2.0


class Gap(NamedTuple):
    """One comparison: `error` should be at most `tolerance`."""

    what: str
    error: float
    tolerance: float
    detail: str = ""

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # false for NaN

    @property
    def share(self) -> float:
        """How much of the tolerance is used up."""
        return self.error / self.tolerance if self.tolerance else self.error


def fact(what: str, holds: bool, detail: str) -> Gap:
    """A statement that is either true or not."""
    return Gap(what, 0.0 if holds else 1.0, 0.0, detail)


def gap(what: str, got: np.ndarray, want: np.ndarray, tolerance: float, *, floor: float = 0.0) -> Gap:
    """max |got - want| / max(max |want|, floor), absolute where that is zero; with the first time and row."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        return Gap(what, np.inf, tolerance, f"shape {got.shape}, expected {want.shape}")
    error = np.abs(got - want).astype(np.float64)
    if not np.all(np.isfinite(error)):
        error = np.where(np.isfinite(error), error, np.inf)
    scale = max(np.max(np.abs(want), initial=0.0), floor) or 1.0
    relative = float(np.max(error, initial=0.0) / scale)
    if relative <= tolerance:
        return Gap(what, relative, tolerance)
    wrong = error > tolerance * scale
    index = tuple(int(i) for i in np.argwhere(wrong)[0])
    if got.ndim >= 2:  # the earliest time, then the first row and channel
        index = tuple(int(i) for i in min(np.argwhere(wrong).tolist(), key=lambda i: (i[1], *i)))
    where = f"time {index[1]}, row {index[0]}" if got.ndim >= 3 else f"index {index}"
    return Gap(what, relative, tolerance, f"first at {where}: {got[index]:.6g}, expected {want[index]:.6g}")


def forward(what: str, got: Run, want: Run, t: Tolerances) -> Iterator[Gap]:
    yield gap(f"{what}, y", got.y, want.y, t.forward)


def backward(what: str, got: Run, want: Run, t: Tolerances, *, carry: bool = True) -> Iterator[Gap]:
    """Gradients of x, of every parameter and, where both streams began with one, of the initial carry."""
    yield gap(f"{what}, gradient of x", got.dx, want.dx, t.gradient)
    floor = t.floor * largest(want.dparams.values())
    for name, g in want.dparams.items():
        yield gap(f"{what}, gradient of {name}", got.dparams[name], g, t.gradient, floor=floor)
    if carry:
        floor = t.floor * largest(want.dcarry)
        for i, (g, w) in enumerate(zip(got.dcarry, want.dcarry, strict=True)):
            yield gap(f"{what}, gradient of the initial carry's array {i}", g, w, t.gradient, floor=floor)


def both(what: str, got: Run, want: Run, t: Tolerances, *, carry: bool = True) -> Iterator[Gap]:
    yield from forward(what, got, want, t)
    yield from backward(what, got, want, t, carry=carry)


def largest(arrays: Iterable[np.ndarray]) -> float:
    return max((float(np.max(np.abs(a), initial=0.0)) for a in arrays), default=0.0)
