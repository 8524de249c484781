"""The affine map with PyTorch's initialisation, which the papers' recipes assume."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


def torch_uniform(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32, *, fan_in: int) -> jax.Array:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the default of torch.nn.Linear for weights and biases alike."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def linear(width_in: int, width_out: int, *, bias: bool = True, rngs: nnx.Rngs) -> nnx.Linear:
    """A Linear layer (kernel (in, out), bias (out,)) initialised as torch.nn.Linear."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        return torch_uniform(key, shape, dtype, fan_in=width_in)

    return nnx.Linear(width_in, width_out, use_bias=bias, kernel_init=init, bias_init=init, rngs=rngs)
