"""A fair race on one core: every contestant in a pinned process, timed in turn (A B A B ...) by CPU time.

A benchmark script calls `serve` in the child (warm up, then one burst of steps for every line on stdin) and
`race` in the parent. CPU time of a pinned process is robust on a shared machine; taking turns removes drift.
Memory is what the steps add to the process at their highest: what libraries and compilers took before the first
step is not counted. A contestant that cannot run is not an error: it is a `Skipped` with its reason.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Measured(NamedTuple):
    """Median CPU seconds of a step, and the MiB that steps need beside the program itself."""

    seconds: float
    mebibytes: float


class Skipped(NamedTuple):
    reason: str


class Claim(NamedTuple):
    """`ours` takes at most `limit` of the time of `peer`, and at most its memory."""

    ours: str
    peer: str
    limit: float


def pin(*cores: int) -> None:
    """Keep this process on these cores. Call before a numerical library is imported: it counts cores."""
    # Without the filter, an error's own line is the last one that JAX prints.
    os.environ.update(OMP_NUM_THREADS=str(len(cores)), JAX_PLATFORMS="cpu", JAX_TRACEBACK_FILTERING="off")
    os.sched_setaffinity(0, cores)


def serve(step: Callable[[], object], warmup: int = 2) -> None:
    """In the child: after `warmup` steps, answer each line N on stdin with the CPU seconds of N steps and the peak."""
    before = _forget_peak()
    for _ in range(warmup):
        step()
    _say("ready")
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.process_time()
            step()
            seconds.append(time.process_time() - start)
        _say({"seconds": seconds, "mebibytes": _resident("VmHWM") - before})


def race(
    commands: Mapping[str, list[str]], *, rounds: int = 6, burst: int = 5, timeout: float = 120
) -> dict[str, Measured | Skipped]:
    """Every contestant measured, from `rounds` bursts of `burst` steps taken in turn."""
    children = {name: _start(command) for name, command in commands.items()}
    ready = {name: _receive(child, timeout) for name, child in children.items()}
    out = {name: answer for name, answer in ready.items() if isinstance(answer, Skipped)}
    seconds: dict[str, list[float]] = {name: [] for name in commands if name not in out}
    mebibytes: dict[str, float] = {}
    for _ in range(rounds):
        for name in [name for name in seconds if name not in out]:
            children[name].stdin.write(f"{burst}\n")
            children[name].stdin.flush()
            answer = _receive(children[name], timeout)
            if isinstance(answer, Skipped):
                out[name] = answer
            else:
                seconds[name] += answer["seconds"]
                mebibytes[name] = answer["mebibytes"]
    for child in children.values():
        child.kill()
        child.wait()
    return {n: out[n] if n in out else Measured(statistics.median(seconds[n]), mebibytes[n]) for n in commands}


def report(title: str, results: Mapping[str, Measured | Skipped], claims: Sequence[Claim]) -> bool:
    """Print what was measured and what becomes of the claims. True if each that could be tried holds."""
    print(title)
    for name, result in results.items():
        if isinstance(result, Skipped):
            print(f"  {name:28s} skipped: {result.reason}")
        else:
            print(f"  {name:28s} {result.seconds * 1e3:9.1f} ms {result.mebibytes:9.0f} MiB")
    within = True
    for claim in claims:
        ours, peer = results[claim.ours], results[claim.peer]
        if isinstance(ours, Skipped) or isinstance(peer, Skipped):
            continue
        time_ratio, memory_ratio = ours.seconds / peer.seconds, ours.mebibytes / peer.mebibytes
        holds = time_ratio <= claim.limit and memory_ratio <= 1
        within &= holds
        print(
            f"  {claim.ours} / {claim.peer}: time {time_ratio:.2f} (at most {claim.limit:.2f}), "
            f"memory {memory_ratio:.2f} (at most 1){'' if holds else '   MISSED'}"
        )
    return within


def _forget_peak() -> float:
    """Give freed memory back, restart the count of the highest resident size, and return the present one (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(field: str) -> float:
    """MiB: VmRSS now, VmHWM at its highest."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


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
