"""How the TPU kernels lay arrays out: heads side by side in lanes, as projections make them, and time in sublanes.

No head is moved in memory: (b, t, h, d) is read as (b, t, h d), and a grid step takes one block of lanes. A head
dimension is padded to 128 or 256 lanes; below 128, `fold` heads share a block of 128. What is one number a token
(log-sum-exp, positions) lies along lanes: (b, h, 1, t), (rows, 1, t).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longwave.kernels.attention.reference import Coordinates

Shaped = Any  # an array, or the shape and dtype of one
LANES = 128
SMALL = (8, 16, 32, 64)  # head dimensions below LANES


@dataclasses.dataclass(frozen=True)
class Layout:
    """Heads in lanes. h, kv: heads of queries and keys as they come; d, dv: their dimensions.

    fold:         query heads in a block of lanes.
    wide, wide_v: lanes of one head of q and k, and of v and o.
    """

    h: int
    kv: int
    d: int
    dv: int
    fold: int
    wide: int
    wide_v: int

    @classmethod
    def of(cls, q: Shaped, k: Shaped, v: Shaped) -> Layout:
        """For q (b, tq, h, d), k (b, tk, kv, d) and v (b, tk, kv, dv)."""
        h, d, kv, dv = *q.shape[2:], *v.shape[2:]
        wide = next((w for w in SMALL if max(d, dv) <= w), LANES)
        while wide < LANES < h * wide and h % (LANES // wide):
            wide *= 2  # no heads left over in the last block
        if wide == LANES:
            return cls(h, kv, d, dv, 1, -(-d // LANES) * LANES, -(-dv // LANES) * LANES)
        return cls(h, kv, d, dv, min(h, LANES // wide), wide, wide)

    @property
    def blocks(self) -> int:
        """Blocks of lanes that queries lie in: the grid axis of heads."""
        return self.h // self.fold

    @property
    def group(self) -> int:
        """Blocks of query lanes that read the same block of key lanes. Folded heads have keys of their own."""
        return self.h // self.kv if self.fold == 1 else 1

    @property
    def lanes(self) -> int:
        """Lanes of a block of q and k."""
        return max(LANES, self.wide)

    @property
    def lanes_v(self) -> int:
        """Lanes of a block of v and o."""
        return max(LANES, self.wide_v)

    def queries(self, x: Float[Array, "b t h w"], t: int) -> Float[Array, "b t lanes"]:
        """q, do or o as a kernel reads it, t tokens long."""
        return self._in_lanes(x, t, self.wide if x.shape[-1] == self.d else self.wide_v)

    def keys(self, x: Float[Array, "b t kv w"], t: int) -> Float[Array, "b t lanes"]:
        """k or v as a kernel reads it."""
        if self.fold > 1:
            x = jnp.repeat(x, self.h // self.kv, axis=2)
        return self.queries(x, t)

    def _in_lanes(self, x: Array, t: int, wide: int) -> Array:
        x = jnp.pad(x, [(0, 0), (0, t - x.shape[1]), (0, 0), (0, wide - x.shape[3])])
        x = x.reshape(*x.shape[:2], -1)
        return jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % LANES)])

    def of_queries(self, x: Float[Array, "b t lanes"], t: int, w: int) -> Float[Array, "b t h w"]:
        """What a kernel wrote for query heads, in time again; w: self.d or self.dv."""
        wide = self.wide if w == self.d else self.wide_v
        return x[:, :t, : self.h * wide].reshape(x.shape[0], t, self.h, wide)[..., :w]

    def of_keys(self, x: Float[Array, "b t lanes"], t: int, w: int) -> Float[Array, "b t kv w"]:
        """Likewise for key heads: gradients of keys that were repeated are summed, in float32."""
        if self.fold == 1:
            wide = self.wide if w == self.d else self.wide_v
            return x[:, :t, : self.kv * wide].reshape(x.shape[0], t, self.kv, wide)[..., :w]
        x = self.of_queries(x, t, w).reshape(x.shape[0], t, self.kv, -1, w)
        return jnp.sum(x.astype(jnp.float32), 3).astype(x.dtype)


def rows(x: Float[Array, "b t h"], t: int, fill: float = 0.0) -> Float[Array, "b h 1 t"]:
    """One number a query and head, along lanes."""
    x = jnp.moveaxis(x, 2, 1)[:, :, None]
    return jnp.pad(x, [(0, 0)] * 3 + [(0, t - x.shape[3])], constant_values=fill)


def of_rows(x: Float[Array, "b h 1 t"], t: int) -> Float[Array, "b t h"]:
    return jnp.moveaxis(x[:, :, 0, :t], 1, 2)


def places(at: Coordinates, t: int) -> list[Int[Array, "rows 1 t"]]:
    """Positions and segments that are data, in this order, along lanes; padding stands where the last token does."""
    given = [jnp.asarray(x, jnp.int32) for x in at if x is not None]
    given = [jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, t - x.shape[-1])], mode="edge") for x in given]
    return [jnp.broadcast_to(x, (x.size // t, t))[:, None] for x in given]
