"""The static autotuner: the fastest candidate is kept, a refusal with its reason, what is known is not compiled."""

import json

import pytest

from longwave.kernels import aot
from longwave.kernels.aot import frozen, tune
from longwave.kernels.aot.estimate import CaseError
from tests.kernels import matmul_operation
from tests.kernels.test_budget import estimate

OPERATION = matmul_operation.__name__
PROBLEM = matmul_operation.PROBLEM


def alone(seconds):
    """The result of a program of one kernel that takes so long."""
    return [estimate(compute=seconds, dma=0.0, steps=0)]


@pytest.fixture
def compiler(monkeypatch):
    """In the compiler's place: 256-blocks take one microsecond, others two, more than 4 MiB a block is refused."""
    monkeypatch.setattr(frozen, "libtpu", lambda: "1.0")
    compiled = []

    def estimates(build, *args, return_errors):
        assert return_errors  # one that is refused must not stop the others
        cases = build(*args)
        compiled.extend(case.name for case in cases)
        results = {f"{PROBLEM} 256": alone(1e-6), f"double {1 << 16}": CaseError("out of vmem: 512 of 16 MiB")}
        return [results.get(case.name, alone(2e-6)) for case in cases]

    monkeypatch.setattr(tune, "estimates", estimates)
    return compiled


def test_the_fastest_is_kept_and_a_refusal_keeps_its_reason(compiler, tmp_path, capsys):
    file = tmp_path / "blocks.json"
    rows = tune.tune(OPERATION, "v5e", file=file)
    assert json.loads(file.read_text()) == {"v5e": rows}
    assert rows[PROBLEM] == {"blocks": {"n": 256}, "libtpu": "1.0", "tried": {"n=128": 2e-6, "n=256": 1e-6}}
    assert rows["double"]["blocks"] == {"rows": 1 << 11}
    assert rows["double"]["tried"][f"rows={1 << 16}"] == "out of vmem: 512 of 16 MiB"
    assert frozen.blocks(file, "v5e") == {PROBLEM: {"n": 256}, "double": {"rows": 1 << 11}}
    assert frozen.blocks(file, "v6e") == {}
    assert "4 of 4 programs compiled" in capsys.readouterr().err


def test_what_the_table_knows_is_not_compiled_unless_asked(compiler, tmp_path):
    file = tmp_path / "blocks.json"
    first = tune.tune(OPERATION, "v5e", file=file)
    assert len(compiler) == 4
    assert tune.tune(OPERATION, "v5e", file=file) == first
    assert len(compiler) == 4
    tune.tune(OPERATION, "v6e", file=file)
    assert len(compiler) == 8
    assert tune.tune(OPERATION, "v5e", file=file, again=True) == first
    assert len(compiler) == 12
    assert sorted(json.loads(file.read_text())) == ["v5e", "v6e"]


def test_an_interrupted_table_goes_on_where_it_stopped(compiler, tmp_path, monkeypatch):
    file = tmp_path / "blocks.json"
    monkeypatch.setattr(tune, "_BATCH", 1)
    measure = tune.measure

    def interrupted(*args, **kwargs):
        for number, found in enumerate(measure(*args, **{**kwargs, "jobs": 1})):
            if number == 3:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(tune, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune.tune(OPERATION, "v5e", file=file)
    kept = json.loads(file.read_text())["v5e"]
    assert sum(len(row["tried"]) for row in kept.values()) == 3
    monkeypatch.setattr(tune, "measure", measure)
    compiler.clear()
    rows = tune.tune(OPERATION, "v5e", file=file)
    assert len(compiler) == 1
    assert sum(len(row["tried"]) for row in rows.values()) == 4
    assert rows[PROBLEM]["blocks"] == {"n": 256}


def test_times_of_two_compilers_are_not_compared(compiler, tmp_path, monkeypatch, capsys):
    file = tmp_path / "blocks.json"
    tune.tune(OPERATION, "v5e", file=file)
    kept = json.loads(file.read_text())
    del kept["v5e"][PROBLEM]["tried"]["n=128"]  # as if it were a new candidate
    file.write_text(json.dumps(kept))
    monkeypatch.setattr(frozen, "libtpu", lambda: "2.0")
    compiler.clear()
    rows = tune.tune(OPERATION, "v5e", file=file)
    assert sorted(compiler) == [f"{PROBLEM} 128", f"{PROBLEM} 256"]  # both, or they would not compare
    assert rows[PROBLEM]["libtpu"] == "2.0"
    assert rows["double"]["libtpu"] == "1.0"
    assert "rows of libtpu 1.0 stay" in capsys.readouterr().err


def test_a_problem_that_nothing_serves_has_no_blocks(compiler, tmp_path, monkeypatch):
    refused = matmul_operation.candidates("v5e")[1]
    monkeypatch.setattr(
        matmul_operation, "candidates", lambda chip: [tune.Entry("double", "doubled", refused.candidates[1:])]
    )
    file = tmp_path / "blocks.json"
    assert "blocks" not in tune.tune(OPERATION, "v5e", file=file)["double"]
    assert frozen.blocks(file, "v5e") == {}


@pytest.mark.parametrize(
    "message",
    [
        "case double 2048 on v5e: LaunchError: kernel double: Launch.steps is 3, its grid is (4,)",
        "case double 2048: _estimate_all ended its process (SIGKILL): ",
    ],
)
def test_a_wrong_launch_or_want_of_memory_here_is_no_refusal(compiler, tmp_path, monkeypatch, message):
    monkeypatch.setattr(tune, "measure", lambda *args, **kwargs: iter([((1, 0), CaseError(message))]))
    with pytest.raises(CaseError, match="case double"):
        tune.tune(OPERATION, "v5e", file=tmp_path / "blocks.json")
    assert not (tmp_path / "blocks.json").exists()


@pytest.mark.full
@pytest.mark.large
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_with_the_real_compiler(tmp_path):
    rows = tune.tune(OPERATION, "v5e", file=tmp_path / "blocks.json", jobs=1)
    tried = rows[PROBLEM]["tried"]
    assert rows[PROBLEM]["blocks"] == {"n": 256}
    assert tried["n=256"] < tried["n=128"]
    assert rows["double"]["blocks"] == {"rows": 1 << 11}
    assert "vmem" in rows["double"]["tried"][f"rows={1 << 16}"].lower()
