"""How fast S4D trains on one core, beside other implementations.

    python benchmarks/s4d.py [--peer_python PYTHON] [--peers_dir DIR]

Layer: forward and backward of S4D without output projection, against discretax's S4D, which has none.
Step:  a whole training step (embedding, 4 x [x + S4D(LayerNorm x)], mean pool, cross-entropy, AdamW),
       against the torch S4D of state-spaces (`models/s4/s4d.py`).
Batch 8, length 2,048, width 64, N 64. The peers run under PYTHON, which needs jax, optax, equinox, discretax
and torch; DIR (or the variable PEERS_DIR) holds a checkout of state-spaces/s4 named `s4`. What is missing is
skipped with its reason.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

import harness

BATCH, LENGTH, WIDTH, DEPTH, N, VOCAB, CLASSES = 8, 2048, 64, 4, 64, 32, 10


def layer_ours() -> Callable[[], object]:
    from flax import nnx

    from longwave.layers.s4d import S4D

    graph, parameters = nnx.split(S4D(WIDTH, N=N, output=None, rngs=nnx.Rngs(0)))
    return _layer_step(lambda p, x: nnx.merge(graph, p)(x).y, parameters)


def layer_discretax() -> Callable[[], object]:
    import equinox as eqx
    import jax
    from discretax.sequence_mixers.s4d import S4DSequenceMixer

    mixer = S4DSequenceMixer(in_features=WIDTH, state_dim=N, key=jax.random.key(0))
    parameters, rest = eqx.partition(mixer, eqx.is_inexact_array)
    key = jax.random.key(1)
    return _layer_step(lambda p, x: jax.vmap(lambda row: eqx.combine(p, rest)(row, key))(x), parameters)


def _layer_step(apply: Callable, parameters: object) -> Callable[[], object]:
    import jax
    import jax.numpy as jnp

    x, dy = jax.random.normal(jax.random.key(2), (2, BATCH, LENGTH, WIDTH), jnp.float32)

    @jax.jit
    def run(parameters: object, x: jax.Array, dy: jax.Array) -> tuple:
        y, vjp = jax.vjp(apply, parameters, x)
        return y, vjp(dy)  # y too: a layer that is linear in x needs no forward pass for its gradients

    return lambda: jax.block_until_ready(run(parameters, x, dy))


def step_ours() -> Callable[[], object]:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from longwave.layers.s4d import S4D

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
            self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(DEPTH)])
            self.mixers = nnx.List([S4D(WIDTH, N=N, rngs=rngs) for _ in range(DEPTH)])
            self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

        def __call__(self, tokens: jax.Array) -> jax.Array:
            x = self.embed(tokens)
            for norm, mixer in zip(self.norms, self.mixers, strict=True):
                x = x + mixer(norm(x)).y
            return self.head(jnp.mean(x, axis=1))

    graph, parameters = nnx.split(Net(nnx.Rngs(0)))
    optimizer = optax.adamw(1e-3)
    tokens, labels = (jnp.asarray(a) for a in _batch())

    def loss(p: object) -> jax.Array:
        logits = nnx.merge(graph, p)(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(p: object, s: object) -> tuple:
        value, gradients = jax.value_and_grad(loss)(p)
        updates, s = optimizer.update(gradients, s, p)
        return optax.apply_updates(p, updates), s, value

    compiled = jax.jit(step, donate_argnums=(0, 1))
    state = [parameters, optimizer.init(parameters), None]

    def run() -> None:
        state[:] = compiled(*state[:2])
        float(state[2])

    return run


def step_torch() -> Callable[[], object]:
    import torch
    from torch import nn

    sys.path.insert(0, os.path.join(os.environ["PEERS_DIR"], "s4"))
    from models.s4.s4d import S4D

    torch.set_num_threads(1)
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCAB, WIDTH)
            self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(DEPTH))
            self.mixers = nn.ModuleList(S4D(WIDTH, d_state=N, transposed=True) for _ in range(DEPTH))
            self.head = nn.Linear(WIDTH, CLASSES)

        def forward(self, tokens):
            x = self.embed(tokens)
            for norm, mixer in zip(self.norms, self.mixers, strict=True):
                x = x + mixer(norm(x).transpose(1, 2))[0].transpose(1, 2)
            return self.head(x.mean(1))

    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    tokens, labels = (torch.as_tensor(a) for a in _batch())

    def run() -> None:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(net(tokens), labels)
        value.backward()
        optimizer.step()
        value.item()

    return run


def _batch() -> tuple:
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.integers(0, VOCAB, (BATCH, LENGTH)), rng.integers(0, CLASSES, BATCH)


CONTESTANTS = {f.__name__: f for f in (layer_ours, layer_discretax, step_ours, step_torch)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", default=sys.executable, help="interpreter that has the peers installed")
    parser.add_argument("--peers_dir", default=os.environ.get("PEERS_DIR", ""), help="folder of the checkouts")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        harness.pin(options.core)
        harness.serve(CONTESTANTS[options.contestant]())
        return 0
    os.environ["PEERS_DIR"] = options.peers_dir

    def race(*names: str) -> dict[str, float | harness.Skipped]:
        command = lambda name: [
            sys.executable if name.endswith("_ours") else options.peer_python,
            *(__file__, "--contestant", name, "--core", str(options.core)),
        ]
        return harness.race({name: command(name) for name in names}, rounds=options.rounds)

    layer = race("layer_ours", "layer_discretax")
    within = harness.report("S4D, forward + backward", layer, "layer_ours", {"layer_discretax": 1.0})
    step = race("step_ours", "step_torch")
    within &= harness.report("Training step", step, "step_ours", {"step_torch": 0.45})
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
