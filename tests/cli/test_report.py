"""`longwave report`: the table of an operation and its peers, the plot, and what is said when they cannot be had."""

import io
import re

import pytest
from matplotlib.image import imread

from longwave.cli import estimates, roofline
from longwave.cli.estimates import Row
from longwave.cli.main import main
from longwave.kernels import aot
from longwave.kernels.aot import tune
from longwave.kernels.aot.chips import CHIPS
from longwave.kernels.aot.estimate import CaseError
from tests.kernels import matmul_operation
from tests.kernels.test_budget import estimate

OPERATION = matmul_operation.__name__
needs_libtpu = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))


def entries():
    ours = matmul_operation.cases("v5e")
    return [*ours[:1], tune.Entry("backward", "tiled", ours[0].candidates), *ours[1:]]


def rows():
    first, second, peer = entries()
    result = lambda *kernels: [estimate(kernel, compute=1e-6, dma=0.0, steps=0) for kernel in kernels]
    return [
        Row(first, first.candidates[0], result("forward")),
        Row(peer, peer.candidates[0], CaseError("out of vmem")),
        Row(second, second.candidates[0], result("dq", "dkv")),
    ]


def test_the_fastest_candidate_of_each_counts_and_problems_stand_together(monkeypatch):
    first, second, peer = entries()
    peer = tune.Entry(peer.problem, peer.kernel, [*peer.candidates, *first.candidates], peer=True)
    results = {(0, 0): [estimate()], (1, 0): CaseError("no"), (2, 0): CaseError("no"), (2, 1): [estimate("other")]}
    monkeypatch.setattr(
        estimates,
        "measure",
        lambda operation, cases, chip, picks, jobs: {pick: results[pick] for pick in picks}.items(),
    )
    found = estimates.contest(OPERATION, "v5e", [peer.__class__(**vars(e)) for e in (first, second, peer)], jobs=1)
    assert [(row.entry.problem, row.entry.kernel, row.candidate.label) for row in found] == [
        (first.problem, "tiled", "n=256"),
        (first.problem, "small tiles", "n=256"),
        ("backward", "tiled", "n=256"),
    ]
    assert found[1].result == [estimate("other")]
    found = estimates.contest(OPERATION, "v5e", [first, second, peer], jobs=1, only="backward")
    assert [row.entry.kernel for row in found] == ["tiled"]


def test_every_kernel_has_a_line_and_the_last_one_the_ratio():
    lines = estimates.table("matmul", "v5e", rows()).splitlines()
    assert "static estimates" in lines[0]
    assert lines[2].split()[:2] == ["blocks", "steps"]
    shown = [re.split(r"\s{2,}", line.strip()) for line in lines[3:9]]
    assert shown[0] == [matmul_operation.PROBLEM]
    assert (shown[1][0], shown[1][1], shown[1][-1]) == ("tiled", "n=256", "1.00")
    assert shown[2] == ["small tiles *", "n=128", "no estimate: out of vmem"]
    assert shown[3] == ["backward"]
    assert [line[0] for line in shown[4:]] == ["tiled: dq", "tiled: dkv"]
    assert shown[4][-1] == shown[5][-2] == "1.0"  # microseconds, and only the last kernel has a ratio
    assert shown[5][-1] == "1.00"


def test_a_peer_is_held_against_ours():
    first, _, peer = entries()
    ours, theirs = [estimate(compute=2e-6, dma=0.0, steps=0)], [estimate(compute=3e-6, dma=0.0, steps=0)]
    for result, last in ((ours, "1.50"), (CaseError("out of vmem"), "3.0")):  # without ours the time ends the line
        found = [Row(first, first.candidates[0], result), Row(peer, peer.candidates[0], theirs)]
        text = estimates.table("matmul", "v5e", found)
        assert next(line for line in text.splitlines() if "small tiles" in line).split()[-1] == last


def test_tuning_comes_first_and_a_kernel_without_estimate_is_a_failure(monkeypatch, tmp_path, capsys):
    calls = []
    refused = [Row(entries()[0], entries()[0].candidates[0], CaseError("case n: out of vmem"))]
    monkeypatch.setattr(aot, "missing", lambda: None)
    monkeypatch.setattr(tune, "tune", lambda *args, **how: calls.append((*args, how)))
    monkeypatch.setattr(estimates, "contest", lambda *args, **how: calls.append(args[:2]) or refused)
    monkeypatch.setattr(roofline, "draw", lambda *args: b"")
    assert main(["report", OPERATION, "--tune", "--again", "--chip", "v6e", "--save", str(tmp_path / "new")]) == 1
    assert calls == [(OPERATION, "v6e", {"again": True, "jobs": 2}), (OPERATION, "v6e")]
    assert "longwave report: case n: out of vmem" in capsys.readouterr().err
    assert (tmp_path / "new" / "matmul_operation-v6e.png").exists()


@pytest.mark.full
def test_a_plot_of_nothing_but_the_roof():
    refused = rows()[1:2]
    assert imread(io.BytesIO(roofline.draw("matmul", "v5e", refused))).shape[2] == 4


@needs_libtpu
def test_report_of_a_small_operation(tmp_path, capsys):
    assert main(["report", OPERATION, "--chip", "v5e", "--save", str(tmp_path), "--jobs", "1"]) == 0
    said = capsys.readouterr()
    assert "2 of 2 programs compiled" in said.err
    words = [line.split() for line in said.out.splitlines() if line]
    line = {name: next(w for w in words if w[0] == name) for name in ("tiled", "small")}
    steps = {"tiled": line["tiled"][2], "small": line["small"][4]}
    assert steps == {"tiled": "4", "small": "16"}  # (512 / block)^2
    assert float(line["small"][-1]) > 1  # four times as many steps, each with its overhead
    peak = float(line["tiled"][-3].rstrip("%")) / 100
    time = float(line["tiled"][-2]) * 1e-6
    assert peak == pytest.approx(2 * matmul_operation.N**3 / time / CHIPS["v5e"].peak, rel=0.1)
    assert imread(tmp_path / "matmul_operation-v5e.png").shape[2] == 4


def test_arguments_that_are_wrong(capsys):
    assert main(["report", OPERATION, "--chip", "v5"]) == 2
    assert "did you mean 'v5" in capsys.readouterr().err
    assert main(["report", "no_such_operation"]) == 2
    assert "OPERATION 'no_such_operation'" in capsys.readouterr().err
    assert main(["report", "longwave.kernels.partition"]) == 2
    assert "no function `cases(chip)`" in capsys.readouterr().err
    assert main(["report", OPERATION, "--again"]) == 2
    assert main(["report", OPERATION, "--jobs", "0"]) == 2


def test_without_the_compiler_one_line_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(aot, "missing", lambda: "libtpu is not installed: do this")
    assert main(["report", OPERATION]) == 1
    assert capsys.readouterr().err == "longwave report: libtpu is not installed: do this\n"
