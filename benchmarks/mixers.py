"""Every mixer in one run: a training step, a decoded token and the carry, against length.

    taskset -c 0 python benchmarks/mixers.py --out docs/images/mixers.png
    taskset -c 0 python benchmarks/mixers.py --mixers RAT,MoM,Attention --lengths 512,2048,8192

One layer of width 64 with its own defaults, float32. A step is the gradient of sum(y^2) in the parameters and in x,
batch 1; a token is decoded by a language model of two layers (benchmarks/decoding.py). Lengths and mixers are taken in
turn, and the median of the rounds counts. The carry is what a layer keeps of one row after so many tokens, in bytes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping

import decoding
import jax
import jax.numpy as jnp
from flax import nnx
from matplotlib import colormaps
from matplotlib.figure import Figure

from longwave import layers
from longwave.layers.mixer import Context, Unsupported
from longwave.training import plot

WIDTH, ROUNDS = 64, 3
Numbers = Mapping[int, float]  # length -> what was measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", default=",".join(layers.MIXERS))
    parser.add_argument("--lengths", default="256,1024,4096")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", default="mixers.png")
    args = parser.parse_args()
    lengths = [int(n) for n in args.lengths.split(",")]
    names = args.mixers.split(",")
    if unknown := [name for name in names if name not in layers.MIXERS]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(layers.MIXERS)}")
    steps = training_steps(names, lengths, args.rounds)
    tokens = {name: decoding.measure(name, lengths, args.rounds) for name in names if decodes(name)}
    carries = {name: carry_bytes(name, lengths) for name in tokens}
    rows = [
        {
            "mixer": name,
            **{f"step {n:,} ms": f"{1e3 * steps[name][n]:.1f}" for n in lengths},
            **{f"token {n:,} ms": f"{1e3 * tokens[name][n]:.3f}" if name in tokens else plot.MISSING for n in lengths},
            **{f"carry {n:,}": f"{carries[name][n]:,.0f} B" if name in carries else plot.MISSING for n in lengths},
        }
        for name in names
    ]
    plot.table(rows, title=f"one layer of width {WIDTH}, {jax.devices()[0].device_kind}")
    draw({"training step (ms)": steps, "decoded token (ms)": tokens, "carry of a row (bytes)": carries}, args.out)


def build(name: str) -> nnx.Module:
    return layers.MIXERS[name](WIDTH, rngs=nnx.Rngs(0))


def training_steps(names: list[str], lengths: list[int], rounds: int) -> dict[str, Numbers]:
    """Median seconds of forward and backward of each mixer at each length, all taken in turn."""
    calls = {(name, n): training_step(name, n) for name in names for n in lengths}
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[key].append(time.perf_counter() - began)
    return {name: {n: statistics.median(seconds[name, n]) for n in lengths} for name in names}


def training_step(name: str, length: int) -> Callable[[], object]:
    graph, parameters, rest = nnx.split(build(name), nnx.Param, ...)

    def cost(parameters: nnx.State, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(nnx.merge(graph, parameters, rest)(x, None, Context()).y))

    x = jax.random.normal(jax.random.key(0), (1, length, WIDTH))
    step = jax.jit(jax.grad(cost, argnums=(0, 1))).lower(parameters, x).compile()
    jax.block_until_ready(step(parameters, x))
    return lambda: jax.block_until_ready(step(parameters, x))


def decodes(name: str) -> bool:
    try:
        build(name).init_carry(1, capacity=1)
    except Unsupported:
        return False
    return True


def carry_bytes(name: str, lengths: list[int]) -> Numbers:
    mixer = build(name)
    size = lambda x: math.prod(x.shape) * x.dtype.itemsize
    carry = lambda n: jax.eval_shape(lambda: mixer.init_carry(1, capacity=n))
    return {n: float(sum(map(size, jax.tree.leaves(carry(n))))) for n in lengths}


def draw(panels: Mapping[str, Mapping[str, Numbers]], path: str) -> None:
    figure = Figure(figsize=(13, 5), layout="constrained")
    names = list(next(iter(panels.values())))
    colours = {name: colormaps["turbo"](i / max(len(names) - 1, 1)) for i, name in enumerate(names)}
    for axes, (title, found) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name, numbers in found.items():
            scale = 1e3 if title.endswith("(ms)") else 1.0
            axes.plot(list(numbers), [scale * x for x in numbers.values()], ".-", color=colours[name], label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(xlabel="length (tokens)", title=title)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
