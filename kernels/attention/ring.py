"""Attention with time split over devices: keys go round a ring, each device's own queries meet them in turn.

After each step the parts are merged by their log-sum-exps (Ring Attention, arXiv:2310.01889). A device never holds
more than its own share of keys and the one that it was just handed, and each part is exact, forward and backward.

Where early queries see less than late ones (a causal mask), a device trades its share of time for one early and
one late stretch: of 2 n stretches, device i takes stretch i and stretch 2 n - 1 - i, of queries and keys alike. Every
device then has the same work in every step (the zigzag of Llama 3, arXiv:2407.21783). Positions travel with the tokens,
so no form has to know.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from longwave.kernels.attention.flash import Forms, delta
from longwave.kernels.attention.mask import Mask
from longwave.kernels.attention.reference import Coordinates, Scores, merge
from longwave.kernels.partition import Names


class Ring(NamedTuple):
    """n devices along `axis`; in step s = start, ..., start + steps - 1 device i holds the keys of device i - s."""

    axis: Names
    n: int
    start: int
    steps: int
    zigzag: bool


def ring(axis: Names, n: int, mask: Mask, q_at: Coordinates, k_at: Coordinates, tq: int, tk: int) -> Ring:
    """The ring for tq queries and tk keys in all: no steps in which nobody sees anything, and balanced work."""
    if q_at.position is not None or k_at.position is not None:
        return Ring(axis, n, 0, n, zigzag=False)
    cq, ck = tq // n, tk // n
    seen = lambda i, j: bool(mask.live(i * cq, (i + 1) * cq - 1, j * ck, (j + 1) * ck - 1))
    if cq % 2 == ck % 2 == 0 and seen(n - 1, 0) != seen(0, n - 1):
        return Ring(axis, n, 0, n, zigzag=True)
    live = [s for s in range(n) if any(seen(i, (i - s) % n) for i in range(n))] or [0]
    steps, start = min((max((s - start) % n for s in live) + 1, start) for start in live)
    return Ring(axis, n, start, steps, zigzag=False)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attention(
    forms: Forms, scores: Scores, ring: Ring, q: Array, k: Array, v: Array, q_at: Coordinates, k_at: Coordinates
) -> tuple[Array, Array]:
    """(o, lse) of the local queries over the keys of all devices; inside `shard_map`, arrays are local shares."""
    q_at, k_at = _placed(ring, q_at, q.shape[1]), _placed(ring, k_at, k.shape[1])
    q, q_at = _trade(ring, (q, q_at))
    held = _pass_on(_trade(ring, (k, v, k_at)), ring, ring.start)

    def step(_: Array, state: tuple) -> tuple:
        (k, v, k_at), o, lse = state
        part = forms.run("forward", q, k, v, q_at, k_at, scores=scores)
        return (_pass_on((k, v, k_at), ring, 1), *merge((o, lse), part))

    blind = jnp.zeros((*q.shape[:3], v.shape[-1])), jnp.full(q.shape[:3], -jnp.inf)
    _, o, lse = lax.fori_loop(0, ring.steps, step, (held, *blind))
    return _trade_back(ring, (o.astype(v.dtype), lse))


def _forward(forms, scores, ring, q, k, v, q_at, k_at):
    o, lse = attention(forms, scores, ring, q, k, v, q_at, k_at)
    return (o, lse), (q, k, v, o, lse, q_at, k_at)


def _backward(forms, scores, ring, kept, grads):
    """Keys go round once more, and with them the gradients that they gather on the way."""
    q, k, v, o, lse, q_at, k_at = kept
    do, dlse = grads
    q_at, k_at = _placed(ring, q_at, q.shape[1]), _placed(ring, k_at, k.shape[1])
    q, q_at, lse, delta_, do = _trade(ring, (q, q_at, lse, delta(o, lse, do, dlse), do))
    held = _pass_on(_trade(ring, (k, v, k_at)), ring, ring.start)

    def step(_: Array, state: tuple) -> tuple:
        (k, v, k_at), dq, dk, dv = state
        parts = forms.run("backward", q, k, v, q_at, k_at, lse, delta_, do, scores=scores)
        dq, dk, dv = (total + part.astype(jnp.float32) for total, part in zip((dq, dk, dv), parts, strict=True))
        held, dk, dv = _pass_on(((k, v, k_at), dk, dv), ring, 1)
        return held, dq, dk, dv

    zeros = [jnp.zeros(x.shape) for x in (q, k, v)]
    _, dq, dk, dv = lax.fori_loop(0, ring.steps, step, (held, *zeros))
    dk, dv = _pass_on((dk, dv), ring, -(ring.start + ring.steps))
    (dq, dk, dv) = (_trade_back(ring, dx).astype(x.dtype) for dx, x in zip((dq, dk, dv), (q, k, v), strict=True))
    return dq, dk, dv, None, None


attention.defvjp(_forward, _backward)


def _placed(ring: Ring, at: Coordinates, t: int) -> Coordinates:
    """Positions as numbers: of the whole sequence, where they are 0, 1, 2, ..."""
    return at if at.position is not None else at._replace(position=lax.axis_index(ring.axis) * t + jnp.arange(t))


def _pass_on(tree: Any, ring: Ring, places: int) -> Any:
    """Everybody's arrays, some places further along the ring."""
    if places % ring.n == 0:
        return tree
    pairs = [(i, (i + places) % ring.n) for i in range(ring.n)]
    return jax.tree.map(lambda x: lax.ppermute(x, ring.axis, pairs), tree)


def _stretches(ring: Ring) -> Iterable[list[tuple[int, int]]]:
    """Where the first and the second half of every device's share go: stretch c to device min(c, 2 n - 1 - c)."""
    for half in (0, 1):
        yield [(i, min(c, 2 * ring.n - 1 - c)) for i in range(ring.n) for c in (2 * i + half,)]


def _trade(ring: Ring, tree: Any) -> Any:
    """Shares of time for an early and a late stretch each, in either order: positions tell."""
    if not ring.zigzag:
        return tree

    def trade(x: Array) -> Array:
        axis = min(1, x.ndim - 1)
        halves = zip(jnp.split(x, 2, axis), _stretches(ring), strict=True)
        return jnp.concatenate([lax.ppermute(half, ring.axis, pairs) for half, pairs in halves], axis)

    return jax.tree.map(trade, tree)


def _trade_back(ring: Ring, tree: Any) -> Any:
    if not ring.zigzag:
        return tree

    def back(x: Array) -> Array:
        halves = zip(jnp.split(x, 2, 1), _stretches(ring), strict=True)
        home = [lax.ppermute(half, ring.axis, [(j, i) for i, j in pairs]) for half, pairs in halves]
        return jnp.concatenate(home, 1)

    return jax.tree.map(back, tree)
