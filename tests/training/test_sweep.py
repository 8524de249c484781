"""Sweeps: each replica is its single run, alone on its devices; what is asked for, what is written, what goes wrong."""

import dataclasses
import functools
import json
import math
import os
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import train
from longwave import layers, models
from longwave.configs.loader import ConfigError
from longwave.kernels import aot
from longwave.layers.contract_forms import _groups
from longwave.training import metrics, sharding, sweep
from longwave.training.checkpoint import RunMismatch
from longwave.training.optimizer import AdamW, Plateau, warmup_constant
from longwave.training.preemption import RESUMABLE
from longwave.training.program import _stacked, build
from longwave.training.run import Run
from longwave.training.sweep_report import Outcome, summary
from longwave.training.terminal import spelled
from tests.models.decay import Decay
from tests.test_train import CONFIG, ROOT, find, records, signal_at
from tests.tolerances import OTHER_MESH, REPLICA, assert_close
from tests.training.test_step import Majority

KIND = r"(?:all-gather|all-reduce|reduce-scatter|collective-permute|collective-broadcast|(?:ragged-)?all-to-all)"
NOTATION = r"\{\{.*?\}\}|\{\}|\[[\d,]*\]<=\[[\d,]*\](?:T\([\d,]*\))?|mesh\[.*?\] ?\{.*?\}"
COLLECTIVE = re.compile(rf" {KIND}(?:-start)?\(.*?(?:replica_groups|source_target_pairs)=({NOTATION})")


def joined(text, of, devices=8):
    """Of every collective, whether one of its groups joins devices for which `of` (a number -> its part) differs."""
    groups = [_groups(found, devices) for found in COLLECTIVE.findall(text)]
    assert len(groups) == len(re.findall(rf" {KIND}(?:-start)?\(", text))
    return [any(len({of(i) for i in group}) > 1 for group in each) for each in groups]


class Seeded(Majority):
    """With an order of its own for every seed."""

    def stream(self, split, *, batch_size, seed=0, step=0, rows=None):
        return super().stream(split, batch_size=batch_size, step=step + 1000 * seed)


def backbone(inputs, *, rngs, mixer=Decay, mlp=None):
    options = {"width": 8, "depth": 1, "norm": layers.BatchNorm, "dropout": 0.2}
    return models.Backbone(inputs, **options, mixers=(mixer,), mlp=mlp, rngs=rngs)


RUN = Run(
    task=Seeded(),
    backbone=backbone,
    optimizer=AdamW(
        lr=9.0,
        weight_decay=0.05,
        groups={"A": (0.001, 0.0)},
        schedule=warmup_constant(warmup=2),
        plateau=Plateau(factor=0.5, patience=0),
        clip=1.0,
    ),
    steps=9,
    batch_size=16,
    ema=0.9,
    mesh={"replica": 4, "data": 2},
    sweep={"seed": (0, 3), "lr": (0.01, 0.003)},
    log_every=1,
    max_bad_steps=2,
)
LARGE = dataclasses.replace(
    RUN, backbone=functools.partial(backbone, mixer=layers.S4D, mlp=layers.MLP), accumulate=2
)  # with an FFT, which XLA would gather


class Trained:
    """A program run for some steps, with an evaluation after every third."""

    def __init__(self, run):
        self.program = build(run, jax.devices()[: math.prod(run.mesh.values())])
        with jax.set_mesh(self.program.mesh):
            key = jax.eval_shape(self.program.new_key)
            self.step = self.program.train_step.lower(self.program.state, self.program.batch, key).compile()

    def run(self, steps, poison=()):
        """(state, losses, scores). `poison`: (step, replica) whose batch is not finite."""
        program, losses, scores = self.program, [], []
        with jax.set_mesh(program.mesh):
            key, stream = program.key(), program.stream("train")
            state = program.init(key)
            for k in range(steps):
                rows = dict(next(stream))
                rows["weight"] = rows["weight"].copy()
                for _, replica in (p for p in poison if p[0] == k):
                    rows["weight"][replica] = np.nan
                state, values = self.step(state, program.global_batch(rows), key)
                losses.append(jax.device_get(values["loss"]))
                if k % 3 == 2:
                    scores.append(program.evaluate(state, "valid"))
                    state = program.evaluated(state, scores[-1])
        return state, losses, scores


