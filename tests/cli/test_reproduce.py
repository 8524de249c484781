"""`longwave reproduce lra`: what it plans, what it leaves alone, how it stops, and one real run."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from longwave.cli import reproduce
from longwave.cli.main import main

ROOT = Path(__file__).parents[2]
LISTOPS = ["configs/lra/listops.gin", "configs/lra/listops/s4.gin"]


@pytest.fixture
def calls(monkeypatch):
    """Stands in for train.py: the commands that were run; `ends` holds (exit code, told to stop) of those to come."""
    made, ends = [], []

    def call(command):
        made.append(command)
        folder = Path(command[command.index("--run_dir") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text("{}")
        code, stop = ends.pop(0) if ends else (0, False)
        if code == 0:
            write_result(folder, command)
        return code, stop

    monkeypatch.setattr(reproduce, "call", call)
    call.made, call.ends = made, ends
    return call


def write_result(folder, command):
    seed = next(int(word.split("=")[1]) for word in command if word.startswith("train.seed="))
    result = {"task": "listops", "metric": "accuracy", "seed": seed, "steps": 120_000, "parameters": 815_186}
    result |= {"test": {"accuracy": 0.59 + seed / 100}, "baselines": {}, "device": "8 x TPU v5e, 2 processes"}
    result |= {"row": {"protocol": "s4", "data": "official files"}, "command": ["train.py", *command[2:]]}
    (folder / "result.json").write_text(json.dumps(result))


def lra(runs, *argv):
    return main(["reproduce", "lra", "--model", "s4", "--task", "listops", "--runs", str(runs), *argv])


def test_every_seed_is_run_in_order_and_the_table_ends_it(tmp_path, calls, capsys):
    assert lra(tmp_path, "--seeds", "3", "--protocol", "s4", "--set", "train.log_every=7") == 0
    expected = [
        [
            *(sys.executable, str(ROOT / "train.py"), *LISTOPS),
            *('listops.ListOps.protocol="s4"', "LENGTH=2048", "train.log_every=7", f"train.seed={seed}"),
            *("--run_dir", str(tmp_path / f"listops-s4-s4-seed{seed}")),
        ]
        for seed in range(3)
    ]
    assert calls.made == expected
    out = capsys.readouterr().out
    assert out.startswith("3 runs, 0 of them finished\n[1/3] listops-s4-s4-seed0: starts\n  python ")
    assert "[3/3] listops-s4-s4-seed2: finished after 0.0 minutes, exit code 0" in out
    assert "| ours: s4 " in out
    assert "60.00 ± 1.00" in out
    assert "3 (0, 1, 2)" in out


def test_finished_runs_are_left_alone_and_begun_ones_go_on(tmp_path, calls, capsys):
    calls.ends.extend([(0, False), (reproduce.RESUMABLE, False)])
    assert lra(tmp_path, "--seeds", "3") == reproduce.RESUMABLE
    assert len(calls.made) == 2  # it stops there
    out = capsys.readouterr().out
    assert "[2/3] listops-s4-seed1: stopped after 0.0 minutes, exit code 75; the same command goes on" in out
    assert "| ours: s4" not in out

    assert lra(tmp_path, "--seeds", "3") == 0
    assert calls.made[2] == calls.made[1]  # the very same command
    assert len(calls.made) == 4
    out = capsys.readouterr().out
    assert out.startswith(
        "3 runs, 1 of them finished\n[1/3] listops-s4-seed0: finished\n[2/3] listops-s4-seed1: goes on"
    )

    assert lra(tmp_path, "--seeds", "3") == 0
    assert len(calls.made) == 4


def test_a_failed_run_is_named_and_the_next_one_runs(tmp_path, calls, capsys):
    calls.ends.extend([(1, False), (0, False), (-9, False)])
    assert lra(tmp_path, "--seeds", "3") == 1
    captured = capsys.readouterr()
    assert "[1/3] listops-s4-seed0: FAILED after 0.0 minutes, exit code 1\n" in captured.out
    assert "| ours: s4" in captured.out
    assert captured.err == "2 of 3 runs failed: listops-s4-seed0, listops-s4-seed2\n"


def test_a_run_that_leaves_no_result_has_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "call", lambda command: (0, False))
    assert lra(tmp_path) == 1
    assert "exit code 0, but there is no result.json" in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, -15, 1])
def test_told_to_stop_it_starts_no_other_run(tmp_path, calls, code):
    calls.ends.append((code, True))
    assert lra(tmp_path, "--seeds", "2") == reproduce.RESUMABLE
    assert len(calls.made) == 1


def test_dry_run_prints_the_commands(tmp_path, calls, capsys):
    lra(tmp_path, "--seeds", "1")
    capsys.readouterr()
    assert lra(tmp_path, "--seeds", "2", "--dry_run") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"python {ROOT / 'train.py'} {' '.join(LISTOPS)} train.seed=0 --run_dir {tmp_path}")
    assert first.endswith("listops-s4-seed0  # finished")
    assert second.endswith("listops-s4-seed1")
    assert len(calls.made) == 1


def test_another_finished_run_in_the_folder_is_no_result_of_this_one(tmp_path, calls, capsys):
    assert lra(tmp_path) == 0
    assert lra(tmp_path, "--set", "layers.S4.N=8") == 2
    assert "holds a finished run of s4, not of s4 (layers.S4.N=8)" in capsys.readouterr().err


def test_a_protocol_brings_its_length(tmp_path, capsys):
    argv = ["reproduce", "lra", "--model", "s4", "--runs", str(tmp_path), "--dry_run", "--protocol", "lra"]
    for task, length in (("listops", 2000), ("text", 4000), ("retrieval", 4000), ("pathx", 16384)):
        assert main([*argv, "--task", task]) == 0
        assert f" LENGTH={length} train.seed=0 " in capsys.readouterr().out


def test_a_budget_has_its_own_config_and_model(tmp_path, capsys):
    argv = ["reproduce", "lra", "--task", "listops", "--budget", "cpu-hour", "--runs", str(tmp_path), "--dry_run"]
    assert main([*argv, "--model", "s4d"]) == 0
    assert main([*argv, "--protocol", "lra"]) == 0  # found in the file that the budget's config includes
    plain, lra = capsys.readouterr().out.splitlines()
    assert plain.endswith(f"configs/lra/listops/cpu_hour.gin train.seed=0 --run_dir {tmp_path}/listops-cpu_hour-seed0")
    assert "cpu_hour.gin 'listops.ListOps.protocol=\"lra\"' train.seed=0" in lra  # the budget's length stays
    assert main([*argv, "--model", "s4"]) == 2
    assert "--budget cpu-hour has a model of its own, s4d" in capsys.readouterr().err


def test_tasks_without_the_model_are_left_out_only_where_none_was_named(tmp_path, monkeypatch, capsys):
    for name in ("train.py", "configs/lra/text.gin", "configs/lra/text/m.gin", "configs/lra/image.gin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    argv = ["reproduce", "lra", "--model", "m", "--dry_run"]
    assert main(argv) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert main([*argv, "--task", "text", "image"]) == 2
    assert "there is no configs/lra/image/m.gin; there are: text: m" in capsys.readouterr().err
    (tmp_path / "train.py").unlink()
    assert main(argv) == 2
    assert f"there is no train.py in {tmp_path}: reproduce runs from a checkout" in capsys.readouterr().err


def test_a_task_without_a_file_of_its_own_takes_the_one_for_any_task(tmp_path, monkeypatch, capsys):
    names = ("text.gin", "text/m.gin", "image.gin", "models/m.gin")
    for name in ("train.py", *(f"configs/lra/{name}" for name in names)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    assert main(["reproduce", "lra", "--model", "m", "--dry_run"]) == 0
    text, image = capsys.readouterr().out.splitlines()
    assert "configs/lra/text.gin configs/lra/text/m.gin train.seed=0" in text
    assert "configs/lra/image.gin configs/lra/models/m.gin train.seed=0" in image
    assert reproduce.existing().endswith("any task: m")


def test_models_alone_are_listed():
    (listops,) = [part for part in reproduce.existing().split("; ") if "listops: " in part]
    assert {"s4", "transformer", "--budget cpu-hour"} <= set(listops.split(": ")[-1].split(", "))
    assert not {"masked", "causal", "cpu_hour"} & set(listops.split(": ")[-1].split(", "))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "s9"], "no task has a config configs/lra/TASK/s9.gin; there are: listops: "),
        ([], "--model is missing; there are: listops: "),
        (["--model", "s4", "--task", "listop"], "--task listop: expected one of"),
        (["--model", "s4", "--seeds", "0"], "--seeds 0: expected at least 1"),
        (["--model", "s4", "--protocol", "s5"], "--protocol s5: expected one of lra, s4, clean"),
        (["--model", "s4", "--budget", "cpu"], "--budget cpu: expected one of cpu-hour"),
        (["--model", "masked", "--task", "text"], "--model masked: that file pretrains models and is none itself; "),
        (["--model", "cpu_hour"], "--model cpu_hour: say --budget cpu-hour"),
        (["--model", "s4", "--set", "more.gin"], "--set more.gin: expected NAME=VALUE"),
        (["--model", "s4", "--set", "train.seed=3"], "--set train.seed=3: that is what --seeds is for"),
        (["--model", "s4", "--set", "text.Text.protocol='s4'"], "that is what --protocol is for"),
    ],
)
def test_wrong_arguments_are_named(argv, message, capsys):
    assert main(["reproduce", "lra", *argv]) == 2
    assert message in capsys.readouterr().err


CHILD = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(sys.argv[1], "w").close()
time.sleep(30)
"""


