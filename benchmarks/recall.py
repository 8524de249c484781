"""How much a mixer recalls against how much state it carries: MQAR in small, one point a mixer and size.

    python benchmarks/recall.py [attention delta-rule rat ...] [--results PATH] [--plot PATH] [--steps 300]

512 ids, rows of 64 tokens with 8 pairs (configs/tasks/mqar_linear.gin); two layers of width 64 without an MLP, each
behind a layer of short convolutions of three taps (Based's recipe, as the published points); logits by the table of
embeddings; batches of 256 rows; one rate for all, where the published points are the best of several.
State is what `init_carry` of all layers holds for one sequence at 64 tokens, in bytes. A point that PATH holds already
with as many steps is not trained again: an interrupted command goes on where it stopped.

The plot shows the published points beside ours, in other markers. They are of a harder task: 8,192 ids, up to 1,024
tokens and 256 pairs, and longer training.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from longwave import layers
from longwave.models import Backbone, TokenEmbedding
from longwave.tasks.recall import published
from longwave.tasks.recall.mqar import MQAR
from longwave.training.optimizer import AdamW, warmup_constant
from longwave.training.program import build
from longwave.training.run import Run

TASK = MQAR(vocab=512, length=64, pairs=8, sizes=(50_000, 256, 1_024), tied=True)
WIDTH, DEPTH, BATCH, RATE = 64, 4, 256, 3e-3


Make = Callable[..., Any]


def sizes(mixer: Make, name: str, values: tuple[int, ...], **others: Any) -> dict[str, Make]:
    return {f"{name}={value}": functools.partial(mixer, **{name: value}, **others) for value in values}


# family -> size -> mixer
FAMILIES: dict[str, dict[str, Make]] = {
    "delta-rule": sizes(layers.DeltaNet, "heads", (1, 4), conv=1),
    "rat": sizes(layers.RAT, "L", (1, 2, 4, 16), H=4),
    "mom": sizes(layers.MoM, "P", (16, 64), heads=1),
    "convolution": {"": layers.ShortConv},
    "linear-attention": sizes(layers.LinearAttention, "heads", (2,)),
    "based": sizes(layers.Based, "heads", (4,)),
    "attention": {"": functools.partial(layers.Attention, heads=2)},
    "gated-delta-rule": sizes(layers.GatedDeltaNet, "heads", (1,), expand_k=1, expand_v=1, conv=1),
    "mamba2": sizes(layers.Mamba2, "N", (8, 32, 128), P=32),
    "mamba": sizes(layers.Mamba, "N", (4, 16)),
    "window": sizes(layers.Attention, "window", (8, 16, 32), heads=2),
    "s4d": sizes(layers.S4D, "N", (16, 64)),
    "lru": sizes(layers.LRU, "N", (64, 256)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), metavar=" ".join(FAMILIES), help="default: all")
    parser.add_argument("--results", type=Path, default=Path("runs/recall.jsonl"), help="one line a point")
    parser.add_argument("--plot", help="draw all points of the results into this PNG file")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    if unknown := set(options.families) - set(FAMILIES):
        parser.error(f"families are {', '.join(FAMILIES)}, not {', '.join(sorted(unknown))}")
    for family in options.families:
        for size, mixer in FAMILIES[family].items():
            known = {(p["family"], p["size"]) for p in read(options.results, options.steps)}
            if (family, size) not in known:
                point = {"family": family, "size": size, "steps": options.steps, **measure(mixer, options.steps)}
                options.results.parent.mkdir(parents=True, exist_ok=True)
                with options.results.open("a") as file:
                    file.write(json.dumps(point) + "\n")
                print(f"{family} {size}: {point['accuracy']:.1%} after {point['seconds']:.0f} s", flush=True)
    points = read(options.results, options.steps)
    print(table(points))
    if options.plot:
        plot(points, options.plot)


def read(path: Path, steps: int) -> list[dict[str, Any]]:
    """The points of so many steps."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [point for point in map(json.loads, lines) if point["steps"] == steps]


def measure(mixer: Make, steps: int) -> dict[str, Any]:
    """Accuracy on test after so many steps, bytes of state, and seconds of processor time."""
    encoder = functools.partial(TokenEmbedding, std=0.02)
    backbone = functools.partial(Backbone, width=WIDTH, depth=DEPTH, mixers=(layers.ShortConv, mixer), encoder=encoder)
    optimizer = AdamW(lr=RATE, schedule=warmup_constant(warmup=20))
    run = Run(task=TASK, backbone=backbone, optimizer=optimizer, steps=steps, batch_size=BATCH)
    began, program = time.process_time(), build(run, jax.devices()[:1])
    with jax.set_mesh(program.mesh):
        key = program.key()
        state, stream = program.init(key), program.stream("train")
        for _ in range(steps):
            state, _ = program.train_step(state, program.global_batch(next(stream)), key)
        accuracy = program.evaluate(state, "test")["accuracy"]
    bytes_ = state_bytes(functools.partial(backbone, TASK.inputs), TASK.length)
    return {"state": bytes_, "accuracy": accuracy, "seconds": round(time.process_time() - began, 1)}


def state_bytes(make: Callable[..., nnx.Module], length: int) -> int:
    """Of the carry of one sequence that is as long."""
    carry = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)).init_carry(1, capacity=length))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(carry))


def table(points: list[Mapping[str, Any]]) -> str:
    lines = ["| mixer | size | state (bytes) | accuracy | CPU time (s) |", "|---|---|---|---|---|"]
    for p in points:
        lines.append(f"| {p['family']} | {p['size']} | {p['state']:,} | {p['accuracy']:.1%} | {p['seconds']:.0f} |")
    guess = TASK.baselines["a value of the row"]
    return "\n".join([*lines, f"| guessing among the values of a row | | | {guess:.1%} | |"])


def plot(points: list[Mapping[str, Any]], path: str) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8.6, 4.8), layout="constrained")
    axes, colors = figure.subplots(), colormaps["tab10"]
    for i, family in enumerate(dict.fromkeys(p["family"] for p in points)):
        own = sorted((p["state"], p["accuracy"]) for p in points if p["family"] == family)
        axes.plot(*zip(*own, strict=True), "o-", color=colors(i), label=f"{family} (here)")
    rows = [row for row in published.load() if row.task == "MQAR, mixed"]
    for i, (row, marker) in enumerate(zip(rows, "s^vD<>pPX", strict=True)):
        own = sorted((int(size), score / 100) for size, score in row.scores.items() if score is not None)
        axes.plot(*zip(*own, strict=True), marker=marker, mfc="none", ls=":", lw=0.8, color=str(0.25 + 0.05 * i),
                  label=f"{row.model} (published)")  # fmt: skip
    guess = TASK.baselines["a value of the row"]
    axes.axhline(guess, color="#6b6b6b", ls="--", lw=0.8, label=f"guessing (here) {guess:.1%}")
    axes.set_xscale("log")
    axes.set(xlabel="state of one sequence (bytes)", ylabel="accuracy on test", ylim=(0, 1.02))
    axes.set_title("Recall against state; here: 512 ids, 64 tokens, 8 pairs. Published: 8,192 ids, up to 1,024 tokens",
                   fontsize=9)  # fmt: skip
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
