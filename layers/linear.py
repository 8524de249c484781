"""The affine map, by its initialisation: PyTorch's, which most papers' recipes assume, and others'.

Modules that let a config choose take a constructor of this kind: (width_in, width_out, *, bias=True, rngs).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

MakeLinear = Callable[..., nnx.Linear]


def torch_uniform(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32, *, fan_in: int) -> jax.Array:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): the default of torch.nn.Linear for weights and biases alike."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def linear(width_in: int, width_out: int, *, bias: bool = True, rngs: nnx.Rngs) -> nnx.Linear:
    """A Linear layer (kernel (in, out), bias (out,)) initialised as torch.nn.Linear."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        return torch_uniform(key, shape, dtype, fan_in=width_in)

    return nnx.Linear(width_in, width_out, use_bias=bias, kernel_init=init, bias_init=init, rngs=rngs)


def lecun(width_in: int, width_out: int, *, bias: bool = True, rngs: nnx.Rngs) -> nnx.Linear:
    """Kernel from LeCun's truncated normal of variance 1 / width_in, bias 0: flax's default."""
    return nnx.Linear(width_in, width_out, use_bias=bias, rngs=rngs)


def xavier(width_in: int, width_out: int, *, bias: bool = True, rngs: nnx.Rngs) -> nnx.Linear:
    """Kernel from Glorot's uniform, U(-a, a) with a^2 = 6 / (width_in + width_out); bias N(0, 1e-12).

    Of Long Range Arena's Transformers.
    """
    kernel, tiny = jax.nn.initializers.glorot_uniform(), jax.nn.initializers.normal(1e-6)
    return nnx.Linear(width_in, width_out, use_bias=bias, kernel_init=kernel, bias_init=tiny, rngs=rngs)


def normal(width_in: int, width_out: int, *, std: float = 0.02, bias: bool = True, rngs: nnx.Rngs) -> nnx.Linear:
    """Kernel N(0, std^2), bias 0: of GPT-2, and of many language models since."""
    return nnx.Linear(width_in, width_out, use_bias=bias, kernel_init=jax.nn.initializers.normal(std), rngs=rngs)
