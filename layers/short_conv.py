"""A short causal convolution as a mixer of its own, plain or gated: what hybrids put between layers that recall.

y = conv(x)        or, as BaseConv (Arora et al., 2023, "Zoology", arXiv:2312.04927),        y = (W x + b) conv(x)

BaseConv's second bias, that of its convolution, is left out.
"""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longwave.kernels.short_conv import short_conv
from longwave.layers.heads import masks
from longwave.layers.linear import linear
from longwave.layers.mamba import at_least_one, unpadded
from longwave.layers.mixer import Carry, Context, Mixer, Out


class ShortConv(Mixer):
    """A depthwise causal convolution.

    conv:  taps, the token itself included; they start N(0, 1 / conv).
    gated: the output is multiplied by an affine map of the token.

    The carry is the last conv - 1 inputs, (b, conv - 1, width), float32.
    """

    roles: ClassVar[dict[str, str]] = {"taps": "kernel"}

    def __init__(self, width: int, *, conv: int = 3, gated: bool = False, rngs: nnx.Rngs):
        at_least_one(self, conv=conv)
        self.taps = nnx.Param(jax.random.normal(rngs.params(), (conv, width)) / math.sqrt(conv))
        if gated:
            self.gate = linear(width, width, rngs=rngs)

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """Zeros. Nothing depends on capacity."""
        conv, width = self.taps.shape
        return jnp.zeros((batch, conv - 1, width), jnp.float32)

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        u = unpadded(x, ctx)
        y, carry = short_conv(u, self.taps[...], state=carry, **masks(ctx))
        return Out(y * self.gate(u) if hasattr(self, "gate") else y, carry, {})
