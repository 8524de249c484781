"""What stands below a mixer that reads lower layers, while it is examined."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from flax import nnx

from longwave.layers.mixer import Carry, Context, Mixer, Out


class OverACopy(Mixer):
    """A mixer above a copy of itself with parameters of its own, whose side outputs it reads: every promise then holds
    for what passes between layers too, gradients and carries included.

    Both are given the same x, so that only side outputs connect them. y is the upper one's.
    """

    def __init__(self, width: int, *, mixer: Callable[..., Mixer], rngs: nnx.Rngs):
        self.lower, self.upper = (mixer(width, rngs=rngs) for _ in range(2))
        self.supports, self.chunk = self.upper.supports, self.upper.chunk

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        return tuple(mixer.init_carry(batch, capacity=capacity) for mixer in (self.lower, self.upper))

    def __call__(self, x, carry: Carry | None = None, ctx: Context = Context()) -> Out:
        carry = (None, None) if carry is None else carry
        below = self.lower(x, carry[0], ctx)
        y, above, aux = self.upper(x, carry[1], dataclasses.replace(ctx, below=(below.aux,)))
        return Out(y, (below.carry, above), aux)
