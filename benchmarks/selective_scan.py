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

import sys
from collections.abc import Callable

import network
from layer_race import Race, main

CHANNELS, N = 2 * network.WIDTH, 16


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
HEATS = {what: [f"longwave_{what}", f"mambapy_{what}"] for what in ("network", "scan")}


if __name__ == "__main__":
    sys.exit(main(Race(__file__, __doc__, "Mamba", CONTESTANTS, HEATS, time=0.15)))
