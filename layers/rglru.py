"""RG-LRU in the recurrent block of Griffin and Hawk (De et al., 2024, "Griffin: Mixing Gated Linear Recurrences with
Local Attention for Efficient Language Models", arXiv:2402.19427, Sections 2.3 and 2.4).

    x = conv(W_x u)        z = gelu(W_z u)             conv: causal, depthwise, 4 taps
    r_t = sigmoid(W_a x_t + b_a)                       recurrence gate      W_a, W_i: block-diagonal
    i_t = sigmoid(W_i x_t + b_i)                       input gate
    a_t = exp(-c softplus(Λ) r_t)                      c = 8
    h_t = a_t h_{t-1} + sqrt(1 - a_t²) (i_t x_t)       a document's first token: h_t = i_t x_t
    out = W_out (h z)

sqrt(1 - a²) keeps h as large as what is written. A first token has no h before it to make room for, and is written
whole, as in the authors' released code.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from longwave.kernels.linear_scan import linear_scan
from longwave.kernels.short_conv import short_conv
from longwave.layers.attention import places
from longwave.layers.block_diagonal import BlockDiagonal
from longwave.layers.half_glu import tanh_gelu
from longwave.layers.heads import masks
from longwave.layers.linear import linear, torch_uniform
from longwave.layers.mamba import at_least_one, out_projection, unpadded
from longwave.layers.mixer import Carry, Context, Mixer, Out
from longwave.layers.timescale import Softplus


def recurrence(
    x: Float[Array, "b t d"],
    r: Float[Array, "b t d"],
    i: Float[Array, "b t d"],
    Lambda: Float[Array, " d"],
    first: Bool[Array, "b t"],
    *,
    c: float,
) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"]]:
    """(a, what is written): h_t = a_t h_{t-1} + that. float32."""
    log_a = -c * jax.nn.softplus(Lambda)[None, None] * r
    left = -jnp.expm1(2 * log_a)
    # sqrt has no derivative at 0, where a gate that underflows gets it.
    size = jnp.where(left > 0, jnp.sqrt(jnp.where(left > 0, left, 1)), 0)
    return jnp.exp(log_a), jnp.where(first[..., None], 1, size) * i * x


class RGLRU(Mixer):
    """Real-gated linear recurrent unit between its convolution and its output gate.

    channels: of the recurrence; None: the width. The paper takes about 4/3 of it.
    blocks:   of the matrices of the gates.
    conv:     taps of the convolution, the token itself included.
    c:        exponent of the recurrence gate.
    a_min, a_max: exp(-c softplus(Λ)), the decay of an open recurrence gate, starts uniform between them. (In the
        released code it is exp(-softplus(Λ)), by its square: decays start shorter there.)
    bias:     of the projections from and to the width.
    residuals: how many residual branches the model adds up: W_out starts divided by the root of it.

    The carry: "conv" (b, conv - 1, channels), the last inputs of the convolution, and "h" (b, channels), both float32,
    and "position" (b,) int32, the tokens that the document has had.
    """

    roles: ClassVar[dict[str, str]] = {"conv": "kernel", "conv_bias": "bias", "Lambda": "A"}
    keep_float32: ClassVar[frozenset[str]] = frozenset({"Lambda"})

    def __init__(
        self,
        width: int,
        *,
        channels: int | None = None,
        blocks: int = 16,
        conv: int = 4,
        c: float = 8.0,
        a_min: float = 0.9,
        a_max: float = 0.999,
        bias: bool = True,
        residuals: int = 1,
        rngs: nnx.Rngs,
    ):
        channels = width if channels is None else channels
        at_least_one(self, channels=channels, blocks=blocks, conv=conv, residuals=residuals)
        if channels % blocks:
            raise ValueError(f"RGLRU.blocks = {blocks} must divide channels = {channels}")
        if not 0 < a_min < a_max < 1:
            raise ValueError(f"RGLRU.a_min = {a_min}, a_max = {a_max}: 0 < a_min < a_max < 1 must hold")
        if c <= 0:
            raise ValueError(f"RGLRU.c = {c} must be positive")
        self.channels, self.taps, self.c = channels, conv, c
        self.in_x = linear(width, channels, bias=bias, rngs=rngs)
        self.in_z = linear(width, channels, bias=bias, rngs=rngs)
        self.conv = nnx.Param(torch_uniform(rngs.params(), (conv, channels), fan_in=conv))
        self.conv_bias = nnx.Param(torch_uniform(rngs.params(), (channels,), fan_in=conv))
        self.a = BlockDiagonal(channels, blocks=blocks, lecun=True, rngs=rngs)
        self.i = BlockDiagonal(channels, blocks=blocks, lecun=True, rngs=rngs)
        decay = jax.random.uniform(rngs.params(), (channels,), minval=a_min, maxval=a_max)
        self.Lambda = nnx.Param(Softplus().inverse(-jnp.log(decay) / c))
        self.out = out_projection(channels, width, bias=bias, residuals=residuals, rngs=rngs)

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """Zeros. Nothing depends on capacity."""
        return {
            "conv": jnp.zeros((batch, self.taps - 1, self.channels), jnp.float32),
            "h": jnp.zeros((batch, self.channels), jnp.float32),
            "position": jnp.zeros(batch, jnp.int32),
        }

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        carry = self.init_carry(len(x)) if carry is None else carry
        u = unpadded(x, ctx)
        # `valid` keeps the projection's bias out of the taps, and the convolution's out of what follows.
        v, conv = short_conv(self.in_x(u), self.conv[...], self.conv_bias[...], state=carry["conv"], **masks(ctx))
        r, i = jax.nn.sigmoid(self.a(v)), jax.nn.sigmoid(self.i(v))
        place = places(carry["position"], x.shape[1], ctx)
        Lambda = self.Lambda[...].astype(jnp.float32)
        a, write = recurrence(v.astype(jnp.float32), r, i, Lambda, place.position == 0, c=self.c)
        h, state = linear_scan(a, write, carry["h"], **masks(ctx))
        y = self.out(h.astype(x.dtype) * tanh_gelu(self.in_z(u)))
        return Out(unpadded(y, ctx), {"conv": conv, "h": state, "position": place.end}, {})
