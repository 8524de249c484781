"""Softmax attention: `attention` picks the form for shapes and platform, `merge` joins disjoint sets of keys."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longwave.kernels.attention import ring
from longwave.kernels.attention.forms import FEW_QUERIES, Backend, choose
from longwave.kernels.attention.mask import (
    Blocks,
    BlockSparse,
    Butterfly,
    Causal,
    ChunkSummary,
    Global,
    Mask,
    Prefix,
    Sinks,
    Window,
)
from longwave.kernels.attention.reference import Coordinates, Scores, merge
from longwave.kernels.partition import Axes, parts, sharded

__all__ = [
    "BlockSparse",
    "Blocks",
    "Butterfly",
    "Causal",
    "ChunkSummary",
    "Global",
    "Mask",
    "Prefix",
    "Sinks",
    "Window",
    "attention",
    "merge",
]

Ids = Int[Array, "*b t"] | tuple[Int[Array, "*b tq"] | None, Int[Array, "*b tk"] | None] | None


def attention(
    q: Float[Array, "b tq h d"],
    k: Float[Array, "b tk kv d"],
    v: Float[Array, "b tk kv dv"],
    *,
    mask: Mask = Mask(),
    positions: Ids = None,
    segment_ids: Ids = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
    axes: Axes = Axes(),
) -> Float[Array, "b tq h dv"] | tuple[Float[Array, "b tq h dv"], Float[Array, "b tq h"]]:
    """softmax(scale q k' where visible) v, of any lengths, in O(tq + tk) memory, with gradients.

    q, k, v:      kv heads divide h: query head i reads key head i // (h / kv).
    mask:         by position: `Mask()` sees all, `Causal() & (Window(w) | Sinks(n))` and so on.
    positions:    (t,) or (b, t), in any order, of queries and keys alike, or a pair (of queries, of keys); None:
                  0, 1, 2, ... in both.
    segment_ids:  likewise; a query sees keys of its own segment alone, and a key of a negative segment is seen by
                  none (padding, empty cache). None within a pair is all 0.
    scale:        of the scores; None: d ** -0.5.
    softcap:      c: the scaled scores s become c tanh(s / c); None: they stay.
    return_lse:   also the log-sum-exp of each query's scores, float32.
    backend:      "auto": by shape and by the platform that is compiled for. Or the form's name.
    axes:         mesh axes that split batch, heads and time; keys then go round a ring.

    The output has v's dtype; softmax and sums are float32. A query that sees nothing gives 0 (lse -inf).
    """
    _check(q, k, v, softcap)
    q_at, k_at = _coordinates(q, k, positions, segment_ids)
    scores = Scores(mask, q.shape[-1] ** -0.5 if scale is None else scale, softcap)
    if 0 in (*q.shape, *k.shape, *v.shape):
        o, lse = jnp.zeros((*q.shape[:3], v.shape[-1]), v.dtype), jnp.full(q.shape[:3], -jnp.inf)
        return (o, lse) if return_lse else o
    axes = _axes(axes, q, k)
    around = None
    if axes.seq:
        around = ring.ring(axes.seq, parts(axes.seq), mask, q_at, k_at, q.shape[1], k.shape[1])
    form = choose(backend, q, k, v, q_at, k_at, scores, return_lse=return_lse, around=around, axes=axes)
    k, v = _key_heads_by_part(q, k, v, axes)
    dims = ("bth.", "bth.", "bth.", *jax.tree.map(lambda x: "bt"[2 - x.ndim :], (q_at, k_at)))
    o, lse = sharded(form, axes, dims, ("bth.", "bth"))(q, k, v, q_at, k_at)
    return (o, lse) if return_lse else o


def _coordinates(q: Array, k: Array, positions: Ids, segment_ids: Ids) -> tuple[Coordinates, Coordinates]:
    pair = lambda ids: ids if isinstance(ids, tuple) else (ids, ids)
    q_segments, k_segments = pair(segment_ids)
    if q_segments is None and k_segments is not None:
        q_segments = jnp.zeros(q.shape[1], jnp.int32)
    if k_segments is None and q_segments is not None:
        k_segments = jnp.zeros(k.shape[1], jnp.int32)
    q_positions, k_positions = pair(positions)
    q_at, k_at = Coordinates(q_positions, q_segments), Coordinates(k_positions, k_segments)
    for side, at, x in (("queries", q_at, q), ("keys", k_at, k)):
        for field, ids in at._asdict().items():
            if ids is not None and ids.shape not in (x.shape[1:2], x.shape[:2]):
                allowed = f"{x.shape[1:2]} or {x.shape[:2]}"
                raise ValueError(f"attention: {field}s of the {side} have shape {ids.shape}; it must be {allowed}")
    return q_at, k_at


def _axes(axes: Axes, q: Array, k: Array) -> Axes:
    """Without axes of heads that do not divide them, and those of time for a few queries: these stay whole."""
    n = parts(axes.seq)
    if q.shape[1] <= FEW_QUERIES or n == 1:
        axes = dataclasses.replace(axes, seq=None)
    elif q.shape[1] % n or k.shape[1] % n:
        lengths = f"{q.shape[1]} queries and {k.shape[1]} keys"
        raise ValueError(f"attention: {n} devices along {axes.seq!r} must divide {lengths}")
    return axes.for_heads(q.shape[2])


def _check(q: Array, k: Array, v: Array, softcap: float | None) -> None:
    (b, _, h, d), (kb, tk, kv, kd) = q.shape, k.shape
    if (kb, kd) != (b, d) or v.shape[:3] != (b, tk, kv):
        raise ValueError(
            f"attention takes q (b, tq, h, d), k (b, tk, kv, d), v (b, tk, kv, dv); got {q.shape}, {k.shape}, {v.shape}"
        )
    if h % kv:
        raise ValueError(f"attention: {kv} key heads must divide {h} query heads")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"attention: softcap = {softcap} must be positive, or None")


def _key_heads_by_part(q: Array, k: Array, v: Array, axes: Axes) -> tuple[Array, Array]:
    """Repeats key heads that parts of the query heads share: each part then holds what it reads, no more."""
    times = math.lcm(k.shape[2], parts(axes.heads)) // k.shape[2]
    return jnp.repeat(k, times, axis=2), jnp.repeat(v, times, axis=2)
