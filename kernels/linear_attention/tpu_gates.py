"""What the two kernels share: gates as rows, decays between tokens, and the triangle of a chunk.

Matrices of a chunk stand as (j, i), the token that wrote in sublanes and the token that reads in lanes, and only
j <= i is computed: `Part`s, one for each 128 readers, reach from the chunk's first token to the last of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from longwave.kernels.linear_attention.tpu_layout import LANES, Plan

NN, NT, TN = ((((i,), (j,)), ((), ())) for i, j in ((1, 0), (1, 1), (0, 0)))  # a b, a b', a' b
Matrix = Float[Array, "j i"]
Row = Float[Array, "1 i"]


def dot(a: Array, b: Array, dimensions: Any) -> Float[Array, "m n"]:
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


class Part(NamedTuple):
    """`size` readers of a chunk from `start` on, and the writers from the first to the last of them."""

    start: int
    size: int

    @property
    def readers(self) -> slice:
        return slice(self.start, self.start + self.size)

    @property
    def writers(self) -> slice:
        return slice(0, self.start + self.size)


def parts(plan: Plan) -> list[Part]:
    return [Part(start, LANES) for start in range(0, plan.chunk, LANES)]  # one or two


class Gates(NamedTuple):
    """Of one head over a chunk; None is 1.

    decay: sums of log2 decays.    write, erase: as given.
    read, keep: what the state before the chunk counts for a reader (with the scale), and a writer for the state behind.
    carry: what the one state counts for the other.    enter: as read, without the scale.
    up, down: from a writer of the first part to that part's end, and from there to a reader of the second.
    """

    decay: Row | None
    write: Row | None
    erase: Row | None
    read: Row | float | None
    keep: Row | None
    carry: Any  # (1, 1), or None
    enter: Row | None
    up: Row | None
    down: Row | None


def gates(plan: Plan, rows: Any, starts: Row | None, head: Any, at: Any) -> Gates:
    """rows: the block of `Plan.rows`, or None.    starts: the chunk's part of `Plan.starts`.    at: the chunk."""
    decay = rows[0, head, 0:1, at] if plan.decay else None
    write = rows[0, head, int(plan.decay) : plan.decay + 1, at] if plan.write else None
    erase = rows[0, head, plan.gates - 1 : plan.gates, at] if plan.erase else None
    enter = keep = carry = up = down = None
    if decay is not None:
        last = decay[:, plan.chunk - 1 :]
        enter = jnp.exp2(decay)
        keep, carry = jnp.exp2(last - decay), jnp.exp2(last)
        middle = decay[:, LANES - 1 : LANES]
        up, down = jnp.exp2(middle - decay[:, :LANES]), jnp.exp2(decay[:, LANES:] - middle)
    if starts is not None:
        last_start = starts[:, plan.chunk - 1 :]
        in_last = (lax.broadcasted_iota(jnp.int32, starts.shape, 1) >= last_start).astype(jnp.float32)
        enter = jnp.where(starts < 0, 1.0 if enter is None else enter, 0.0)
        keep = in_last if keep is None else keep * in_last
        carry = (last_start < 0).astype(jnp.float32) * (1.0 if carry is None else carry)
    read = enter if plan.scale == 1 else plan.scale * (1.0 if enter is None else enter)
    return Gates(decay, write, erase, read, keep, carry, enter, up, down)


def times(x: Array, gate: Any) -> Array:
    return x if gate is None else x.astype(jnp.float32) * gate


def scores(plan: Plan, part: Part, q: Array, k: Array, starts: Row | None) -> Matrix:
    """scale q_i k_j where i sees j."""
    s = dot(k[part.writers], q[part.readers], NT)
    return visible(s if plan.scale == 1 else s * plan.scale, part, starts)


def visible(x: Matrix, part: Part, starts: Row | None, *, strictly: bool = False) -> Matrix:
    """x, and 0 where j is behind i (strictly: or is i) or of another document."""
    j = lax.broadcasted_iota(jnp.int32, x.shape, 0) + strictly
    seen = j <= lax.broadcasted_iota(jnp.int32, x.shape, 1) + part.start
    if starts is not None:
        seen &= j - strictly >= starts[:, part.readers]
    return jnp.where(seen, x, 0)


def decays(plan: Plan, found: Gates) -> Iterator[Matrix | None]:
    """Of the readers of each part and the writers of the same part, what is left at i of what j wrote.

    Above the triangle at most 1.
    """
    if found.decay is None:
        yield from (None for _ in parts(plan))
        return
    # As a square it is turned at once, and stands in all lanes: cheaper than to turn it and spread it.
    column = jnp.broadcast_to(found.decay, (LANES, plan.chunk)).T
    for part in parts(plan):
        yield jnp.exp2(jnp.minimum(found.decay[:, part.readers] - column[part.readers], 0))


def own(plan: Plan, head: int) -> slice:
    """The rows of a head in its slab."""
    return slice(head * plan.wide_v, (head + 1) * plan.wide_v)


def across(
    plan: Plan, written: list[Array], matrices: list[Matrix], by_head: list[Gates], dtype: Any
) -> Float[Array, "lanes i"] | None:
    """What readers of the second part read of the first one, but for `down`; all heads of a slab at once.

    Their decay is a product of two that are at most 1, so that no matrix is formed of it.
    """
    if plan.chunk == LANES:
        return None
    first = stack([times(w[:, :LANES], found.up).astype(dtype) for w, found in zip(written, by_head, strict=True)])
    return dot(first, matrices[1][:LANES].astype(dtype), NN)


def stack(heads: list[Array]) -> Array:
    """The heads of a slab, below one another."""
    return heads[0] if len(heads) == 1 else jnp.concatenate(heads)
