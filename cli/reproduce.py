"""Run what is missing of a model on Long Range Arena, and print the table.

    longwave reproduce lra --model s4 --task listops --seeds 3
    longwave reproduce lra --model s4 --protocol s4 --runs runs/s4          # every task that the model has a config for
    longwave reproduce lra --task listops --budget cpu-hour                 # scaled down, and labelled so
    longwave reproduce lra --model s4 --task text --dry_run                 # the commands alone

One run a task and seed, in order, each a process of train.py with configs/lra/TASK.gin and the model's,
configs/lra/TASK/MODEL.gin or, where a task has none of its own, configs/lra/models/MODEL.gin.
What is finished is left alone, what was interrupted goes on where it stopped; so the same command again is always
right. Ctrl-C or SIGTERM stops after the step under way. Exit code: 0 if all are finished, 75 if stopped, 1 if a run
failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from longwave.cli.usage import UsageError, nearest

ROOT = Path(__file__).parents[1]  # the checkout
RESUMABLE = 75  # train.py's exit code when it was stopped and has saved


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arena", metavar="lra", choices=("lra",), help="the benchmark: lra")
    parser.add_argument("--model", help="the stem of a file in configs/lra/TASK/ or configs/lra/models/")
    parser.add_argument("--task", nargs="+", action="extend", metavar="TASK", help="default: all that have the model")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N - 1 (default: 1)")
    parser.add_argument("--protocol", help="lra, s4 or clean (default: the config's; lra of transformer and local)")
    parser.add_argument("--budget", metavar="NAME", help="a scaled-down config with its own small model: cpu-hour")
    parser.add_argument("--runs", type=Path, default=Path("runs/lra"), metavar="FOLDER", help="default: runs/lra")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, and run nothing")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="overrides of every run"
    )


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run, and the command (without the interpreter) that starts it or goes on with it."""

    folder: Path
    command: tuple[str, ...]

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").is_file()

    @property
    def begun(self) -> bool:
        return (self.folder / "run.json").is_file()


