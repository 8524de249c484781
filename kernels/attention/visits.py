"""Which pairs of blocks a kernel visits: a mask and segments, compiled into lists that it walks through.

A visit is one block of queries and one of keys. Visits of the same outer block (queries forward, keys backward)
follow each other, the first and the last of them marked, so that a kernel starts and ends its sums there. Blocks
between which nothing is visible have no visit: they are neither fetched nor computed, nor do they cost a step.
Where positions are constants and there are no segments the list is a constant. Where they are data, it is made
as the program runs: its length is that of all that might be visible, its tail repeats the last visit, marked dead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from longwave.kernels.attention.mask import Mask
from longwave.kernels.attention.reference import Coordinates

# Flags of a visit. FIRST, LAST: of its outer block. LIVE: some pair is visible. MASKED: some pair may be hidden.
FIRST, LAST, LIVE, MASKED = 1, 2, 4, 8
FAR = np.iinfo(np.int32).max // 2


class Visits(NamedTuple):
    """Rows of lists, one for each batch row, or one for all. NumPy where they are constants."""

    q: Int[Array, "rows n"]
    k: Int[Array, "rows n"]
    flags: Int[Array, "rows n"]


class Split(NamedTuple):
    """How time is cut: t tokens into n blocks of c; the last may hold padding."""

    t: int
    c: int

    @property
    def n(self) -> int:
        return -(-self.t // self.c)


def visits(mask: Mask, q_at: Coordinates, k_at: Coordinates, q: Split, k: Split, *, by_keys: bool = False) -> Visits:
    """The visits, by blocks of queries, or (by_keys) of keys. Every outer block has at least one."""
    q_range, k_range = _ranges(q_at.position, q), _ranges(k_at.position, k)
    constant = q_at.position is None and k_at.position is None
    corners = _corners(q_range, k_range)
    shape = (q.n, k.n)
    live, whole = mask.live(*corners), mask.whole(*corners)
    padded = np.arange(k.n) == k.n - 1 if k.n * k.c > k.t else np.zeros(k.n, bool)
    whole = whole & ~padded[None, :]
    candidates = np.broadcast_to(np.asarray(live), shape) if constant else np.ones(shape, bool)
    if k_at.segment is not None:
        q_segments, k_segments = _ranges(q_at.segment, q, inside=True), _ranges(k_at.segment, k, inside=True)
        q_lo, q_hi, k_lo, k_hi = _corners(q_segments, k_segments)
        live = live & (q_lo <= k_hi) & (k_lo <= q_hi)
        # Padding is left out of the ranges, so a block that holds any is not whole.
        complete = _complete(q_at.segment, q)[..., :, None] & _complete(k_at.segment, k)[..., None, :]
        whole = whole & complete & (q_lo == q_hi) & (k_lo == k_hi) & (q_lo == k_lo)
    outer, inner = np.nonzero(_with_one(candidates.T if by_keys else candidates))
    qi, ki = (inner, outer) if by_keys else (outer, inner)
    pick = lambda x: jnp.broadcast_to(x, (*x.shape[:-2], *shape))[..., qi, ki]
    if constant and k_at.segment is None:
        pick = lambda x: np.broadcast_to(x, shape)[qi, ki]
        return _listed(qi, ki, outer, pick(live), pick(whole))
    live, whole = pick(jnp.asarray(live)), pick(jnp.asarray(whole))
    rows = max((x.shape[0] for x in (live, whole) if x.ndim == 2), default=1)
    to_rows = lambda x: jnp.broadcast_to(x, (rows, len(qi)))
    return jax.vmap(lambda live, whole: _sorted(qi, ki, outer, live, whole))(to_rows(live), to_rows(whole))


def _ranges(x: Any, blocks: Split, *, inside: bool = False) -> tuple[Any, Any]:
    """Least and greatest of each block; `inside`: of those that are not negative. Padding takes no part."""
    if x is None:
        lo = np.arange(blocks.n) * blocks.c
        return lo, np.minimum(lo + blocks.c, blocks.t) - 1
    x = jnp.asarray(x)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks.n * blocks.c - blocks.t)], mode="edge")
    x = x.reshape(*x.shape[:-1], blocks.n, blocks.c)
    seen = x >= 0 if inside else True
    return jnp.min(x, -1, where=seen, initial=FAR), jnp.max(x, -1, where=seen, initial=-FAR)


def _corners(q_range: tuple[Any, Any], k_range: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Of every pair of blocks: least and greatest of its queries, (..., nq, 1), and of its keys, (..., 1, nk)."""
    return (*(x[..., :, None] for x in q_range), *(x[..., None, :] for x in k_range))


