"""Gated DeltaNet (Yang, Kautz and Hatamizadeh, 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule",
arXiv:2412.06464, equation 10 and Section 3.4): DeltaNet's correction and Mamba-2's decay.

    q, k, v = silu(conv(W x)),  q and k of length 1
    β = sigmoid(W_β x)        α = exp(-exp(A_log) softplus(W_α x + dt_bias))
    S' = α_t S_{t-1}        S_t = S' + β_t k_t (v_t - S'' k_t)'        o_t = S_t' q_t / sqrt(K)
    y = W_out (norm_h(o) silu(W_g x))

(S'' is the transpose of S'.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longwave.kernels.linear_attention import linear_attention
from longwave.layers.heads import ConvolvedHeads, Decay, HeadNorm, channels, join, masks
from longwave.layers.linear import linear
from longwave.layers.mamba import at_least_one, unpadded
from longwave.layers.mixer import Carry, Context, Mixer, Out


class GatedDeltaNet(Mixer):
    """The gated delta rule with its convolutions, norm and gate.

    heads, expand_k: the paper's heads have 256 key dimensions each, three quarters of the width together: six heads of
        a width of 2,048.      expand_v: value dimensions of a head for each of its key dimensions.
    conv:      taps of the convolutions, the token itself included.
    A_init:    exp(A_log) starts uniform between these two.
    negative_eigenvalues: β is doubled.
    norm_eps:  of each head's norm.

    The carry is float32: "conv", the last inputs of the convolutions of "q", "k" and "v", and "S" (b, heads, K, V).
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int = 6,
        expand_k: float = 0.75,
        expand_v: float = 2.0,
        conv: int = 4,
        A_init: tuple[float, float] = (0.0, 16.0),
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
        rngs: nnx.Rngs,
    ):
        keys = channels(self, width, expand_k, heads, "expand_k")
        values = channels(self, keys, expand_v, heads, "expand_v * expand_k")
        at_least_one(self, conv=conv)
        self.heads, self.K, self.V, self.most = heads, keys // heads, values // heads, 1 + negative_eigenvalues
        self.qkv = ConvolvedHeads(width, heads=heads, key=self.K, value=self.V, conv=conv, rngs=rngs)
        self.beta, self.a = linear(width, heads, bias=False, rngs=rngs), linear(width, heads, bias=False, rngs=rngs)
        self.decay = Decay((heads,), A_init=A_init, rngs=rngs)
        self.gate = linear(width, values, bias=False, rngs=rngs)
        self.norm = HeadNorm(self.V, eps=norm_eps)
        self.out = linear(values, width, bias=False, rngs=rngs)

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """Zeros. Nothing depends on capacity."""
        S = jnp.zeros((batch, self.heads, self.K, self.V), jnp.float32)
        return {"conv": self.qkv.init_carry(batch), "S": S}

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        carry = self.init_carry(x.shape[0]) if carry is None else carry
        u = unpadded(x, ctx)
        (q, k, v), conv = self.qkv(u, carry["conv"], ctx)
        beta = self.most * jax.nn.sigmoid(self.beta(u).astype(jnp.float32))
        g = self.decay(self.a(u))
        o, S = linear_attention(q, k, v, g, w=beta, beta=beta, scale=self.K**-0.5, state=carry["S"], **masks(ctx))
        y = self.out(join(self.norm(o)) * jax.nn.silu(self.gate(u)))
        return Out(unpadded(y, ctx), {"conv": conv, "S": S}, {})
