"""Multi-head softmax attention (arXiv:1706.03762).

With grouped key heads (GQA, arXiv:2305.13245), rotary positions (arXiv:2104.09864), and a sliding window with
pinned first tokens (StreamingLLM, arXiv:2309.17453) or blocks that do not see each other (the local attention of
arXiv:2011.04006):

    q_t, k_t, v_t = W_q x_t, W_k x_t, W_v x_t         y_t = W_out concat_h softmax(q_t k' / sqrt(d)) v

The carry holds keys (turned by their position) and values of the current document, and the tokens it has had:

    k, v: (b, slots, kv_heads, head_dim), in the dtype of the projections     position: (b,) int32

A token's slot follows from its position p alone. Full attention: slot p of `capacity`. Window: the first
`sinks` tokens take the first `sinks` slots, every other one slot sinks + p % window of the ring behind. Blocks: slot
p % block of a ring. So a new document, whose positions start again at 0, needs nothing cleared: `position` tells which
slots live.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from longwave.kernels.attention import Blocks, Causal, Mask, Sinks, Window, attention, merge
from longwave.layers.dropped_attention import dropped_attention
from longwave.layers.linear import MakeLinear, lecun
from longwave.layers.mixer import Carry, Context, Mixer, Out, Unsupported
from longwave.layers.rope import rope


class Places(NamedTuple):
    """Where the tokens of a call stand.

    position: within the token's document.
    segment:  0 continues the carried document, 1, 2, ... after resets; -1 is padding.
    end:      tokens that the last document has had after this call.   last: its segment.
    """

    position: Int[Array, "b t"]
    segment: Int[Array, "b t"]
    end: Int[Array, "b"]
    last: Int[Array, "b"]


def places(start: Int[Array, "b"], t: int, ctx: Context) -> Places:
    """Positions and segments of t tokens behind `start` tokens of each row's current document."""
    shape = (start.shape[0], t)
    if ctx.valid is None and ctx.reset is None:  # no sum over time, which may be split over devices
        zeros = jnp.zeros(shape, jnp.int32)
        return Places(start[:, None] + jnp.arange(t)[None], zeros, start + t, zeros[:, 0])
    valid = jnp.ones(shape, bool) if ctx.valid is None else ctx.valid
    reset = jnp.zeros(shape, bool) if ctx.reset is None else ctx.reset & valid
    rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    origin = lax.cummax(jnp.where(reset, rank, -start[:, None]), axis=1)
    document = jnp.cumsum(reset, axis=1, dtype=jnp.int32)
    end = rank[:, -1] + 1 - origin[:, -1]
    return Places(rank - origin, jnp.where(valid, document, -1), end, document[:, -1])


