"""RAT (Wei, Yadav, Pascanu and Gulcehre, 2025, "RAT: Bridging RNN Efficiency and Attention Accuracy via Chunk-based
Sequence Modeling", arXiv:2507.04416).

Tokens fall into chunks of L. Within its chunk a token averages keys and values by a gate of each channel; beyond, it
attends to one summary of every earlier chunk, the average at its end. Of an input x_t in chunk c:

    z, v, g, q, k = sigmoid(W_z x), W_v x, sigmoid(W_g x + b_g), W_q x, W_k x
    k~_t = g_t k~_{t-1} + (1 - g_t) k_t        v~_t = g_t v~_{t-1} + (1 - g_t) v_t        from zero in every chunk
    o_t = softmax of turn_c(q_t) . {turn_c'(k~ at the end of c', c' < c), turn_c(k~_t)} P^-1/2  over the same v~
    out_t = W_o (z_t o_t)

`turn` is the rotary embedding by the number of the chunk. G groups of queries and keys serve H heads, head h group
h mod G: gates differ by channel, so that keys differ by head all the same. L = 1 is attention over gated keys and
values; one chunk for all is the recurrent network out = W_o (z v~), which has neither queries nor keys.

The running entry stands in the chunk of its query, so that their turns cancel: queries and summaries alone are turned.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from longwave.kernels.attention import ChunkSummary, attention, merge
from longwave.kernels.linear_scan import linear_scan
from longwave.kernels.partition import Axes, parts, sharded
from longwave.layers.attention import Places, places
from longwave.layers.linear import MakeLinear, lecun
from longwave.layers.mamba import at_least_one
from longwave.layers.mixer import Carry, Context, Mixer, Out
from longwave.layers.rope import rope


class Summaries(NamedTuple):
    """Turned keys, and values, at the ends of chunks; of each its chunk and document (-1: none ended here).

    chunk, segment: None where one document fills the rows from their start, so that summary j is that of chunk j.
    """

    k: Float[Array, "b n h p"]
    v: Float[Array, "b n h p"]
    chunk: Int[Array, "b n"] | None = None
    segment: Int[Array, "b n"] | None = None


def last_of_chunks(x: Shaped[Array, "b t *d"], ends: Bool[Array, "b t"] | None, L: int) -> Shaped[Array, "b n *d"]:
    """What stands at the last tokens of chunks; `ends` marks them, None: chunks count from the first token.

    Wherever documents begin, two ends are at least L tokens apart: each stretch of L tokens has at most one, and what
    has none gives 0. So the answer has a static shape, and a device with a stretch of time needs no other's.
    """
    b, t, *d = x.shape
    if ends is None:
        return x[:, : t // L * L].reshape(b, -1, L, *d)[:, :, -1]
    c = min(L, t)
    cut = lambda x: jnp.pad(x, [(0, 0), (0, -t % c)] + [(0, 0)] * (x.ndim - 2)).reshape(b, -1, c, *x.shape[2:])
    return jnp.sum(jnp.where(cut(ends.reshape(b, t, *(1 for _ in d))), cut(x), 0), axis=2)


class RAT(Mixer):
    """Gated averages within chunks, softmax attention over the chunks before.

    L:      tokens of a chunk; None: one chunk, however long.
    H, G:   heads of width / H; groups of queries and keys, which the heads share in turn.
    rope:   base of the rotary embedding of chunk numbers; None: no positions.
    span:   b_g starts as log U(1, span - 1), so that gates remember over up to so many tokens; None: L. Of one or two
            tokens it starts at 0.
    linear: constructor of the projections: how they are initialised.

    The carry: "k" and "v" (b, slots, H, width / H), turned summaries in the dtype of the parameters; "running_k" and
    "running_v" (b, width) float32, of the chunk that is not over; "position" (b,), tokens of the document. A `capacity`
    has a slot for every L tokens, and a document may fill one chunk more; beyond, outputs are NaN, and a longer call
    raises. With one chunk the carry is "running_v" alone. The running averages and gates are float32.
    """

    roles: ClassVar[dict[str, str]] = {"b_g": "bias"}
    keep_float32: ClassVar[frozenset[str]] = frozenset({"b_g"})

    def __init__(
        self,
        width: int,
        *,
        L: int | None = 16,
        H: int = 8,
        G: int = 2,
        rope: float | None = 10_000.0,
        span: int | None = None,
        linear: MakeLinear = lecun,
        rngs: nnx.Rngs,
    ):
        span = L if span is None else span
        if span is None:
            raise ValueError("RAT.span = None must be a number of tokens where L is None: the length to remember over")
        at_least_one(self, **({} if L is None else {"L": L}), H=H, G=G, span=span)
        if width % H or H % G:
            raise ValueError(f"RAT.H = {H} must divide width = {width}, and RAT.G = {G} the heads")
        if rope is not None and width // H % 2:
            raise ValueError(f"RAT: heads of {width // H} must be even for rope; rope = None turns it off")
        self.width, self.H, self.G, self.P, self.rope = width, H, G, width // H, rope
        self.L = 0 if L is None else L  # 0: one chunk
        project = lambda size: linear(width, size, bias=False, rngs=rngs)
        self.in_z, self.in_v, self.in_g = project(width), project(width), project(width)
        if self.L:
            self.in_q, self.in_k = project(G * self.P), project(G * self.P)
        self.out = project(width)
        self.b_g = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (width,), minval=1.0, maxval=max(span - 1, 1))))

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """No token yet. `capacity`: the longest document; required but with L = None."""
        if not self.L:
            return {"running_v": jnp.zeros((batch, self.width), jnp.float32)}
        if capacity is None:
            raise ValueError("RAT.init_carry needs a capacity: the longest document to hold the chunks of")
        return self._empty(batch, capacity)

    def _empty(self, batch: int, capacity: int) -> Carry:
        slots = lambda: jnp.zeros((batch, capacity // self.L, self.H, self.P), self.in_k.kernel[...].dtype)
        running = lambda: jnp.zeros((batch, self.width), jnp.float32)
        at = jnp.zeros(batch, jnp.int32)
        return {"k": slots(), "v": slots(), "running_k": running(), "running_v": running(), "position": at}

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        if not self.L:
            return self._one_chunk(x, carry, ctx)
        b, t, _ = x.shape
        room = None if carry is None else (carry["k"].shape[1] + 1) * self.L
        if room is not None and t > room:
            raise ValueError(f"{t} tokens do not fit the carry's {room}: init_carry with more capacity")
        at = places(jnp.zeros(b, jnp.int32) if carry is None else carry["position"], t, ctx)
        lost = jnp.zeros((b, t), bool) if room is None else at.position >= room
        x = jnp.where((lost | (at.segment < 0))[..., None], 0, x)

        keep, take = self._gates(x)
        begins = at.position % self.L == 0
        average = partial(self._average, keep, take, begins, ctx)
        held = (None, None) if carry is None else (carry["running_k"], carry["running_v"])
        k, running_k = average(self._tile(self.in_k(x)), held[0])
        v, running_v = average(self.in_v(x), held[1])
        q, k, v = rearrange(self.in_q(x), "b t (g p) -> b t g p", p=self.P), self._heads(k), self._heads(v)
        plain = carry is None and ctx.reset is None and ctx.valid is None
        own = jnp.sum(jnp.tile(q, (1, 1, self.H // self.G, 1)).astype(jnp.float32) * k, -1) * self.P**-0.5
        new = self._summaries(k.astype(x.dtype), v.astype(x.dtype), at, plain, ctx.axes)
        o, _ = merge((v, own), *self._attend(self._turn(q, at.position // self.L), new, carry, at, ctx))

        y = self.out(jax.nn.sigmoid(self.in_z(x)) * rearrange(o.astype(x.dtype), "b t h p -> b t (h p)"))
        y = jnp.where(lost[..., None], jnp.nan, y)
        y = jnp.where((at.segment < 0)[..., None], 0, y)
        slots = self._write(self._empty(b, t) if carry is None else carry, new, at)
        return Out(y, {**slots, "running_k": running_k, "running_v": running_v, "position": at.end}, {})

    def _one_chunk(self, x: Array, carry: Carry | None, ctx: Context) -> Out:
        x = x if ctx.valid is None else jnp.where(ctx.valid[..., None], x, 0)
        held = None if carry is None else carry["running_v"]
        v, running = self._average(*self._gates(x), ctx.reset, ctx, self.in_v(x), held)
        return Out(self.out(jax.nn.sigmoid(self.in_z(x)) * v.astype(x.dtype)), {"running_v": running}, {})

    def _gates(self, x: Array) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"]]:
        """g and 1 - g, float32: where one is nearly 1 the other has all its digits."""
        g = self.in_g(x).astype(jnp.float32) + self.b_g[...].astype(jnp.float32)[None, None]
        return jax.nn.sigmoid(g), jax.nn.sigmoid(-g)

    def _average(
        self, keep: Array, take: Array, begins: Array | None, ctx: Context, x: Array, held: Array | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b d"]]:
        return linear_scan(keep, take * x.astype(jnp.float32), held, reset=begins, valid=ctx.valid, axes=ctx.axes)

    def _tile(self, x: Float[Array, "b t gp"]) -> Float[Array, "b t hp"]:
        return jnp.tile(x, (1, 1, self.H // self.G))

    def _heads(self, x: Float[Array, "b t hp"]) -> Float[Array, "b t h p"]:
        return rearrange(x, "b t (h p) -> b t h p", p=self.P)

    def _turn(self, x: Float[Array, "b t h p"], chunk: Int[Array, "*b t"]) -> Float[Array, "b t h p"]:
        return x if self.rope is None else rope(x, chunk, base=self.rope)

    def _summaries(self, k: Array, v: Array, at: Places, plain: bool, axes: Axes) -> Summaries:
        """Of the chunks that end in this call, turned. Devices find those of their own stretches of time."""
        axes = Axes(axes.batch, axes.heads, axes.seq if k.shape[1] > 1 else None).for_heads(self.H)
        n = parts(axes.seq)
        find = lambda ends: partial(jax.tree.map, lambda x: last_of_chunks(x, ends, self.L))
        if plain and (n == 1 or k.shape[1] % (n * self.L) == 0):
            k, v = sharded(find(None), axes, (("bth.", "bth."),), ("bth.", "bth."))((k, v))
            return Summaries(self._turn(k, jnp.arange(k.shape[1])), v)
        ends = (at.position % self.L == self.L - 1) & (at.segment >= 0)
        dims, here = ("bth.", "bth.", "bt", "bt"), (k, v, at.position // self.L, at.segment + 1)
        k, v, chunk, segment = sharded(lambda ends, here: find(ends)(here), axes, ("bt", dims), dims)(ends, here)
        return Summaries(self._turn(k, chunk), v, chunk, segment - 1)

    def _attend(
        self, q: Float[Array, "b t g p"], new: Summaries, carry: Carry | None, at: Places, ctx: Context
    ) -> list[tuple[Array, Array]]:
        """(output, log-sum-exp) over the summaries of this call, and over those that are carried."""
        q = jnp.tile(q, (1, 1, self.H // self.G, 1))

        def look(seen: Summaries, axes: Axes) -> Any:
            positions = None if seen.chunk is None else (at.position, seen.chunk)
            documents = None if seen.segment is None else (at.segment, seen.segment)
            return attention(
                q,
                seen.k,
                seen.v,
                mask=ChunkSummary(self.L),
                positions=positions,
                segment_ids=documents,
                return_lse=True,
                axes=axes,
            )

        found = []
        if q.shape[1] > 1 and new.k.shape[1]:  # a single token sees no chunk that it ends itself
            found.append(look(new, ctx.axes))
        if carry is not None and (slots := carry["k"].shape[1]):
            slot = jnp.broadcast_to(jnp.arange(slots)[None], (q.shape[0], slots))
            live = slot < carry["position"][:, None] // self.L
            held = Summaries(carry["k"], carry["v"], slot, jnp.where(live, 0, -1))
            found.append(look(held, dataclasses.replace(ctx.axes, seq=None)))  # slots are not split over time
        return found

    def _write(self, carry: Carry, new: Summaries, at: Places) -> Carry:
        """The carry with the last document's summaries in their slots."""
        slots = carry["k"].shape[1]
        if new.chunk is None or new.segment is None:
            return {name: getattr(new, name)[:, :slots].astype(carry[name].dtype) for name in ("k", "v")}
        slot = jnp.where(new.segment == at.last[:, None], new.chunk, slots)  # out of range: dropped
        put = jax.vmap(lambda held, slot, x: held.at[slot].set(x.astype(held.dtype), mode="drop"))
        return {name: put(carry[name], slot, getattr(new, name)) for name in ("k", "v")}
