"""A budget file: what gets worse is named with both numbers, what is new by its name, and it changes on purpose."""

import json

import pytest

from longwave.kernels.aot import budget, frozen
from longwave.kernels.aot.timing import Estimate


def estimate(kernel="forward", chip="v5e", **figures):
    base = {
        "steps": 64,
        "bundles": 1000.0,
        "mxu": 0.5,
        "valu": 0.4,
        "eup": 0.1,
        "xlu": 0.1,
        "load": 0.3,
        "store": 0.2,
        "spills": 100.0,
        "compute": 64 * 1000 / 1.5e9,
        "dma": 1e-5,
        "bytes": 1 << 20,
        "bytes_exact": True,
        "flops": 2**30,
        "code": 900,
        "vmem": 1 << 20,
    }
    return Estimate(kernel=kernel, chip=chip, **{**base, **figures})


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Budgets of two cases, the second of two kernels."""
    monkeypatch.setattr(frozen, "libtpu", lambda: "1.0")
    monkeypatch.setenv("UPDATE_BUDGETS", "1")
    path = tmp_path / "budgets.json"
    budget.check({"small": [estimate()], "large": [estimate("dq"), estimate("dkv")]}, path)
    monkeypatch.setenv("UPDATE_BUDGETS", "0")
    return path


def test_a_row_holds_what_was_measured_and_the_compiler(file):
    kept = json.loads(file.read_text())
    assert sorted(kept["v5e"]) == ["large", "small"]
    assert sorted(kept["v5e"]["large"]) == ["dkv", "dq"]
    e = estimate()
    assert kept["v5e"]["small"]["forward"] == {
        "bundles": 1000.0,
        "spills": 100.0,
        "peak": pytest.approx(e.peak, rel=1e-4),
        "bytes": 1 << 20,
        "libtpu": "1.0",
    }
    assert sum('"bundles"' in line for line in file.read_text().splitlines()) == 3  # a row is a line


@pytest.mark.parametrize(
    "figures",
    [{}, {"bundles": 1049.0}, {"spills": 104.0}, {"bytes": (1 << 20) + 40_000}, {"bundles": 9.0, "spills": 0.0}],
)
def test_what_is_within_five_per_cent_or_better_passes(file, figures):
    before = file.read_text()
    budget.check({"small": [estimate(**figures)]}, file)
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"bundles": 1060.0}, "bundles 1,000 -> 1,060 (+6.0%)"),
        ({"spills": 120.0}, "spills 100 -> 120 (+20.0%)"),
        ({"bytes": 1 << 21}, "bytes 1,048,576 -> 2,097,152"),
        ({"compute": 2 * 64 * 1000 / 1.5e9}, "of peak ("),
    ],
)
def test_what_is_worse_is_named_with_both_numbers(file, figures, said):
    before = file.read_text()
    with pytest.raises(budget.BudgetExceeded, match="1 of 2 static estimates") as failure:
        budget.check({"large": [estimate("dq"), estimate("dkv", **figures)]}, file)
    (line,) = [line for line in str(failure.value).splitlines() if line.startswith("  ")]
    assert line.startswith("  v5e, large, dkv: ")
    assert said in line
    assert file.read_text() == before


def test_the_first_spill_of_a_kernel_without_any_is_worse(file, monkeypatch):
    monkeypatch.setenv("UPDATE_BUDGETS", "1")
    budget.check({"small": [estimate(spills=0.0)]}, file)
    monkeypatch.delenv("UPDATE_BUDGETS")
    with pytest.raises(budget.BudgetExceeded, match="spills 0 -> 2"):
        budget.check({"small": [estimate(spills=2.0)]}, file)


def test_what_the_file_lacks_is_named(file):
    cases = {"small": [estimate(), estimate()], "new": [estimate()], "large": [estimate("dq", chip="v6e")]}
    with pytest.raises(budget.BudgetExceeded, match="3 of 4") as failure:
        budget.check(cases, file)
    for name in ("v5e, small, forward 2", "v5e, new, forward", "v6e, large, dq"):
        assert f"  {name}: no budget in the file" in str(failure.value)


def test_rewriting_on_purpose_touches_the_measured_cases_alone(file, monkeypatch):
    monkeypatch.setenv("UPDATE_BUDGETS", "1")
    monkeypatch.setattr(frozen, "libtpu", lambda: "2.0")
    budget.check({"large": [estimate("fused", bundles=5000.0)], "new": [estimate(chip="v6e")]}, file)
    kept = json.loads(file.read_text())
    assert list(kept["v5e"]["large"]) == ["fused"]  # the two kernels of before are gone
    assert kept["v5e"]["large"]["fused"]["libtpu"] == "2.0"
    assert kept["v5e"]["small"]["forward"]["libtpu"] == "1.0"
    assert list(kept["v6e"]) == ["new"]


def test_budgets_of_another_compiler_are_said_to_be(file, monkeypatch):
    monkeypatch.setattr(frozen, "libtpu", lambda: "2.0")
    with pytest.warns(UserWarning, match=r"libtpu 1\.0, estimates of libtpu 2\.0"):
        budget.check({"small": [estimate()]}, file)
    with pytest.raises(budget.BudgetExceeded, match=r"libtpu 1\.0, estimates of libtpu 2\.0: the compiler may"):
        budget.check({"small": [estimate(bundles=2000.0)]}, file)
