"""train.py as a user runs it: to the end, stopped and resumed, on other meshes, in other folders, with bad input."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import train
from longwave.configs.loader import ConfigError
from longwave.kernels import aot
from longwave.lra.listops import ListOps
from longwave.training.checkpoint import RunMismatch
from longwave.training.preemption import RESUMABLE
from tests.tolerances import OTHER_MESH, assert_close

ROOT = Path(__file__).parents[1]
CONFIG = """
from __gin__ import dynamic_registration
from longwave import layers
from longwave import models
from longwave.lra import listops
from longwave.training import optimizer
from longwave.training import run

train.task = @listops.ListOps()
listops.ListOps.max_length = 16
listops.ListOps.min_tokens = 3
listops.ListOps.max_tokens = 16
listops.ListOps.sizes = (96, 20, 20)
listops.ListOps.processes = 1

train.backbone = @models.Backbone
models.Backbone.width = 8
models.Backbone.depth = 1
models.Backbone.mixers = (@layers.S4D,)
models.Backbone.dropout = 0.1
models.Backbone.norm = @layers.BatchNorm
layers.S4D.N = 4

train.optimizer = @optimizer.AdamW()
optimizer.AdamW.lr = 0.01
optimizer.AdamW.weight_decay = 0.05
optimizer.AdamW.groups = {'A': (0.001, 0.0), 'B': (0.001, 0.0)}
optimizer.AdamW.plateau = @optimizer.Plateau()
optimizer.Plateau.patience = 0

train.steps = 14
train.batch_size = 16
train.eval_every = 4
train.save_every = 3
train.log_every = 1
train.ema = 0.9
train.mesh = {'data': 1}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the config, and with the data once the first test has built it."""
    home = tmp_path_factory.mktemp("train")
    (home / "tiny.gin").write_text(CONFIG)
    os.environ["LONGWAVE_DATA"] = str(home / "data")
    yield home
    del os.environ["LONGWAVE_DATA"]


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """The mesh of {'data': 1} takes the first of the eight virtual devices."""
    with pytest.MonkeyPatch.context() as patch:
        build = train.build

        def on_as_many_devices_as_named(run, devices=None):
            count = int(np.prod(list(run.mesh.values())))
            return build(run, jax.devices()[:count] if devices is None else devices)

        patch.setattr(train, "build", on_as_many_devices_as_named)
        patch.setattr(train.distributed, "start", lambda cluster: None)  # the tests' devices are long in use
        yield


@pytest.fixture(scope="module")
def finished(home):
    """An uninterrupted run."""
    assert run(home, "whole") == 0
    return home / "whole"


def run(home, name, *overrides, **flags):
    options = [f"--{flag}={value}" for flag, value in flags.items()]
    return train.main([str(home / "tiny.gin"), *overrides, "--run_dir", str(home / name), *options])


@contextlib.contextmanager
def signal_at(step, number=signal.SIGTERM):
    """Sends the signal to this process when batch `step` is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        stream = ListOps.stream

        def interrupted(self, split, *, step: int = 0, **kwargs):
            for k, batch in enumerate(stream(self, split, step=step, **kwargs), start=step):
                if split == "train" and k == at:
                    os.kill(os.getpid(), number)
                yield batch

        at = step
        patch.setattr(ListOps, "stream", interrupted)
        yield


