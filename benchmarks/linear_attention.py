"""How fast Mamba-2 trains on one core, and in how much memory, beside mamba2-jax and transformers.

    python benchmarks/linear_attention.py [network scan] [--peer_python PYTHON]
    python benchmarks/linear_attention.py --growth [--plot PATH]

`network` is a whole training step of the network in network.py, four layers of width 64 (expand 2, heads of 32, N = 64)
on a batch of 8 x 2,048 tokens; `scan` is linear_attention of one such layer, forward and backward, beside what
mamba2-jax has for it. The second form measures our own steps at lengths 512 to 16,384 and compares their growth with
linear.

PYTHON has mamba2-jax, optax, torch and transformers. The peers run with chunks of 64, where they are fastest here.
What cannot run is skipped with its reason. The exit code is 0 if every claim that could be tried holds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping

import harness
import network
from harness import Measured, Skipped

LENGTH, LENGTHS = 2048, tuple(2**k for k in range(9, 15))
N, P = 64, 32
HEADS = 2 * network.WIDTH // P
CHUNK = 64  # of the peers
TIME, MEMORY = 0.85, 0.5  # claimed: ours over each peer's
SLACK = 1.15  # measurement noise: a token may cost this much more than at the cheapest shorter length


def main() -> int:
    options = _options()
    if options.contestant:
        harness.pin(options.core)
        kind, _, length = options.contestant.partition(":")
        harness.serve(CONTESTANTS[kind](int(length)))
        return 0
    within = [_growth(options)] if options.growth else [_compare(what, options) for what in options.what or RACES]
    return 0 if all(within) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="network|scan", help="default: both")
    parser.add_argument("--peer_python", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--growth", action="store_true", help="our own steps at many lengths")
    parser.add_argument("--plot", metavar="PATH", help="with --growth: draw it into this PNG file")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.what) - set(RACES):
        parser.error(f"{unknown.pop()!r} is none of {', '.join(RACES)}")
    return options


def _race(kinds: list[str], length: int, options: argparse.Namespace) -> dict[str, Measured | Skipped]:
    command = lambda kind: [
        sys.executable if kind.startswith("longwave") else options.peer_python,
        *(__file__, "--contestant", f"{kind}:{length}", "--core", str(options.core)),
    ]
    return harness.race({k: command(k) for k in kinds}, rounds=options.rounds, burst=1, timeout=600)


def _compare(what: str, options: argparse.Namespace) -> bool:
    """Prints what was measured and what becomes of the claims. True if these hold, or could not be tried."""
    results = _race(RACES[what], LENGTH, options)
    print(f"{what}: batch {network.BATCH}, length {LENGTH:,}", flush=True)
    ours, within = results[RACES[what][0]], True
    for name, result in results.items():
        if isinstance(result, Skipped):
            print(f"  {name:22s} skipped: {result.reason}")
            continue
        line = f"  {name:22s} {result.seconds * 1e3:9.1f} ms {result.mebibytes:8.0f} MiB"
        if result is not ours and isinstance(ours, Measured):
            time, memory = ours.seconds / result.seconds, ours.mebibytes / result.mebibytes
            holds = time <= TIME and memory <= MEMORY
            within &= holds
            line += f"   ours: time {time:.2f} (at most {TIME}), memory {memory:.2f} (at most {MEMORY})"
            line += "" if holds else "   MISSED"
        print(line, flush=True)
    return within


def _growth(options: argparse.Namespace) -> bool:
    """Prints milliseconds a step, nanoseconds a token of the batch, and MiB. True if no token gets dearer."""
    points: dict[int, Measured] = {}
    within = True
    print(f"Training step, batch {network.BATCH}\n  {'length':>8s} {'ms':>9s} {'ns/token':>9s} {'MiB':>7s}")
    for length in LENGTHS:
        result = _race(["longwave_network"], length, options)["longwave_network"]
        if isinstance(result, Skipped):
            print(f"  {length:8,d} skipped: {result.reason}")
            continue
        points[length] = result
        cost = lambda n: points[n].seconds / (n * network.BATCH) * 1e9
        within &= cost(length) <= SLACK * min(cost(n) for n in points)
        ms = result.seconds * 1e3
        print(f"  {length:8,d} {ms:9.1f} {cost(length):9.0f} {result.mebibytes:7.0f}", flush=True)
    if options.plot and points:
        _plot(points, options.plot)
    return within


def _plot(points: Mapping[int, Measured], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    fields = {"seconds": "processor time of a training step (s)", "mebibytes": "memory that a step adds (MiB)"}
    for ax, (field, label) in zip(figure.subplots(1, 2), fields.items(), strict=True):
        values = [getattr(point, field) for point in points.values()]
        ax.plot(list(points), values, "o-", color="#1f4e8c", label="Mamba-2")
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


# The contestants: a length -> a step


def _longwave_network(length: int) -> Callable[[], object]:
    from flax import nnx

    from longwave.layers.mamba2 import Mamba2

    make = lambda key: nnx.split(Mamba2(network.WIDTH, N=N, P=P, rngs=nnx.Rngs(key)))
    graph = make(0)[0]
    mixer = network.Mixer(lambda key: make(key)[1], lambda p, x: nnx.merge(graph, p)(x).y)
    return network.training_step(lambda: mixer, length)


def _mamba2_jax_network(length: int) -> Callable[[], object]:
    from flax import nnx
    from mamba2_jax.modeling import Mamba2Config, Mamba2Mixer

    config = Mamba2Config(hidden_size=network.WIDTH, state_size=N, head_dim=P, chunk_size=CHUNK, num_hidden_layers=1)
    make = lambda key: nnx.split(Mamba2Mixer(config, 0, rngs=nnx.Rngs(key)))
    graph = make(0)[0]
    mixer = network.Mixer(lambda key: make(key)[1], lambda p, x: nnx.merge(graph, p)(x)[0])
    return network.training_step(lambda: mixer, length)


def _transformers_network(length: int) -> Callable[[], object]:
    """Its mixer without CUDA kernels."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    sizes = {"hidden_size": network.WIDTH, "state_size": N, "head_dim": P, "num_heads": HEADS, "n_groups": 1}
    config = Mamba2Config(**sizes, chunk_size=CHUNK, num_hidden_layers=1)
    return network.training_step(lambda: Mamba2Mixer(config, 0), length)


