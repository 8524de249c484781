"""Softmax attention by blocks of queries and keys: O(t) memory forward and backward.

The equations of FlashAttention (arXiv:2205.14135). Forward streams the live key blocks past each block of
queries with a running maximum m and sum l, and divides once at the end; what is kept for the backward pass is
o and lse. Backward forms each block of probabilities again:

    p = exp(s - lse)    dv = p' do    ds = p * (do v' - delta)    dq = scale ds k    dk = scale ds' q
    delta = sum(o * do) - dlse

Which blocks are live is asked of the mask and of the segments as the program runs: a causal mask costs half,
a window its width, and packed documents or padded rows what their own lengths cost.

Letters: r rows, one for each batch and key head, n blocks of c tokens, g query heads that share a key head,
m = g c queries of a block. Products are written so that none contracts the rows of both operands: XLA's CPU
backend has no fast matmul for that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from longwave.kernels.attention.mask import Mask
from longwave.kernels.attention.reference import Coordinates, Scores, einsum32, visible

BLOCK = 256  # a block of float32 scores fits the second-level cache of a CPU core; half and twice are no faster
HIDDEN = -1e30  # score of an invisible key
FLOOR = -1e29  # where the running maximum starts: above HIDDEN, so that exp(HIDDEN - m) is 0 even if no key is seen


def forward(
    q: Float[Array, "b tq h d"],
    k: Float[Array, "b tk kv d"],
    v: Float[Array, "b tk kv dv"],
    q_at: Coordinates,
    k_at: Coordinates,
    scores: Scores,
    *,
    block: int = BLOCK,
) -> tuple[Float[Array, "b tq h dv"], Float[Array, "b tq h"]]:
    """Output in v's dtype and float32 log-sum-exp. Memory O(tq + tk). Coordinates are (t,) or (b, t)."""
    cut = _Cut(q, k, q_at, k_at, block)
    at = cut.places()
    f = partial(_forward_row, scores)
    o, lse = _over_rows(f, _live(scores.mask, *at), cut.queries(q), cut.keys(k), cut.keys(v), *at)
    return cut.in_time(o), cut.in_time(lse)


def backward(
    q: Float[Array, "b tq h d"],
    k: Float[Array, "b tk kv d"],
    v: Float[Array, "b tk kv dv"],
    q_at: Coordinates,
    k_at: Coordinates,
    lse: Float[Array, "b tq h"],
    delta: Float[Array, "b tq h"],
    do: Float[Array, "b tq h dv"],
    scores: Scores,
    *,
    block: int = BLOCK,
) -> tuple[Float[Array, "b tq h d"], Float[Array, "b tk kv d"], Float[Array, "b tk kv dv"]]:
    """Gradients from lse, over these keys and any others, and delta = sum(o * do) - dlse."""
    cut = _Cut(q, k, q_at, k_at, block)
    at = cut.places()
    rows = (*map(cut.queries, (q, do, lse, delta)), cut.keys(k), cut.keys(v))
    dq, dk, dv = _over_rows(partial(_backward_row, scores), _live(scores.mask, *at), *rows, *at)
    return cut.in_time(dq), cut.keys_in_time(dk), cut.keys_in_time(dv)


