"""Lightning attention (Qin et al., 2024, "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths
in Large Language Models", arXiv:2401.04658), in the layer of TransNormerLLM (arXiv:2307.14995), with the gate of its
authors' later code (TNL, arXiv:2405.17381).

Retention whose heads forget at ALiBi's slopes, the less the higher the layer; no rotation, no scale:

    q, k = silu(W x)        λ_h = exp(-s_h (1 - layer / (layers - 1) + 1e-5))        s_h = 2^(-8h/H), h = 1 ... H
    S_t = λ S_{t-1} + k_t v_t'        o_t = S_t' q_t        y = W_out (sigmoid(W_up W_low x) norm(o))

Where H is no power of two, the slopes are ALiBi's (arXiv:2108.12409): those of the power below, then every second one
of the power above.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from longwave.kernels.linear_attention import linear_attention
from longwave.layers.heads import LowRank, channels, join, masks, split
from longwave.layers.linear import linear
from longwave.layers.mamba import at_least_one, unpadded
from longwave.layers.mixer import Carry, Context, Mixer, Out
from longwave.layers.norms import RMSNorm


class LightningAttention(Mixer):
    """Linear attention with fixed decays, a norm over all heads and a gate.

    layer, layers: which layer of how many this is, from 0 on: the decays depend on it.
    silu_v:   v = silu(W x) too, as in TNL's code and in MiniMax-01 (arXiv:2501.08313).
    rank:     of the map to the gate; None: the dimensions of a head.
    norm_eps: of the norm.

    The carry is S (b, heads, d, d), float32.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int = 8,
        layer: int = 0,
        layers: int = 1,
        silu_v: bool = False,
        rank: int | None = None,
        norm_eps: float = 1e-6,
        rngs: nnx.Rngs,
    ):
        size = channels(self, width, 1, heads, "1")
        rank = size // heads if rank is None else rank
        at_least_one(self, rank=rank, layers=layers)
        if not 0 <= layer < layers:
            raise ValueError(f"LightningAttention.layer = {layer} must be at least 0 and below layers = {layers}")
        self.heads, self.size, self.silu_v, self.layer, self.layers = heads, size // heads, silu_v, layer, layers
        self.q, self.k, self.v = (linear(width, size, bias=False, rngs=rngs) for _ in range(3))
        self.gate = LowRank(width, rank, size, bias=False, rngs=rngs)
        self.norm = RMSNorm(size, eps=norm_eps)
        self.out = linear(size, width, bias=False, rngs=rngs)

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """Zeros. Nothing depends on capacity."""
        return jnp.zeros((batch, self.heads, self.size, self.size), jnp.float32)

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        u = unpadded(x, ctx)
        q, k, v = (split(f(u), self.heads) for f in (self.q, self.k, self.v))
        q, k, v = jax.nn.silu(q), jax.nn.silu(k), jax.nn.silu(v) if self.silu_v else v
        depth = 1 - self.layer / max(self.layers - 1, 1) + 1e-5
        g = jnp.asarray(-slopes(self.heads) * depth, jnp.float32)
        g = jnp.broadcast_to(g[None, None], (*x.shape[:2], self.heads))
        o, S = linear_attention(q, k, v, g, state=carry, **masks(ctx))
        y = self.out(jax.nn.sigmoid(self.gate(u)) * self.norm(join(o)))
        return Out(unpadded(y, ctx), S, {})


def slopes(heads: int) -> np.ndarray:
    """ALiBi's, float64."""
    of = lambda n: 2.0 ** (-8.0 * np.arange(1, n + 1) / n)
    below = 2 ** (heads.bit_length() - 1)
    return np.concatenate([of(below), of(2 * below)[::2][: heads - below]])
