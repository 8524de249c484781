"""Linear work in about 2 sqrt(t) vector steps: the tokens of all chunks advance side by side.

    1. every chunk from zero: what map of the carry it is, (P, S): carry -> P carry + S
    2. these maps composed over the chunks: the carry that each chunk is handed
    3. every chunk again, from that carry: the outputs

No product of decays is kept for a token and none is divided by: the outputs come from the recurrence itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from longwave.kernels.linear_scan.pair import Number, one_like, shape, through, zero_like
from longwave.kernels.linear_scan.reference import Sweep, Tokens, step

Incoming = Callable[[Number, Number], Number]  # the map of all local tokens, (P, S) -> the carry they are handed


def sweep_tokens(tokens: Tokens, incoming: Incoming, sweep: Sweep) -> tuple[Number, Number]:
    """(out (b, t, d) in the dtype of x, what the last token hands on (b, d))."""
    b, t, d = shape(tokens.x)
    c = chunk_length(t)
    k = -(-t // c)
    if k * c > t:
        tokens = pad(tokens, k * c)
    constant = len(shape(tokens.a)) == 1
    split = lambda v: v[None, None] if v.ndim == 1 else v.reshape(b, k, c, v.shape[-1])
    chunks = jax.tree.map(split, tokens)
    order = lambda j: c - 1 - j if sweep.reverse else j

    def token(j: jax.Array) -> Tokens:
        at = lambda v: jax.lax.dynamic_index_in_dim(v, j, axis=2, keepdims=False)
        moving = jax.tree.map(at, chunks._replace(a=None) if constant else chunks)
        return moving._replace(a=chunks.a) if constant else moving

    zeros = jax.tree.map(lambda v: jnp.zeros((b, k, d), jnp.float32), tokens.x)
    alike = constant and tokens.reset is None and tokens.valid is None  # one P for all rows and chunks
    ones = one_like(jax.tree.map(lambda v: v[:1, :1], zeros) if alike else zeros)

    def compose(j: jax.Array, maps: tuple[Number, Number]) -> tuple[Number, Number]:
        P, S = maps
        now = token(order(j))
        still = now._replace(x=jax.tree.map(lambda v: jnp.zeros((1, 1, 1), jnp.float32), now.x))
        return step(P, still, sweep)[0], step(S, now, sweep)[0]

    handed = _across(*jax.lax.fori_loop(0, c, compose, (ones, zeros)), incoming, sweep)

    def emit(j: jax.Array, carry: tuple[Number, Number]) -> tuple[Number, Number]:
        number, out = carry
        j = order(j)
        number, y = step(number, token(j), sweep)
        write = lambda out, y: jax.lax.dynamic_update_index_in_dim(out, y.astype(out.dtype), j, axis=2)
        return number, jax.tree.map(write, out, y)

    last, out = jax.lax.fori_loop(0, c, emit, (handed, zero_like(chunks.x)))
    end = 0 if sweep.reverse else -1
    return jax.tree.map(lambda v: v.reshape(b, k * c, d)[:, :t], out), jax.tree.map(lambda v: v[:, end], last)


def chunk_length(t: int) -> int:
    """The divisor of t nearest to its square root, if one is within a factor 2; else the root, rounded up."""
    root = math.sqrt(t)
    near = [c for c in range(math.ceil(root / 2), math.floor(2 * root) + 1) if t % c == 0]
    return min(near, key=lambda c: abs(math.log(c / root)), default=math.ceil(root))


def _across(P: Number, S: Number, incoming: Incoming, sweep: Sweep) -> Number:
    """The carry that each chunk is handed (b, k, d), from the maps of the chunks."""
    P = jax.tree.map(lambda p, s: jnp.broadcast_to(p, (p.shape[0], *s.shape[1:])), P, S)

    def then(before: tuple[Number, Number], chunk: tuple[Number, Number]) -> tuple:
        P, S = chunk
        return (through(P, before[0]), through(P, before[1]) + S), before

    by_chunk = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (P, S))
    first = jax.tree.map(lambda v: v[0], by_chunk)
    whole, before = jax.lax.scan(then, (one_like(first[0]), zero_like(first[1])), by_chunk, reverse=sweep.reverse)
    P, S = jax.tree.map(lambda v: jnp.moveaxis(v, 0, 1), before)
    return through(P, jax.tree.map(lambda v: v[:, None], incoming(*whole))) + S


def pad(tokens: Tokens, length: int) -> Tokens:
    """Invalid tokens behind the last, up to `length`."""
    b, t = shape(tokens.x)[:2]
    valid = jnp.ones((b, t, 1), bool) if tokens.valid is None else tokens.valid
    pad = lambda v: v if v.ndim == 1 else jnp.pad(v, ((0, 0), (0, length - t), (0, 0)))
    return jax.tree.map(pad, tokens._replace(valid=valid))
