"""Logs: what is written, when device values are fetched, and what a kill or a resumed run leaves behind."""

import json
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longwave.training import logger, metrics, stopwatch
from longwave.training.logger import Logger
from longwave.training.stopwatch import Stopwatch
from tests.training import processes


@pytest.fixture
def start(tmp_path):
    """start(at): a logger of a run of 10 steps in tmp_path that begins after `at` steps."""

    def start(at=0, **settings):
        defaults = {"total_steps": 10, "batch_tokens": 100, "start": at, "log_every": 2, "tty": False}
        return Logger(tmp_path, **(defaults | settings))

    return start


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def seen(folder):
    """(step, name, value) of everything that does not measure time."""
    timed = ("ms/", "time", "seconds", "steps_per_s", "tokens_per_s")
    return [(r["step"], k, v) for r in lines(folder) for k, v in r.items() if k != "step" and not k.startswith(timed)]


def train(log, steps):
    for step in steps:
        log.late(step, {"loss": jnp.float32(step / 2)})


class Fetched:
    """A device array that remembers when it was fetched."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def __array__(self, dtype=None, copy=None):
        self.log.append(self.name)
        return np.zeros((), np.float32)

    def __float__(self):
        self.log.append(self.name)
        return 0.0


def test_lines_of_training_and_evaluation(start, tmp_path):
    with start() as log:
        train(log, range(1, 5))
        log.scalars(4, {"loss": 1.5, "accuracy": np.float32(0.25)}, split="valid")
        train(log, range(5, 11))
    assert seen(tmp_path) == [
        *[(2, "tokens", 200), (2, "train/loss", 1.0), (4, "tokens", 400), (4, "train/loss", 2.0)],
        *[(4, "tokens", 400), (4, "valid/loss", 1.5), (4, "valid/accuracy", 0.25)],
        *[(6, "tokens", 600), (6, "train/loss", 3.0), (8, "tokens", 800), (8, "train/loss", 4.0)],
        *[(10, "tokens", 1000), (10, "train/loss", 5.0)],
    ]
    assert all(abs(r["time"] - time.time()) < 60 for r in lines(tmp_path))
    assert lines(tmp_path)[-1]["tokens_per_s"] == pytest.approx(100 * lines(tmp_path)[-1]["steps_per_s"])


def test_values_are_fetched_after_the_next_dispatch_and_only_when_due(start):
    order = []
    with start(is_main=False) as log:
        for step in range(1, 6):
            order.append(f"dispatch {step}")
            returned = log.late(step, {"loss": Fetched(order, f"fetch {step}")})
            assert (returned is not None) == (step in (3, 5))
    assert order == [
        "dispatch 1",
        "dispatch 2",
        "dispatch 3",
        "fetch 2",
        "dispatch 4",
        "dispatch 5",
        "fetch 4",
    ]


def test_flush_writes_what_is_pending(start, tmp_path):
    with start() as log:
        train(log, [1, 2])
        assert lines(tmp_path) == []
        assert log.flush() == {"loss": 1.0}
        assert [r["step"] for r in lines(tmp_path)] == [2]
        assert log.flush() is None


def test_seconds_add_up_to_the_time_of_training_alone(start, tmp_path, monkeypatch):
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0], time=time.time, time_ns=time.time_ns)
    monkeypatch.setattr(logger, "time", clock)
    with start(log_every=4) as log:
        now[0] += 100  # the first step is compiled
        for step in range(1, 11):
            train(log, [step])
            now[0] += step  # while the device works on it
            if step in (3, 4, 10):
                log.flush()
                now[0] += 1000  # an evaluation: within an interval, at the end of one, and after the last step
                log.scalars(step, {"loss": 1.0}, split="valid")
                log.scalars(step, {"loss": 1.0}, split="other")
    timed = {r["step"]: (r["seconds"], r["steps_per_s"]) for r in lines(tmp_path) if "seconds" in r}
    assert {r["step"] for r in lines(tmp_path) if "valid/loss" in r} == {3, 4, 10}
    first, second = 1 + 2 + 3 + 4, 5 + 6 + 7 + 8
    assert timed == {4: (first, 4 / first), 8: (second, 4 / second), 10: (9 + 10, 2 / (9 + 10))}


def test_sync_leaves_nothing_in_this_process(start, tmp_path, monkeypatch):
    with start() as log:
        train(log, [1, 2])
        log.sync()
        assert [r["step"] for r in lines(tmp_path)] == [2]
    events = EventAccumulator(str(tmp_path)).Reload()  # TensorBoard's own thread may lag until the end
    assert [e.step for e in events.Scalars("train/loss")] == [2]
    for path in tmp_path.iterdir():
        path.unlink()
    monkeypatch.setattr(metrics, "is_local", lambda path: False)
    path = tmp_path / "metrics.jsonl"
    with start() as log:
        train(log, [1, 2, 3])
        assert not path.exists()
        log.sync()
        assert [r["step"] for r in lines(tmp_path)] == [2]
        path.write_text("untouched")
        log.sync()
        assert path.read_text() == "untouched"  # nothing new: not written again
        train(log, [4])
        log.sync()
        assert [r["step"] for r in lines(tmp_path)] == [2, 4]


def test_other_processes_write_nothing_and_return_the_same(start, tmp_path, capsys):
    with start(is_main=False) as log:
        train(log, range(1, 3))
        log.sync()
        train(log, range(1, 3))
        assert log.late(3, {"loss": jnp.float32(9)}) == {"loss": 1.0}
        log.scalars(3, {"loss": 1.0}, split="valid")
        log.text("config", "x")
    assert not any(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_a_resumed_run_writes_the_same_lines(start, tmp_path):
    def run(log, first, last):
        for step in range(first, last + 1):
            train(log, [step])
            if step % 4 == 0:
                log.scalars(step, {"loss": step * 1.0}, split="valid")

    with start() as log:
        run(log, 1, 10)
    whole = seen(tmp_path)
    for at in (4, 5, 6, 8):
        with start(at) as log:
            if at % 4 == 0:  # a loop that evaluates before it goes on
                log.scalars(at, {"loss": at * 1.0}, split="valid")
            run(log, at + 1, 10)
        assert seen(tmp_path) == whole


@pytest.mark.parametrize("tail", ['{"step": 4, "train/lo', '{"step": 4}garbage\n', '{"loss": 1}'])
def test_a_half_written_line_is_repaired(start, tmp_path, tail, caplog):
    with start() as log:
        train(log, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    good = path.read_text()
    path.write_text(good + tail)
    assert [r["step"] for r in metrics.read(tmp_path)] == [2]
    with start(2):
        assert path.read_text() == good
    assert "half-written line 2" in caplog.text


def test_values_that_are_not_finite_survive_as_strict_json(start, tmp_path):
    with start() as log:
        log.scalars(1, {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 1.0}, split="valid")
    (raw,) = lines(tmp_path)
    assert [raw[f"valid/{n}"] for n in "abcd"] == ["nan", "inf", "-inf", 1.0]
    (line,) = metrics.read(tmp_path)
    np.testing.assert_equal([line[f"valid/{n}"] for n in "abcd"], [np.nan, np.inf, -np.inf, 1.0])


def test_a_remote_file_is_rewritten_whole(start, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "is_local", lambda path: False)
    path = tmp_path / "metrics.jsonl"
    with start() as log:
        train(log, range(1, 4))
        assert not path.exists()
        monkeypatch.setattr(metrics, "REWRITE_EVERY", 0.0)
        train(log, range(4, 6))
        assert [r["step"] for r in lines(tmp_path)] == [2, 4]
        monkeypatch.setattr(metrics, "REWRITE_EVERY", 1e9)
        train(log, range(6, 9))
    assert [r["step"] for r in lines(tmp_path)] == [2, 4, 6, 8]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]  # no event files


def test_tensorboard_shows_each_step_once_after_a_resume(start, tmp_path):
    for at in (0, 4):
        with start(at) as log:
            for step in range(at + 1, 8):
                log.late(step, {"loss": step / 2 + 10 * (at > 0)})
            log.text("config", "train.steps = 1\ntrain.seed = 2")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(2, 1.0), (4, 2.0), (6, 13.0)]
    assert b"    train.seed = 2" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_plain_output(start, capsys):
    with start(log_every=5) as log:
        for step in range(1, 11):
            log.late(step, {"loss": jnp.float32(1.25), "accuracy": 0.5, "grad_norm": 3.0})
        log.scalars(10, {"accuracy": 0.75}, split="test")
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("step 5/10  loss 1.25  accuracy 0.5  ")
    assert first.endswith(" left")
    assert " steps/s  " in second
    assert " tokens/s  0:00:00 left" in second
    assert third == "step 10  test  accuracy 0.75"


def test_progress_bar(start, capsys):
    with start(tty=True) as log:
        train(log, range(1, 11))
        log.scalars(10, {"accuracy": 0.75}, split="valid")
        log.say("brackets [stay]")
    out = capsys.readouterr().out
    assert "step 10  valid  accuracy 0.75" in out
    assert "brackets [stay]" in out
    assert "10/10" in out.splitlines()[-1]
    assert "loss 5" in out.splitlines()[-1]


def test_an_error_in_the_loop_is_not_hidden_by_a_fetch(start):
    class Broken:
        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("the device is gone")

    with pytest.raises(KeyError), start() as log:  # noqa: PT012
        log.late(2, {"loss": Broken()})
        raise KeyError


def test_a_run_folder_that_cannot_be_written(start, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to the run folder .*file/run.*--run_dir"):
        Logger(tmp_path / "file" / "run", total_steps=1, batch_tokens=1)


TOGETHER = """
import sys
from pathlib import Path
from longwave.training import distributed
distributed.start()
from longwave.training.logger import Logger
folder = Path(sys.argv[1])
make = lambda name: Logger(folder / name, total_steps=9, batch_tokens=1, log_every=1, is_main=distributed.is_main())
try:
    make("file/run")
