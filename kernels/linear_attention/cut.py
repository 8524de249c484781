"""How arrays in time lie in rows of spans of chunks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from longwave.kernels.linear_attention.reference import SPAN, Inputs


class Way(NamedTuple):
    """chunk: tokens, a power of two; `erasing` is that of calls with an erase gate.

    in_turn: one row of the batch after the other, not all at once.
    """

    chunk: int
    erasing: int
    in_turn: bool


class Runs(NamedTuple):
    """Of every chunk of a row: whose state it goes on with, and whether it is the first and the last one to do so.

    A chunk of padding has the id s, of no state.
    """

    id: Int[Array, "*b n"]
    first: Bool[Array, "*b n"]
    last: Bool[Array, "*b n"]


@dataclasses.dataclass(frozen=True)
class Cut:
    """How arrays in time lie in rows of spans of chunks: (b, m, n, c, features), and back."""

    hq: int
    hk: int
    h: int
    K: int
    V: int
    t: int
    n: int
    way: Way
    gate: int  # dimensions of g: 0 (none), 3 or 4
    erases: bool

    @classmethod
    def of(cls, inputs: Inputs, way: Way) -> Cut:
        (_, t, hq, K), (hk, (h, V)) = inputs.q.shape, (inputs.k.shape[2], inputs.v.shape[2:])
        n = min(SPAN // way.chunk, -(-t // way.chunk))
        gate = 0 if inputs.g is None else inputs.g.ndim
        return cls(hq, hk, h, K, V, t, n, way, gate, inputs.beta is not None)

    @property
    def groups(self) -> int:
        return self.h if self.gate == 4 or self.erases else math.lcm(self.hq, self.hk)

    @property
    def heads(self) -> int:
        """Of a group. Without decay they are one."""
        return 1 if self.gate == 0 else self.h // self.groups

    def split(self, x: Array) -> Array:
        """(b, t, ...) -> (b, m, n, c, features). What is behind the last token is 0."""
        b, rest = x.shape[0], x.shape[2:]
        span = self.n * self.way.chunk
        m = -(-self.t // span)
        if m * span > self.t:
            x = jnp.pad(x, [(0, 0), (0, m * span - self.t)] + [(0, 0)] * len(rest))
        return x.reshape(b, m, self.n, self.way.chunk, *([math.prod(rest)] if rest else []))

    def in_time(self, x: Array, like: Array) -> Array:
        b = x.shape[0]
        return x.reshape(b, -1, *like.shape[2:])[:, : self.t].astype(like.dtype)

    def tokens(self, inputs: Inputs) -> Inputs:
        return jax.tree.map(self.split, inputs)

    def wide(self, S: Array) -> Array:
        """States (..., h, K, V) -> (..., G, K, r V)."""
        S = S.astype(jnp.float32).reshape(*S.shape[:-3], self.groups, -1, self.K, self.V)
        return jnp.swapaxes(S, -3, -2).reshape(*S.shape[:-3], self.K, -1)

    def tall(self, S: Array) -> Array:
        S = S.reshape(*S.shape[:-1], -1, self.V)
        return jnp.swapaxes(S, -3, -2).reshape(*S.shape[:-4], self.h, self.K, self.V)

    def runs(self, ids: Int[Array, "b t"], s: int) -> Runs:
        """(b, m, n) each."""
        ids = ids[:, :: self.way.chunk]
        ids = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % self.n)), constant_values=-1)
        ids = jnp.where(ids < 0, s, ids)
        new = jnp.diff(ids, axis=1) != 0
        end = jnp.ones_like(new[:, :1])
        runs = Runs(ids, jnp.concatenate((end, new), 1), jnp.concatenate((new, end), 1))
        return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, self.n), runs)

    def rows(self, f: Callable, *args: Any) -> Any:
        return lax.map(lambda row: f(*row), args) if self.way.in_turn else jax.vmap(f)(*args)

    # Of one span: (n, c, features) to groups first, and back.

    def grouped(self, x: Array, heads: int) -> Array:
        """q or k -> (n, G, c, K), and u or o, whose features are G groups' -> (n, G, c, r V)."""
        x = x.reshape(*x.shape[:2], heads, -1)
        return jnp.moveaxis(jnp.repeat(x, self.groups // heads, axis=2), 2, 1)

    def flat(self, x: Array, heads: int) -> Array:
        n, G, c, _ = x.shape
        x = jnp.moveaxis(x, 1, 2)
        x = x if heads == G else jnp.sum(x.reshape(n, c, heads, G // heads, -1), 3)
        return x.reshape(n, c, -1)

    def gates(self, g: Array) -> Array:
        """(n, c, h) -> (n, G, r, c)."""
        return jnp.swapaxes(g.astype(jnp.float32), 1, 2).reshape(g.shape[0], self.groups, -1, g.shape[1])

    def by_head(self, x: Array) -> Array:
        """(n, G, c, r V) -> (n, G, r, c, V)."""
        return jnp.swapaxes(x.reshape(*x.shape[:3], self.heads, -1), 2, 3)
