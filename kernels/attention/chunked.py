"""Softmax attention by blocks of queries and keys: O(t) memory forward and backward.

The equations of FlashAttention (arXiv:2205.14135). Forward streams the live key blocks past each block of
queries with a running maximum m and sum l, and divides once at the end; what is kept for the backward pass is
o and lse. Backward forms each block of probabilities again:

    p = exp(s - lse)    dv = p' do    ds = p * (do v' - delta)    dq = scale ds k    dk = scale ds' q
    delta = sum(o * do) - dlse

Which blocks are live is asked of the mask and of the segments as the program runs: a causal mask costs half,
a window its width, and packed documents or padded rows what their own lengths cost.

Letters: r rows, one for each batch and key head, n blocks of c tokens, g query heads that share a key head,
m = g c queries of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from longwave.kernels.attention.mask import Mask
from longwave.kernels.attention.reference import Coordinates, einsum32, visible

BLOCK = 256  # a block of float32 scores fits the second-level cache of a CPU core; half and twice are no faster
HIDDEN = -1e30  # score of an invisible key
FLOOR = -1e29  # where the running maximum starts: above HIDDEN, so that exp(HIDDEN - m) is 0 even if no key is seen


def attention(
    q: Float[Array, "b tq h d"],
    k: Float[Array, "b tk kv d"],
    v: Float[Array, "b tk kv dv"],
    q_at: Coordinates,
    k_at: Coordinates,
    *,
    mask: Mask,
    scale: float,
    block: int = BLOCK,
) -> tuple[Float[Array, "b tq h dv"], Float[Array, "b tq h"]]:
    """Output in v's dtype and float32 log-sum-exp. Memory O(tq + tk). Coordinates are (t,) or (b, t)."""
    b, tq, h, d = q.shape
    tk, kv, dv = v.shape[1:]
    g = h // kv
    (nq, cq), (nk, ck) = _split(tq, block), _split(tk, block)
    if k_at.segment is None and nk * ck > tk:  # the padding must be told from keys
        q_at, k_at = (x._replace(segment=jnp.zeros_like(x.position)) for x in (q_at, k_at))
    to_rows = lambda x: jnp.repeat(jnp.broadcast_to(x, (b, x.shape[-1])), kv, axis=0)
    q_at, k_at = jax.tree.map(to_rows, (q_at, k_at))
    q_at, k_at = _cut(q_at, nq, cq), _cut(k_at, nk, ck)

    q = _pad(q, 1, nq * cq).reshape(b, nq, cq, kv, g, d)
    q = q.transpose(0, 3, 1, 4, 2, 5).reshape(b * kv, nq, g * cq, d)
    k, v = (_pad(x, 1, nk * ck).reshape(b, nk, ck, kv, x.shape[-1]) for x in (k, v))
    k, v = (x.transpose(0, 3, 1, 2, 4).reshape(b * kv, nk, ck, x.shape[-1]) for x in (k, v))
    o, lse = _rows(mask, scale, q, k, v, q_at, k_at)
    o = o.reshape(b, kv, nq, g, cq, dv).transpose(0, 2, 4, 1, 3, 5).reshape(b, nq * cq, h, dv)
    lse = lse.reshape(b, kv, nq, g, cq).transpose(0, 2, 4, 1, 3).reshape(b, nq * cq, h)
    return o[:, :tq], lse[:, :tq]


def _split(t: int, block: int) -> tuple[int, int]:
    """Number of blocks and their length: as even as multiples of 8 allow, so that little is padded."""
    n = -(-t // block)
    return n, t if n == 1 else min(block, -(-t // (8 * n)) * 8)


def _pad(x: Array, axis: int, size: int, **how) -> Array:
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


def _scores(q, k, q_at: Coordinates, k_at: Coordinates, mask: Mask, scale: float) -> Float[Array, "m c"]:
    s = scale * einsum32("md,cd->mc", q, k)
    see = visible(mask, q_at, k_at)
    if see is True:
        return s
    by_head = s.reshape(-1, *see.shape)
    return jnp.where(see[None], by_head, HIDDEN).reshape(s.shape)


def _forward_row(mask, scale, visits, q, k, v, q_at, k_at):
    """q (n, m, d), k and v (n, c, .) of one row -> o (n, m, dv), lse (n, m)."""

    def query_block(xs):
        q, q_at, order, live = xs

        def key_block(i, state):
            o, m, l = state
            j = order[i]
            s = _scores(q, k[j], q_at, jax.tree.map(lambda x: x[j], k_at), mask, scale)
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


def _backward_row(mask, scale, visits, q, k, v, o, lse, do, dlse, q_at, k_at):
    """Gradients of one row's q, k and v; dk and dv gather their sums in float32 across query blocks."""
    blind = lse == -jnp.inf
    lse = jnp.where(blind, 0.0, lse)  # exp(HIDDEN - 0) is 0: a query that sees nothing has no gradient
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), -1) - jnp.where(blind, 0.0, dlse)

    def query_block(sums, xs):
        q, do, lse, delta, q_at, order, live = xs

        def key_block(i, sums):
            dq, dk, dv = sums
            j = order[i]
            s = _scores(q, k[j], q_at, jax.tree.map(lambda x: x[j], k_at), mask, scale)
            p = jnp.exp(s - lse[:, None])
            ds = scale * p * (einsum32("md,cd->mc", do, v[j]) - delta[:, None])
            dq = dq + einsum32("mc,cd->md", ds, k[j])
            return dq, dk.at[j].add(einsum32("mc,md->cd", ds, q)), dv.at[j].add(einsum32("mc,md->cd", p, do))

        dq, dk, dv = lax.fori_loop(0, live, key_block, (jnp.zeros(q.shape), *sums))
        return (dk, dv), dq.astype(q.dtype)

    xs = (q, do, lse, delta, q_at, *visits)
    (dk, dv), dq = lax.scan(query_block, (jnp.zeros(k.shape), jnp.zeros(v.shape)), xs)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rows(mask, scale, q, k, v, q_at, k_at):
    return _over_rows(partial(_forward_row, mask, scale), _live(mask, q_at, k_at), q, k, v, q_at, k_at)


def _rows_forward(mask, scale, q, k, v, q_at, k_at):
    o, lse = _rows(mask, scale, q, k, v, q_at, k_at)
    return (o, lse), (q, k, v, o, lse, q_at, k_at)


def _rows_backward(mask, scale, kept, grads):
    *arrays, q_at, k_at = kept
    f = partial(_backward_row, mask, scale)
    dq, dk, dv = _over_rows(f, _live(mask, q_at, k_at), *arrays, *grads, q_at, k_at)
    return dq, dk, dv, None, None


_rows.defvjp(_rows_forward, _rows_backward)
