"""The mixer contract as a suite: what `layers/mixer.py` promises, asked of anybody's mixer.

    from longwave.layers import contract
    checks = contract.examine(MyMixer)          # MyMixer(width, rngs=...), or functools.partial(MyMixer, N=8)
    print(contract.certificate(checks))

A promise is a function from a `Bench` to gaps: what was compared, how far apart, how far is allowed.
Promises that the mixer does not claim (`supports`) are skipped, and so are those whose reference rests on a
broken one: a fault is reported once, by its cause.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax

from longwave.layers import contract_forms, contract_numbers
from longwave.layers.contract_bench import LONG, Bench, Settings
from longwave.layers.contract_gaps import Gap, Tolerances
from longwave.layers.mixer import Mixer

__all__ = ["LONG", "PROMISES", "Check", "Settings", "Tolerances", "certificate", "examine"]


class Promise(NamedTuple):
    """One line of the certificate. `needs`: capabilities; `after`: promises that its reference rests on."""

    test: Callable[[Bench, Tolerances], Iterator[Gap]]
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.test.__name__  # ty: ignore[missing-attribute]: a function has one

    @property
    def text(self) -> str:
        return (self.test.__doc__ or "").split("\n")[0].rstrip(".")


@dataclasses.dataclass(frozen=True)
class Check:
    """The outcome of one promise: its first failing or else widest gap, and where it fails in words."""

    name: str
    text: str
    passed: bool = True
    skipped: str = ""
    error: float = 0.0
    tolerance: float = 0.0
    seconds: float = 0.0
    detail: str = ""


_TYPES = ("supports", "types")
_CAUSAL = (*_TYPES, "causality")
_SPLIT = (*_CAUSAL, "chunks", "steps", "gradients")

PROMISES = (
    Promise(contract_forms.supports),
    Promise(contract_forms.roles),
    Promise(contract_forms.types, after=("supports",)),
    Promise(contract_numbers.causality, needs=("causal",), after=_TYPES),
    Promise(contract_numbers.chunks, needs=("causal", "carry"), after=_CAUSAL),
    Promise(contract_numbers.steps, needs=("causal", "carry"), after=_CAUSAL),
    Promise(contract_numbers.gradients, needs=("causal", "carry"), after=(*_CAUSAL, "chunks", "steps")),
    Promise(contract_numbers.start, needs=("carry",), after=_CAUSAL),
    Promise(contract_numbers.reset, needs=("carry", "reset"), after=_SPLIT),
    Promise(contract_numbers.packing, needs=("reset",), after=(*_SPLIT, "start", "reset")),
    Promise(contract_numbers.padding, after=(*_SPLIT, "start")),
    Promise(contract_numbers.garbage, after=("padding",)),
    Promise(contract_numbers.rows, after=_TYPES),
    Promise(contract_forms.finite, after=_TYPES),
    Promise(contract_forms.bfloat16, after=_TYPES),
    Promise(contract_forms.repeatable, after=_TYPES),
    Promise(contract_forms.sharding, after=(*_TYPES, "rows", "repeatable")),
    Promise(contract_forms.compilation, after=_TYPES),
)


def examine(
    make: Callable[..., Mixer], settings: Settings = Settings(), tolerances: Tolerances = Tolerances()
) -> list[Check]:
    """Every promise asked of `make(width, rngs=...)`. `LONG` settings have longer sequences."""
    checks: list[Check] = []
    doubtful: dict[str, str] = {}  # promise that fails, or rests on one that does -> the one that fails
    with jax.default_matmul_precision("float32"):  # forms are compared, not what a matmul unit rounds away
        bench = Bench(make, settings)
        for promise in PROMISES:
            lacks = [what for what in promise.needs if not bench.has(what)]
            causes = [doubtful[name] for name in promise.after if name in doubtful]
            if lacks or causes:
                reason = f"does not claim {lacks[0]!r}" if lacks else f"rests on {causes[0]!r}, which fails"
                check = Check(promise.name, promise.text, skipped=reason)
            else:
                check = _ask(promise, bench, tolerances)
            if causes or not check.passed:
                doubtful[promise.name] = causes[0] if causes else promise.name
            checks.append(check)
    return checks


def _ask(promise: Promise, bench: Bench, tolerances: Tolerances) -> Check:
    start = time.perf_counter()
    gaps = []
    skipped = ""
    try:
        for gap in promise.test(bench, tolerances):
            gaps.append(gap)
    except contract_forms.NotHere as reason:
        skipped = str(reason)
    except Exception as error:  # a mixer may raise anything; the certificate says what
        gaps.append(Gap(type(error).__name__, math.inf, 0.0, str(error).split("\n\n")[0]))
    worst = next((gap for gap in gaps if not gap.holds), None) or max(gaps, key=lambda gap: gap.share, default=None)
    check = Check(promise.name, promise.text, skipped=skipped, seconds=time.perf_counter() - start)
    if worst is None:
        return check
    detail = "" if worst.holds else f"{worst.what}: {worst.detail}"
    return dataclasses.replace(check, passed=worst.holds, error=worst.error, tolerance=worst.tolerance, detail=detail)


def certificate(checks: Sequence[Check], title: str = "") -> str:
    """The table of an examination, for terminals and Markdown alike, and below it what differs and where."""
    header = ("", "promise", "", "error", "allowed", "s")
    rows = [header]
    for c in checks:
        mark = "–" if c.skipped else "✓" if c.passed else "✗"
        numbers = ("", "") if c.skipped else (_number(c.error), _number(c.tolerance))
        rows.append((mark, c.name, c.skipped or c.text, *numbers, f"{c.seconds:.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cell = lambda text, i: text.rjust(widths[i]) if i >= 3 else text.ljust(widths[i])
    lines = ["| " + " | ".join(cell(text, i) for i, text in enumerate(row)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (n + 1) + ("-" if i < 3 else ":") for i, n in enumerate(widths)) + "|"
    broken = [c for c in checks if not c.passed]
    kept = sum(c.passed and not c.skipped for c in checks)
    total = f"{kept} kept, {len(broken)} broken, {sum(bool(c.skipped) for c in checks)} skipped"
    parts = [title] if title else []
    parts.append("\n".join([lines[0], rule, *lines[1:]]))
    parts += [f"✗ {c.name}: {c.text}\n  {c.detail}" for c in broken]
    parts.append(f"{total}; {sum(c.seconds for c in checks):.1f} s")
    return "\n\n".join(parts)


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1f}" if 0.1 <= value < 1000 else f"{value:.0e}"