def _longwave_scan(length: int) -> Callable[[], object]:
    import jax

    from longwave.kernels.linear_attention import linear_attention

    def scan(x: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array) -> jax.Array:
        dt = jax.nn.softplus(dt)
        return linear_attention(C[:, :, None], B[:, :, None], x, dt * A[None, None], w=dt)[0]

    return _scan(scan, length)


def _mamba2_jax_scan(length: int) -> Callable[[], object]:
    """With its mixer's copies of B and C for every head. It adds a D of zeros."""
    import jax.numpy as jnp
    from mamba2_jax.modeling import ssd_forward

    zeros = jnp.zeros(HEADS)
    limits = {"dt_bias": zeros, "dt_min": 0.0, "dt_max": float("inf")}

    def scan(x, dt, A, B, C):
        B, C = (jnp.repeat(m[:, :, None], HEADS, axis=2) for m in (B, C))
        return ssd_forward(x, dt, A, B, C, CHUNK, zeros, **limits)[0]

    return _scan(scan, length)


def _scan(scan: Callable, length: int) -> Callable[[], object]:
    import jax
    import numpy as np

    rng = np.random.default_rng(0)
    tokens = lambda *size: rng.normal(size=(network.BATCH, length, *size)).astype(np.float32)
    arrays = tokens(HEADS, P), tokens(HEADS) - 4, -np.arange(1, HEADS + 1, dtype=np.float32), tokens(N), tokens(N)

    @jax.jit
    def run(dy, *args):
        y, vjp = jax.vjp(scan, *args)
        return y, vjp(dy)

    args = jax.device_put((tokens(HEADS, P), *arrays))
    return lambda: jax.block_until_ready(run(*args))


CONTESTANTS = {
    "longwave_network": _longwave_network,
    "mamba2_jax_network": _mamba2_jax_network,
    "transformers_network": _transformers_network,
    "longwave_scan": _longwave_scan,
    "mamba2_jax_scan": _mamba2_jax_scan,
}
RACES = {
    "network": ["longwave_network", "mamba2_jax_network", "transformers_network"],
    "scan": ["longwave_scan", "mamba2_jax_scan"],
}


if __name__ == "__main__":
    sys.exit(main())
