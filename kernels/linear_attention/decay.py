"""What decay does inside chunks of c tokens, and how its gradient returns.

With b the sums of g from a chunk's start, a chunk that S enters is

    o_i = q_i exp(b_i) S + sum_{j<=i} (q_i exp(b_i - b_j) k_j') u_j           u = w v
    S  <- exp(b_c) S + sum_j (k_j exp(b_c - b_j))' u_j

`Reads` holds its factors. Every exponent is the sum of g over a stretch of tokens, so none is above 0. No sum of g
over the others is taken from another: where one g is -100, that would leave nothing of its neighbours' digits. Gates
are thus learned from strong decays as from weak ones, g = -inf included. A reset is a mask, not a number.

Two ways. Scalar decays scale rows of u and of o, and exp(b_i - b_j) multiplies q k'. Vector decays scale q and k:
two halves of a chunk meet where they touch, q exp(sum since then) (k exp(sum until then))', and the halves are made
of halves in the same way, down to single tokens. Both factors are at most 1.

Letters: n chunks, G groups of heads that share q and k, r heads of a group, c tokens, K and V.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from longwave.kernels.attention.reference import einsum32

NOTHING_LEFT = -128.0  # exp of it, and of all that is less, is 0 in float32


class Documents(NamedTuple):
    """Which tokens of a chunk hear each other, the state that enters, and who is heard by the state that leaves."""

    same: Bool[Array, "n c c"]
    first: Bool[Array, "n c"]
    last: Bool[Array, "n c"]
    one: Bool[Array, " n"]


def documents(reset: Bool[Array, "n c"]) -> Documents:
    run = jnp.cumsum(reset.astype(jnp.int32), axis=-1)
    end = run[:, -1:]
    return Documents(run[:, :, None] == run[:, None], run == 0, run == end, end[:, 0] == 0)


class Reads(NamedTuple):
    """What reads: q, and where an erase gate is, beta k. A of each: (n, G, r, c, c), 0 above the diagonal.

    q of each, and k: (n, G, c, K), decayed if decays are vectors.
    enter, leave: (n, G, r, c), factors of what the state gives to o and of what u gives to the state, or None: 1.
    fade: (n, G, r, 1) or (n, G, 1, K), the factor of the state that passes by, or None: 1.
    """

    A: Sequence[Float[Array, "n G r c c"]]
    q: Sequence[Float[Array, "n G c K"]]
    k: Float[Array, "n G c K"]
    enter: Float[Array, "n G r c"] | None
    leave: Float[Array, "n G r c"] | None
    fade: Float[Array, "n G r K"] | None


class Cotangents(NamedTuple):
    """Of `Reads`. Of A without the decay's own factor; of enter and leave times these factors themselves."""

    A: Sequence[Float[Array, "n G r c c"]]
    q: Sequence[Float[Array, "n G c K"]]
    k: Float[Array, "n G c K"]
    enter: Float[Array, "n G r c"]
    leave: Float[Array, "n G r c"]
    fade: Float[Array, "n G r K"] | None


def total(x: Float[Array, "n G r *rest"]) -> Float[Array, "n G *rest"]:
    """The sum over axis 2, as a product with ones: XLA's sums over an axis that is not the last are slow on CPUs."""
    rows = x.reshape(*x.shape[:3], -1)
    ones = jnp.ones((*x.shape[:2], 1, x.shape[2]))
    return jnp.matmul(ones, rows, precision=jax.lax.Precision.HIGHEST).reshape(*x.shape[:2], *x.shape[3:])


# No decay, or a scalar


def scalar(
    readers: Sequence[Array], k: Array, g: Float[Array, "n G r c"] | None, docs: Documents | None
) -> tuple[Reads, Array]:
    """(the factors, exp(b_i - b_j) (n, G, r, c, c))."""
    c = k.shape[-2]
    see = np.tril(np.ones((c, c), bool))[None]
    see = (see if docs is None else see & docs.same)[:, None, None]
    if g is None:
        decay = jnp.asarray(see, jnp.float32)
        cast = lambda mask: mask[:, None, None].astype(jnp.float32)
        enter, leave, fade = (None,) * 3 if docs is None else (cast(mask) for mask in docs[1:])
        fade = None if docs is None else fade[..., None]
    else:
        g = jnp.maximum(g, NOTHING_LEFT)
        since, until = _until(g), _after(g)
        decay = jnp.exp(jnp.where(see, jnp.minimum(_between(g), 0), -jnp.inf))
        enter, leave, fade = jnp.exp(since), jnp.exp(until), jnp.exp(since[..., -1:])
        if docs is not None:
            over = lambda mask: mask[:, None, None]
            enter, leave = jnp.where(over(docs.first), enter, 0), jnp.where(over(docs.last), leave, 0)
            fade = jnp.where(over(docs.one)[..., None], fade, 0)
    A = tuple(einsum32("ngik,ngjk->ngij", q, k.astype(q.dtype))[:, :, None] * decay for q in readers)
    return Reads(A, readers, k, enter, leave, fade), decay


