"""Both directions from any causal mixer: y = forward(x) + mirror(backward(mirror(x))).

The mirror turns each document around within its own length, so packed documents and padding on either side
stay where they are, and so do resets and validity: both directions are called with the same context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from longwave.layers.mixer import Carry, Context, Mixer, Out, Unsupported

SIDES = ("forward", "backward")


def mirror_index(ctx: Context, batch: int, t: int) -> Int[Array, "b t"]:
    """For each token, the one at the same distance from the other end of its document (or run of padding)."""
    false = jnp.zeros((batch, t), bool)
    valid = ~false if ctx.valid is None else ctx.valid
    first = false if ctx.reset is None else ctx.reset & valid
    first = first | jnp.pad(valid[:, 1:] != valid[:, :-1], ((0, 0), (1, 0)))
    index = jnp.arange(t)[None, :]
    start = lax.cummax(jnp.where(first, index, 0), axis=1)
    last = jnp.pad(first[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    end = lax.cummin(jnp.where(last, index, t - 1), axis=1, reverse=True)
    return start + end - index


@jax.custom_vjp
def mirror(x: Float[Array, "b t d"], index: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """x[:, index]. The index is its own inverse, so the gradient is the same gather, not a scatter."""
    return jnp.take_along_axis(x, index[..., None], axis=1)


mirror.defvjp(lambda x, index: (mirror(x, index), index), lambda index, g: (mirror(g, index), None))


class Bidirectional(Mixer):
    """Sum of a causal mixer over the sequence and one over its mirror image.

    mixer: constructor of the causal mixer, called as mixer(width, rngs=rngs).
    tied:  one set of parameters for both directions, instead of two.

    Side outputs of the two directions stand side by side, "forward" and "backward"; where the mixer reads lower layers,
    a direction reads its own of theirs, mirrored as it is itself.
    There is no carry: the backward direction starts at the end.
    """

    supports = frozenset({"reset"})

    def __init__(self, width: int, *, mixer: Callable[..., Mixer], tied: bool = False, rngs: nnx.Rngs):
        self.forward = mixer(width, rngs=rngs)
        inner = type(self.forward).__name__
        if "causal" not in self.forward.supports:
            raise ValueError(f"Bidirectional.mixer = {inner} must be causal: it sees both directions by itself")
        self.chunk = self.forward.chunk
        self.reads_below = self.forward.reads_below
        self.supports = self.supports & self.forward.supports
        self.tied = tied
        if not tied:
            self.backward = mixer(width, rngs=rngs)

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        raise Unsupported(self, "carry", "the backward direction starts at the end of the sequence")

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        if carry is not None:
            raise Unsupported(self, "carry", "the backward direction starts at the end of the sequence")
        if ctx.reset is None and ctx.valid is None:
            flip = lambda x: jnp.flip(x, axis=1)
        else:
            index = mirror_index(ctx, *x.shape[:2])
            flip = lambda x: mirror(x, index)
        keys = (None, None) if ctx.key is None else jax.random.split(ctx.key)
        below = lambda side: tuple(aux.get(side, {}) for aux in ctx.below)
        there, back = (
            dataclasses.replace(ctx, key=key, below=below(side)) for key, side in zip(keys, SIDES, strict=True)
        )
        forward = self.forward(x, None, there)
        backward = (self.forward if self.tied else self.backward)(flip(x), None, back)
        aux = dict(zip(SIDES, (forward.aux, backward.aux), strict=True))
        return Out(forward.y + flip(backward.y), (), aux)
