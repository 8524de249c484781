"""DeltaNet: the delta rule (Yang, Wang, Zhang, Shen and Kim, 2024, "Parallelizing Linear Transformers with the Delta
Rule over Sequence Length", arXiv:2406.06484; the rule is Schlag, Irie and Schmidhuber's, arXiv:2102.11174).

What a key holds already is taken away in the measure β before its new value is written, so that the state can be
corrected, not only added to:

    q, k, v = silu(conv(W x)),  q and k of length 1        β = sigmoid(W_β x)
    S_t = S_{t-1} + β_t k_t (v_t - S_{t-1}' k_t)'        o_t = S_t' q_t / sqrt(K)        y = W_out norm_h(o)

With β in (0, 2) the state's eigenvalues 1 - β may be negative (Grazzi et al., 2024, arXiv:2411.12537).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longwave.kernels.linear_attention import linear_attention
from longwave.layers.heads import ConvolvedHeads, HeadNorm, channels, join, masks
from longwave.layers.linear import linear
from longwave.layers.mamba import at_least_one, unpadded
from longwave.layers.mixer import Carry, Context, Mixer, Out


class DeltaNet(Mixer):
    """The delta rule with its convolutions and norm.

    heads:    the paper's have 128 dimensions each.
    expand_k, expand_v: key and value dimensions of all heads, for each of the width.
    conv:     taps of the convolutions, the token itself included.
    negative_eigenvalues: β is doubled.
    norm_eps: of each head's norm.

    The carry is float32: "conv", the last inputs of the convolutions of "q", "k" and "v", and "S" (b, heads, K, V).
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int = 8,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv: int = 4,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
        rngs: nnx.Rngs,
    ):
        keys = channels(self, width, expand_k, heads, "expand_k")
        values = channels(self, width, expand_v, heads, "expand_v")
        at_least_one(self, conv=conv)
        self.heads, self.K, self.V, self.most = heads, keys // heads, values // heads, 1 + negative_eigenvalues
        self.qkv = ConvolvedHeads(width, heads=heads, key=self.K, value=self.V, conv=conv, rngs=rngs)
        self.beta = linear(width, heads, bias=False, rngs=rngs)
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
        o, S = linear_attention(q, k, v, w=beta, beta=beta, scale=self.K**-0.5, state=carry["S"], **masks(ctx))
        y = self.out(join(self.norm(o)))
        return Out(unpadded(y, ctx), {"conv": conv, "S": S}, {})