def test_sigterm_reaches_the_run_which_is_waited_for(tmp_path):
    def stop():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop, daemon=True).start()
    assert reproduce.call([sys.executable, "-c", CHILD, str(tmp_path / "ready")]) == (75, True)
    assert signal.getsignal(signal.SIGTERM) is before
    assert reproduce.call([sys.executable, "-c", "raise SystemExit(3)"]) == (3, False)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_real_run_is_interrupted_goes_on_and_is_in_the_table(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("LONGWAVE_DATA", str(tmp_path / "data"))
    tiny = "LENGTH=64 ListOps.min_tokens=5 ListOps.max_tokens=60 ListOps.sizes=(200,40,40) ListOps.processes=1 STEPS=40"
    tiny += " train.batch_size=8 train.eval_every=20 train.save_every=10 train.log_every=1"
    tiny += " Backbone.width=8 Backbone.depth=1"
    argv = ["reproduce", "lra", "--model", "s4d", "--task", "listops", "--set", *tiny.split()]
    argv += ["--runs", str(tmp_path / "runs")]
    first = tmp_path / "runs/listops-s4d-seed0"

    def stop_once():
        while not (first / "metrics.jsonl").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_once, daemon=True).start()
    assert main(argv) == reproduce.RESUMABLE
    assert not (first / "result.json").exists()
    assert main(argv) == 0
    out = capfd.readouterr().out
    assert "[1/1] listops-s4d-seed0: goes on" in out
    assert "resumed at step" in out
    steps = [
        json.loads(line)["step"] for line in (first / "metrics.jsonl").read_text().splitlines() if "train/loss" in line
    ]
    assert steps == list(range(1, 41))
    assert "## Scaled down" in out
    assert "| s4d (ListOps.min_tokens=5, " in out