def _complete(segment: Array, blocks: Split) -> Bool[Array, "*rows n"]:
    """Whether a block holds no padding, neither of the caller's nor ours."""
    pad = [(0, 0)] * (segment.ndim - 1) + [(0, blocks.n * blocks.c - blocks.t)]
    x = jnp.pad(jnp.asarray(segment), pad, constant_values=-1)
    return jnp.all(x.reshape(*x.shape[:-1], blocks.n, blocks.c) >= 0, -1)


def _with_one(candidates: np.ndarray) -> np.ndarray:
    """Every outer block has a candidate, so that its output is written."""
    candidates = candidates.copy()
    candidates[~candidates.any(1), 0] = True
    return candidates


def _listed(qi: np.ndarray, ki: np.ndarray, outer: np.ndarray, live: np.ndarray, whole: np.ndarray) -> Visits:
    change = np.flatnonzero(np.diff(outer)) + 1
    flags = live * LIVE + (~whole) * MASKED
    flags[np.concatenate([[0], change])] |= FIRST
    flags[np.concatenate([change - 1, [len(outer) - 1]])] |= LAST
    return Visits(*(np.asarray(x, np.int32)[None] for x in (qi, ki, flags)))


def _sorted(qi: np.ndarray, ki: np.ndarray, outer: np.ndarray, live: Array, whole: Array) -> Visits:
    """Live candidates first, and one dead one for each outer block that has none."""
    n, last = len(outer), int(outer[-1])
    any_live = jnp.zeros(last + 1, bool).at[outer].max(live)
    first_of_outer = np.concatenate([[True], np.diff(outer) > 0])
    keep = live | (first_of_outer & ~any_live[outer])
    count = jnp.sum(keep)
    order = jnp.argsort(~keep, stable=True)
    at = order[jnp.minimum(jnp.arange(n), count - 1)]
    counted, outer = jnp.arange(n) < count, jnp.asarray(outer)[at]
    differs = outer[1:] != outer[:-1]
    first = jnp.concatenate([jnp.ones(1, bool), differs])
    end = jnp.concatenate([differs, jnp.ones(1, bool)]) | (jnp.arange(n) == count - 1)
    flags = live[at] * LIVE + (~whole[at]) * MASKED + first * FIRST + end * LAST
    return Visits(*(jnp.asarray(x)[at].astype(jnp.int32) for x in (qi, ki)), jnp.where(counted, flags, 0))


def tile_visible(
    mask: Mask,
    q_position: Int[Array, "..."],
    k_position: Int[Array, "..."],
    q_segment: Int[Array, "..."] | None,
    k_segment: Int[Array, "..."] | None,
    k_index: Int[Array, "..."],
    tk: int,
) -> Bool[Array, "..."]:
    """What a masked visit shows, inside a kernel: arguments broadcast to the tile, whichever way it is laid.

    k_index: where keys stand in memory; from tk on they are the kernel's own padding.
    """
    see = (k_index < tk) & mask.visible(q_position, k_position)
    if q_segment is not None and k_segment is not None:
        see = see & (q_segment == k_segment) & (k_segment >= 0)
    return see
