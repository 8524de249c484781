"""Based's linear attention (Arora et al., 2024, "Simple linear attention language models balance the recall-throughput
tradeoff", arXiv:2402.18668, Section 3): the features are the second-order Taylor series of the softmax's exponential.

    φ(x) = [1, x / d^(1/4), vec(xx') / (sqrt(2) sqrt(d))]        φ(q)'φ(k) = 1 + s + s²/2,  s = q'k / sqrt(d)
    y_t = W_out concat_h (Σ_i φ(q_t)'φ(k_i) v_i) / (Σ_i φ(q_t)'φ(k_i) + eps)

1 + s + s²/2 is at least 1/2: nothing is divided by 0. d is small, 16 in the paper, for there are 1 + d + d² features.
The paper's models alternate these layers with short convolutions and with attention over a small window:

    models.Backbone.mixers = (@layers.ShortConv, @layers.Based, @layers.Attention)
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longwave.kernels.linear_attention import linear_attention
from longwave.layers.heads import channels, join, masks, split
from longwave.layers.linear import linear
from longwave.layers.mamba import at_least_one, unpadded
from longwave.layers.mixer import Carry, Context, Mixer, Out


def taylor(x: Float[Array, "b t h d"]) -> Float[Array, "b t h 1+d+d*d"]:
    """φ(x): the inner product of two is 1 + s + s²/2 of their own one's s = x'y / sqrt(d)."""
    d = x.shape[-1]
    second = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], d * d) / math.sqrt(2 * d)
    return jnp.concatenate((jnp.ones_like(x[..., :1]), x / d**0.25, second), axis=-1)


class Based(Mixer):
    """Linear attention with Taylor features.

    feature_dim: d, the dimensions of a head's queries and keys before φ; its values have width / heads.
    eps:         of the division; the authors' 1e-12, other code's 1e-6.

    The carry is float32, (b, heads, 1 + d + d², width / heads + 1): the sum of φ(k) v', and that of φ(k) as its last
    column.
    """

    def __init__(self, width: int, *, heads: int = 16, feature_dim: int = 16, eps: float = 1e-12, rngs: nnx.Rngs):
        size = channels(self, width, 1, heads, "1")
        at_least_one(self, feature_dim=feature_dim)
        self.heads, self.V, self.d, self.eps = heads, size // heads, feature_dim, eps
        self.q, self.k = (linear(width, heads * feature_dim, bias=False, rngs=rngs) for _ in range(2))
        self.v, self.out = (linear(size, size, bias=False, rngs=rngs) for _ in range(2))

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """Zeros. Nothing depends on capacity."""
        return jnp.zeros((batch, self.heads, 1 + self.d + self.d**2, self.V + 1), jnp.float32)

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        u = unpadded(x, ctx)
        q, k, v = (split(f(u), self.heads) for f in (self.q, self.k, self.v))
        o, state = linear_attention(taylor(q), taylor(k), v, normaliser=self.eps, state=carry, **masks(ctx))
        return Out(unpadded(self.out(join(o)), ctx), state, {})
