"""Which pairs of blocks a kernel visits: a mask and segments, compiled into lists that it walks through.

A visit is one block of queries and one of keys. Visits of the same outer block (queries forward, keys backward)
follow each other, the first and the last of them marked, so that a kernel starts and ends its sums there. Blocks
between which nothing is visible have no visit: they are neither fetched nor computed, nor do they cost a step.
Where positions are constants and there are no segments the list is a constant. Where they are data, it is made
as the program runs: its length is that of all that might be visible, its tail repeats the last visit, marked dead.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from longwave.kernels.attention.mask import BlockSparse, Mask, granularity, tables
from longwave.kernels.attention.reference import Coordinates

# Flags of a visit. FIRST, LAST: of its outer block. LIVE: some pair is visible. MASKED: some pair may be hidden. From
# TABLE up, a bit for each table of the mask: whether its cell is set.
FIRST, LAST, LIVE, MASKED, TABLE = (1 << bit for bit in range(5))
TABLES = 26  # that have bits in an int32
FAR = np.iinfo(np.int32).max // 2


List = Int[Array, "rows n"] | Int[np.ndarray, "rows n"]


class Visits(NamedTuple):
    """Rows of lists, one for each batch row, or one for all. NumPy where they are constants."""

    q: List
    k: List
    flags: List


class Split(NamedTuple):
    """How time is cut: t tokens into n blocks of c; the last may hold padding."""

    t: int
    c: int

    @property
    def n(self) -> int:
        return -(-self.t // self.c)


def visits(mask: Mask, q_at: Coordinates, k_at: Coordinates, q: Split, k: Split, *, by_keys: bool = False) -> Visits:
    """The visits, by blocks of queries, or (by_keys) of keys. Every outer block has at least one.

    Raises:
      ValueError: the mask has tables that blocks of these sizes cannot be looked up in: see `refusal`.
    """
    live, whole = pairs(mask, q_at, k_at, q, k)
    possible = mask.live(*_corners(_ranges(q_at.position, q), _ranges(k_at.position, k)))
    candidates = np.ones((q.n, k.n), bool) if isinstance(possible, jax.Array) else _full(possible, q, k)[0]
    outer, inner = np.nonzero(_with_one(candidates.T if by_keys else candidates))
    qi, ki = (inner, outer) if by_keys else (outer, inner)
    live, whole, bits = (x[..., qi, ki] for x in (live, whole, _table_bits(mask, q_at, k_at, q, k)))
    if not isinstance(live, jax.Array) and not isinstance(whole, jax.Array):
        return _listed(qi, ki, outer, live[0], whole[0], bits)
    rows = np.broadcast_shapes(live.shape, whole.shape)
    each = jax.vmap(lambda live, whole: _sorted(qi, ki, outer, live, whole, bits))
    return each(jnp.broadcast_to(live, rows), jnp.broadcast_to(whole, rows))


def pairs(
    mask: Mask, q_at: Coordinates, k_at: Coordinates, q: Split, k: Split
) -> tuple[Bool[Array, "rows nq nk"], Bool[Array, "rows nq nk"]]:
    """Of every pair of blocks, whether some query sees some key, and whether all see all; NumPy where constant.

    The answers may err as those of `Mask.live` and `Mask.whole` do. Rows: of the batch, or one for all.
    """
    corners = _corners(_ranges(q_at.position, q), _ranges(k_at.position, k))
    padded = (np.arange(k.n) + 1) * k.c > k.t
    live, whole = mask.live(*corners), mask.whole(*corners) & ~padded[None, None, :]
    if q_at.segment is not None and k_at.segment is not None:
        q_ids, k_ids = _ranges(q_at.segment, q, inside=True), _ranges(k_at.segment, k, inside=True)
        q_lo, q_hi, k_lo, k_hi = _corners(q_ids, k_ids)
        live = live & (q_lo <= k_hi) & (k_lo <= q_hi)
        # Padding is left out of the ranges, so a block that holds any is not whole.
        complete = _complete(q_at.segment, q)[..., :, None] & _complete(k_at.segment, k)[..., None, :]
        whole = whole & complete & (q_lo == q_hi) & (k_lo == k_hi) & (q_lo == k_lo)
    return _full(live, q, k), _full(whole, q, k)


def _full(x: Any, q: Split, k: Split) -> Any:
    rows = np.shape(x)[0] if np.ndim(x) else 1
    return (jnp if isinstance(x, jax.Array) else np).broadcast_to(x, (rows, q.n, k.n))


def refusal(mask: Mask, q_at: Coordinates, k_at: Coordinates, q: Split, k: Split) -> str | None:
    """Why the mask's tables cannot be looked up by blocks; None: they can, or there are none."""
    found, size = tables(mask), granularity(mask)
    if size is None:
        return None
    if len(found) > TABLES:
        return f"{len(found)} tables in one mask, at most {TABLES} are allowed"
    if q_at.position is not None or k_at.position is not None:
        return "a table (BlockSparse) with positions that are data"
    for of, blocks in (("queries", q), ("keys", k)):
        if size % blocks.c if blocks.n > 1 else blocks.t > size:
            return f"a table (BlockSparse) of {size} positions a cell, which blocks of {blocks.c} {of} do not divide"
    return None


