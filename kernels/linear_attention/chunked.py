"""Linear work in matmuls: chunks of tokens side by side, a state from chunk to chunk.

In a chunk that S enters, o = enter * (q S) + A u and S <- fade S + k' (leave * u), with u = w v and the factors of
`decay.py`; an erase gate makes u of S, see `erase.py`. A span of 256 tokens is one step of a scan: its chunks are made
side by side, but for the states between them. The forward pass saves the state before every span; the backward pass
makes each span again, last one first:

    dS      <- fade dS + q' (enter * do)                 dA = do u'
    du       = A' do + leave * (k dS)                    dq, dk: from dA, (enter * do) S' and (leave * u) dS'

Letters as in `decay.py`; m spans. Heads that share q and k stand side by side, (c, r V), in all products but those
with A; without decay they share A too, and are one head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from longwave.kernels.attention.reference import einsum32
from longwave.kernels.linear_attention import decay, erase
from longwave.kernels.linear_attention.cut import Cut, Runs, Way
from longwave.kernels.linear_attention.reference import Inputs, unpadded

# Work inside a chunk grows with its length, work on states with its inverse. One core has no use for parallel rows, and
# a span of one row fits its cache; a matrix unit of 128 x 128 wants long chunks; tensor cores take 64, and are many.
# Inverses of erase gates cost c^3 in full float32, which matrix units are slow at.
WAYS = {
    "cpu": Way(32, erasing=32, in_turn=True),
    "tpu": Way(256, erasing=64, in_turn=False),
    "gpu": Way(64, erasing=64, in_turn=False),
}


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


State = tuple[Float[Array, "G K rV"], Float[Array, "s G K rV"] | None]  # the one handed on, and those of segments


def _forward_row(cut: Cut, scale: float, x: Inputs, runs: Runs | None, state: State) -> tuple[Array, State, Array]:
    """One row, span by span: (o, the state after it, the one handed to every span)."""

    def span(state: State, given: tuple[Inputs, Runs | None]) -> tuple[State, tuple[Array, Array]]:
        x, runs = given
        terms = _terms(cut, x)
        reads = terms.reads
        before, u, after = _hand_on(cut, terms, state, runs)
        o = _times(einsum32("ngik,ngkv->ngiv", reads.q[0], before), reads.enter)
        o = scale * (o + _apply(cut, "ngrij,ngrjv->ngriv", reads.A[0], u))
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
        reads = terms.reads
        before, u, _ = _hand_on(cut, terms, (S, states), runs)
        dlocal = einsum32("ngik,ngiv->ngkv", reads.q[0], _times(do, reads.enter))
        du = _apply(cut, "ngrij,ngriv->ngrjv", reads.A[0], do)
        after, du, dstate = _hand_back(cut, terms, dlocal, du, dstate, runs)
        readers = [_read(cut, reads, 0, do, u, before)]
        if terms.erase is not None:
            du = erase.unsolved(terms.erase, du)
            of_A, *others = _read(cut, reads, 1, -du, u, before)
            readers.append((jnp.tril(of_A, -1), *others))
        dA, dq, enter = zip(*readers, strict=True)
        left = _times(u, reads.leave)
        dk = einsum32("ngjv,ngkv->ngjk", left, after)
        leave = _along(cut, reads.k, dk, lambda: left * einsum32("ngjk,ngkv->ngjv", reads.k, after))
        fade = _faded(cut, reads.fade, before * after)
        return dstate, terms.pull(decay.Cotangents(dA, dq, dk, sum(enter), leave, fade), du)

    dstate, grads = lax.scan(span, dfinal, (x, do, saved, runs), reverse=True)
    return grads, dstate


class Terms(NamedTuple):
    """Of a span: what its products are made of, and how the gradients of reads and u return to the inputs."""

    reads: decay.Reads
    erase: erase.Erase | None
    u: Float[Array, "n G c rV"]  # w v; with an erase gate not yet what is written
    pull: Callable[[decay.Cotangents, Array], Inputs]


def _terms(cut: Cut, x: Inputs) -> Terms:
    valid = x.valid
    x = unpadded(x)
    n, c = x.v.shape[:2]
    v = x.v.reshape(n, c, cut.h, cut.V)
    w = None if x.w is None else x.w.astype(jnp.float32)[..., None]
    u = cut.grouped((v if w is None else v * w).reshape(n, c, -1), cut.groups)
    q, k = cut.grouped(x.q, cut.hq), cut.grouped(x.k, cut.hk)
    wide = lambda x: cut.grouped(x, cut.h).astype(jnp.float32)
    g = None if x.g is None else wide(x.g) if cut.gate == 4 else cut.gates(x.g)
    beta = wide(x.beta) if cut.erases else None
    docs = None if x.reset is None else decay.documents(x.reset)
    reads, pull_reads = _reads(cut, (q,) if beta is None else (q, beta * k), k, g, docs)

    def pull(d: decay.Cotangents, du: Array) -> Inputs:
        (dq, *dread), dk, dg = pull_reads(d)
        if dg is not None:
            dg = cut.flat(dg, cut.h) if cut.gate == 4 else jnp.swapaxes(dg.reshape(n, cut.h, c), 1, 2)
        dbeta = None
        if beta is not None:
            dk = dk + beta * dread[0]
            dbeta = dread[0] * k
            dbeta = cut.flat(dbeta if beta.shape[-1] > 1 else jnp.sum(dbeta, -1, keepdims=True), cut.h)
        du = cut.flat(du, cut.groups).reshape(v.shape)
        dv = (du if w is None else du * w).reshape(n, c, -1)
        dw = None if w is None else jnp.sum(du * v, -1)
        return unpadded(Inputs(cut.flat(dq, cut.hq), cut.flat(dk, cut.hk), dv, dg, dw, None, valid, dbeta))

    return Terms(reads, None if beta is None else erase.erase(reads), u, pull)


def _reads(
    cut: Cut, readers: tuple[Array, ...], k: Array, g: Array | None, docs: decay.Documents | None
) -> tuple[decay.Reads, Callable]:
    """(the factors; their cotangents -> those of the readers, of k and of g)."""
    if cut.gate == 4:
        reads, pull = jax.vjp(lambda *args: decay.vector(*args, docs), readers, k, g)
        return reads, lambda d: pull(decay.Reads(d.A, d.q, d.k, None, None, d.fade))
    reads, faded = decay.scalar(readers, k, g, docs)
    return reads, lambda d: decay.scalar_pull(reads, faded, d, decays=g is not None)


def _read(cut: Cut, reads: decay.Reads, i: int, do: Array, u: Array, before: Array) -> tuple[Array, Array, Array]:
    """Of o = enter (q S) + A u of reader i: the gradients of A, of q, and of enter times enter."""
    entered = _times(do, reads.enter)
    dq = einsum32("ngiv,ngkv->ngik", entered, before)
    enter = _along(cut, reads.q[i], dq, lambda: entered * einsum32("ngik,ngkv->ngiv", reads.q[i], before))
    return einsum32("ngriv,ngrjv->ngrij", cut.by_head(do), cut.by_head(u)), dq, enter


def _along(cut: Cut, x: Array, dx: Array, products: Callable[[], Array]) -> Float[Array, "n G r c"]:
    """The gradient of the factor of x times the factor: x . dx, or of every head that shares x by its own products."""
    return _sum(cut, products()) if cut.heads > 1 else jnp.sum(x * dx, -1)[:, :, None]


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
    cut: Cut, terms: Terms, state: State, runs: Runs | None
) -> tuple[Float[Array, "n G K rV"], Float[Array, "n G c rV"], State]:
    """(the state that each chunk is handed, what its tokens write, what is there after them all)."""
    reads, u = terms.reads, terms.u

    def chunk(state: State, given: tuple[Array | None, erase.Link, Runs | None]) -> tuple[State, tuple]:
        (S, states), (fade, link, run) = state, given
        if run is not None:
            S = jnp.where(run.first, states.at[run.id].get(mode="fill", fill_value=0), S)
        local, u = link(S)
        after = _faint(fade, S) + local
        if run is not None:
            states = states.at[run.id].set(after, mode="drop")
        return (after, states), (S, u)

    if terms.erase is None:
        link = erase.Link(einsum32("ngjk,ngjv->ngkv", reads.k, _times(u, reads.leave)))
    else:
        link = erase.onwards(terms.erase, u)
    state, (handed, written) = lax.scan(chunk, state, (_over_state(cut, reads.fade), link, runs))
    return handed, u if terms.erase is None else written, state


def _hand_back(
    cut: Cut, terms: Terms, dlocal: Float[Array, "n G K rV"], du: Array, dstate: State, runs: Runs | None
) -> tuple[Float[Array, "n G K rV"], Float[Array, "n G c rV"], State]:
    """(the gradient of the state after each chunk, of what its tokens write, of the states before them all).

    dlocal and du: what the chunk's own reads give to the state before it and to what it writes.
    """
    reads = terms.reads

    def chunk(dstate: State, given: tuple[Array | None, erase.Link, Runs | None]) -> tuple[State, tuple]:
        (dS, dstates), (fade, link, run) = dstate, given
        if run is not None:
            dS = dS + jnp.where(run.last, dstates.at[run.id].get(mode="fill", fill_value=0), 0)
        local, du = link(dS)
        before = _faint(fade, dS) + local
        if run is not None and dstates is not None:
            dstates = dstates.at[jnp.where(run.first, run.id, len(dstates))].set(before, mode="drop")
            before = jnp.where(run.first, 0, before)
        return (before, dstates), (dS, du)

    link = erase.Link(dlocal) if terms.erase is None else erase.backwards(terms.erase, dlocal, du)
    dstate, (after, dwritten) = lax.scan(chunk, dstate, (_over_state(cut, reads.fade), link, runs), reverse=True)
    if terms.erase is None:
        dwritten = du + _times(einsum32("ngjk,ngkv->ngjv", reads.k, after), reads.leave)
    return after, dwritten, dstate


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
