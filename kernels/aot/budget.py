"""Budgets: what static estimates of a kernel must not fall behind, in `kernels/<operation>/budgets.json`.

    def test_budgets():
        budget.check(measured, Path(attention.__file__).with_name("budgets.json"))

The file is chip -> case -> kernel -> row. `UPDATE_BUDGETS=1 pytest ...` writes the rows that the test measures, on
purpose: the diff shows what got better, what worse.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from longwave.kernels.aot import frozen
from longwave.kernels.aot.timing import Estimate

MARGIN = 0.05
SWITCH = "UPDATE_BUDGETS"
_SMALLER_IS_BETTER = ("bundles", "spills", "bytes")


class BudgetExceeded(AssertionError):
    """A kernel got worse, or has no budget; the message lists what, from what number to what."""


def check(measured: Mapping[str, Sequence[Estimate]], file: Path) -> None:
    """Holds case name -> estimates of its kernels to the file. Rows of cases that are not among them stay untouched.

    Raises:
      BudgetExceeded: bundles a step, spills a step or bytes more than 5 % above their budget, the fraction of peak
          more than 5 % below it, or a case that the file lacks. A budget of another libtpu is said to be one.
    """
    table, found = frozen.read(file), list(_rows(measured))
    if os.environ.get(SWITCH) == "1":
        for chip, case, _, _ in found:
            table.setdefault(chip, {})[case] = {}
        for chip, case, kernel, row in found:
            table[chip][case][kernel] = row
        frozen.write(file, table)
        return
    wrong, compilers = [], set()
    for chip, case, kernel, row in found:
        old = table.get(chip, {}).get(case, {}).get(kernel)
        if faults := ["no budget in the file"] if old is None else list(_worse(old, row)):
            wrong.append(f"  {chip}, {case}, {kernel}: {', '.join(faults)}")
        if old is not None:
            compilers.add(old["libtpu"])
    other = sorted(compilers - {frozen.libtpu()})
    of_another = f"{file}: budgets of libtpu {', '.join(other)}, estimates of libtpu {frozen.libtpu()}" if other else ""
    if wrong:
        lines = [f"{file}: {len(wrong)} of {len(found)} static estimates are over budget (+{MARGIN:.0%})", *wrong]
        if other:
            lines.append(f"{of_another}: the compiler may be what changed")
        raise BudgetExceeded("\n".join([*lines, f"meant so? {SWITCH}=1 writes these rows anew"]))
    if other:
        warnings.warn(f"{of_another}: within the margin all the same", stacklevel=2)


def _rows(measured: Mapping[str, Sequence[Estimate]]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(chip, case, kernel, row); the second call of a kernel in a case is "kernel 2"."""
    for case, estimates in measured.items():
        calls: dict[str, int] = {}
        for e in estimates:
            calls[e.kernel] = calls.get(e.kernel, 0) + 1
            kernel = e.kernel if calls[e.kernel] == 1 else f"{e.kernel} {calls[e.kernel]}"
            row = {"bundles": float(e.bundles), "spills": float(e.spills), "peak": float(e.peak), "bytes": int(e.bytes)}
            yield e.chip, case, kernel, {**row, "libtpu": frozen.libtpu()}


def _worse(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in _SMALLER_IS_BETTER:
        if new[name] > old[name] * (1 + MARGIN) * (1 + 1e-4):  # the file keeps five digits
            yield f"{name} {_number(old[name])} -> {_number(new[name])}{_percent(old[name], new[name])}"
    if new["peak"] < old["peak"] * (1 - MARGIN) * (1 - 1e-4):
        yield f"{old['peak']:.1%} -> {new['peak']:.1%} of peak{_percent(old['peak'], new['peak'])}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percent(old: float, new: float) -> str:
    return f" ({new / old - 1:+.1%})" if old else ""
