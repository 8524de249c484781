"""RetNet's multi-scale retention (Sun, Dong, Huang, Ma, Xia, Xue, Wang and Wei, 2023, "Retentive Network: A Successor
to Transformer for Large Language Models", arXiv:2307.08621, equations 5 to 8); vision's ViR is the same layer.

Keys and queries turn with the token's position, and every head forgets at a pace of its own:

    q_n = W_q x_n e^{inθ},  k_n = W_k x_n e^{inθ}        γ_h = 1 - 2^(-5-h),  h = 0, 1, ...
    S_n = γ S_{n-1} + k_n v_n'        o_n = S_n' q_n / sqrt(K)        y = W_out (swish(W_g x) GroupNorm_h(o))

xPos's decay is γ itself; the rotation is that of `rope`. A head reads its position from the carry.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from longwave.kernels.linear_attention import linear_attention
from longwave.layers.attention import places
from longwave.layers.heads import GroupNorm, channels, join, masks, split
from longwave.layers.linear import linear
from longwave.layers.mamba import unpadded
from longwave.layers.mixer import Carry, Context, Mixer, Out
from longwave.layers.rope import rope


class RetNet(Mixer):
    """Multi-scale retention with its norm and gate.

    heads:    the paper's have 256 key dimensions each.
    expand_k, expand_v: key and value dimensions of all heads, for each of the width.
    base:     of the angles θ.     norm_eps: of the group norm.

    The carry: "S" (b, heads, K, V), float32, and "position" (b,), the tokens of the document so far.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int = 8,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        base: float = 10_000.0,
        norm_eps: float = 1e-5,
        rngs: nnx.Rngs,
    ):
        keys = channels(self, width, expand_k, heads, "expand_k")
        values = channels(self, width, expand_v, heads, "expand_v")
        if (keys // heads) % 2:
            raise ValueError(f"RetNet.heads = {heads}: {keys // heads} key dimensions of a head; an even number turns")
        self.heads, self.K, self.V, self.base = heads, keys // heads, values // heads, base
        self.q, self.k = linear(width, keys, bias=False, rngs=rngs), linear(width, keys, bias=False, rngs=rngs)
        self.v, self.gate = linear(width, values, bias=False, rngs=rngs), linear(width, values, bias=False, rngs=rngs)
        self.norm = GroupNorm(heads, self.V, eps=norm_eps)
        self.out = linear(values, width, bias=False, rngs=rngs)

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """No token yet. Nothing depends on capacity."""
        return {
            "S": jnp.zeros((batch, self.heads, self.K, self.V), jnp.float32),
            "position": jnp.zeros(batch, jnp.int32),
        }

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        carry = self.init_carry(x.shape[0]) if carry is None else carry
        u, at = unpadded(x, ctx), places(carry["position"], x.shape[1], ctx)
        q, k, v = (split(f(u), self.heads) for f in (self.q, self.k, self.v))
        q, k = (rope(m, at.position, base=self.base) for m in (q, k))
        g = jnp.broadcast_to(jnp.asarray(log_decay(self.heads))[None, None], (*x.shape[:2], self.heads))
        o, S = linear_attention(q, k, v, g, scale=self.K**-0.5, state=carry["S"], **masks(ctx))
        y = self.out(jax.nn.silu(self.gate(u)) * join(self.norm(o)))
        return Out(unpadded(y, ctx), {"S": S, "position": at.end}, {})


def log_decay(heads: int) -> np.ndarray:
    """log γ of every head."""
    return np.log1p(-(2.0 ** (-5.0 - np.arange(heads)))).astype(np.float32)
