"""Moves the valid tokens of each row into a frame that starts at the row's carried remainder, and back.

A mixer with inner chunks of c tokens keeps the unfinished chunk of every row in its carry: r tokens, 0 <= r
< c, another r in each row. Placed at slots r, r + 1, ... of a frame, behind those r tokens, the new tokens
meet the chunk borders of a sequence seen whole, so that any split and any padding are exact. Both
directions are one gather (`_slide`), and the transpose of a slide is the slide back: no scatter, forward or
backward.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


def frame_length(t: int, chunk: int) -> int:
    """Slots that hold t new tokens behind at most chunk - 1 carried ones, in whole chunks."""
    return -(-(t + chunk - 1) // chunk) * chunk


def to_frame(
    x: Shaped[Array, "b t *d"], valid: Bool[Array, "b t"] | None, offset: Int[Array, "b"], length: int
) -> tuple[Shaped[Array, "b f *d"], Bool[Array, "b f"]]:
    """The valid tokens of each row at slots offset, offset + 1, ... of a frame of `length`; zero elsewhere.

    Returns the frame and which of its slots hold a token of x. `length` must have room: at least offset + t
    (`frame_length`). x may be of any dtype, e.g. the reset flags.
    """
    start, count = _span(valid, x.shape[:2])
    return _slide(x, start, offset, count, length), _within(offset, count, length)


def from_frame(
    frame: Shaped[Array, "b f *d"], valid: Bool[Array, "b t"] | None, offset: Int[Array, "b"], t: int
) -> Shaped[Array, "b t *d"]:
    """The inverse of `to_frame`: slots from offset on back to the valid positions, zero elsewhere."""
    start, count = _span(valid, (frame.shape[0], t))
    return _slide(frame, offset, start, count, t)


def _span(valid: Array | None, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """First valid position and number of valid positions of each row (they are contiguous)."""
    if valid is None:
        return jnp.zeros(shape[0], jnp.int32), jnp.full(shape[0], shape[1], jnp.int32)
    return jnp.argmax(valid, axis=1).astype(jnp.int32), jnp.sum(valid, axis=1, dtype=jnp.int32)


def _within(start: Array, count: Array, length: int) -> Array:
    slot = jnp.arange(length)[None, :]
    return (slot >= start[:, None]) & (slot < (start + count)[:, None])


def _gather(x: Array, source: Array, target: Array, count: Array, length: int) -> Array:
    """out[b, target_b + j] = x[b, source_b + j] for j < count_b, zero elsewhere; out has `length` slots."""
    index = jnp.arange(length)[None, :] + (source - target)[:, None]
    widen = (..., *(None,) * (x.ndim - 2))
    moved = jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[1] - 1)[widen], axis=1)
    return jnp.where(_within(target, count, length)[widen], moved, jnp.zeros((), x.dtype))


def _slide(x: Array, source: Array, target: Array, count: Array, length: int) -> Array:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return _gather(x, source, target, count, length)
    return _linear_slide((x.shape[1], length), x, source, target, count)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_slide(lengths: tuple[int, int], x: Array, source: Array, target: Array, count: Array) -> Array:
    return _gather(x, source, target, count, lengths[1])


_linear_slide.defvjp(
    lambda lengths, x, *spans: (_gather(x, *spans, lengths[1]), spans),
    lambda lengths, spans, g: (_gather(g, spans[1], spans[0], spans[2], lengths[0]), None, None, None),
)
