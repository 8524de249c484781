"""Linear attention (Katharopoulos, Vyas, Pappas and Fleuret, 2020, "Transformers are RNNs: Fast Autoregressive
Transformers with Linear Attention", arXiv:2006.16236, equations 16 to 20).

The softmax's exp(q'k) becomes a product of features, φ(q)'φ(k), so that the sum over the past is a state:

    S_t = S_{t-1} + φ(k_t) v_t'        z_t = z_{t-1} + φ(k_t)
    y_t = W_out concat_h (S_t' φ(q_t)) / (z_t' φ(q_t) + eps)
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longwave.kernels.linear_attention import linear_attention
from longwave.layers.heads import channels, join, masks, split
from longwave.layers.linear import linear
from longwave.layers.mamba import unpadded
from longwave.layers.mixer import Carry, Context, Mixer, Out

FeatureMap = Callable[[Float[Array, "b t h d"]], Float[Array, "b t h K"]]


def elu_plus_one(x: Float[Array, "b t h d"]) -> Float[Array, "b t h d"]:
    """elu(x) + 1: positive, and its gradient does not vanish below 0 (equation 7)."""
    return jax.nn.elu(x) + 1


def feature_count(feature_map: FeatureMap, size: int) -> int:
    """Features of a vector of so many numbers."""
    return jax.eval_shape(feature_map, jax.ShapeDtypeStruct((1, 1, 1, size), jnp.float32)).shape[-1]


class LinearAttention(Mixer):
    """Causal attention with a feature map for a kernel, of constant memory.

    feature_map: φ, of (b, t, heads, d) in its last dimension.
    normaliser:  eps of the division by the sum of the weights; None: no division.
    scale:       of the scores q'k; it matters without a normaliser.

    The carry is S, float32, (b, heads, features, d), with z as one more column behind a normaliser.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int = 8,
        feature_map: FeatureMap = elu_plus_one,
        normaliser: float | None = 1e-6,
        scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        size = channels(self, width, 1, heads, "1")
        self.heads, self.size, self.feature_map = heads, size // heads, feature_map
        self.normaliser, self.scale = normaliser, scale
        self.q, self.k, self.v = (linear(width, size, bias=False, rngs=rngs) for _ in range(3))
        self.out = linear(size, width, bias=False, rngs=rngs)

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """Zeros. Nothing depends on capacity."""
        columns = self.size + (self.normaliser is not None)
        return jnp.zeros((batch, self.heads, feature_count(self.feature_map, self.size), columns), jnp.float32)

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        u = unpadded(x, ctx)
        q, k, v = (split(f(u), self.heads) for f in (self.q, self.k, self.v))
        q, k = self.feature_map(q), self.feature_map(k)
        o, state = linear_attention(q, k, v, scale=self.scale, normaliser=self.normaliser, state=carry, **masks(ctx))
        return Out(unpadded(self.out(join(o)), ctx), state, {})
