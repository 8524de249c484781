"""How fast Mamba-2 and the delta rule train on one core, and in how much memory, beside other people's code.

    python benchmarks/linear_attention.py [network scan delta] [--peer_python PYTHON]
    python benchmarks/linear_attention.py --growth [--plot PATH]

`network` is a whole training step of the network in network.py, four layers of width 64 (expand 2, heads of 32, N = 64)
on a batch of 8 x 2,048 tokens; `scan` is linear_attention of one such layer, forward and backward, beside what
mamba2-jax has for it; `delta` is the gated delta rule, 4 heads of K = V = 64, beside the textbook's chunks in PyTorch,
with loops in Python over the rows of the inverse and over the chunks. The second form measures our own steps at lengths
512 to 16,384 and compares their growth with linear.

PYTHON has mamba2-jax, optax, torch and transformers. The peers run with chunks of 64, where they are fastest here.
What cannot run is skipped with its reason. The exit code is 0 if every claim that could be tried holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import network
from layer_race import Race, main

N, P = 64, 32
HEADS = 2 * network.WIDTH // P
CHUNK = 64  # of the peers
DELTA = 64  # K and V of the delta rule's heads


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


def _delta_arrays(length: int) -> tuple:
    """do, q, k, v, g, beta; keys of length 1."""
    import numpy as np

    rng = np.random.default_rng(0)
    normal = lambda *size: rng.normal(size=(network.BATCH, length, HEADS, *size)).astype(np.float32)
    do, q, k, v = (normal(DELTA) for _ in range(4))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    return do, q, k, v, -np.abs(normal()), 1 / (1 + np.exp(-normal()))


def _longwave_delta(length: int) -> Callable[[], object]:
    import jax

    from longwave.kernels.linear_attention import linear_attention

    @jax.jit
    def run(do, *args):
        rule = lambda q, k, v, g, beta: linear_attention(q, k, v, g, w=beta, beta=beta, scale=DELTA**-0.5)[0]
        o, vjp = jax.vjp(rule, *args)
        return o, vjp(do)

    args = jax.device_put(_delta_arrays(length))
    return lambda: jax.block_until_ready(run(*args))


def _torch_delta(length: int) -> Callable[[], object]:
    import torch

    torch.set_num_threads(1)
    do, *args = (torch.tensor(x) for x in _delta_arrays(length))
    args = [x.requires_grad_() for x in args]

    def rule(q, k, v, g, beta):
        chunks = lambda x: x.transpose(1, 2).unflatten(2, (-1, CHUNK))  # (b, h, n, c, ...)
        q, k, v, g, beta = (chunks(x) for x in (DELTA**-0.5 * q, k, v, g, beta[..., None]))
        until = g.cumsum(-1)[..., None]
        decay = (until - until.transpose(-1, -2)).tril().exp().tril()
        L = ((beta * k) @ k.transpose(-1, -2) * decay).tril(-1)
        rows = [torch.zeros_like(L[..., 0, :])]
        for i in range(1, CHUNK):  # row i of (I + L)^-1 - I
            above = torch.stack(rows, -2)
            rows.append(-L[..., i, :] - (L[..., i, :i, None] * above).sum(-2))
        X = torch.stack(rows, -2) + torch.eye(CHUNK)
        U, W = X @ (beta * v), X @ (beta * k * until.exp())
        A, entered, last = (q @ k.transpose(-1, -2)) * decay, q * until.exp(), until[..., -1:, :]
        left, fade = k * (last - until).exp(), last.exp()
        S, o = U.new_zeros(*U.shape[:2], DELTA, DELTA), []
        for i in range(U.shape[2]):
            u = U[:, :, i] - W[:, :, i] @ S
            o.append(entered[:, :, i] @ S + A[:, :, i] @ u)
            S = fade[:, :, i] * S + left[:, :, i].transpose(-1, -2) @ u
        return torch.cat(o, 2).transpose(1, 2)

    def run() -> list:
        o = rule(*args)
        return [o, *torch.autograd.grad(o, args, do)]

    return run


CONTESTANTS = {
    "longwave_network": _longwave_network,
    "mamba2_jax_network": _mamba2_jax_network,
    "transformers_network": _transformers_network,
    "longwave_scan": _longwave_scan,
    "mamba2_jax_scan": _mamba2_jax_scan,
    "longwave_delta": _longwave_delta,
    "torch_delta": _torch_delta,
}
HEATS = {
    "network": ["longwave_network", "mamba2_jax_network", "transformers_network"],
    "scan": ["longwave_scan", "mamba2_jax_scan"],
    "delta": ["longwave_delta", "torch_delta"],
}
TIME = {"network": 0.85, "scan": 0.85, "delta": 0.4}


if __name__ == "__main__":
    sys.exit(main(Race(__file__, __doc__, "Mamba-2", CONTESTANTS, HEATS, time=TIME)))
