"""How a MemMamba layer joins what it read (c_tok from its own notes, c_lay from lower layers') to its input x.

    u, carry = fusion(x, c_tok, c_lay, carry, ctx)

The paper (arXiv:2510.03279, Eq. 12 and Table 4) names five and writes out the sum; the rest is our reading. Weighted
and Conv1d start at u = x: a layer around a trained mixer then begins as that mixer, bit for bit.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longwave.kernels.short_conv import short_conv
from longwave.layers.linear import linear
from longwave.layers.mixer import Carry, Context

X = Float[Array, "b t d"]


class Fusion(nnx.Module):
    """Base of the fusions: constructed by (width, rngs=...). What is zero, as c at an empty pool, changes nothing."""

    def init_carry(self, batch: int) -> Carry:
        """The state before the first token: most have none."""
        return ()

    def __call__(self, x: X, c_tok: X, c_lay: X, carry: Carry, ctx: Context) -> tuple[X, Carry]:
        raise TypeError(f"{type(self).__name__} defines no __call__")


class Weighted(Fusion):
    """u = x + α_tok c_tok + α_lay c_lay, two scalars that start at alpha: the paper's best."""

    roles: ClassVar[dict[str, str]] = {"alpha_tok": "norm", "alpha_lay": "norm"}  # gains: they do not decay
    keep_float32: ClassVar[frozenset[str]] = frozenset({"alpha_tok", "alpha_lay"})

    def __init__(self, width: int, *, alpha: float = 0.0, rngs: nnx.Rngs):
        self.alpha_tok, self.alpha_lay = (nnx.Param(jnp.asarray(alpha, jnp.float32)) for _ in range(2))

    def __call__(self, x: X, c_tok: X, c_lay: X, carry: Carry, ctx: Context) -> tuple[X, Carry]:
        return x + (self.alpha_tok[...] * c_tok + self.alpha_lay[...] * c_lay).astype(x.dtype), carry


class Residual(Fusion):
    """u = x + c_tok + c_lay."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        pass

    def __call__(self, x: X, c_tok: X, c_lay: X, carry: Carry, ctx: Context) -> tuple[X, Carry]:
        return x + c_tok + c_lay, carry


class Gated(Fusion):
    """u = x + σ(W x + b) (c_tok + c_lay), channel by channel."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.gate = linear(width, width, rngs=rngs)

    def __call__(self, x: X, c_tok: X, c_lay: X, carry: Carry, ctx: Context) -> tuple[X, Carry]:
        return x + (jax.nn.sigmoid(self.gate(x)) * (c_tok + c_lay)).astype(x.dtype), carry


class Product(Fusion):
    """u = x (1 + c_tok + c_lay), channel by channel."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        pass

    def __call__(self, x: X, c_tok: X, c_lay: X, carry: Carry, ctx: Context) -> tuple[X, Carry]:
        return x * (1 + c_tok + c_lay), carry


class Conv1d(Fusion):
    """u = x + conv(c_tok + c_lay): depthwise, causal, of `taps` taps that start at zero. Its carry: taps - 1 inputs."""

    roles: ClassVar[dict[str, str]] = {"w": "kernel"}

    def __init__(self, width: int, *, taps: int = 4, rngs: nnx.Rngs):
        if taps < 1:
            raise ValueError(f"Conv1d.taps = {taps}: expected at least 1")
        self.w = nnx.Param(jnp.zeros((taps, width)))

    def init_carry(self, batch: int) -> Carry:
        taps, width = self.w.shape
        return jnp.zeros((batch, taps - 1, width), jnp.float32)

    def __call__(self, x: X, c_tok: X, c_lay: X, carry: Carry, ctx: Context) -> tuple[X, Carry]:
        w = self.w[...].astype(x.dtype)
        read, carry = short_conv(c_tok + c_lay, w, state=carry, reset=ctx.reset, valid=ctx.valid, axes=ctx.axes)
        return x + read, carry