def vector(tree, replica=None):
    """All numbers of a tree, or those of one replica."""
    return np.concatenate([np.ravel(leaf if replica is None else leaf[replica]) for leaf in jax.tree.leaves(tree)])


@pytest.fixture(scope="module")
def trained():
    return Trained(RUN)


def alone(run, replica):
    return Trained(dataclasses.replace(sweep.single(run, replica), mesh={"data": 1}))


def assert_is_its_single_run(swept, replica, alone):
    state, losses, scores = swept
    own, own_losses, own_scores = alone.run(9)
    i = replica.index
    for name in ("params", "ema", "model_state", "plateau"):
        assert_close(vector(getattr(state.train, name), i), vector(getattr(own, name)), REPLICA, name)
    assert_close([loss[i] for loss in losses], own_losses, REPLICA)
    assert_close([s["loss"][i] for s in scores], [s["loss"] for s in own_scores], REPLICA)
    assert int(state.step) == int(own.step)
    assert int(state.evaluated) == int(own.evaluated)
    best = int(np.argmax([s["accuracy"] for s in own_scores]))
    assert int(state.best.step[i]) == 3 * (best + 1)
    assert_close(state.best.scores["loss"][i], own_scores[best]["loss"], REPLICA)
    at_best = alone.run(3 * (best + 1))[0]
    assert_close(vector(state.best.params, i), vector(at_best.ema), REPLICA)
    assert_close(vector(state.best.model_state, i), vector(at_best.model_state), REPLICA)


def test_replicas_over_devices_are_their_single_runs(trained):
    """Four replicas of two devices each, with dropout, BatchNorm, plateau and averaged parameters."""
    swept = trained.run(9)
    assert len({float(loss) for loss in swept[1][-1]}) == 4
    replica = trained.program.replicas[3]
    assert_is_its_single_run(swept, replica, alone(RUN, replica))


