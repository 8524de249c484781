"""The TPU kernels of attention, compiled for every generation: static estimates against targets and budgets."""

from pathlib import Path

import pytest

from longwave.kernels import aot, attention
from longwave.kernels.aot import budget
from longwave.kernels.attention.mask import Causal

T = 4096
# One case for each code of its own: forward two heads in a block of lanes, one, and one over two such blocks; backward
# sums that stand transposed, and sums that do not.
FORWARD = {d: f"forward causal t={T} d={d}" for d in (64, 128, 256)}
BACKWARD = {d: f"backward causal t={T} d={d}" for d in (64, 128)}
TARGETS = {"v5e": (128, 0.50), "v5p": (128, 0.46), "v6e": (256, 0.32)}  # d, and the fraction of peak forward


def ours(chip):
    from longwave.kernels.attention import report, report_backward

    forward = [report.ours(name, chip, T, d, Causal()) for d, name in FORWARD.items()]
    backward = [e for e in report_backward.cases(chip) if e.problem in BACKWARD.values() and not e.peer]
    return [*forward, *(candidate.case for entry in backward for candidate in entry.candidates)]


@pytest.mark.full
@pytest.mark.skipif(aot.missing() is not None, reason=aot.missing() or "")
@pytest.mark.parametrize("chip", [*TARGETS])
def test_static_estimates_reach_their_targets_and_stay_within_budget(chip):
    names = [*FORWARD.values(), *BACKWARD.values()]
    measured = dict(zip(names, aot.estimates(ours, chip), strict=True))
    assert all(e.kernel == f"attention_{name.split()[0]}" for name in names for e in measured[name])
    d, target = TARGETS[chip]
    (forward,) = measured[FORWARD[d]]
    assert forward.peak >= target
    budget.check(measured, Path(attention.__file__).with_name("budgets.json"))
