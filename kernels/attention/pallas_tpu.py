"""Flash attention on TPUs: `forward` and `backward` lay out, pad, cut into blocks, and call the kernels.

On any other platform the same kernels run interpreted: slow, and right.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longwave.kernels.attention import blocks, tpu_backward, tpu_forward, tpu_layout
from longwave.kernels.attention.reference import Coordinates, Scores
from longwave.kernels.attention.tpu_layout import Layout
from longwave.kernels.attention.tpu_plan import Plan

# The scalar memory of a core is 1 MiB: lists of visits may have three quarters of it.
SMEM_BYTES = 3 * 2**18


def forward(
    q: Float[Array, "b tq h d"],
    k: Float[Array, "b tk kv d"],
    v: Float[Array, "b tk kv dv"],
    q_at: Coordinates,
    k_at: Coordinates,
    scores: Scores,
    *,
    cut: blocks.Cut | None = None,
) -> tuple[Float[Array, "b tq h dv"], Float[Array, "b tq h"]]:
    """Output in v's dtype and float32 log-sum-exp. cut: other blocks than those that are chosen."""
    plan = Plan.of(q, k, v, q_at, k_at, scores, cut or blocks.forward(q, k, v, scores.mask))
    layout, (steps, patterns) = plan.layout, plan.steps(q_at, k_at)
    arrays = layout.queries(q, plan.tq), layout.keys(k, plan.tk), layout.keys(v, plan.tk)
    o, lse = run(partial(tpu_forward.call, plan, patterns), steps, *arrays, *plan.places(q_at, k_at))
    return layout.of_queries(o, plan.q.t, layout.dv), tpu_layout.of_rows(lse, plan.q.t)


def backward(
    q: Float[Array, "b tq h d"],
    k: Float[Array, "b tk kv d"],
    v: Float[Array, "b tk kv dv"],
    q_at: Coordinates,
    k_at: Coordinates,
    lse: Float[Array, "b tq h"],
    delta: Float[Array, "b tq h"],
    do: Float[Array, "b tq h dv"],
    scores: Scores,
) -> tuple[Float[Array, "b tq h d"], Float[Array, "b tk kv d"], Float[Array, "b tk kv dv"]]:
    """Gradients from lse, over these keys and any others, and delta = sum(o * do) - dlse."""
    layout, tq, tk = Layout.of(q, k, v), q.shape[1], k.shape[1]
    cut = blocks.backward(layout, tq, tk, q.dtype.itemsize, scores.mask)
    lse = jnp.where(lse == -jnp.inf, tpu_backward.BLIND, lse * tpu_backward.LOG2E)
    part = partial(_gradients, cut, scores, k, v, k_at)
    if tq <= cut.part:
        (dk, dv), dq = part((), (q, do, lse, delta, q_at))
    else:
        sums = tuple(jnp.zeros_like(layout.keys(x, -(-tk // cut.k) * cut.k), jnp.float32) for x in (k, v))
        cuts = partial(_parts, cut.part)
        at = Coordinates(*(None if x is None else cuts(x, x.ndim - 1, mode="edge") for x in q_at.placed(tq)))
        queries = cuts(q, 1), cuts(do, 1), cuts(lse, 1, constant_values=tpu_backward.BLIND), cuts(delta, 1), at
        (dk, dv), dq = jax.lax.scan(part, sums, queries)
        dq = jnp.moveaxis(dq, 0, 1).reshape(dq.shape[1], -1, *dq.shape[3:])[:, :tq]
        dk = dk * scores.scale
    dk, dv = layout.of_keys(dk, tk, layout.d), layout.of_keys(dv, tk, layout.dv)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


def _gradients(cut: blocks.BackwardCut, scores: Scores, k: Array, v: Array, k_at: Coordinates, sums: Any, queries: Any):
    """Sums of dk and dv, as the kernel has them, over these queries and those before, and dq."""
    q, do, lse, delta, q_at = queries
    plan = Plan.of(q, k, v, q_at, k_at, scores, cut)
    layout, rows = plan.layout, partial(tpu_layout.rows, t=plan.tq)
    arrays = layout.queries(q, plan.tq), layout.keys(k, plan.tk), layout.keys(v, plan.tk), layout.queries(do, plan.tq)
    arrays = *arrays, rows(lse, fill=tpu_backward.BLIND), rows(delta)
    walk, places = tpu_backward.Walk.of(plan, q_at, k_at), plan.places(q_at, k_at)
    dq, *sums = run(partial(tpu_backward.call, plan, cut.buffers), walk, arrays, tuple(places), sums)
    return tuple(sums), layout.of_queries(dq, plan.q.t, layout.d)


def _parts(size: int, x: Array, axis: int, **how: Any) -> Array:
    """Pieces of this size along an axis, the last one padded, along a new first axis."""
    n = -(-x.shape[axis] // size)
    widths = [(0, n * size - x.shape[axis]) if i == axis else (0, 0) for i in range(x.ndim)]
    x = jnp.pad(x, widths, **how)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], n, size, *x.shape[axis + 1 :]), axis, 0)


def run(kernel: Callable[..., Any], *args: Any) -> Any:
    """kernel(*args, interpret=...): compiled where the program is compiled for TPUs."""
    args = jax.tree.map(jnp.asarray, args)
    compiled, interpreted = (partial(kernel, interpret=interpret) for interpret in (False, True))
    return jax.lax.platform_dependent(*args, tpu=compiled, default=interpreted)