@pytest.mark.full
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({"data": 1}, marks=pytest.mark.large),
        pytest.param({"replica": 2, "data": 1}, marks=pytest.mark.large),
        {"replica": 2, "data": 2, "tensor": 2},
    ],
)
def test_every_replica_is_its_single_run_on_any_mesh(mesh, singles):
    many = Trained(dataclasses.replace(LARGE, mesh=mesh))
    swept = many.run(9)
    for replica, single in zip(sweep.replicas(LARGE), singles, strict=True):
        assert_is_its_single_run(swept, replica, single)
    devices = math.prod(mesh.values())
    assert not any(joined(many.step.as_text(), lambda i: i * mesh.get("replica", 1) // devices, devices))


@pytest.fixture(scope="module")
def singles():
    return [alone(LARGE, replica) for replica in sweep.replicas(LARGE)]


def test_no_collective_joins_two_replicas(trained):
    text = trained.step.as_text()
    crossing = joined(text, lambda i: i // 2)  # device i of a mesh of 4 x 2 belongs to replica i // 2
    assert crossing  # the gradient's
    assert not any(crossing)
    assert any(joined(text, lambda i: i % 4))  # the same program on the axes the wrong way round
    with jax.set_mesh(trained.program.mesh):
        place = sharding.replica_sharding(trained.program.mesh)
        mean = jax.jit(lambda x: x.sum(0), in_shardings=place).lower(jax.ShapeDtypeStruct((4, 2), np.float32))
    assert joined(mean.compile().as_text(), lambda i: i // 2) == [True]


@pytest.mark.parametrize(
    ("groups", "rows", "columns"),  # of devices laid out as 4 x 2
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", False, True),
        ("{{0,2,4,6},{1,3,5,7}}", True, False),
        ("[4,2]<=[8]", False, True),
        ("[2,4]<=[4,2]T(1,0)", True, False),
        ("{}", True, True),
    ],
)
def test_groups_are_read_in_every_notation(groups, rows, columns):
    text = f"  %a.1 = f32[2]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, use_global_device_ids=true"
    assert joined(text, lambda i: i // 2) == [rows]
    assert joined(text, lambda i: i % 2) == [columns]


def test_a_replica_that_is_not_finite_fails_alone(trained):
    good = trained.run(6)[0]
    bad = trained.run(6, poison=[(k, 1) for k in (3, 4, 5)])[0]
    at_three = trained.run(3)[0]
    for i in range(4):
        expected = at_three if i == 1 else good
        for name in ("params", "ema", "model_state", "opt"):
            ours, theirs = vector(getattr(bad.train, name), i), vector(getattr(expected.train, name), i)
            np.testing.assert_array_equal(ours, theirs)
    assert np.asarray(bad.failed).tolist() == [0, 5, 0, 0]  # two bad steps in a row
    assert np.asarray(bad.train.skipped)[1].tolist() == [3, 3]
    assert int(bad.best.step[1]) == 3  # what it was before


@pytest.mark.skipif(aot.missing() is not None, reason=aot.missing() or "")
@pytest.mark.full
def test_a_sharded_sweep_compiles_for_tpus_with_no_collective_across_replicas():
    run = dataclasses.replace(LARGE, mesh={"replica": 2, "data": 2})
    program = build(run, aot.topology("v5e:2x2"))
    arguments = program.state, program.batch, jax.eval_shape(program.new_key)
    report = aot.compile(program.train_step, *arguments, mesh=program.mesh)
    assert report.fits
    crossing = joined(report.hlo, lambda i: i // 2, devices=4)
    assert crossing
    assert not any(crossing)
    assert any(joined(report.hlo, lambda i: i % 2, devices=4))


def test_the_short_form_on_the_command_line():
    given = ["train.steps=3", "sweep.seed=range(1, 4)", "sweep.lr = (1e-3, 3e-3)"]
    assert sweep.long_form(given) == ["train.steps=3", "train.sweep={'seed': (1, 2, 3), 'lr': (0.001, 0.003)}"]
    assert sweep.long_form(["train.steps=3"]) == ["train.steps=3"]
    for wrong in (
        "sweep.seed=3",
        "sweep.seed=range(",
        "sweep.lr=open('x')",
        "sweep.lr=(1e-3, x)",
        "sweep.seed=range()",
    ):
        with pytest.raises(ValueError, match=r"expected values such as sweep\.seed=range\(5\)"):
            sweep.long_form([wrong])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": (1, 2)}, "names 'width': expected 'seed' or 'lr'"),
        ({"seed": ()}, "is empty"),
        ({"lr": (0.1, 0.2, 0.1)}, "names a value twice"),
        ({"seed": (0, -1)}, "whole numbers of at least 0"),
        ({"seed": (0, 1.5)}, "whole numbers of at least 0"),
        ({"lr": (0.1, -0.1)}, "finite numbers of at least 0"),
        ({"lr": (0.1, math.nan)}, "finite numbers of at least 0"),
    ],
)
def test_sweeps_that_cannot_be_meant_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RUN, sweep=values)


def test_meshes_that_do_not_fit_a_sweep_are_refused():
    with pytest.raises(ValueError, match=r"'replica' without train\.sweep"):
        build(dataclasses.replace(RUN, sweep={}))
    with pytest.raises(ValueError, match="'replica' = 8 must divide the 4 replicas"):
        build(dataclasses.replace(RUN, mesh={"replica": -1}))


def test_seeds_are_slowest():
    assert [(r.index, r.seed, r.lr) for r in sweep.replicas(RUN)] == [
        (0, 0, 0.01),
        (1, 0, 0.003),
        (2, 3, 0.01),
        (3, 3, 0.003),
    ]
    assert [(r.seed, r.lr) for r in sweep.replicas(dataclasses.replace(RUN, sweep={"seed": (7,)}))] == [(7, 9.0)]
    assert [(r.seed, r.lr) for r in sweep.replicas(dataclasses.replace(RUN, seed=5, sweep={"lr": (0.1,)}))] == [
        (5, 0.1)
    ]
    assert sweep.replicas(RUN)[1].name == "replica-1-seed0-lr0.003"
    one = sweep.single(RUN, sweep.replicas(RUN)[3])
    assert (one.seed, one.optimizer.lr, one.sweep) == (3, 0.003, {})


def test_mean_and_deviation_are_over_the_seeds_of_a_rate():
    tests = {0.1: (0.5, 0.75, 0.4), 0.2: (0.25, 0.5, 0.75), 0.3: (0.5, 0.1, 0.1)}
    failed = {(0.2, 2): (6, 20), (0.3, 1): (0, 0), (0.3, 2): (6, 20)}  # (rate, seed) -> (best step, failed at)
    found = []
    for seed in range(3):
        for lr, values in tests.items():
            step, at = failed.get((lr, seed), (6, 0))
            found.append(
                Outcome(sweep.Replica(len(found), seed, lr), step, at, {"accuracy": 0.5}, {"accuracy": values[seed]})
            )
    rows = {row.pop("lr"): row for row in summary(found, "accuracy")}
    assert rows[0.1] == {
        "valid": 0.5,
        "mean": pytest.approx(np.mean(tests[0.1])),
        "std": pytest.approx(np.std(tests[0.1], ddof=1)),
        "n": 3,
        "min": 0.4,
        "max": 0.75,
        "failed": 0,
    }
    assert (rows[0.2]["mean"], rows[0.2]["n"], rows[0.2]["failed"]) == (0.375, 2, 1)
    assert (rows[0.3]["mean"], rows[0.3]["std"], rows[0.3]["n"], rows[0.3]["failed"]) == (0.5, None, 1, 2)


def test_batches_of_other_lengths_are_filled_up():
    """Buckets give the seeds batches of different lengths."""
    batch = lambda length, value: {"inputs": np.full((2, length), value), "label": np.full(2, value)}
    streams = {5: iter([batch(3, 1)]), 7: iter([batch(4, 2)])}
    found = next(_stacked(streams, [5, 5, 7], {"inputs": (4,), "label": ()}))
    assert found["inputs"][:, 0].tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [2, 2, 2, 2]]
    assert found["label"][:, 1].tolist() == [1, 1, 2]


def test_lines_show_mean_and_range():
    values = {
        "loss": np.array([1.0, np.nan, 3.0]),
        "lr": np.array([0.5, 0.5]),
        "seconds": 2.0,
        "gone": np.array([np.inf]),
    }
    assert spelled(values) == "loss 2 (1 to 3) [1 not finite]  lr 0.5  seconds 2  gone nan [1 not finite]"
    line = metrics.over_replicas({name: values[name] for name in ("loss", "seconds")})
    assert line == {"loss": 2.0, "loss/min": 1.0, "loss/max": 3.0, "seconds": 2.0}


# As a user runs it.

# With a mixer that compiles fast.
TINY = CONFIG.replace("from longwave import layers", "from longwave import layers\nfrom tests.models import decay")
TINY = TINY.replace("@layers.S4D", "@decay.Decay").replace("layers.S4D.N = 4\n", "")
SWEEP = ("sweep.seed=(0, 3)", "sweep.lr=(0.003, 1e38)", "train.max_bad_steps=3", "train.steps=7")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the config and the data."""
    home = tmp_path_factory.mktemp("sweep")
    (home / "tiny.gin").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGWAVE_DATA", str(home / "data"))
        patch.setattr(train.distributed, "start", lambda cluster: None)  # the tests' devices are long in use
        patch.setattr(
            train,
            "build",
            lambda run, devices=None: build(run, devices or jax.devices()[: math.prod(run.mesh.values())]),
        )
        yield home


def start(home, name, *overrides):
    return train.main([str(home / "tiny.gin"), *overrides, "--run_dir", str(home / name)])


@pytest.fixture(scope="module")
def finished(home):
    """A sweep whose second rate cannot work."""
    assert start(home, "swept", *SWEEP) == 0
    return home / "swept"


def lines(folder):
    """Those of training and of validation."""
    found = metrics.read(folder)
    return [[line for line in found if f"{split}/loss" in line] for split in ("train", "valid")]


@pytest.mark.full
def test_a_replica_leaves_what_its_single_run_leaves(home, finished):
    assert start(home, "single", "train.seed=3", "optimizer.AdamW.lr=0.003", "train.steps=7") == 0
    replica, single = finished / "replica-2-seed3-lr0.003", home / "single"
    for ours, theirs in zip(lines(replica), lines(single), strict=True):
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        assert [line["tokens"] for line in ours] == [line["tokens"] for line in theirs]
        for name in {"train/loss", "train/grad_norm", "train/lr", "valid/loss", "valid/accuracy"} & set(ours[0]):
            assert_close([line[name] for line in ours], [line[name] for line in theirs], 10 * REPLICA, name)
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (replica, single))
    assert set(ours) - set(theirs) == {"lr", "replica_number", "replicas"}
    for name in ("best_step", "steps", "seed", "task", "metric", "parameters", "baselines"):
        assert ours[name] == theirs[name], name
    assert ours["test"]["accuracy"] == theirs["test"]["accuracy"]
    assert_close(ours["test"]["loss"], theirs["test"]["loss"], REPLICA)


def test_every_replica_has_a_result_of_its_own(finished):
    for seed in (0, 3):
        (replica,) = finished.glob(f"replica-*-seed{seed}-lr0.003")
        names = ("result.json", "metrics.jsonl", "table.md", "curve.png")
        assert all((replica / name).stat().st_size for name in names)
        training, validation = lines(replica)
        assert [line["step"] for line in training] == list(range(1, 8))
        scores = {line["step"]: line["valid/accuracy"] for line in validation}
        assert list(scores) == [4, 7]
        result = json.loads((replica / "result.json").read_text())
        assert (result["seed"], result["lr"], result["replicas"]) == (seed, 0.003, 4)
        assert result["valid"]["accuracy"] == scores[result["best_step"]] == max(scores.values())


def test_the_whole_says_mean_and_range_and_who_failed(finished):
    told = json.loads((finished / "sweep.json").read_text())
    by_folder = {each["folder"]: each for each in told["replicas"]}
    good = [by_folder[name]["test"]["accuracy"] for name in ("replica-0-seed0-lr0.003", "replica-2-seed3-lr0.003")]
    first, second = told["summary"]
    assert (first["lr"], first["n"], first["failed"]) == (0.003, 2, 0)
    assert first["mean"] == pytest.approx(np.mean(good))
    assert first["std"] == pytest.approx(np.std(good, ddof=1))
    assert (second["n"], second["failed"], second["mean"]) == (0, 2, None)
    broken = by_folder["replica-1-seed0-lr1e+38"]
    assert (broken["failed_at"], broken["test"]) == (3, None)
    assert "no finite step" in json.loads((finished / broken["folder"] / "result.json").read_text())["failed"]
    assert (finished / "sweep.png").stat().st_size
    assert (finished / "table.md").read_text().startswith("| lr | valid | mean | std | n |")
    whole, parts = lines(finished)[0], [lines(finished / name)[0] for name in sorted(by_folder)]
    for line, *each in zip(whole, *parts, strict=True):
        losses = [one["train/loss"] for one in each]
        assert line["train/loss"] == pytest.approx(np.mean(losses))
        assert (line["train/loss/min"], line["train/loss/max"]) == (min(losses), max(losses))
        assert line["tokens"] == 4 * each[0]["tokens"]
    assert [line["step"] for line in whole] == list(range(1, 8))


def test_another_sweep_is_another_run(home, finished):
    with pytest.raises(RunMismatch, match=r"train\.sweep"):
        start(home, "swept", *SWEEP[1:])
    with pytest.raises(ConfigError, match="names 'width'"):
        start(home, "x", "sweep.width=(8, 16)")


@pytest.mark.full
def test_a_stopped_sweep_goes_on_bit_for_bit_and_is_evaluated_again(home, finished, capsys):
    for step in (4, 6):  # at 4 an evaluation is due, which then belongs to the resumed run
        with signal_at(step - 1):
            assert start(home, "stopped", *SWEEP) == RESUMABLE
    assert start(home, "stopped", *SWEEP) == 0
    mine, theirs = (json.loads(records(folder)[1]) for folder in (finished, home / "stopped"))
    assert find(mine, "arrays") == find(theirs, "arrays")
    before, stopped = (json.loads((folder / "sweep.json").read_text()) for folder in (finished, home / "stopped"))
    assert before["replicas"] == stopped["replicas"]
    for name in [each["folder"] for each in before["replicas"]]:
        for ours, theirs in zip(lines(home / "stopped" / name), lines(finished / name), strict=True):
            pick = lambda line: {key: value for key, value in line.items() if key.startswith(("train/", "valid/"))}
            assert list(map(repr, map(pick, ours))) == list(map(repr, map(pick, theirs)))
    assert train.main(["--evaluate", str(finished)]) == 0
    assert "not Long Range Arena" in capsys.readouterr().out
    after = json.loads((finished / "sweep.json").read_text())
    assert (after["replicas"], after["summary"]) == (before["replicas"], before["summary"])
    assert train.main(["--evaluate", str(finished), "--transfer", "same", "ListOps.seed=0"]) == 0
    other = json.loads((finished / "replica-2-seed3-lr0.003" / "transfer-same.json").read_text())
    assert other["test"] == before["replicas"][2]["test"]


@pytest.mark.full
def test_two_processes_with_half_of_the_replicas_each(home, finished):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mesh = "train.mesh={'replica': 2, 'data': 2}"
    command = [sys.executable, str(ROOT / "train.py"), "tiny.gin", *SWEEP, mesh, "--run_dir", "two"]
    processes = []
    for index in range(2):
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=2"),
        }
        processes.append(subprocess.Popen(command, cwd=home, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=400)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    for one in finished.glob("replica-*"):
        assert_close(
            [line["train/loss"] for line in lines(home / "two" / one.name)[0]],
            [line["train/loss"] for line in lines(one)[0]],
            OTHER_MESH,
        )
    ours, theirs = (json.loads((folder / "sweep.json").read_text()) for folder in (home / "two", finished))
    assert [each["failed_at"] for each in ours["replicas"]] == [each["failed_at"] for each in theirs["replicas"]]
    for a, b in zip(ours["replicas"][::2], theirs["replicas"][::2], strict=True):
        assert_close(a["test"]["loss"], b["test"]["loss"], OTHER_MESH)


@pytest.mark.full
def test_every_replica_failing_ends_the_sweep(home):
    with pytest.raises(FloatingPointError, match=r"steps in a row[\s\S]*so it is the update"):
        start(home, "hopeless", "sweep.seed=(0, 1)", "sweep.lr=(1e38,)", "train.max_bad_steps=3")


@pytest.mark.full
def test_dry_run_counts_all_replicas(home, capsys):
    assert train.main([str(home / "tiny.gin"), *SWEEP, "--dry_run"]) == 0
    out = capsys.readouterr().out
    count = re.search(r"(\d+) parameters in each of 4 replicas", out)[1]
    assert re.search(rf"parameters +{count}\n", out)
    assert "swept" in out
