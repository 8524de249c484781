"""Long rows read in chunks: the mixers' carry is all that goes from one to the next.

A model trained on 256 tokens is asked at a million in the memory of a chunk and of the carry, which for a recurrent
mixer does not grow; that of attention holds the tokens, and does.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from longwave.kernels.partition import Axes
from longwave.layers.mixer import Context


def streamed_logits(
    model: Any, inputs: Int[Array, "b t"], position: Int[Array, "b q"], *, chunk: int, axes: Axes = Axes()
) -> Float[Array, "b q classes"]:
    """What `model`, a TokenClassifier, says at `position`, in evaluation, read in chunks: the same as at once.

    Every mixer must support "carry". One compiled body serves all chunks, and another one what is left at the end.
    """
    (batch, t), ctx = inputs.shape, Context(axes=axes)
    structure, parameters = nnx.split(model.backbone)

    def read(state: tuple, piece: tuple) -> tuple[tuple, None]:
        (carry, found), (start, ids) = state, piece
        backbone = nnx.merge(structure, parameters)  # made here, so that whatever it changes of itself stays here
        y, carry, *_ = backbone(ids, carry, ctx, False)
        at = position - start
        inside = (at >= 0) & (at < ids.shape[1])
        here = jnp.take_along_axis(y, jnp.clip(at, 0, ids.shape[1] - 1)[..., None], axis=1).astype(jnp.float32)
        return (carry, jnp.where(inside[..., None], here, found)), None

    whole = t // chunk
    pieces = inputs[:, : whole * chunk].reshape(batch, whole, chunk).swapaxes(0, 1)
    found = jnp.zeros((*position.shape, model.backbone.width), jnp.float32)
    state = (model.backbone.init_carry(batch, capacity=t), found)
    state, _ = jax.lax.scan(read, state, (jnp.arange(whole) * chunk, pieces))
    if t % chunk:
        state, _ = read(state, (whole * chunk, inputs[:, whole * chunk :]))
    return model.logits(state[1], axes)
