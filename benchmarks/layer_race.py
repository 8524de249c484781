"""What the benchmarks of one layer share: races of a training step and of the operation inside, and growth with length.

A script names its contestants (a length -> a step), who runs against whom, and what is claimed, and calls `main`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import harness
import network
from harness import Measured, Skipped

LENGTH, LENGTHS = 2048, tuple(2**k for k in range(9, 15))
SLACK = 1.1  # measurement noise: a token may cost this much more than at the cheapest shorter length


class Race(NamedTuple):
    """file, doc: of the script, which is called again for each contestant.    name: of the layer.

    contestants: name -> a length -> a step; those of "longwave" run in this interpreter.
    heats:       what is raced ("network", "scan") -> its contestants, ours first; "longwave_network" grows.
    time, memory: claimed, ours over each peer's; of each heat, or the same of all.
    """

    file: str
    doc: str | None
    name: str
    contestants: Mapping[str, Callable[[int], Callable[[], object]]]
    heats: Mapping[str, Sequence[str]]
    time: float | Mapping[str, float]
    memory: float | Mapping[str, float] = 0.5

    def claims(self, what: str) -> tuple[float, float]:
        """(time, memory) of that heat."""
        time, memory = (x[what] if isinstance(x, Mapping) else x for x in (self.time, self.memory))
        return time, memory


def main(race: Race) -> int:
    options = _options(race)
    if options.contestant:
        harness.pin(options.core)
        kind, _, length = options.contestant.partition(":")
        harness.serve(race.contestants[kind](int(length)))
        return 0
    if options.growth:
        return 0 if _growth(race, options) else 1
    held = [_compare(race, what, options) for what in options.what or race.heats]  # all are run, whatever one finds
    return 0 if all(held) else 1


def _options(race: Race) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=race.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="|".join(race.heats), help="default: all")
    parser.add_argument("--peer_python", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--growth", action="store_true", help="our own steps at many lengths")
    parser.add_argument("--plot", metavar="PATH", help="with --growth: draw it into this PNG file")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.what) - set(race.heats):
        parser.error(f"{unknown.pop()!r} is none of {', '.join(race.heats)}")
    return options


def _times(race: Race, kinds: Sequence[str], length: int, options: argparse.Namespace) -> dict[str, Measured | Skipped]:
    command = lambda kind: [
        sys.executable if kind.startswith("longwave") else options.peer_python,
        *(race.file, "--contestant", f"{kind}:{length}", "--core", str(options.core)),
    ]
    return harness.race({k: command(k) for k in kinds}, rounds=options.rounds, burst=1, timeout=600)


def _compare(race: Race, what: str, options: argparse.Namespace) -> bool:
    """Prints what was measured and what becomes of the claims. True if these hold, or could not be tried."""
    results = _times(race, race.heats[what], LENGTH, options)
    print(f"{what}: batch {network.BATCH}, length {LENGTH:,}", flush=True)
    ours, within = results[race.heats[what][0]], True
    most_time, most_memory = race.claims(what)
    for name, result in results.items():
        if isinstance(result, Skipped):
            print(f"  {name:22s} skipped: {result.reason}")
            continue
        line = f"  {name:22s} {result.seconds * 1e3:9.1f} ms {result.mebibytes:8.0f} MiB"
        if result is not ours and isinstance(ours, Measured):
            time, memory = ours.seconds / result.seconds, ours.mebibytes / result.mebibytes
            holds = time <= most_time and memory <= most_memory
            within &= holds
            line += f"   ours: time {time:.3f} (at most {most_time}), memory {memory:.3f} (at most {most_memory})"
            line += "" if holds else "   MISSED"
        print(line, flush=True)
    return within


def _growth(race: Race, options: argparse.Namespace) -> bool:
    """Prints milliseconds a step, nanoseconds a token of the batch, and MiB. True if no token gets dearer."""
    points: dict[int, Measured] = {}
    within = True
    print(f"Training step, batch {network.BATCH}\n  {'length':>8s} {'ms':>9s} {'ns/token':>9s} {'MiB':>7s}")
    for length in LENGTHS:
        result = _times(race, ["longwave_network"], length, options)["longwave_network"]
        if isinstance(result, Skipped):
            print(f"  {length:8,d} skipped: {result.reason}")
            continue
        points[length] = result
        cost = lambda n: points[n].seconds / (n * network.BATCH) * 1e9
        within &= cost(length) <= SLACK * min(cost(n) for n in points)
        ms = result.seconds * 1e3
        print(f"  {length:8,d} {ms:9.1f} {cost(length):9.0f} {result.mebibytes:7.0f}", flush=True)
    if options.plot and points:
        _plot(race.name, points, options.plot)
    return within


def _plot(name: str, points: Mapping[int, Measured], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    fields = {"seconds": "processor time of a training step (s)", "mebibytes": "memory that a step adds (MiB)"}
    for ax, (field, label) in zip(figure.subplots(1, 2), fields.items(), strict=True):
        values = [getattr(point, field) for point in points.values()]
        ax.plot(list(points), values, "o-", color="#1f4e8c", label=name)
        end = max(points)
        ax.plot(list(points), [values[-1] * n / end for n in points], "--", color="#6b6b6b", label="linear")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set(xlabel="length (tokens)", ylabel=label, xticks=list(points))
        ax.set_xticklabels([f"{n:,}" for n in points])
        ax.grid(color="#e6e6e6", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