def run(args: argparse.Namespace) -> int:
    planned = plan(args)
    for p in planned:
        check_same(p)
    if args.dry_run:
        for p in planned:
            note = "  # finished" if p.finished else "  # begun" if p.begun else ""
            print(shlex.join(["python", *p.command]) + note)
        return 0

    print(f"{len(planned)} runs, {sum(p.finished for p in planned)} of them finished")
    failed = []
    for number, p in enumerate(planned, start=1):
        place = f"[{number}/{len(planned)}] {p.folder.name}"
        if p.finished:
            print(f"{place}: finished")
            continue
        print(f"{place}: {'goes on' if p.begun else 'starts'}\n  {shlex.join(['python', *p.command])}", flush=True)
        started = time.monotonic()
        code, stop = call([sys.executable, *p.command])
        ended = f"after {(time.monotonic() - started) / 60:.1f} minutes, exit code {code}"
        if p.finished and code == 0:
            print(f"{place}: finished {ended}", flush=True)
        elif stop or code == RESUMABLE:
            print(f"{place}: stopped {ended}; the same command goes on from what is saved")
        else:
            failed.append(p.folder.name)
            print(f"{place}: FAILED {ended}" + ("" if code else ", but there is no result.json"), flush=True)
        if stop or code == RESUMABLE:
            return RESUMABLE
    if finished := [p.folder for p in planned if p.finished]:
        from longwave.cli import tables

        print("\n" + tables.markdown(tables.build(finished, protocol=args.protocol)), end="")
    if failed:
        print(f"{len(failed)} of {len(planned)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def plan(args: argparse.Namespace) -> list[Planned]:
    """The runs in order: task by task in the order of the arena, seeds inside. Raises UsageError."""
    from longwave.cli.results import BUDGETS
    from longwave.lra.protocol import PROTOCOLS
    from longwave.lra.published import TASKS

    if not (ROOT / "train.py").is_file():
        raise UsageError(f"there is no train.py in {ROOT}: reproduce runs from a checkout of the repository")
    if args.seeds < 1:
        raise UsageError(f"--seeds {args.seeds}: expected at least 1")
    for option, name, allowed in (("--protocol", args.protocol, PROTOCOLS), ("--budget", args.budget, BUDGETS)):
        if name is not None and name not in allowed:
            raise UsageError(f"{option} {name}: expected one of {', '.join(allowed)}{nearest(name, allowed)}")
    for word in args.set:
        name = word.split("=")[0]
        if "=" not in word or word.startswith("-"):
            raise UsageError(f"--set {word}: expected NAME=VALUE, e.g. --set train.log_every=10")
        if name == "train.seed" or name.endswith("protocol"):
            raise UsageError(f"--set {word}: that is what --{'seeds' if name == 'train.seed' else 'protocol'} is for")
    if args.model in BUDGETS.values():
        raise UsageError(f"--model {args.model}: say --budget {dict(map(reversed, BUDGETS.items()))[args.model]}")
    if not (args.model or args.budget):
        raise UsageError(f"--model is missing; {existing()}")
    for task in args.task or ():
        if task not in TASKS:
            raise UsageError(f"--task {task}: expected one of {', '.join(TASKS)}{nearest(task, TASKS)}")
    wanted = [task for task in TASKS if task in (args.task or TASKS)]
    stem = BUDGETS[args.budget] if args.budget else args.model
    have = [task for task in wanted if all((ROOT / file).is_file() for file in configs(task, stem, args.budget))]
    if args.task and have != wanted:
        lacking = [f for task in wanted for f in configs(task, stem, args.budget) if not (ROOT / f).is_file()]
        raise UsageError(f"there is no {', '.join(lacking)}; {existing()}")
    if not have:
        raise UsageError(f"no task has a config configs/lra/TASK/{stem}.gin; {existing()}")
    if not (args.budget or all(is_model(ROOT / configs(task, stem, None)[-1]) for task in have)):
        raise UsageError(f"--model {stem}: that file pretrains models and is none itself; {existing()}")
    if args.budget and args.model:
        check_model(args.model, args.budget, have, stem)
    return [_planned(args, task, stem, seed) for task in have for seed in range(args.seeds)]


def configs(task: str, stem: str, budget: str | None) -> list[str]:
    """The config files of a run: a budget's stands alone; a model's is the task's own, else that for any task."""
    own, common = f"configs/lra/{task}/{stem}.gin", f"configs/lra/models/{stem}.gin"
    if budget is not None:
        return [own]
    return [f"configs/lra/{task}.gin", common if (ROOT / common).is_file() and not (ROOT / own).is_file() else own]


def existing() -> str:
    """Which models each task has a config for."""
    from longwave.cli.results import BUDGETS
    from longwave.lra.published import TASKS

    found = {}
    for task in TASKS:
        files = sorted((ROOT / "configs/lra" / task).glob("*.gin"))
        stems = [p.stem for p in files if p.stem in BUDGETS.values() or is_model(p)]
        budgets = [f"--budget {name}" for name, stem in BUDGETS.items() if stem in stems]
        has_task = (ROOT / f"configs/lra/{task}.gin").is_file()
        if models := [stem for stem in stems if has_task and stem not in BUDGETS.values()] + budgets:
            found[task] = models
    if common := sorted(path.stem for path in (ROOT / "configs/lra/models").glob("*.gin")):
        found["any task"] = common
    return "there are: " + "; ".join(f"{task}: {', '.join(models)}" for task, models in found.items())


def is_model(file: Path) -> bool:
    """Whether a file beside a task's models is one; what is named behind a model to pretrain it sets another task."""
    return not re.search(r"^train\.task\s*=", file.read_text(), re.MULTILINE)


def check_model(model: str, budget: str, tasks: Sequence[str], stem: str) -> None:
    """A budget's config has a model of its own; raises UsageError where another one is asked for."""
    for task in tasks:
        (file,) = configs(task, stem, budget)
        text = (ROOT / file).read_text()
        mixers = [name.lower() for name in re.findall(r"@layers\.(\w+)", "".join(re.findall(r"\.mixers\s*=.*", text)))]
        if mixers and model.lower().replace("_", "") not in mixers:
            raise UsageError(
                f"--model {model}: --budget {budget} has a model of its own, {', '.join(mixers)} ({file}); "
                "leave --model out"
            )


def _planned(args: argparse.Namespace, task: str, stem: str, seed: int) -> Planned:
    files = configs(task, stem, args.budget)
    overrides = [*args.set, f"train.seed={seed}"]
    if args.protocol:
        overrides = [f'{_task_class(files)}.protocol="{args.protocol}"', *overrides]
        if not args.budget:  # which has a length of its own
            overrides.insert(1, f"LENGTH={_length(task, args.protocol)}")
    folder = args.runs / "-".join([task, stem, *([args.protocol] if args.protocol else []), f"seed{seed}"])
    return Planned(folder, (str(ROOT / "train.py"), *files, *overrides, "--run_dir", str(folder)))


def _task_class(files: Sequence[str]) -> str:
    """What the config binds as `train.task`, such as text.Text; a budget's config may include the task's."""
    for file in files:
        text = (ROOT / file).read_text()
        if found := re.search(r"^train\.task\s*=\s*@([\w.]+)\(\)", text, re.MULTILINE):
            return found[1]
        if included := re.findall(r"^include '(.+)'", text, re.MULTILINE):
            return _task_class(included)
    raise UsageError(f"--protocol: {', '.join(files)} bind no train.task")


def _length(task: str, protocol: str) -> int:
    """The task's length in a protocol; its config has that of one alone."""
    from longwave.cli import tasks

    return tasks.in_protocol(tasks.task_of(task), protocol).inputs.length


def check_same(planned: Planned) -> None:
    """Raises UsageError where the folder's finished run is not the planned one."""
    from longwave.cli.results import model_of

    if planned.finished:
        command = json.loads((planned.folder / "result.json").read_text())["command"]
        if (there := model_of(command)) != (asked := model_of(planned.command)):
            raise UsageError(
                f"{planned.folder} holds a finished run of {there}, not of {asked}; name another folder with --runs"
            )


def call(command: Sequence[str]) -> tuple[int, bool]:
    """(exit code of a process, whether this one was told to stop while it ran).

    Ctrl-C reaches both from the terminal, SIGTERM is passed on: the process saves and ends, and is waited for.
    """
    told: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def on_signal(number: int, frame: object) -> None:
        told.append(number)
        if process is not None and number == signal.SIGTERM:
            process.send_signal(number)

    old = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process = subprocess.Popen(command)
        if signal.SIGTERM in told:  # before there was a process
            process.send_signal(signal.SIGTERM)
        return process.wait(), bool(told)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