def scalar_pull(reads: Reads, decay: Array, d: Cotangents, *, decays: bool) -> tuple[list[Array], Array, Array | None]:
    """(those of the readers, dk, dg (n, G, r, c) or None)."""
    dreaders, dk = [], d.k
    for q, dA, dq in zip(reads.q, d.A, d.q, strict=True):
        P = total(dA * decay)
        dreaders.append(einsum32("ngij,ngjk->ngik", P, reads.k.astype(q.dtype)) + dq)
        dk = einsum32("ngij,ngik->ngjk", P, q) + dk
    if not decays or d.fade is None:
        return dreaders, dk, None
    c = decay.shape[-1]
    strictly = np.tri(c, k=-1, dtype=bool)[None, None, None]  # what is between a token and itself decays nothing
    M = jnp.where(strictly, sum(dA * A for dA, A in zip(d.A, reads.A, strict=True)), 0)
    at = jnp.sum(M, -1) - jnp.sum(M, -2) + d.enter
    return dreaders, dk, _from(at) + _before(d.leave) + d.fade


def _between(g: Float[Array, "... c"]) -> Float[Array, "... c c"]:
    """The sum of g over j < l <= i, exact: whole numbers first, whose sums lose no digit, then what is left."""
    whole = jnp.round(g)
    difference = lambda b: b[..., :, None] - b[..., None, :]
    return difference(_until(whole)) + difference(_until(g - whole))


def _until(x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    """Sums over all up to a token, itself included. (Of all four: a product with a triangle, on any backend fast.)"""
    return _triangle(x, lambda l, i: l <= i)


def _from(x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    return _triangle(x, lambda l, i: l >= i)


def _before(x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    return _triangle(x, lambda l, i: l < i)


def _after(x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    return _triangle(x, lambda l, i: l > i)


def _triangle(x: Array, counts) -> Array:
    at = np.arange(x.shape[-1])
    ones = counts(at[:, None], at[None, :]).astype(np.float32)
    return jnp.dot(x.reshape(-1, at.size), ones, precision=jax.lax.Precision.HIGHEST).reshape(x.shape)


# A vector


def vector(
    readers: Sequence[Array], k: Float[Array, "n G c K"], g: Float[Array, "n G c K"], docs: Documents | None
) -> Reads:
    """The factors, each pair of tokens through the point where the halves that hold them touch."""
    (n, G, c, K), z = k.shape, len(readers)
    q = jnp.stack(readers, -2).astype(jnp.float32).reshape(-1, z, K)
    k, since = (x.astype(jnp.float32).reshape(-1, 1, K) for x in (k, g))
    until = jnp.zeros_like(since)
    A = jnp.sum(q * k, -1, keepdims=True)  # blocks of one token, (block, token, K); in A a row for each of its readers
    m = 1
    while m < c:  # blocks of all chunks along one axis: XLA's CPU library fails on products of many axes
        pairs = lambda x: jnp.moveaxis(x.reshape(-1, 2, *x.shape[1:]), 1, 0)
        (A1, A2), (since1, since2), (until1, until2) = pairs(A), pairs(since), pairs(until)
        q2, k1 = (x.reshape(-1, 2, m, *x.shape[1:])[:, i] for i, x in ((1, q), (0, k[:, 0])))
        q2 = (q2 * jnp.exp(since2)[:, :, None]).reshape(-1, m * z, K)
        low = einsum32("sik,sjk->sij", q2, k1 * jnp.exp(until1))
        A = jnp.concatenate((jnp.pad(A1, [(0, 0), (0, 0), (0, m)]), jnp.concatenate((low, A2), -1)), -2)
        since = jnp.concatenate((since1, since1[:, -1:] + since2), -2)
        until = jnp.concatenate((until1 + since2[:, -1:], until2), -2)
        m *= 2
    A, q = A.reshape(n, G, c, z, c), q.reshape(n, G, c, z, K)
    k, since, until = (x.reshape(n, G, c, K) for x in (k, since, until))
    q, k, fade = q * jnp.exp(since)[..., None, :], k * jnp.exp(until), jnp.exp(since[..., -1:, :])
    if docs is not None:
        A = jnp.where(docs.same[:, None, :, None], A, 0)
        q = jnp.where(docs.first[:, None, :, None, None], q, 0)
        k = jnp.where(docs.last[:, None, :, None], k, 0)
        fade = jnp.where(docs.one[:, None, None, None], fade, 0)
    of_each = lambda x: tuple(x[:, :, :, i] for i in range(z))
    return Reads(tuple(A[:, :, None] for A in of_each(A)), of_each(q), k, None, None, fade)
