"""The TPU kernels of attention, compiled for every generation: static estimates against targets and budgets."""

from pathlib import Path

import pytest

from longwave.kernels import aot, attention
from longwave.kernels.aot import budget
from longwave.kernels.attention.mask import Causal

T = 4096
TARGETS = {"v5e": (128, 0.50), "v5p": (128, 0.46), "v6e": (256, 0.32)}  # d, and the fraction of peak forward


def names(chip):
    """Forward and backward, with code of their own: heads that share a block of lanes, heads that have one; and d."""
    widths = {"forward": sorted({64, 128, TARGETS[chip][0]}), "backward": (64, 128)}
    return [f"{way} causal t={T} d={d}" for way in widths for d in widths[way]]


def ours(chip):
    from longwave.kernels.attention import report, report_backward

    entries = [entry for entry in report_backward.cases(chip) if not entry.peer]
    backward = {entry.problem: candidate.case for entry in entries for candidate in entry.candidates}
    forward = lambda name: report.ours(name, chip, T, int(name.rpartition("=")[2]), Causal())
    return [backward[name] if name in backward else forward(name) for name in names(chip)]


@pytest.mark.full
@pytest.mark.skipif(aot.missing() is not None, reason=aot.missing() or "")
@pytest.mark.parametrize("chip", [pytest.param(chip, marks=[pytest.mark.large] * (chip != "v5e")) for chip in TARGETS])
def test_static_estimates_reach_their_targets_and_stay_within_budget(chip):
    measured = dict(zip(names(chip), aot.estimates(ours, chip), strict=True))
    assert all(e.kernel == f"attention_{name.split()[0]}" for name in measured for e in measured[name])
    d, target = TARGETS[chip]
    (forward,) = measured[f"forward causal t={T} d={d}"]
    assert forward.peak >= target
    budget.check(measured, Path(attention.__file__).with_name("budgets.json"))
