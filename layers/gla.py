"""GLA, gated linear attention (Yang, Wang, Shen, Panda and Kim, 2023, "Gated Linear Attention Transformers with
Hardware-Efficient Training", arXiv:2312.06635, equations 3 to 6 and Section 4.4).

Every key dimension forgets as the token says:

    α_t = sigmoid(W_up W_low x_t + b)^(1/τ)        S_t = Diag(α_t) S_{t-1} + k_t v_t'        o_t = S_t' q_t / sqrt(K)
    y = W_out (swish(W_g x) norm_h(o))
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longwave.kernels.linear_attention import linear_attention
from longwave.layers.heads import HeadNorm, LowRank, channels, join, masks, split
from longwave.layers.linear import linear
from longwave.layers.mamba import at_least_one, unpadded
from longwave.layers.mixer import Carry, Context, Mixer, Out


class GLA(Mixer):
    """Gated linear attention with its norm and gate.

    expand_k, expand_v: key and value dimensions of all heads, for each of the width.
    rank, tau: of the map to α, and the root that is taken of it: α starts near 1.
    norm_eps:  of each head's norm.

    The carry is S (b, heads, K, V), float32.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        rank: int = 16,
        tau: float = 16.0,
        norm_eps: float = 1e-5,
        rngs: nnx.Rngs,
    ):
        keys = channels(self, width, expand_k, heads, "expand_k")
        values = channels(self, width, expand_v, heads, "expand_v")
        at_least_one(self, rank=rank)
        if tau <= 0:
            raise ValueError(f"GLA.tau = {tau} must be positive")
        self.heads, self.K, self.V, self.tau = heads, keys // heads, values // heads, tau
        self.q, self.k = linear(width, keys, bias=False, rngs=rngs), linear(width, keys, bias=False, rngs=rngs)
        self.v, self.gate = linear(width, values, bias=False, rngs=rngs), linear(width, values, bias=False, rngs=rngs)
        self.decay = LowRank(width, rank, keys, bias=True, rngs=rngs)
        self.norm = HeadNorm(self.V, eps=norm_eps)
        self.out = linear(values, width, bias=False, rngs=rngs)

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """Zeros. Nothing depends on capacity."""
        return jnp.zeros((batch, self.heads, self.K, self.V), jnp.float32)

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        u = unpadded(x, ctx)
        q, k, v = (split(f(u), self.heads) for f in (self.q, self.k, self.v))
        g = jax.nn.log_sigmoid(split(self.decay(u), self.heads).astype(jnp.float32)) / self.tau
        o, S = linear_attention(q, k, v, g, scale=self.K**-0.5, state=carry, **masks(ctx))
        y = self.out(jax.nn.silu(self.gate(u)) * join(self.norm(o)))
        return Out(unpadded(y, ctx), S, {})