except OSError as error:
    print(error)
log = make("run")
log.late(1, {"loss": 2.0})
if distributed.is_main():
    log._file.close()
try:
    log.sync()
except ValueError as error:
    print(error)
"""


def test_what_stops_the_main_process_is_raised_on_both(tmp_path):
    (tmp_path / "file").write_text("")
    first, second = processes.outputs(processes.launch(TOGETHER, tmp_path, count=2), seconds=60)
    assert first == second
    assert first.startswith("cannot write to the run folder ")
    assert first.endswith("--run_dir\nI/O operation on closed file.\n")


def test_wandb_is_optional(start, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"train\.wandb_project = 'p' needs .*: `uv sync --extra wandb`"):
        start(wandb_project="p")
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)),
        config={},
        finish=lambda: calls.append("finish"),
    )
    wandb = types.SimpleNamespace(init=lambda **settings: calls.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for _ in range(2):
        with start(wandb_project="p") as log:
            log.scalars(3, {"loss": 1.0}, split="valid")
    assert calls[1:3] == [(3, {"valid/loss": 1.0}), "finish"]
    assert calls[0]["project"] == "p"
    assert calls[0]["resume"] == "allow"
    assert calls[0]["id"] == calls[3]["id"]


def test_stopwatch_medians(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stopwatch, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    watch = Stopwatch(window=3)
    assert watch.median_outside("wait") == 0.0
    for wait, data, rest in ((50, 50, 50), (4, 1, 7), (6, 3, 9), (5, 0, 8)):  # the first leaves the window
        watch.lap()
        now[0] += rest
        with watch("wait"):
            now[0] += wait - 1
        with watch("wait"):
            now[0] += 1
        if data:
            with watch("data"):
                now[0] += data
    watch.lap()
    with watch("wait"):  # in a lap that has not ended
        now[0] += 1000
    assert len(watch) == 3
    assert watch.medians() == {"data": 1, "wait": 5, "rest": 8, "total": 13}
    assert watch.median_outside("wait") == 8
    assert watch.median_outside("wait", "never") == 8
    assert watch.median_outside("data") == 13


def test_an_iteration_costs_under_50_microseconds(start):
    with start(total_steps=10**6, log_every=10**6, tty=True) as log:
        laps = []
        for step in range(1, 2001):
            began = time.perf_counter()
            log.stopwatch.lap()
            with log.stopwatch("data"):
                pass
            with log.stopwatch("dispatch"):
                pass
            log.late(step, {"loss": 0.0})
            laps.append(time.perf_counter() - began)
    assert np.median(laps) < 50e-6