class _Cut:
    """Arrays in time, cut into rows (batch and key head) of blocks; and back."""

    def __init__(self, q: Array, k: Array, q_at: Coordinates, k_at: Coordinates, block: int):
        self.b, self.tq, self.h = q.shape[:3]
        self.tk, self.kv = k.shape[1:3]
        of_queries = max(8, block * self.kv // self.h // 8 * 8)  # m stays about as large as a block of keys
        (self.nq, self.cq), (self.nk, self.ck) = _split(self.tq, of_queries), _split(self.tk, block)
        q_at, k_at = q_at.placed(self.tq), k_at.placed(self.tk)
        if k_at.segment is None and self.nk * self.ck > self.tk:  # the padding must be told from keys
            q_at = q_at._replace(segment=jnp.zeros(self.tq, jnp.int32))
            k_at = k_at._replace(segment=jnp.zeros(self.tk, jnp.int32))
        self.at = q_at, k_at

    def queries(self, x: Array) -> Array:
        """(b, tq, h, ...) -> (r, nq, m, ...)."""
        x, rest = _pad(x, 1, self.nq * self.cq), x.shape[3:]
        x = x.reshape(self.b, self.nq, self.cq, self.kv, -1, *rest)
        return jnp.moveaxis(x, (3, 4), (1, 3)).reshape(self.b * self.kv, self.nq, -1, *rest)

    def keys(self, x: Array) -> Array:
        """(b, tk, kv, d) -> (r, nk, c, d)."""
        x = _pad(x, 1, self.nk * self.ck).reshape(self.b, self.nk, self.ck, self.kv, -1)
        return jnp.moveaxis(x, 3, 1).reshape(self.b * self.kv, self.nk, self.ck, -1)

    def places(self) -> tuple[Coordinates, Coordinates]:
        to_rows = lambda x: jnp.repeat(jnp.broadcast_to(x, (self.b, x.shape[-1])), self.kv, axis=0)
        q_at, k_at = jax.tree.map(to_rows, self.at)
        return _cut(q_at, self.nq, self.cq), _cut(k_at, self.nk, self.ck)

    def in_time(self, x: Array) -> Array:
        """(r, nq, m, ...) -> (b, tq, h, ...)."""
        rest = x.shape[3:]
        x = x.reshape(self.b, self.kv, self.nq, -1, self.cq, *rest)
        return jnp.moveaxis(x, (1, 3), (3, 4)).reshape(self.b, -1, self.h, *rest)[:, : self.tq]

    def keys_in_time(self, x: Array) -> Array:
        """(r, nk, c, d) -> (b, tk, kv, d)."""
        x = x.reshape(self.b, self.kv, self.nk, self.ck, -1)
        return jnp.moveaxis(x, 1, 3).reshape(self.b, -1, self.kv, x.shape[-1])[:, : self.tk]


def _split(t: int, block: int) -> tuple[int, int]:
    """Number of blocks and their length: as even as multiples of 8 allow, so that little is padded."""
    n = -(-t // block)
    return n, t if n == 1 else min(block, -(-t // (8 * n)) * 8)


def _pad(x: Any, axis: int, size: int, **how) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, **how)


def _cut(at: Coordinates, n: int, c: int) -> Coordinates:
    """(..., t) into blocks (..., n, c). Padding takes the last position and segment -1."""
    position = _pad(at.position, -1, n * c, mode="edge").reshape(*at.position.shape[:-1], n, c)
    if at.segment is None:
        return Coordinates(position)
    return Coordinates(position, _pad(at.segment, -1, n * c, constant_values=-1).reshape(position.shape))


def _live(mask: Mask, q_at: Coordinates, k_at: Coordinates) -> Bool[Array, "r nq nk"]:
    """Which blocks of keys a block of queries must visit."""

    def ranges(at, x):
        seen = True if at.segment is None else at.segment >= 0
        lo = jnp.min(x, -1, where=seen, initial=jnp.iinfo(x.dtype).max // 2)
        return lo, jnp.max(x, -1, where=seen, initial=jnp.iinfo(x.dtype).min // 2)

    def pairs(field):
        q_lo, q_hi = ranges(q_at, getattr(q_at, field))
        k_lo, k_hi = ranges(k_at, getattr(k_at, field))
        return q_lo[..., :, None], q_hi[..., :, None], k_lo[..., None, :], k_hi[..., None, :]

    live = mask.live(*pairs("position"))
    if k_at.segment is not None:
        q_lo, q_hi, k_lo, k_hi = pairs("segment")
        live = live & (q_lo <= k_hi) & (k_lo <= q_hi)
    return jnp.broadcast_to(live, (*q_at.position.shape[:-1], k_at.position.shape[-2]))


def _visits(live: Bool[Array, "*r nq nk"]) -> tuple[Int[Array, "*r nq nk"], Int[Array, "*r nq"]]:
    """Key blocks in the order of visit, live ones first, and how many these are."""
    return jnp.argsort(~live, axis=-1, stable=True), jnp.sum(live, -1)


def _over_rows(f: Callable, live: Array, *arrays):
    """f(visits, *row) for each (batch, key head).

    On a CPU in turn, each with its own live blocks: its cache then holds a block of scores. Elsewhere all at
    once, visiting what is live for any of them.
    """
    in_turn = lambda live, *xs: lax.map(lambda row: f(*row), (_visits(live), *xs))
    at_once = lambda live, *xs: jax.vmap(partial(f, _visits(live.any(0))))(*xs)
    return lax.platform_dependent(live, *arrays, cpu=in_turn, default=at_once)


def _scores(q, k, q_at: Coordinates, k_at: Coordinates, scores: Scores) -> Float[Array, "m c"]:
    """Capped scores, HIDDEN where nothing is seen."""
    s = scores.cap(scores.scale * einsum32("md,cd->mc", q, k))
    see = visible(scores.mask, q_at, k_at)
    if see is True:
        return s
    by_head = s.reshape(-1, *see.shape)
    return jnp.where(see[None], by_head, HIDDEN).reshape(s.shape)


def _forward_row(scores, visits, q, k, v, q_at, k_at):
    """q (n, m, d), k and v (n, c, .) of one row -> o (n, m, dv), lse (n, m)."""

    def query_block(xs):
        q, q_at, order, live = xs

        def key_block(i, state):
            o, m, l = state
            j = order[i]
            s = _scores(q, k[j], q_at, jax.tree.map(lambda x: x[j], k_at), scores)
            m_new = jnp.maximum(m, jnp.max(s, -1))
            p = jnp.exp(s - m_new[:, None])
            fade = jnp.exp(m - m_new)
            return o * fade[:, None] + einsum32("mc,cd->md", p, v[j]), m_new, l * fade + jnp.sum(p, -1)

        zeros = jnp.zeros(q.shape[0])
        o, m, l = lax.fori_loop(0, live, key_block, (jnp.zeros((q.shape[0], v.shape[-1])), zeros + FLOOR, zeros))
        blind = l == 0
        l = jnp.where(blind, 1.0, l)
        return (o / l[:, None]).astype(v.dtype), jnp.where(blind, -jnp.inf, m + jnp.log(l))

    return lax.map(query_block, (q, q_at, *visits))


def _backward_row(scores, visits, q, do, lse, delta, k, v, q_at, k_at):
    """Gradients of one row's q, k and v; dk and dv gather their sums in float32, (n, ., c), across query blocks."""
    blind = lse == -jnp.inf
    lse = jnp.where(blind, 0.0, lse)  # exp(HIDDEN - 0) is 0: a query that sees nothing has no gradient
    delta = jnp.where(blind, 0.0, delta)

    def query_block(sums, xs):
        q, do, lse, delta, q_at, order, live = xs
        q_turned, do_turned = q.T, do.T

        def key_block(i, sums):
            dq, dk, dv = sums
            j = order[i]
            s = _scores(q, k[j], q_at, jax.tree.map(lambda x: x[j], k_at), scores)
            p = jnp.exp(s - lse[:, None])
            ds = p * (einsum32("md,cd->mc", do, v[j]) - delta[:, None])
            if scores.softcap is not None:  # where s is hidden, p is 0: its slope must only be finite
                ds = ds * (1 - (jnp.maximum(s, -scores.softcap) / scores.softcap) ** 2)
            ds = scores.scale * ds
            dq = dq + einsum32("mc,cd->md", ds, k[j])
            dk = dk.at[j].add(einsum32("dm,mc->dc", q_turned, ds))
            return dq, dk, dv.at[j].add(einsum32("dm,mc->dc", do_turned, p))

        dq, dk, dv = lax.fori_loop(0, live, key_block, (jnp.zeros(q.shape), *sums))
        return (dk, dv), dq.astype(q.dtype)

    turned = lambda x: jnp.swapaxes(x, -1, -2)
    zeros = jnp.zeros(turned(k).shape), jnp.zeros(turned(v).shape)
    (dk, dv), dq = lax.scan(query_block, zeros, (q, do, lse, delta, q_at, *visits))
    return dq, turned(dk).astype(k.dtype), turned(dv).astype(v.dtype)
