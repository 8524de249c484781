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
from longwave.kernels.attention.mask import tables
from longwave.kernels.attention.reference import Coordinates, Scores
from longwave.kernels.attention.tpu_layout import Layout
from longwave.kernels.attention.tpu_plan import Plan, Steps
from longwave.kernels.attention.visits import Split, refusal

# The scalar memory of a core is 1 MiB: lists of visits may have three quarters of it.
SMEM_BYTES = 3 * 2**18
WIDEST = 256  # head dimension
FEW = 128  # queries of a group of heads that fit into one block


def supports(q: Any, k: Any, v: Any, q_at: Coordinates, k_at: Coordinates, scores: Scores) -> str | None:
    """Why these arrays and this mask are not for this form; None when they are."""
    dtypes = sorted({x.dtype.name for x in (q, k, v)})
    if len(dtypes) > 1 or dtypes[0] not in ("bfloat16", "float32"):
        return f"q, k, v are {', '.join(dtypes)}, not all bfloat16 or all float32"
    if (d := max(q.shape[-1], v.shape[-1])) > WIDEST:
        return f"heads of width {d}; up to {WIDEST} are supported"
    if 0 in (*q.shape, *k.shape, *v.shape):
        return "an array is empty"
    cut, back = (
        blocks.forward(q, k, v, scores.mask),
        blocks.backward(Layout.of(q, k, v), q.shape[1], k.shape[1], q.dtype.itemsize, scores.mask),
    )
    if not back.part:
        return f"groups of {q.shape[2] // k.shape[2]} heads of width {d}, too many for VMEM to hold their queries"
    back_at = q_at if back.part >= q.shape[1] else q_at.placed(q.shape[1])  # parts know their positions
    for c, at in ((cut, q_at), (back, back_at)):
        if reason := refusal(scores.mask, at, k_at, Split(q.shape[1], c.q), Split(k.shape[1], c.k)):
            return reason
    plan, given = Plan.of(q, k, v, q_at, k_at, scores, cut), jax.tree.leaves((q_at, k_at))
    rows = q.shape[0] if any(x.ndim == 2 for x in given) else 1
    visited = plan.q.n * plan.k.n if given else plan.steps(q_at, k_at)[0].flags.size
    visited_back = back.part // back.q * -(-k.shape[1] // back.k)
    numbers = max(len(Steps._fields) * visited, 3 * visited_back)
    if (needed := 4 * rows * numbers) > SMEM_BYTES:
        return f"lists of {rows} x {numbers:,} numbers, {needed:,} bytes; scalar memory has {SMEM_BYTES:,} for them"
    return None


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
    tq, g = q.shape[1], q.shape[2] // k.shape[2]
    if g > 1 and tq * g <= FEW and cut is None and not tables(scores.mask):  # they need positions 0, 1, 2, ...
        return _forward_by_group(q, k, v, q_at, k_at, scores)
    plan = Plan.of(q, k, v, q_at, k_at, scores, cut or blocks.forward(q, k, v, scores.mask))
    layout, (steps, patterns) = plan.layout, plan.steps(q_at, k_at)
    arrays = layout.queries(q, plan.tq), layout.keys(k, plan.tk), layout.keys(v, plan.tk)
    o, lse = run(partial(tpu_forward.call, plan, patterns), steps, *arrays, *plan.places(q_at, k_at))
    return layout.of_queries(o, plan.q.t, layout.dv), tpu_layout.of_rows(lse, plan.q.t)


def _forward_by_group(q, k, v, q_at, k_at, scores):
    """Few queries: those of all heads that read the same key head, under each other, so that it is read once."""
    b, tq, h, d = q.shape
    kv, g = k.shape[2], h // k.shape[2]
    rows = q.reshape(b, tq, kv, g, d).swapaxes(2, 3).reshape(b, tq * g, kv, d)
    rows_at = jax.tree.map(lambda x: jnp.repeat(x, g, axis=-1), q_at.placed(tq))
    o, lse = forward(rows, k, v, rows_at, k_at, scores)
    by_head = lambda x: x.reshape(b, tq, g, kv, -1).swapaxes(2, 3).reshape(b, tq, h, -1)
    return by_head(o), by_head(lse)[..., 0]


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
    walk, places = tpu_backward.Walk.of(plan, cut, q_at, k_at), plan.places(q_at, k_at)
    dq, *sums = run(partial(tpu_backward.call, plan, cut), walk, arrays, tuple(places), sums)
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
