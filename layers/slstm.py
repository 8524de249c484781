"""sLSTM, the scalar memory of xLSTM (Beck et al., 2024, "xLSTM: Extended Long Short-Term Memory", arXiv:2405.04517).

Every channel is a cell; the channels of a head hear each other's last output (Section 2.2). Of an input u_t, with
x = silu(conv(u)):

    z, o = W_z u + R_z h_{t-1} + b_z, W_o u + R_o h_{t-1} + b_o             all W and R block-diagonal, a block a head
    i, f = W_i x + R_i h_{t-1} + b_i, W_f x + R_f h_{t-1} + b_f
    m_t = max(log f' + m_{t-1}, i)                                          f' = sigmoid(f), or exp(f)
    c_t = exp(log f' + m_{t-1} - m_t) c_{t-1} + exp(i - m_t) tanh(z)
    n_t = exp(log f' + m_{t-1} - m_t) n_{t-1} + exp(i - m_t)
    h_t = sigmoid(o) c_t / n_t        y_t = norm(h_t)                        the norm of each head's channels

(b_i cancels in c / n; it is kept as the paper has it.) The gates depend on h: there is no parallel form, and tokens are
taken one by one. What follows in the paper's block, a gated MLP, is the backbone's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from longwave.kernels.mlstm.reference import EMPTY
from longwave.kernels.partition import Axes, sharded
from longwave.kernels.short_conv import short_conv
from longwave.layers.block_diagonal import BlockDiagonal
from longwave.layers.heads import GroupNorm, join, split
from longwave.layers.linear import torch_uniform
from longwave.layers.mamba import at_least_one, unpadded
from longwave.layers.mixer import Carry, Context, Mixer, Out


class State(NamedTuple):
    """c, n, h and m of every channel, (b, heads, channels of a head), float32. c and n are in units of exp(m)."""

    c: Float[Array, "b h p"]
    n: Float[Array, "b h p"]
    h: Float[Array, "b h p"]
    m: Float[Array, "b h p"]


class Tokens(NamedTuple):
    """gates: what z, i, f and o have from the input; of one token: without t."""

    gates: Float[Array, "b *t h 4 p"]
    reset: Bool[Array, "b *t"] | None
    valid: Bool[Array, "b *t"] | None


def empty(b: int, heads: int, p: int) -> State:
    """The state before the first token."""
    shape = (b, heads, p)
    return State(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(shape), jnp.full(shape, EMPTY, jnp.float32))


def step(
    state: State, token: Tokens, R: Float[Array, "h 4 p p"], log_forget: Callable[[Array], Array]
) -> tuple[State, Float[Array, "b h p"]]:
    """(the state after a token, its h). Nothing depends on m: gradients take it as a constant."""
    over = lambda mask: mask[:, None, None]
    if token.reset is not None:
        b, h, p = state.h.shape
        state = jax.tree.map(lambda new, old: jnp.where(over(token.reset), new, old), empty(b, h, p), state)
    z, i, f, o = jnp.moveaxis(token.gates + jnp.einsum("bhp,hgpq->bhgq", state.h, R), 2, 0)
    before = log_forget(f) + state.m
    m = jax.lax.stop_gradient(jnp.maximum(before, i))
    keep, write = jnp.exp(before - m), jnp.exp(i - m)
    c, n = keep * state.c + write * jnp.tanh(z), keep * state.n + write
    h = jax.nn.sigmoid(o) * c / n
    new = State(c, n, h, m)
    if token.valid is not None:
        new = jax.tree.map(lambda new, old: jnp.where(over(token.valid), new, old), new, state)
    return new, h


def exponential_gate(f: Array) -> Array:
    """The log of the forget gate that is an exponential itself."""
    return f


class SLSTM(Mixer):
    """Scalar memory with exponential gates and memory mixing in heads.

    heads: of width / heads channels each.
    conv:  taps of the convolution before the input and forget gates, the token itself included; None: there is none.
    log_forget: the log of the forget gate from f: jax.nn.log_sigmoid, or `exponential_gate`.
    norm_eps: of the norm.

    b_f starts at 3 to 6 over the channels of a head; this and the uniform start of the rest are not quoted from the
    paper.
    The carry is float32: "conv" (b, conv - 1, width), the last inputs of the convolution, and "cell", a State.
    """

    roles: ClassVar[dict[str, str]] = {"conv": "kernel", "conv_bias": "bias", "R": "kernel"}
    keep_float32: ClassVar[frozenset[str]] = frozenset({"R"})

    def __init__(
        self,
        width: int,
        *,
        heads: int = 4,
        conv: int | None = 4,
        log_forget: Callable[[Array], Array] = jax.nn.log_sigmoid,
        norm_eps: float = 1e-5,
        rngs: nnx.Rngs,
    ):
        taps = 1 if conv is None else conv
        at_least_one(self, heads=heads, conv=taps)
        if width % heads:
            raise ValueError(f"SLSTM.heads = {heads} must divide the width {width}")
        self.width, self.heads, self.taps, self.log_forget = width, heads, taps, log_forget
        p = width // heads
        draw = lambda *shape: nnx.Param(torch_uniform(rngs.params(), shape, fan_in=taps))
        self.conv, self.conv_bias = (None, None) if conv is None else (draw(conv, width), draw(width))
        self.z, self.i, self.f, self.o = (BlockDiagonal(width, blocks=heads, rngs=rngs) for _ in range(4))
        self.f.bias = nnx.Param(jnp.tile(jnp.linspace(3.0, 6.0, p), heads))
        self.R = nnx.Param(torch_uniform(rngs.params(), (heads, 4, p, p), fan_in=p))  # of z, i, f, o
        self.norm = GroupNorm(heads, p, eps=norm_eps)

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """No inputs, and an empty memory. Nothing depends on capacity."""
        return {
            "conv": jnp.zeros((batch, self.taps - 1, self.width), jnp.float32),
            "cell": empty(batch, self.heads, self.width // self.heads),
        }

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        carry = self.init_carry(len(x)) if carry is None else carry
        masks: dict[str, Any] = {"reset": ctx.reset, "valid": ctx.valid}
        u, conv = unpadded(x, ctx), carry["conv"]
        c = u
        if self.conv is not None:
            c, conv = short_conv(u, self.conv[...], self.conv_bias[...], state=conv, **masks, axes=ctx.axes)
            c = jax.nn.silu(c)
        gates = jnp.stack([split(g, self.heads) for g in (self.z(u), self.i(c), self.f(c), self.o(u))], axis=3)
        axes = Axes(ctx.axes.batch, ctx.axes.heads).for_heads(self.heads)  # time is whole on every device
        tokens = Tokens(gates, **masks)
        by_time = jax.tree.map(lambda x: "bth.."[: x.ndim], tokens)
        by_head = jax.tree.map(lambda x: "bh.", carry["cell"])
        run = sharded(self.scan, axes, (by_time, by_head, "h..."), ("bth.", by_head))
        h, cell = run(tokens, carry["cell"], self.R[...].astype(jnp.float32))
        y = join(self.norm(h)).astype(x.dtype)
        return Out(unpadded(y, ctx), {"conv": conv, "cell": cell}, {})

    def scan(self, tokens: Tokens, state: State, R: Float[Array, "h 4 p p"]) -> tuple[Array, State]:
        """(h (b, t, heads, p), final state): `step` token by token."""
        over_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
        state, h = jax.lax.scan(lambda s, token: step(s, token, R, self.log_forget), state, over_time)
        return jnp.moveaxis(h, 0, 1), state