class Attention(Mixer):
    """Softmax attention over all earlier tokens, a window or block of them, or (causal=False) the whole document.

    heads, kv_heads: query heads, and key heads that divide them (None: as many).
    head_dim: None: width / heads.
    window:   how many last tokens a query sees, its own included (causal=False: on either side); None: all.
    sinks:    how many first tokens of the document every query sees beside its window.
    block:    the document falls into blocks of this many tokens, and a query sees its own block; None: one block.
    rope:     base of the rotary embedding; None: no positions.
    bias:     of the four projections.      linear: their constructor: how they are initialised.
    dropout:  of the attention weights; acts only with a key.

    Full attention needs a `capacity` for its carry. A longer call raises; a document that outgrows it gives
    NaN from there on, and never wraps in silence. Computes in the dtype of x, softmax in float32; the carry
    holds k and v in the dtype of the parameters.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
        window: int | None = None,
        sinks: int = 0,
        block: int | None = None,
        rope: float | None = 10_000.0,
        bias: bool = False,
        linear: MakeLinear = lecun,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        kv_heads = heads if kv_heads is None else kv_heads
        if head_dim is None and width % heads:
            raise ValueError(f"Attention.heads = {heads} must divide width = {width}, or head_dim be given")
        if heads % kv_heads:
            raise ValueError(f"Attention.kv_heads = {kv_heads} must divide heads = {heads}")
        head_dim = width // heads if head_dim is None else head_dim
        if rope is not None and head_dim % 2:
            raise ValueError(f"Attention.head_dim = {head_dim} must be even for rope; rope = None turns it off")
        if window is not None and window < 1:
            raise ValueError(f"Attention.window = {window} must be at least 1, or None")
        if sinks < 0 or (sinks and window is None):
            raise ValueError(f"Attention.sinks = {sinks} must be at least 0, and 0 without a window")
        if block is not None and (block < 1 or window is not None):
            raise ValueError(f"Attention.block = {block} must be at least 1, and None with a window")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.causal, self.window, self.sinks, self.block, self.rope = causal, window, sinks, block, rope
        self.rate = dropout
        if not causal:
            self.supports = frozenset({"reset"})

        def project(n_in: int, n_out: int) -> nnx.Linear:
            layer = linear(n_in, n_out, bias=bias, rngs=rngs)
            layer.promote_dtype = _to_input_dtype
            return layer

        self.q = project(width, heads * head_dim)
        self.k = project(width, kv_heads * head_dim)
        self.v = project(width, kv_heads * head_dim)
        self.out = project(heads * head_dim, width)

    @property
    def mask(self) -> Mask:
        near = Mask()
        if self.window is not None:
            near = Window(self.window) | Sinks(self.sinks) if self.sinks else Window(self.window)
        if self.block is not None:
            near = Blocks(self.block)
        return Causal() & near if self.causal else near

    @property
    def ring(self) -> int | None:
        """Slots that the carry reuses; None: it holds all tokens."""
        return self.block if self.window is None else self.window

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """No token yet. `capacity`: the longest document; required by full attention, ignored by a window."""
        self._check_carry()
        if self.ring is None and capacity is None:
            raise ValueError("Attention.init_carry: full attention needs a capacity: the longest document to hold")
        return self._empty(batch, capacity, self.k.kernel[...].dtype)

    def _check_carry(self) -> None:
        if not self.causal:
            raise Unsupported(self, "carry", "with causal=False a token also sees those that have not come yet")

    def _empty(self, batch: int, capacity: int | None, dtype) -> Carry:
        slots = capacity if self.ring is None else self.sinks + self.ring
        shape = (batch, slots, self.kv_heads, self.head_dim)  # a buffer each: they may be donated
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype), "position": jnp.zeros(batch, jnp.int32)}

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        b, t, _ = x.shape
        if carry is not None:
            self._check_carry()
            if self.ring is None and t > (capacity := carry["k"].shape[1]):
                raise ValueError(f"{t} tokens do not fit the carry's capacity = {capacity}: init_carry with more")
        at = places(jnp.zeros(b, jnp.int32) if carry is None else carry["position"], t, ctx)
        lost = jnp.zeros((b, t), bool)
        if carry is not None and self.ring is None:
            lost = at.position >= capacity
        # Padding and what has no slot may be NaN and must not touch the others, but 0 * NaN is NaN.
        x = jnp.where((lost | (at.segment < 0))[..., None], 0, x)
        heads = lambda y: rearrange(y, "b t (h d) -> b t h d", d=self.head_dim)
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        if self.rope is not None:
            q, k = rope(q, at.position, base=self.rope), rope(k, at.position, base=self.rope)
        o = self._attend(q, k, v, carry, at, ctx)
        y = self.out(rearrange(o, "b t h d -> b t (h d)"))
        y = jnp.where(lost[..., None], jnp.nan, y)
        y = jnp.where((at.segment < 0)[..., None], 0, y)
        if not self.causal:
            return Out(y, (), {})
        return Out(
            y, self._write(self._empty(b, t, self.k.kernel[...].dtype) if carry is None else carry, k, v, at), {}
        )

    def _attend(self, q: Array, k: Array, v: Array, carry: Carry | None, at: Places, ctx: Context) -> Array:
        """Attention over the tokens of this call, and over the carried slots where there are any."""
        plain = carry is None and ctx.reset is None and ctx.valid is None
        new = (None, None) if plain else (at.position, at.segment)

        def over(part: int, k: Array, v: Array, positions: Array | None, segments: Array | None):
            at: dict[str, Any] = {
                "positions": (None if positions is None else new[0], positions),
                "segment_ids": (new[1], segments),
            }
            if self.rate == 0 or ctx.key is None:
                # Slots of a carry are not split over time.
                axes = dataclasses.replace(ctx.axes, seq=None) if part else ctx.axes
                o = attention(q, k, v, mask=self.mask, **at, return_lse=carry is not None, axes=axes)
                return (o, None) if carry is None else o
            key, reach = jax.random.fold_in(ctx.key, part), None if part or self.sinks else self.ring
            return dropped_attention(q, k, v, mask=self.mask, **at, rate=self.rate, key=key, reach=reach)

        # Tokens of a document stand side by side, so where only distance counts their places in memory will do.
        own = over(0, k, v, None if self.mask.relative else new[0], new[1])
        if carry is None:
            return own[0]
        position, live = self._slots(carry)
        return merge(own, over(1, carry["k"], carry["v"], position, jnp.where(live, 0, -1)))[0]

    def _slots(self, carry: Carry) -> tuple[Int[Array, "b s"], Bool[Array, "b s"]]:
        """Position of the token that each carried slot holds, and whether it holds one."""
        slot = jnp.arange(carry["k"].shape[1])[None, :]
        end = carry["position"][:, None]
        if self.ring is None:
            position = jnp.broadcast_to(slot, (end.shape[0], slot.shape[1]))
            return position, position < end
        ring = end - 1 - (end - 1 - (slot - self.sinks)) % self.ring  # the last one that fell on this slot
        pinned = slot < self.sinks
        return jnp.where(pinned, slot, ring), jnp.where(pinned, slot < end, ring >= self.sinks)

    def _write(self, carry: Carry, k: Array, v: Array, at: Places) -> Carry:
        """The carry with the last document's tokens in their slots."""
        slots = carry["k"].shape[1]
        slot, keep = at.position, at.segment == at.last[:, None]
        if self.ring is not None:
            pinned = slot < self.sinks
            keep = keep & (pinned | (slot >= at.end[:, None] - self.ring))
            slot = jnp.where(pinned, slot, self.sinks + slot % self.ring)
        slot = jnp.where(keep, slot, slots)  # out of range: dropped, as is what exceeds the capacity
        put = jax.vmap(lambda held, slot, x: held.at[slot].set(x.astype(held.dtype), mode="drop"))
        return {"k": put(carry["k"], slot, k), "v": put(carry["v"], slot, v), "position": at.end}


def _to_input_dtype(arrays, /, *, dtype=None, inexact=True):
    """Computes in the dtype of x, whatever the parameters are stored in."""
    return tuple(None if a is None else a.astype(arrays[0].dtype) for a in arrays)