def lines(run_dir, key):
    """step -> value, and that no step was written twice."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    pairs = [(line["step"], line[key]) for line in found if key in line]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def records(run_dir):
    """Fingerprints of all arrays of the newest checkpoint."""
    newest = max((run_dir / "checkpoints").glob("*.json"), key=lambda p: int(p.stem))
    return int(newest.stem), newest.read_text()


def test_a_run_ends_with_everything_in_its_folder(finished):
    names = ("config.gin", "operative.gin", "run.json", "metrics.jsonl", "result.json", "curve.png", "table.md")
    assert all((finished / name).stat().st_size > 0 for name in names)
    assert list(finished.glob("events.out.tfevents.*"))
    result = json.loads((finished / "result.json").read_text())
    valid = lines(finished, "valid/accuracy")
    assert sorted(valid) == [4, 8, 12, 14]
    assert result["valid"]["accuracy"] == max(valid.values())
    assert valid[result["best_step"]] == max(valid.values())
    assert result["test"]["accuracy"] * 20 == pytest.approx(round(result["test"]["accuracy"] * 20), abs=1e-4)
    assert sorted(lines(finished, "train/loss")) == list(range(1, 15))
    assert {"root operator", "majority"} <= set(result["baselines"])
    assert 0 < result["training_seconds"] < 60


def test_evaluating_again_repeats_the_result(finished):
    before = json.loads((finished / "result.json").read_text())
    assert train.main(["--evaluate", str(finished)]) == 0
    after = json.loads((finished / "result.json").read_text())
    assert {k: after[k] for k in ("valid", "test", "best_step")} == {
        k: before[k] for k in ("valid", "test", "best_step")
    }


def test_sigterm_and_the_same_command_is_bitwise_the_same_run(home, finished, capsys):
    for step in (4, 7):  # at 4 an evaluation is due, which then belongs to the resumed run
        with signal_at(step - 1):
            assert run(home, "stopped") == RESUMABLE
        assert f"saved at step {step}" in capsys.readouterr().out
        assert records(home / "stopped")[0] == step  # nothing is lost
    assert run(home, "stopped") == 0
    mine, theirs = json.loads(records(home / "stopped")[1]), json.loads(records(finished)[1])
    assert find(mine, "arrays") == find(theirs, "arrays")
    for key in ("train/loss", "train/grad_norm", "train/lr", "valid/loss", "valid/accuracy"):
        assert lines(home / "stopped", key) == lines(finished, key), key
    ours, whole = (json.loads((d / "result.json").read_text()) for d in (home / "stopped", finished))
    assert ours["test"] == whole["test"]


def find(tree, name):
    """The value under a key, wherever it is nested."""
    if name in tree:
        return tree[name]
    return next((found for v in tree.values() if isinstance(v, dict) and (found := find(v, name))), None)


def test_another_mesh_goes_on_with_the_same_run(home, finished):
    with signal_at(6):
        assert run(home, "moved") == RESUMABLE
    assert run(home, "moved", "train.mesh={'data': 2, 'fsdp': 2, 'tensor': 2}") == 0
    mine, theirs = lines(home / "moved", "train/loss"), lines(finished, "train/loss")
    assert_close(list(mine.values()), list(theirs.values()), OTHER_MESH)


def test_a_folder_of_another_run_is_refused_with_the_difference(home, finished):
    files = lambda: {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    before = files()
    with pytest.raises(RunMismatch, match=r"layers.S4D.N = 4[\s\S]*layers.S4D.N = 8[\s\S]*--run_dir"):
        run(home, "whole", "layers.S4D.N=8")
    assert files() == before


def test_evaluating_with_other_data_is_refused(finished):
    before = (finished / "result.json").read_bytes()
    with pytest.raises(RunMismatch, match=r"ListOps\.seed"):
        train.main(["--evaluate", str(finished), "listops.ListOps.seed=1"])
    assert (finished / "result.json").read_bytes() == before


def test_transfer_evaluates_on_other_data_beside_the_result(finished, capsys):
    before = (finished / "result.json").read_bytes()
    for seed in (1, 0):
        assert train.main(["--evaluate", str(finished), "--transfer", f"seed{seed}", f"ListOps.seed={seed}"]) == 0
    assert "seed1" in capsys.readouterr().out
    other, same = (json.loads((finished / f"transfer-seed{seed}.json").read_text()) for seed in (1, 0))
    assert same["test"] == json.loads(before)["test"]
    assert other["baselines"] != same["baselines"]
    assert (finished / "result.json").read_bytes() == before
    with pytest.raises(SystemExit):
        train.main(["--evaluate", str(finished), "--transfer", "nothing"])


def test_a_relative_run_folder_lies_in_the_working_directory(home, monkeypatch):
    monkeypatch.chdir(home)
    assert train.main(["tiny.gin", "train.steps=2", "--run_dir", "relative/run"]) == 0
    assert (home / "relative" / "run" / "result.json").exists()


def test_a_run_made_shorter_than_it_is_ends_at_once(home, finished):
    shutil.copytree(finished, home / "shorter")
    assert run(home, "shorter", "train.steps=6") == 0
    assert sorted(lines(home / "shorter", "train/loss")) == list(range(1, 15))


@pytest.mark.full
def test_a_finished_run_can_be_made_longer(home, finished):
    assert run(home, "longer", "train.steps=4") == 0
    assert run(home, "longer", "train.steps=6") == 0
    assert json.loads((home / "longer" / "result.json").read_text())["steps"] == 6
    assert lines(home / "longer", "train/loss")[6] == lines(finished, "train/loss")[6]


def test_a_run_that_is_not_finite_stops_and_says_what_is_not(home):
    """A rate that overflows the parameters: gradients are finite, the update is not, and nothing of it is kept."""
    with pytest.raises(FloatingPointError, match=r"\d steps in a row[\s\S]*so it is the update"):
        run(home, "diverged", "optimizer.AdamW.lr=1e38", "train.max_bad_steps=3")


def test_mistakes_are_answered_with_their_place(home):
    with pytest.raises(ConfigError, match=r"layers.S4D.M"):
        run(home, "x", "layers.S4D.M=4")
    with pytest.raises(ConfigError, match=r"layers.Attention.heads.*no effect"):
        run(home, "x", "layers.Attention.heads=4")
    with pytest.raises((OSError, ConfigError), match=r"no_such.gin"):
        train.main([str(home / "no_such.gin")])
    (home / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(home, "file/run")
    assert not (home / "x").exists()


def test_dry_run_prints_what_it_would_take(home, capsys):
    assert train.main([str(home / "tiny.gin"), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "backbone/layers/*/mixer/inv_dt" in out
    assert "temporaries" in out
    assert "FLOPs" in out


@pytest.mark.skipif(aot.missing() is not None, reason=aot.missing() or "")
@pytest.mark.parametrize(
    "slice_of", ["v5e:2x2", *(pytest.param(s, marks=pytest.mark.full) for s in ("v5p:2x2x1", "v6e:2x2"))]
)
def test_the_step_compiles_ahead_for_tpus(home, capsys, slice_of):
    command = [str(home / "tiny.gin"), "--compile_only", slice_of, "train.mesh={'data': 2, 'fsdp': 2}"]
    assert train.main(command) == 0
    out = capsys.readouterr().out
    assert "fits: needs" in out
    assert re.search(r"parameters +522\n", out)
    assert re.search(r"all-reduce +[1-9]", out)  # of the gradient
    assert re.search(r"all-gather +[1-9]", out)  # of the parameters in shards


def test_help_is_worth_reading(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    out = capsys.readouterr().out
    for word in ("configs/demo.gin", "train.steps", "--compile_only", "--run_dir"):
        assert word in out


@pytest.mark.full
def test_a_run_can_go_on_inside_the_profilers_window(home):
    assert run(home, "profiled", "train.steps=4") == 0
    assert run(home, "profiled", "train.steps=8", "train.profile=(3, 5)") == 0
    assert len(list((home / "profiled" / "profile").rglob("*.xplane.pb"))) == 1


@pytest.mark.full
def test_resuming_is_bitwise_in_every_form_of_the_step(home):
    """Scanned, rematerialised, in micro-batches, in bfloat16, on a mesh with every axis."""
    forms = (
        "models.Backbone.depth=2",
        "models.Backbone.scan=True",
        "models.Backbone.remat=True",
        "train.accumulate=2",
        "train.compute_dtype='bfloat16'",
        "train.mesh={'data': 2, 'fsdp': 2, 'tensor': 2}",
        "train.steps=9",
    )
    assert run(home, "forms", *forms) == 0
    with signal_at(4):
        assert run(home, "forms-stopped", *forms) == RESUMABLE
    assert run(home, "forms-stopped", *forms) == 0
    mine, theirs = (json.loads(records(home / name)[1]) for name in ("forms-stopped", "forms"))
    assert find(mine, "arrays") == find(theirs, "arrays")


@pytest.mark.full
def test_sigkill_loses_only_the_steps_since_the_last_save(home, finished):
    """In a process of its own, killed while it trains; the same command ends as if nothing had happened."""
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1")}
    command = [sys.executable, str(ROOT / "train.py"), str(home / "tiny.gin"), "--run_dir", str(home / "killed")]
    process = subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 8/"):
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=True)
    assert "resumed at step" in done.stdout
    mine, theirs = json.loads(records(home / "killed")[1]), json.loads(records(finished)[1])
    assert find(mine, "arrays") == find(theirs, "arrays")


@pytest.mark.full
@pytest.mark.parametrize(  # rows apart, and rows on both
    "mesh", [pytest.param("{'data': 2, 'fsdp': 2}", marks=pytest.mark.large), "{'tensor': 4}"]
)
def test_two_processes_train_as_one(home, finished, mesh):
    """Two CPU processes with two devices each, against one device."""
    name = "two" + re.sub(r"\W+", "-", mesh)
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for index in range(2):
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=2"),
        }
        command = [sys.executable, str(ROOT / "train.py"), str(home / "tiny.gin"), f"train.mesh={mesh}"]
        if "tensor" in mesh:  # checkpoints and evaluations fall between the log's own waits for the device
            command.append("train.log_every=7")
        processes.append(
            subprocess.Popen(
                [*command, "--run_dir", str(home / name)], cwd=home, env=environment, stderr=subprocess.PIPE, text=True
            )
        )
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    mine, theirs = lines(home / name, "train/loss"), lines(finished, "train/loss")
    assert max(mine) == 14
    assert_close(list(mine.values()), [theirs[step] for step in mine], OTHER_MESH)
    one, two = (json.loads((home / d / "result.json").read_text()) for d in ("whole", name))
    assert_close(two["test"]["loss"], one["test"]["loss"], OTHER_MESH)


@pytest.mark.full
def test_the_loop_costs_the_host_less_than_three_milliseconds(home):
    """Median over 300 iterations of the time outside dispatch and device wait, from the loop's own counters."""
    intervals = (f"train.{name}_every=150" for name in ("eval", "save", "log"))
    longer = ("listops.ListOps.max_length=512", "models.Backbone.width=16")  # a step that data can keep up with
    assert run(home, "host", "train.steps=300", *intervals, *longer) == 0
    spent = [json.loads(line) for line in (home / "host" / "metrics.jsonl").read_text().splitlines()]
    times = [line for line in spent if "train/loss" in line][-1]
    assert 0 < times["ms/host"] < 3.0, times
