"""Time of a token against the length of the text before it: recurrent mixers cost the same after 65,536 tokens.

    taskset -c 0 python benchmarks/decoding.py --out docs/images/decoding.png
    python benchmarks/decoding.py --mixers LRU,Mamba,Attention --contexts 128,1024,8192

Of each mixer a language model (2 layers, width 64, 257 ids, float32) reads a random text in pieces of 512 tokens, then
writes greedily in blocks of 32 tokens from one compiled function; contexts are taken in turn, and the median of the
rounds is shown. Attention's room is that of its context, so that its time grows with it.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from longwave import layers, models
from longwave.models import generate
from longwave.models.sampling import GREEDY
from longwave.training import plot

PIECE, BLOCK, ROUNDS = 512, 32, 7
WIDTH, DEPTH, VOCAB = 64, 2, 257


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", default="Mamba,Attention")
    parser.add_argument("--contexts", default="128,512,2048,8192,32768,65536")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", default="decoding.png")
    args = parser.parse_args()
    contexts = [int(n) for n in args.contexts.split(",")]
    times = {name: measure(name, contexts, args.rounds) for name in args.mixers.split(",")}
    rows = [{"context": f"{n:,}", **{f"{name} ms": f"{1e3 * times[name][n]:.3f}" for name in times}} for n in contexts]
    plot.table(rows, title=f"milliseconds a token after a context, {DEPTH} layers, width {WIDTH}")
    draw(times, args.out)


def measure(name: str, contexts: list[int], rounds: int) -> dict[int, float]:
    """Context -> median seconds a token."""
    body = models.Backbone(
        models.Tokens(VOCAB, 1), width=WIDTH, depth=DEPTH, mixers=(layers.MIXERS[name],), rngs=nnx.Rngs(0)
    )
    model = models.LanguageModel(body, vocab=VOCAB, rngs=nnx.Rngs(1))
    reader = jax.jit(generate.read, donate_argnums=1)
    writer = jax.jit(lambda model, session: generate.write(model, session, BLOCK, GREEDY), donate_argnums=1)
    sessions, seconds = {}, {n: [] for n in contexts}
    text = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, PIECE)), jnp.int32)
    for n in contexts:
        capacity = n + (rounds + 1) * BLOCK
        session = generate.start(model, 1, capacity=capacity, seeds=jnp.zeros(1, jnp.int32))
        for size in [PIECE] * (n // PIECE) + [n % PIECE] * (n % PIECE > 0):
            session = reader(model, session, text[:, :size])
        sessions[n] = jax.block_until_ready(writer(model, session)[0])  # compiles
    for _ in range(rounds):
        for n in contexts:
            began = time.perf_counter()
            sessions[n] = jax.block_until_ready(writer(model, sessions[n])[0])
            seconds[n].append((time.perf_counter() - began) / BLOCK)
    return {n: statistics.median(values) for n, values in seconds.items()}


def draw(times: dict[str, dict[int, float]], path: str) -> None:
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for name, found in times.items():
        axes.plot(list(found), [1e3 * s for s in found.values()], "o-", label=name, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens before", ylabel="milliseconds a token", yscale="log")
    axes.set_title(f"decoding, one row, {DEPTH} layers, width {WIDTH}, {jax.devices()[0].device_kind}", fontsize=9)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, format="png", dpi=150)
    print(path)


if __name__ == "__main__":
    main()
