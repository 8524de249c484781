"""RAT beside attention on one core: a training step, a token of decoding and the carry, against length.

    python benchmarks/rat.py                       the claims, at 8,192 tokens
    python benchmarks/rat.py --growth [--plot PATH]

One layer of width 128 with heads of 32, one row, float32; chunks of 16, of 64, one chunk (the recurrent network) and
our own attention of the same width and heads. A training step is forward and backward; decoding is a token behind a
text. Claimed of RAT(16) at 8,192 tokens: a step in at most 0.35 of attention's time, and a carry of T / L + 1 entries
for T tokens. The exit code is 0 if that holds. The second form measures the paper's figure of speed, on this machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import harness
from harness import Measured, Skipped

WIDTH, HEADS, TOKENS = 128, 4, 16
LENGTH, LIMIT = 8192, 0.35
TRAINED, DECODED = (512, 1024, 2048, 4096, 8192, 16384), (512, 2048, 8192, 32768)
CHUNKS: dict[str, int | None] = {"RAT(16)": 16, "RAT(64)": 64, "recurrent": None}
KINDS = (*CHUNKS, "attention")


def _layer(kind: str) -> Any:
    from flax import nnx

    from longwave.layers import RAT, Attention

    if kind == "attention":
        return Attention(WIDTH, heads=HEADS, rngs=nnx.Rngs(0))
    return RAT(WIDTH, L=CHUNKS[kind], H=HEADS, span=CHUNKS[kind] or LENGTH, rngs=nnx.Rngs(0))


def _training(kind: str, length: int) -> Callable[[], object]:
    """Forward and backward, by parameters and input."""
    import jax
    from flax import nnx

    graph, state = nnx.split(_layer(kind))
    x, dy = jax.random.normal(jax.random.key(0), (2, 1, length, WIDTH))

    def run(state: Any, x: Any, dy: Any) -> tuple:
        y, pull = jax.vjp(lambda state, x: nnx.merge(graph, state)(x).y, state, x)
        return y, pull(dy)

    compiled = jax.jit(run).lower(state, x, dy).compile()
    return lambda: jax.block_until_ready(compiled(state, x, dy))


def _decoding(kind: str, length: int) -> Callable[[], object]:
    """TOKENS tokens, the last of a document of so many: one token at a time, from the carry to the carry."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    graph, state = nnx.split(_layer(kind))
    x = jax.random.normal(jax.random.key(0), (TOKENS, 1, 1, WIDTH))

    def run(state: Any, carry: Any, x: Any) -> tuple:
        if "position" in carry:
            carry = carry | {"position": jnp.full(1, length - TOKENS)}
        return jax.lax.scan(lambda carry, x: nnx.merge(graph, state)(x, carry)[1::-1], carry, x)

    held = [_layer(kind).init_carry(1, capacity=length)]
    compiled = jax.jit(run, donate_argnums=1).lower(state, held[0], x).compile()

    def step() -> None:
        held[0], y = compiled(state, held[0], x)
        jax.block_until_ready(y)

    return step


def _entries(kind: str, length: int) -> float:
    """Keys and values of the whole width that the carry of so many tokens holds."""
    import jax

    carry = jax.eval_shape(partial(_layer(kind).init_carry, 1, capacity=length))
    return sum(leaf.size for name, leaf in carry.items() if name != "position") / (2 * WIDTH)


MEASURED = {"training": _training, "decoding": _decoding}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--growth", action="store_true", help="all kinds at many lengths")
    parser.add_argument("--plot", metavar="PATH", help="with --growth: draw it into this PNG file")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    harness.pin(options.core)
    if options.contestant:
        what, kind, length = options.contestant.split(":")
        harness.serve(MEASURED[what](kind, int(length)))
        return 0
    return _growth(options) if options.growth else _claims(options)


def _race(what: str, kinds: tuple[str, ...], length: int, options: argparse.Namespace) -> dict[str, Measured | Skipped]:
    command = lambda kind: [sys.executable, __file__, "--core", str(options.core), "--contestant"]
    commands = {kind: [*command(kind), f"{what}:{kind}:{length}"] for kind in kinds}
    return harness.race(commands, rounds=options.rounds, burst=1 if what == "training" else 20, timeout=600)


def _claims(options: argparse.Namespace) -> int:
    results = _race("training", KINDS, LENGTH, options)
    harness.report(f"Forward and backward of one layer, one row of {LENGTH:,} tokens", results, [])
    within = True
    ours, attention = results["RAT(16)"], results["attention"]
    if isinstance(ours, Measured) and isinstance(attention, Measured):
        time = ours.seconds / attention.seconds
        within &= time <= LIMIT
        print(f"  RAT(16) / attention: time {time:.2f} (at most {LIMIT}){'' if within else '   MISSED'}")
    for kind in KINDS:
        entries, chunk = _entries(kind, LENGTH), CHUNKS.get(kind)
        holds = chunk is None or entries == LENGTH // chunk + 1
        within &= holds
        print(f"  {kind:28s} carries {entries:9,.1f} entries{'' if holds else '   MISSED'}")
    return 0 if within else 1


def _growth(options: argparse.Namespace) -> int:
    """Prints milliseconds of a step and microseconds of a token, and entries of the carry."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    scales = {"training": ("ms a step", 1e3), "decoding": ("µs a token", 1e6 / TOKENS)}
    for what, (unit, scale) in scales.items():
        print(f"{what}, {unit}\n  {'length':>8s} " + " ".join(f"{kind:>10s}" for kind in KINDS))
        points = found[what] = {kind: {} for kind in KINDS}
        for length in TRAINED if what == "training" else DECODED:
            for kind, result in _race(what, KINDS, length, options).items():
                if isinstance(result, Measured):
                    points[kind][length] = scale * result.seconds
            print(f"  {length:8,d} " + " ".join(f"{points[kind].get(length, float('nan')):10.1f}" for kind in KINDS))
            sys.stdout.flush()
    found["carry"] = {kind: {length: _entries(kind, length) for length in DECODED} for kind in KINDS}
    if options.plot:
        _plot(found, options.plot)
    return 0


def _plot(found: Mapping[str, Mapping[str, Mapping[int, float]]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    labels = {
        "training": "forward and backward (ms)",
        "decoding": "a token of decoding (µs)",
        "carry": "carry (keys and values of the whole width)",
    }
    colours = dict(zip(KINDS, ("#1f4e8c", "#5b9bd5", "#6b8e23", "#b0413e"), strict=True))
    for ax, (what, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        for kind, points in found[what].items():
            ax.plot(list(points), list(points.values()), "o-", color=colours[kind], label=kind, markersize=4)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set(xlabel="length (tokens)", ylabel=label)
        ax.grid(color="#e6e6e6", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.suptitle(f"CPU, measured: one layer of width {WIDTH}, {HEADS} heads, one row, one core", fontsize=9)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
