"""A fair race on one core: every contestant in a pinned process, timed in turn (A B A B ...) by CPU time.

A benchmark script calls `serve` in the child (warm up, then one burst of steps for every line on stdin) and
`race` in the parent. CPU time of a pinned process is robust on a shared machine; taking turns removes drift.
A contestant that cannot run is not an error: it is a `Skipped` with its reason.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Skipped(NamedTuple):
    reason: str


def pin(core: int) -> None:
    """Keep this process on one core. Call before a numerical library is imported: it counts cores."""
    os.environ.update(OMP_NUM_THREADS="1", JAX_PLATFORMS="cpu")
    os.sched_setaffinity(0, {core})


def serve(step: Callable[[], object], warmup: int = 3) -> None:
    """In the child: after `warmup` steps, answer each line N on stdin with the CPU seconds of N steps."""
    for _ in range(warmup):
        step()
    _say("ready")
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.process_time()
            step()
            seconds.append(time.process_time() - start)
        _say(seconds)


def race(
    commands: Mapping[str, list[str]], *, rounds: int = 6, burst: int = 5, timeout: float = 120
) -> dict[str, float | Skipped]:
    """Median CPU seconds a step of each contestant, from `rounds` bursts taken in turn."""
    children = {name: _start(command) for name, command in commands.items()}
    results: dict[str, list[float] | Skipped] = {name: _receive(c, timeout) for name, c in children.items()}
    results = {name: [] if r == "ready" else r for name, r in results.items()}
    for _ in range(rounds):
        for name, child in children.items():
            if isinstance(results[name], Skipped):
                continue
            child.stdin.write(f"{burst}\n")
            child.stdin.flush()
            answer = _receive(child, timeout)
            results[name] = answer if isinstance(answer, Skipped) else results[name] + answer
    for child in children.values():
        child.kill()
        child.wait()
    return {n: r if isinstance(r, Skipped) else statistics.median(r) for n, r in results.items()}


def report(title: str, results: Mapping[str, float | Skipped], ours: str, limits: Mapping[str, float]) -> bool:
    """Print a table with our time over each peer's. True if every measured ratio is within its limit."""
    print(title)
    within = True
    for name, result in results.items():
        if isinstance(result, Skipped):
            print(f"  {name:24s} skipped: {result.reason}")
            continue
        line = f"  {name:24s} {result * 1e3:8.1f} ms"
        if name in limits and not isinstance(results[ours], Skipped):
            ratio = results[ours] / result
            within &= ratio <= limits[name]
            line += f"   {ours} / {name} = {ratio:.2f} (at most {limits[name]:.2f})"
        print(line)
    return within


MARK = "@@"  # libraries print too


def _say(message: object) -> None:
    print(MARK + json.dumps(message), flush=True)


def _start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _receive(child: subprocess.Popen, timeout: float) -> object | Skipped:
    """The child's next message, or why there is none."""
    watchdog = threading.Timer(timeout, child.kill)
    watchdog.start()
    try:
        for line in child.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
    finally:
        watchdog.cancel()
    lines = child.stderr.read().strip().splitlines() or [f"ended, or said nothing for {timeout:.0f} s"]
    return Skipped(lines[-1][:200])
