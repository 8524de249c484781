"""mLSTM, the matrix memory of xLSTM (Beck et al., 2024, "xLSTM: Extended Long Short-Term Memory", arXiv:2405.04517).

Of an input u_t, with heads of P channels (Section 2.3, and the block of the paper's appendix):

    x, z = W_x u, W_z u                             expand * width channels each
    c = silu(conv(x))                               causal, depthwise, 4 taps
    q, k, v = W_q c, W_k c, W_v x                   block-diagonal
    i, f = W_i [q k v] + b_i, W_f [q k v] + b_f     one of each a head
    C_t = sigmoid(f_t) C_{t-1} + exp(i_t) k_t v_t'     n_t = sigmoid(f_t) n_{t-1} + exp(i_t) k_t
    o_t = C_t' q_t / max(|n_t' q_t|, 1)             q scaled by P^-1/2
    out = W_out ((norm(o) + skip c) silu(z))        the norm of each head's channels

The cell, C_t to o_t, may be another: `SigmoidGated` (Beck et al., 2025, "Tiled Flash Linear Attention",
arXiv:2503.14376) writes sigmoid(i_t) k_t v_t' and divides by nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longwave.kernels.linear_attention import linear_attention
from longwave.kernels.mlstm import empty, mlstm
from longwave.kernels.short_conv import short_conv
from longwave.layers.block_diagonal import BlockDiagonal
from longwave.layers.heads import GroupNorm, channels, join, masks, split
from longwave.layers.linear import linear, torch_uniform
from longwave.layers.mamba import at_least_one, out_projection, unpadded
from longwave.layers.mixer import Carry, Context, Mixer, Out


@dataclasses.dataclass(frozen=True)
class ExponentialGated:
    """The paper's cell. eps: see `kernels.mlstm`."""

    eps: float = 1e-6

    def start(self, b: int, h: int, P: int) -> Carry:
        return empty(b, h, P, P)

    def __call__(self, q: Array, k: Array, v: Array, i: Array, f: Array, **masks: Any) -> tuple[Array, Carry]:
        return mlstm(q, k, v, i, f, eps=self.eps, **masks)


@dataclasses.dataclass(frozen=True)
class SigmoidGated:
    """mLSTMsig: linear attention whose gates are sigmoids. It needs neither normaliser nor maximum."""

    def start(self, b: int, h: int, P: int) -> Carry:
        return jnp.zeros((b, h, P, P))

    def __call__(self, q: Array, k: Array, v: Array, i: Array, f: Array, **masks: Any) -> tuple[Array, Carry]:
        gates = jax.nn.log_sigmoid(f), jax.nn.sigmoid(i)
        return linear_attention(q, k, v, gates[0], w=gates[1], scale=q.shape[-1] ** -0.5, **masks)


class Gate(nnx.Linear):
    """A gate's linear map, whose kernel starts at 0. It stays float32: what it gives is an exponent."""

    keep_float32: ClassVar[frozenset[str]] = frozenset({"kernel", "bias"})

    def __init__(self, width_in: int, bias: Float[Array, " h"], *, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        super().__init__(width_in, len(bias), kernel_init=zeros, bias_init=lambda *_, **__: bias, rngs=rngs)


class MLSTM(Mixer):
    """Matrix memory with exponential gates, with its convolution, skip, norm and output gate.

    heads:     each has expand * width / heads channels for keys and for values.
    expand:    channels of x, z and o for each of the width (the paper's projection factor).
    conv:      taps of the convolution, the token itself included.
    block:     size of the blocks of W_q, W_k and W_v; None: they are dense.
    cell:      ExponentialGated(), or SigmoidGated().
    conv_bias, bias: of the convolution; of the projections from and to the width.
    norm_eps:  of the norm behind the cell.
    residuals: how many residual branches the model adds up: W_out starts divided by the root of it.

    At the start gates do not depend on the token: b_f is 3 to 6 over the heads, b_i N(0, 0.1^2). These two and the
    projections' uniform start are not quoted from the paper.
    The carry is float32: "conv" (b, conv - 1, channels), the last inputs of the convolution, and "cell": of every head
    C (P, P), n (P) and m, or S (P, P).
    """

    roles: ClassVar[dict[str, str]] = {
        "conv": "kernel", "conv_bias": "bias",
        "skip": "norm",  # a gain: it does not decay
    }  # fmt: skip

    def __init__(
        self,
        width: int,
        *,
        heads: int = 4,
        expand: int = 2,
        conv: int = 4,
        block: int | None = 4,
        cell: ExponentialGated | SigmoidGated = ExponentialGated(),
        conv_bias: bool = True,
        bias: bool = False,
        norm_eps: float = 1e-5,
        residuals: int = 1,
        rngs: nnx.Rngs,
    ):
        at_least_one(self, heads=heads, expand=expand, conv=conv, residuals=residuals)
        size = channels(self, width, expand, heads, "expand")
        if block is not None and (block < 1 or size % block):
            raise ValueError(f"MLSTM.block = {block} must divide expand * width = {size}, or be None")
        self.channels, self.heads, self.taps, self.cell = size, heads, conv, cell
        self.in_x = linear(width, size, bias=bias, rngs=rngs)
        self.in_z = linear(width, size, bias=bias, rngs=rngs)
        self.conv = nnx.Param(torch_uniform(rngs.params(), (conv, size), fan_in=conv))
        self.conv_bias = nnx.Param(torch_uniform(rngs.params(), (size,), fan_in=conv)) if conv_bias else None
        project: Callable[[], nnx.Module] = lambda: (
            linear(size, size, bias=False, rngs=rngs)
            if block is None
            else BlockDiagonal(size, blocks=size // block, bias=False, rngs=rngs)
        )
        self.q, self.k, self.v = project(), project(), project()
        self.to_i = Gate(3 * size, 0.1 * jax.random.normal(rngs.params(), (heads,)), rngs=rngs)
        self.to_f = Gate(3 * size, jnp.linspace(3.0, 6.0, heads), rngs=rngs)
        self.norm = GroupNorm(heads, size // heads, eps=norm_eps)
        self.skip = nnx.Param(jnp.ones(size))
        self.out = out_projection(size, width, bias=bias, residuals=residuals, rngs=rngs)

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """No inputs, and an empty memory. Nothing depends on capacity."""
        return {
            "conv": jnp.zeros((batch, self.taps - 1, self.channels), jnp.float32),
            "cell": self.cell.start(batch, self.heads, self.channels // self.heads),
        }

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        carry = {"conv": None, "cell": None} if carry is None else carry
        u = unpadded(x, ctx)
        inner, bias = self.in_x(u), None if self.conv_bias is None else self.conv_bias[...]
        # `valid` keeps the projection's bias out of the taps.
        c, conv = short_conv(inner, self.conv[...], bias, state=carry["conv"], **masks(ctx))
        c = jax.nn.silu(c)
        q, k, v = (f(y).astype(x.dtype) for f, y in ((self.q, c), (self.k, c), (self.v, inner)))
        qkv = jnp.concatenate((q, k, v), axis=-1)
        q, k, v = (split(y, self.heads) for y in (q, k, v))
        o, cell = self.cell(q, k, v, self.to_i(qkv), self.to_f(qkv), state=carry["cell"], **masks(ctx))
        o = join(self.norm(o))
        y = (o + self.skip[...].astype(x.dtype)[None, None] * c) * jax.nn.silu(self.in_z(u))
        return Out(unpadded(self.out(y), ctx), {"conv": conv, "cell": cell}, {})
