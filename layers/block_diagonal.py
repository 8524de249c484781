"""A linear map whose matrix is block-diagonal: blocks of features stay strangers to each other."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from longwave.kernels.attention.reference import einsum32
from longwave.layers.linear import torch_uniform


class BlockDiagonal(nnx.Module):
    """(b, t, d) -> (b, t, d) by a square matrix of `blocks` equal blocks.

    lecun: the kernel starts N(0, blocks / d) and the bias at 0; else both as torch.nn.Linear's.
    The result is float32. kernel: (blocks, d / blocks, d / blocks).
    """

    roles: ClassVar[dict[str, str]] = {"kernel": "kernel"}

    def __init__(self, width: int, *, blocks: int, bias: bool = True, lecun: bool = False, rngs: nnx.Rngs):
        if blocks < 1 or width % blocks:
            raise ValueError(f"BlockDiagonal.blocks = {blocks} must divide the width {width}")
        self.blocks, size = blocks, width // blocks
        shape, key = (blocks, size, size), rngs.params()
        normal = lambda: jax.random.normal(key, shape) * size**-0.5
        self.kernel = nnx.Param(normal() if lecun else torch_uniform(key, shape, fan_in=size))
        start = lambda: jnp.zeros(width) if lecun else torch_uniform(rngs.params(), (width,), fan_in=size)
        self.bias = nnx.Param(start()) if bias else None

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        x = rearrange(x, "b t (n i) -> b t n i", n=self.blocks)
        y = rearrange(einsum32("btni,nio->btno", x, self.kernel[...]), "b t n o -> b t (n o)")
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)[None, None]
