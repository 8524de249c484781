"""The smallest honest mixer, for tests of what stands around mixers: h_t = a h_{t-1} + x_t, y = h."""

import jax
import jax.numpy as jnp
from flax import nnx

from longwave.layers.mixer import Context, Mixer, Out


class Decay(Mixer):
    roles = {"A": "A"}
    keep_float32 = frozenset({"A"})
    supports = frozenset({"causal", "carry"})

    def __init__(self, width, *, rngs):
        self.A = nnx.Param(jax.random.uniform(rngs.params(), (width,), minval=0.5, maxval=0.95))

    def init_carry(self, batch, *, capacity=None):
        return jnp.zeros((batch, self.A.shape[0]))

    def __call__(self, x, carry=None, ctx=Context()):
        valid = jnp.ones(x.shape[:2], bool) if ctx.valid is None else ctx.valid

        def step(h, inputs):
            u, ok = inputs
            h = jnp.where(ok[:, None], self.A[...][None] * h + u, h)
            return h, jnp.where(ok[:, None], h, 0.0)

        carry = self.init_carry(x.shape[0]) if carry is None else carry
        u = jnp.where(valid[..., None], x, 0.0).astype(jnp.float32)
        h, y = jax.lax.scan(step, carry, (jnp.moveaxis(u, 1, 0), valid.T))
        return Out(jnp.moveaxis(y, 0, 1).astype(x.dtype), h, {"energy": jnp.square(h).sum()})
