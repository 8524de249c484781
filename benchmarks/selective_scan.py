"""How fast Mamba trains on one core, and in how much memory, beside mambapy's parallel scan in PyTorch.

    python benchmarks/selective_scan.py [network scan] [--peer_python PYTHON]
    python benchmarks/selective_scan.py --growth [--plot PATH]

`network` is a whole training step of the network in network.py, four layers of width 64 (expand 2, N = 16) on a batch
of 8 x 2,048 tokens, `scan` the selective scan of one such layer alone, forward and backward: softplus, skip and gate
with it. The second form measures our own steps at lengths 512 to 16,384 and compares their growth with linear.

PYTHON has torch and mambapy. What cannot run is skipped with its reason. The exit code is 0 if every claim that could
be tried holds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping

import harness
import network
from harness import Measured, Skipped

LENGTH, LENGTHS = 2048, tuple(2**k for k in range(9, 15))
CHANNELS, N = 2 * network.WIDTH, 16
TIME, MEMORY = 0.15, 0.5  # claimed: ours over the peer's
SLACK = 1.1  # measurement noise: a token may cost this much more than at the cheapest shorter length


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
    parser.add_argument("--peer_python", default=sys.executable, help="interpreter that has torch and mambapy")
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
        options.peer_python if kind.startswith("mambapy") else sys.executable,
        *(__file__, "--contestant", f"{kind}:{length}", "--core", str(options.core)),
    ]
    return harness.race({k: command(k) for k in kinds}, rounds=options.rounds, burst=1, timeout=600)


def _compare(what: str, options: argparse.Namespace) -> bool:
    """Prints what was measured and what becomes of the claims. True if these hold, or could not be tried."""
    results = _race(RACES[what], LENGTH, options)
    print(f"{what}: batch {network.BATCH}, length {LENGTH:,}", flush=True)
    for name, result in results.items():
        if isinstance(result, Skipped):
            print(f"  {name:18s} skipped: {result.reason}")
        else:
            print(f"  {name:18s} {result.seconds * 1e3:9.1f} ms {result.mebibytes:8.0f} MiB")
    ours, peer = results.values()
    if isinstance(ours, Skipped) or isinstance(peer, Skipped):
        return True
    time, memory = ours.seconds / peer.seconds, ours.mebibytes / peer.mebibytes
    holds = time <= TIME and memory <= MEMORY
    print(f"  time {time:.3f} (at most {TIME}), memory {memory:.3f} (at most {MEMORY}){'' if holds else '   MISSED'}")
    return holds


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
        ax.plot(list(points), values, "o-", color="#1f4e8c", label="Mamba")
        end = max(points)
        linear = [values[-1] * n / end for n in points]
        ax.plot(list(points), linear, "--", color="#6b6b6b", label="linear")
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

    from longwave.layers.mamba import Mamba

    make = lambda key: nnx.split(Mamba(network.WIDTH, N=N, rngs=nnx.Rngs(key)))
    graph = make(0)[0]
    mixer = network.Mixer(lambda key: make(key)[1], lambda p, x: nnx.merge(graph, p)(x).y)
    return network.training_step(lambda: mixer, length)


def _mambapy_network(length: int) -> Callable[[], object]:
    """Its `MambaBlock`, which is the mixer without norm and residual."""
    from mambapy.mamba import MambaBlock, MambaConfig

    return network.training_step(lambda: MambaBlock(MambaConfig(network.WIDTH, n_layers=1, d_state=N)), length)


def _longwave_scan(length: int) -> Callable[[], object]:
    import jax

    from longwave.kernels.selective_scan import selective_scan

    x, dt, A, B, C, D, z, dt_bias, dy = _arrays(length)

    @jax.jit
    def run(dy, *args):
        scan = lambda x, dt, A, B, C, D, z, dt_bias: selective_scan(x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias)[0]
        y, vjp = jax.vjp(scan, *args)
        return y, vjp(dy)

    args = jax.device_put((dy, x, dt, A, B, C, D, z, dt_bias))
    return lambda: jax.block_until_ready(run(*args))


def _mambapy_scan(length: int) -> Callable[[], object]:
    """As its `MambaBlock` calls it."""
    import torch
    from mambapy.pscan import pscan

    torch.set_num_threads(1)
    *inputs, dy = (torch.from_numpy(v) for v in _arrays(length))
    inputs = [v.requires_grad_() for v in inputs]
    x, dt, A, B, C, D, z, dt_bias = inputs

    def run() -> object:
        delta = torch.nn.functional.softplus(dt + dt_bias)
        decays = torch.exp(delta.unsqueeze(-1) * A)
        h = pscan(decays, delta.unsqueeze(-1) * B.unsqueeze(2) * x.unsqueeze(-1))
        y = ((h @ C.unsqueeze(-1)).squeeze(3) + D * x) * torch.nn.functional.silu(z)
        return y, torch.autograd.grad(y, inputs, dy)

    return run


def _arrays(length: int) -> tuple:
    """x, dt, A, B, C, D, z, dt_bias and a cotangent, float32."""
    import numpy as np

    rng = np.random.default_rng(0)
    tokens = lambda size: rng.normal(size=(network.BATCH, length, size)).astype(np.float32)
    A = -np.tile(np.arange(1, N + 1, dtype=np.float32), (CHANNELS, 1))
    ones, bias = np.ones(CHANNELS, np.float32), np.full(CHANNELS, -4, np.float32)
    return tokens(CHANNELS), tokens(CHANNELS), A, tokens(N), tokens(N), ones, tokens(CHANNELS), bias, tokens(CHANNELS)


CONTESTANTS = {
    "longwave_network": _longwave_network,
    "mambapy_network": _mambapy_network,
    "longwave_scan": _longwave_scan,
    "mambapy_scan": _mambapy_scan,
}
RACES = {what: [f"longwave_{what}", f"mambapy_{what}"] for what in ("network", "scan")}


if __name__ == "__main__":
    sys.exit(main())
