"""What a mixture of memories costs on one core, beside one gated delta memory of the same sizes, and against length.

    python benchmarks/mom.py [layer]
    python benchmarks/mom.py --growth [--plot PATH]

`layer` is one layer, forward and backward, of width 128 on 8 x 2,048 tokens: two heads of 64 key and value dimensions,
their convolutions, gate and norm. MoM has four memories, of which a token takes two, and the shared one, so that a
token is read and written three times (k + 1); claimed is at most k + 1.3 times the time of GatedDeltaNet. The second
form measures training steps of the network in network.py at lengths 512 to 16,384, and compares their growth with
linear.

The exit code is 0 if every claim holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import network
from layer_race import Race, main

WIDTH, HEADS, P = 128, 2, 64
M, K = 4, 2


def _mom(width: int, heads: int, P: int) -> Callable:
    from longwave.layers.mom import MoM

    return lambda rngs: MoM(width, M=M, k=K, heads=heads, P=P, rngs=rngs)


def _gated_delta(width: int, heads: int, P: int) -> Callable:
    from longwave.layers.gated_deltanet import GatedDeltaNet

    return lambda rngs: GatedDeltaNet(width, heads=heads, expand_k=heads * P / width, expand_v=1.0, rngs=rngs)


def _network(length: int) -> Callable[[], object]:
    from flax import nnx

    make = lambda key: nnx.split(_mom(network.WIDTH, 2, network.WIDTH // 2)(nnx.Rngs(key)))
    graph = make(0)[0]
    mixer = network.Mixer(lambda key: make(key)[1], lambda p, x: nnx.merge(graph, p)(x).y)
    return network.training_step(lambda: mixer, length)


def _layer(make: Callable, length: int) -> Callable[[], object]:
    import jax
    import numpy as np
    from flax import nnx

    graph, parameters = nnx.split(make(WIDTH, HEADS, P)(nnx.Rngs(0)))

    @jax.jit
    def run(dy, parameters, x):
        y, vjp = jax.vjp(lambda p, x: nnx.merge(graph, p)(x).y, parameters, x)
        return y, vjp(dy)

    x, dy = np.random.default_rng(0).normal(size=(2, network.BATCH, length, WIDTH)).astype(np.float32)
    args = jax.device_put((dy, parameters, x))
    return lambda: jax.block_until_ready(run(*args))


CONTESTANTS = {
    "longwave_network": _network,
    "longwave_mom": lambda length: _layer(_mom, length),
    "longwave_gated_delta": lambda length: _layer(_gated_delta, length),
}
HEATS = {"layer": ["longwave_mom", "longwave_gated_delta"]}


if __name__ == "__main__":
    sys.exit(main(Race(__file__, __doc__, "MoM", CONTESTANTS, HEATS, time=K + 1.3, memory=K + 1.3)))
