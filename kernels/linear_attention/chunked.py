"""Linear work in matmuls: chunks of tokens side by side, a state from chunk to chunk.

In a chunk that S enters, o = enter * (q S) + A u and S <- fade S + k' (leave * u), with u = w v and the factors of
`decay.py`. A span of 256 tokens is one step of a scan: its chunks are made side by side, but for the states between
them. The forward pass saves the state before every span; the backward pass makes each span again, last one first:

    dS      <- fade dS + q' (enter * do)                 dA = do u'
    du       = A' do + leave * (k dS)                    dq, dk: from dA, (enter * do) S' and (leave * u) dS'

Letters as in `decay.py`; m spans. Heads that share q and k stand side by side, (c, r V), in all products but those
with A; without decay they share A too, and are one head.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from longwave.kernels.attention.reference import einsum32
from longwave.kernels.linear_attention import decay
from longwave.kernels.linear_attention.reference import SPAN, Inputs, unpadded


class Way(NamedTuple):
    """chunk: tokens, a power of two.  in_turn: one row of the batch after the other, not all at once."""

    chunk: int
    in_turn: bool


# Work inside a chunk grows with its length, work on states with its inverse. One core has no use for parallel rows, and
# a span of one row fits its cache; a matrix unit of 128 x 128 wants long chunks; tensor cores take 64, and are many.
WAYS = {"cpu": Way(32, in_turn=True), "tpu": Way(256, in_turn=False), "gpu": Way(64, in_turn=False)}


class Runs(NamedTuple):
    """Of every chunk of a row: whose state it goes on with, and whether it is the first and the last one to do so.

    A chunk of padding has the id s, of no state.
    """

    id: Int[Array, "*b n"]
    first: Bool[Array, "*b n"]
    last: Bool[Array, "*b n"]


def forward(
    inputs: Inputs, state: Float[Array, "b h K V"], *, scale: float, way: Way = WAYS["cpu"]
) -> tuple[Array, Array, Array]:
    """(o (b, t, h, V), final state, the state before every span (b, ceil(t / SPAN), h, K, V))."""
    cut = Cut.of(inputs, way)
    o, (final, _), saved = cut.rows(
        partial(_forward_row, cut, scale), cut.tokens(inputs), None, (cut.wide(state), None)
    )
    return cut.in_time(o, inputs.v), cut.tall(final), cut.tall(saved)


def backward(
    inputs: Inputs,
    saved: Float[Array, "b m h K V"],
    do: Float[Array, "b t h V"],
    dfinal: Float[Array, "b h K V"],
    *,
    scale: float,
    way: Way = WAYS["cpu"],
) -> tuple[Inputs, Float[Array, "b h K V"]]:
    """(gradients in the dtypes of the inputs, None for masks; that of the initial state)."""
    cut = Cut.of(inputs, way)
    rows = cut.tokens(inputs), cut.split(do), cut.wide(saved), None, None, (cut.wide(dfinal), None)
    grads, (dstate, _) = cut.rows(partial(_backward_row, cut, scale), *rows)
    return _like(cut, grads, inputs), cut.tall(dstate)


def forward_segments(
    inputs: Inputs, states: Float[Array, "b s h K V"], ids: Int[Array, "b t"], *, scale: float, way: Way
) -> tuple[Array, Array, Array]:
    """The same with a state for each segment. Their runs start at multiples of way.chunk."""
    cut = Cut.of(inputs, way)
    runs = cut.runs(ids, states.shape[1])
    none = jnp.zeros_like(states[:, 0])
    carry = cut.wide(none), cut.wide(states)
    o, (_, final), saved = cut.rows(partial(_forward_row, cut, scale), cut.tokens(inputs), runs, carry)
    return cut.in_time(o, inputs.v), cut.tall(final), cut.tall(saved)


def backward_segments(
    inputs: Inputs,
    states: Float[Array, "b s h K V"],
    saved: Float[Array, "b m h K V"],
    ids: Int[Array, "b t"],
    do: Float[Array, "b t h V"],
    dfinal: Float[Array, "b s h K V"],
    *,
    scale: float,
    way: Way,
) -> tuple[Inputs, Float[Array, "b s h K V"]]:
    cut = Cut.of(inputs, way)
    runs = cut.runs(ids, states.shape[1])
    carry = cut.wide(jnp.zeros_like(dfinal[:, 0])), cut.wide(dfinal)
    rows = cut.tokens(inputs), cut.split(do), cut.wide(saved), runs, cut.wide(states), carry
    grads, (_, dstates) = cut.rows(partial(_backward_row, cut, scale), *rows)
    return _like(cut, grads, inputs), cut.tall(dstates)


def _like(cut: Cut, grads: Inputs, inputs: Inputs) -> Inputs:
    no_masks = lambda x: x._replace(reset=None, valid=None)
    return jax.tree.map(cut.in_time, no_masks(grads), no_masks(inputs))


@dataclasses.dataclass(frozen=True)
class Cut:
    """How arrays in time lie in rows of spans of chunks: (b, m, n, c, features), and back."""

    hq: int
    hk: int
    h: int
    K: int
    V: int
    t: int
    n: int
    way: Way
    gate: int  # dimensions of g: 0 (none), 3 or 4

    @classmethod
    def of(cls, inputs: Inputs, way: Way) -> Cut:
        (_, t, hq, K), (hk, (h, V)) = inputs.q.shape, (inputs.k.shape[2], inputs.v.shape[2:])
        n = min(SPAN // way.chunk, -(-t // way.chunk))
        return cls(hq, hk, h, K, V, t, n, way, 0 if inputs.g is None else inputs.g.ndim)

    @property
    def groups(self) -> int:
        return self.h if self.gate == 4 else math.lcm(self.hq, self.hk)

    @property
    def heads(self) -> int:
        """Of a group. Without decay they are one."""
        return 1 if self.gate == 0 else self.h // self.groups

    def split(self, x: Array) -> Array:
        """(b, t, ...) -> (b, m, n, c, features). What is behind the last token is 0."""
        b, rest = x.shape[0], x.shape[2:]
        span = self.n * self.way.chunk
        m = -(-self.t // span)
        if m * span > self.t:
            x = jnp.pad(x, [(0, 0), (0, m * span - self.t)] + [(0, 0)] * len(rest))
        return x.reshape(b, m, self.n, self.way.chunk, *([math.prod(rest)] if rest else []))

    def in_time(self, x: Array, like: Array) -> Array:
        b = x.shape[0]
        return x.reshape(b, -1, *like.shape[2:])[:, : self.t].astype(like.dtype)

    def tokens(self, inputs: Inputs) -> Inputs:
        return jax.tree.map(self.split, inputs)

    def wide(self, S: Array) -> Array:
        """States (..., h, K, V) -> (..., G, K, r V)."""
        S = S.astype(jnp.float32).reshape(*S.shape[:-3], self.groups, -1, self.K, self.V)
        return jnp.swapaxes(S, -3, -2).reshape(*S.shape[:-3], self.K, -1)

    def tall(self, S: Array) -> Array:
        S = S.reshape(*S.shape[:-1], -1, self.V)
        return jnp.swapaxes(S, -3, -2).reshape(*S.shape[:-4], self.h, self.K, self.V)

    def runs(self, ids: Int[Array, "b t"], s: int) -> Runs:
        """(b, m, n) each."""
        ids = ids[:, :: self.way.chunk]
        ids = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % self.n)), constant_values=-1)
        ids = jnp.where(ids < 0, s, ids)
        new = jnp.diff(ids, axis=1) != 0
        end = jnp.ones_like(new[:, :1])
        runs = Runs(ids, jnp.concatenate((end, new), 1), jnp.concatenate((new, end), 1))
        return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, self.n), runs)

    def rows(self, f: Callable, *args: Any) -> Any:
        return lax.map(lambda row: f(*row), args) if self.way.in_turn else jax.vmap(f)(*args)

    # Of one span: (n, c, features) to groups first, and back.

    def grouped(self, x: Array, heads: int) -> Array:
        """q or k -> (n, G, c, K), and u or o, whose features are G groups' -> (n, G, c, r V)."""
        x = x.reshape(*x.shape[:2], heads, -1)
        return jnp.moveaxis(jnp.repeat(x, self.groups // heads, axis=2), 2, 1)

    def flat(self, x: Array, heads: int) -> Array:
        n, G, c, _ = x.shape
        x = jnp.moveaxis(x, 1, 2)
        x = x if heads == G else jnp.sum(x.reshape(n, c, heads, G // heads, -1), 3)
        return x.reshape(n, c, -1)

    def gates(self, g: Array) -> Array:
        """(n, c, h) -> (n, G, r, c)."""
        return jnp.swapaxes(g.astype(jnp.float32), 1, 2).reshape(g.shape[0], self.groups, -1, g.shape[1])

    def by_head(self, x: Array) -> Array:
        """(n, G, c, r V) -> (n, G, r, c, V)."""
        return jnp.swapaxes(x.reshape(*x.shape[:3], self.heads, -1), 2, 3)


State = tuple[Float[Array, "G K rV"], Float[Array, "s G K rV"] | None]  # the one handed on, and those of segments


def _forward_row(cut: Cut, scale: float, x: Inputs, runs: Runs | None, state: State) -> tuple[Array, State, Array]:
    """One row, span by span: (o, the state after it, the one handed to every span)."""

    def span(state: State, given: tuple[Inputs, Runs | None]) -> tuple[State, tuple[Array, Array]]:
        x, runs = given
        terms = _terms(cut, x)
        reads, u = terms.reads, terms.u
        before, after = _hand_on(cut, reads.fade, _kv(reads, u), state, runs)
        o = _times(einsum32("ngik,ngkv->ngiv", reads.q, before), reads.enter)
        o = scale * (o + _apply(cut, "ngrij,ngrjv->ngriv", reads.A, u))
        return after, (cut.flat(o, cut.groups).astype(x.v.dtype), state[0])

    final, (o, saved) = lax.scan(span, state, (x, runs))
    return o, final, saved


def _backward_row(
    cut: Cut,
    scale: float,
    x: Inputs,
    do: Array,
    saved: Array,
    runs: Runs | None,
    states: Array | None,
    dfinal: State,
) -> tuple[Inputs, State]:
    """One row, span by span from the last: (gradients, those of the state before it)."""

    def span(dstate: State, given: tuple[Inputs, Array, Array, Runs | None]) -> tuple[State, Inputs]:
        x, do, S, runs = given
        do = scale * cut.grouped(do, cut.groups).astype(jnp.float32)
        terms = _terms(cut, x)
        reads, u = terms.reads, terms.u
        before, _ = _hand_on(cut, reads.fade, _kv(reads, u), (S, states), runs)
        entered, left = _times(do, reads.enter), _times(u, reads.leave)
        dlocal = einsum32("ngik,ngiv->ngkv", reads.q, entered)
        after, dstate = _hand_back(cut, reads.fade, dlocal, dstate, runs)
        from_state = _times(einsum32("ngjk,ngkv->ngjv", reads.k, after), reads.leave)
        du = _apply(cut, "ngrij,ngriv->ngrjv", reads.A, do) + from_state
        d = decay.Cotangents(
            A=einsum32("ngriv,ngrjv->ngrij", cut.by_head(do), cut.by_head(u)),
            q=einsum32("ngiv,ngkv->ngik", entered, before),
            k=einsum32("ngjv,ngkv->ngjk", left, after),
            enter=_sum(cut, entered * einsum32("ngik,ngkv->ngiv", reads.q, before)),
            leave=_sum(cut, u * from_state),
            fade=_faded(cut, reads.fade, before * after),
        )
        return dstate, terms.pull(d, du)

    dstate, grads = lax.scan(span, dfinal, (x, do, saved, runs), reverse=True)
    return grads, dstate


class Terms(NamedTuple):
    """Of a span: what its products are made of, and how gradients of these return to the inputs."""

    reads: decay.Reads
    u: Float[Array, "n G c rV"]
    pull: Callable[[decay.Cotangents, Array], Inputs]


def _terms(cut: Cut, x: Inputs) -> Terms:
    valid = x.valid
    x = unpadded(x)
    n, c = x.v.shape[:2]
    docs = None if x.reset is None else decay.documents(x.reset)
    q, k = cut.grouped(x.q, cut.hq), cut.grouped(x.k, cut.hk)
    v = x.v.reshape(n, c, cut.h, cut.V)
    w = None if x.w is None else x.w.astype(jnp.float32)[..., None]
    u = cut.grouped((v if w is None else v * w).reshape(n, c, -1), cut.groups)
    if x.g is not None and cut.gate == 4:
        g = cut.grouped(x.g, cut.h)
        reads, vector_pull = jax.vjp(lambda *args: decay.vector(*args, docs), q, k, g)
        pull_keys = lambda d: vector_pull(decay.Reads(d.A, d.q, d.k, None, None, d.fade))
        flat_gate = lambda dg: cut.flat(dg, cut.h)
    else:
        g = None if x.g is None else cut.gates(x.g)
        reads, faded = decay.scalar(q, k, g, docs)
        pull_keys = lambda d: decay.scalar_pull(reads, faded, d, decays=g is not None)
        flat_gate = lambda dg: None if dg is None else jnp.swapaxes(dg.reshape(n, cut.h, c), 1, 2)

    def pull(d: decay.Cotangents, du: Array) -> Inputs:
        dq, dk, dg = pull_keys(d)
        du = cut.flat(du, cut.groups).reshape(v.shape)
        dv = (du if w is None else du * w).reshape(n, c, -1)
        dw = None if w is None else jnp.sum(du * v, -1)
        return unpadded(Inputs(cut.flat(dq, cut.hq), cut.flat(dk, cut.hk), dv, flat_gate(dg), dw, None, valid))

    return Terms(reads, u, pull)


def _kv(reads: decay.Reads, u: Array) -> Float[Array, "n G K rV"]:
    """What the chunks write."""
    return einsum32("ngjk,ngjv->ngkv", reads.k, _times(u, reads.leave))


def _apply(cut: Cut, equation: str, A: Array, x: Float[Array, "n G c rV"]) -> Float[Array, "n G c rV"]:
    """A product with the A of each head."""
    return jnp.swapaxes(einsum32(equation, A, cut.by_head(x)), 2, 3).reshape(x.shape)


def _times(x: Float[Array, "n G c rV"], factor: Float[Array, "n G r c"] | None) -> Float[Array, "n G c rV"]:
    if factor is None:
        return x
    r = factor.shape[2]
    return (x.reshape(*x.shape[:3], r, -1) * jnp.swapaxes(factor, 2, 3)[..., None]).reshape(x.shape)


def _sum(cut: Cut, x: Float[Array, "n G c rV"]) -> Float[Array, "n G r c"]:
    """Over the values of every head."""
    return jnp.swapaxes(jnp.sum(x.reshape(*x.shape[:3], cut.heads, -1), -1), 2, 3)


def _hand_on(
    cut: Cut, fade: Array | None, local: Float[Array, "n G K rV"], state: State, runs: Runs | None
) -> tuple[Float[Array, "n G K rV"], State]:
    """(the state that each chunk is handed, what is there after them all)."""

    def chunk(state: State, given: tuple[Array | None, Array, Runs | None]) -> tuple[State, Array]:
        (S, states), (fade, local, run) = state, given
        if run is not None:
            S = jnp.where(run.first, states.at[run.id].get(mode="fill", fill_value=0), S)
        after = _faint(fade, S) + local
        if run is not None:
            states = states.at[run.id].set(after, mode="drop")
        return (after, states), S

    state, handed = lax.scan(chunk, state, (_over_state(cut, fade), local, runs))
    return handed, state


def _hand_back(
    cut: Cut, fade: Array | None, dlocal: Float[Array, "n G K rV"], dstate: State, runs: Runs | None
) -> tuple[Float[Array, "n G K rV"], State]:
    """(the gradient of the state after each chunk, those of the states before them all)."""

    def chunk(dstate: State, given: tuple[Array | None, Array, Runs | None]) -> tuple[State, Array]:
        (dS, dstates), (fade, dlocal, run) = dstate, given
        if run is not None:
            dS = dS + jnp.where(run.last, dstates.at[run.id].get(mode="fill", fill_value=0), 0)
        before = _faint(fade, dS) + dlocal
        if run is not None and dstates is not None:
            dstates = dstates.at[jnp.where(run.first, run.id, len(dstates))].set(before, mode="drop")
            before = jnp.where(run.first, 0, before)
        return (before, dstates), dS

    dstate, after = lax.scan(chunk, dstate, (_over_state(cut, fade), dlocal, runs), reverse=True)
    return after, dstate


def _faint(fade: Array | None, S: Array) -> Array:
    return S if fade is None else fade * S


def _over_state(cut: Cut, fade: Array | None) -> Float[Array, "n G K rV"] | None:
    """The factor of the state that passes by, (n, G, r, 1) or (n, G, 1, K), over the state's own dimensions."""
    if fade is None:
        return None
    fade = jnp.swapaxes(fade, 2, 3)
    return fade if cut.gate == 4 else jnp.repeat(fade, cut.h // cut.groups // cut.heads * cut.V, axis=-1)


def _faded(cut: Cut, fade: Array | None, x: Float[Array, "n G K rV"]) -> Array | None:
    """The gradient of the factor of passing states: for scalars times the factor."""
    if fade is None:
        return None
    if cut.gate == 4:
        return jnp.sum(x, -1)[:, :, None]
    sums = decay.total(x)
    return fade * jnp.sum(sums.reshape(*sums.shape[:2], cut.heads, -1), -1, keepdims=True)
