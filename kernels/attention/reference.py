"""Softmax attention straight from its equations, all scores in memory; and what every form shares.

    s_qk = cap(scale <q, k>) where q sees k, else -inf      cap(s) = softcap tanh(s / softcap)
    lse_q = log sum_k exp s_qk      o_q = sum_k exp(s_qk - lse_q) v_k

Softmax and sums are float32. A query that sees nothing has o = 0, lse = -inf and zero gradients.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from longwave.kernels.attention.mask import Mask


@dataclasses.dataclass(frozen=True)
class Scores:
    """What becomes of <q, k>: scaled, capped (None: not), and hidden where the mask does not show it."""

    mask: Mask
    scale: float
    softcap: float | None = None

    def cap(self, s: Float[Array, "..."]) -> Float[Array, "..."]:
        return s if self.softcap is None else self.softcap * jnp.tanh(s / self.softcap)


class Coordinates(NamedTuple):
    """Where tokens stand: position for the mask, and segment (None: all in one; negative: padding).

    A position of None is 0, 1, 2, ...: a constant, so that a kernel's list of live blocks is one too.
    """

    position: Int[Array, "*rows t"] | None = None
    segment: Int[Array, "*rows t"] | None = None

    def placed(self, t: int) -> Coordinates:
        """These, with positions as numbers."""
        return self._replace(position=jnp.arange(t)) if self.position is None else self


def visible(mask: Mask, q_at: Coordinates, k_at: Coordinates) -> Bool[Array, "*rows tq tk"] | bool:
    """Which query sees which key: by the mask, within a segment, and never a padded key."""
    pairs = mask.visible(q_at.position[..., :, None], k_at.position[..., None, :])
    if k_at.segment is None:
        return pairs
    query, key = q_at.segment[..., :, None], k_at.segment[..., None, :]
    return pairs & (query == key) & (key >= 0)


def einsum32(equation: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """einsum in the lower precision of its two operands, accumulated in float32.

    On a CPU the operands are widened instead: products of bfloat16 are exact in float32, and XLA's CPU
    backend refuses some batched bfloat16 products with a float32 result.
    """

    def wide(a, b):
        return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32))

    def native(a, b):
        return jnp.einsum(equation, a.astype(low), b.astype(low), preferred_element_type=jnp.float32)

    low = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return wide(a, b) if low.itemsize >= 4 else lax.platform_dependent(a, b, cpu=wide, default=native)


def attention(
    q: Float[Array, "b tq h d"],
    k: Float[Array, "b tk kv d"],
    v: Float[Array, "b tk kv dv"],
    q_at: Coordinates,
    k_at: Coordinates,
    scores: Scores,
) -> tuple[Float[Array, "b tq h dv"], Float[Array, "b tq h"]]:
    """Output in v's dtype and float32 log-sum-exp. Memory O(tq tk). Coordinates are (t,) or (b, t)."""
    b, tq, h, d = q.shape
    tk, kv = k.shape[1:3]
    s = scores.cap(scores.scale * einsum32("bqngd,bknd->bngqk", q.reshape(b, tq, kv, h // kv, d), k))
    at = jax.tree.map(jnp.atleast_2d, (q_at.placed(tq), k_at.placed(tk)))  # either may be the same for all rows
    see = visible(scores.mask, *at)
    see = jnp.broadcast_to(see, (b, tq, tk))[:, None, None]
    s = jnp.where(see, s, -jnp.inf)
    m = lax.stop_gradient(jnp.max(s, -1, keepdims=True))
    m = jnp.where(m == -jnp.inf, 0.0, m)
    p = jnp.exp(s - m)
    l = jnp.sum(p, -1, keepdims=True)
    blind = l == 0
    l = jnp.where(blind, 1.0, l)
    lse = jnp.where(blind, -jnp.inf, m + jnp.log(l))
    o = einsum32("bngqk,bknd->bngqd", p / l, v)
    in_time = lambda x: jnp.moveaxis(x, 3, 1).reshape(b, tq, h, -1)
    return in_time(o).astype(v.dtype), in_time(lse)[..., 0]


def merge(*parts: tuple[Float[Array, "b t h dv"], Float[Array, "b t h"]]) -> tuple[Array, Array]:
    """Attention over the union of disjoint sets of keys, from (output, log-sum-exp) over each of them."""
    o, lse = zip(*parts, strict=True)
    lse = jnp.stack(lse)
    m = lax.stop_gradient(jnp.max(lse, 0))
    m = jnp.where(m == -jnp.inf, 0.0, m)
    w = jnp.exp(lse - m[None])
    l = jnp.sum(w, 0)
    blind = l == 0
    l = jnp.where(blind, 1.0, l)
    mean = sum(x * y[..., None] for x, y in zip(o, w / l[None], strict=True))
    return mean.astype(o[0].dtype), jnp.where(blind, -jnp.inf, m + jnp.log(l))