def _table_bits(mask: Mask, q_at: Coordinates, k_at: Coordinates, q: Split, k: Split) -> Int[np.ndarray, "nq nk"]:
    if reason := refusal(mask, q_at, k_at, q, k):
        raise ValueError(f"attention: {reason}")
    corners = _corners(_ranges(None, q), _ranges(None, k))
    bits = np.zeros((q.n, k.n), np.int32)
    for i, table in enumerate(tables(mask)):
        bits |= np.where(np.asarray(table.live(*corners))[0], TABLE << i, 0).astype(np.int32)
    return bits


def _ranges(x: Any, blocks: Split, *, inside: bool = False) -> tuple[Any, Any]:
    """Least and greatest of each block, (rows, n); `inside`: of those that are not negative. Padding takes no part."""
    if x is None:
        lo = np.arange(blocks.n, dtype=np.int32)[None, :] * blocks.c
        return lo, np.minimum(lo + blocks.c, blocks.t) - 1
    x = _cut(x, blocks, mode="edge")
    seen = x >= 0 if inside else True
    return jnp.min(x, -1, where=seen, initial=FAR), jnp.max(x, -1, where=seen, initial=-FAR)


def _complete(segment: Array, blocks: Split) -> Bool[Array, "rows n"]:
    """Whether a block holds no padding, neither of the caller's nor ours."""
    return jnp.all(_cut(segment, blocks, constant_values=-1) >= 0, -1)


def _cut(x: Array, blocks: Split, **how: Any) -> Int[Array, "rows n c"]:
    x = jnp.atleast_2d(x)
    return jnp.pad(x, ((0, 0), (0, blocks.n * blocks.c - blocks.t)), **how).reshape(-1, blocks.n, blocks.c)


def _corners(q_range: tuple[Any, Any], k_range: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Of every pair of blocks: least and greatest of its queries, (rows, nq, 1), and of its keys, (rows, 1, nk)."""
    return (*(x[..., :, None] for x in q_range), *(x[..., None, :] for x in k_range))


def _with_one(candidates: np.ndarray) -> np.ndarray:
    """Every outer block has a candidate, so that its output is written."""
    candidates = candidates.copy()
    candidates[~candidates.any(1), 0] = True
    return candidates


def _listed(qi, ki, outer, live, whole, bits) -> Visits:
    change = outer[1:] != outer[:-1]
    first, last = np.concatenate([[True], change]), np.concatenate([change, [True]])
    flags = first * FIRST + last * LAST + live * LIVE + ~whole * MASKED + bits
    return Visits(*(np.asarray(x, np.int32)[None] for x in (qi, ki, flags)))


def _sorted(qi, ki, outer, live, whole, bits) -> Visits:
    """Live candidates first, and one dead one for each outer block that has none."""
    n = len(outer)
    alone = ~jnp.zeros(outer[-1] + 1, bool).at[outer].max(live)[outer]
    keep = live | (alone & np.concatenate([[True], outer[1:] != outer[:-1]]))
    count = jnp.sum(keep)
    at = jnp.argsort(~keep, stable=True)[jnp.minimum(jnp.arange(n), count - 1)]
    qi, ki, outer, bits = (jnp.asarray(x, jnp.int32)[at] for x in (qi, ki, outer, bits))
    change = outer[1:] != outer[:-1]
    first = jnp.concatenate([jnp.ones(1, bool), change])
    last = jnp.concatenate([change, jnp.ones(1, bool)]) | (jnp.arange(n) == count - 1)
    flags = first * FIRST + last * LAST + live[at] * LIVE + ~whole[at] * MASKED + bits
    return Visits(qi, ki, jnp.where(jnp.arange(n) < count, flags, 0).astype(jnp.int32))


@dataclasses.dataclass(frozen=True)
class _Cell(Mask):
    """What a table says of a tile: all of it or nothing. A number in a kernel's scalar memory, not 0 where all."""

    bit: Any

    def visible(self, q: Any, k: Any) -> Any:
        return jnp.full_like(k, self.bit) != 0  # compared as vectors: a scalar bool does not join vectors of bools


def tile_visible(
    mask: Mask,
    q_position: Int[Array, "..."],
    k_position: Int[Array, "..."],
    q_segment: Int[Array, "..."] | None,
    k_segment: Int[Array, "..."] | None,
    k_index: Int[Array, "..."],
    tk: int,
    flags: Int[Array, ""] | None = None,
) -> Bool[Array, "..."]:
    """What a masked visit shows, inside a kernel.

    Arguments broadcast to the tile, whichever way it is laid, and so does the answer: a column of queries and a row
    of keys cost least.

    k_index: where keys stand in memory; from tk on they are the kernel's own padding.
    flags:   of the visit. A mask with tables needs them: what a table says of the tile is a bit there.
    """
    if found := tables(mask):
        if flags is None:
            raise ValueError("tile_visible: a mask with tables (BlockSparse) needs the flags of the visit")
        cells = {table: _Cell(flags & (TABLE << i)) for i, table in enumerate(found)}
        mask = mask.map(lambda leaf: cells[leaf] if isinstance(leaf, BlockSparse) else leaf)
    see = (k_index < tk) & mask.visible(q_position, k_position)
    if q_segment is not None and k_segment is not None:
        see = see & (q_segment == k_segment) & (k_segment >= 0)
    return see
