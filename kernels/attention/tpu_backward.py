"""The backward kernel of flash attention on TPUs: one kernel, five matmuls a tile, at any length.

    s = scale k q'     p = 2^(log2(e) s - lse)     dp = v do'     ds = p * (dp - delta)
    dv' += do' p'      dk' += scale q' ds'         dq' += scale k' ds

A grid step is a block of keys, whose dk and dv stay in VMEM while it walks through the blocks of queries that see it.
What it walks over stays there too: q, do and the float32 sums of dq of all queries of the group of heads that share
the keys, so that a visit moves nothing and costs its matmuls, and p is formed once (two kernels would form it twice:
14 n^2 d operations instead of 10). A longer sequence of queries comes in parts, which hand the sums of dk and dv on.

Scores stand transposed, keys in sublanes and queries in lanes: lse and delta, one number a query, are then rows, which
spread over sublanes for nothing. Gradients stand transposed, lanes of heads in sublanes: a head of 64 lanes then costs
half a matmul of 128, and heads that share 128 lanes are apart without a mask; ds is the right side of dq' as it is.
A query that sees nothing, or is padding, has an lse so large that p is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from longwave.kernels.attention.blocks import VMEM_LIMIT
from longwave.kernels.attention.reference import Coordinates
from longwave.kernels.attention.tpu_layout import LANES
from longwave.kernels.attention.tpu_plan import Plan
from longwave.kernels.attention.visits import FIRST, LAST, LIVE, MASKED, tile_visible, visits

BLIND = 1e30  # log-sum-exp of a query that sees nothing
HIDDEN = -1e30  # exponent of an invisible key
LOG2E = math.log2(math.e)
Dot = Callable[[Array, Array, Any], Array]
MATMUL = (((1,), (0,)), ((), ()))
BY_LANES = (((1,), (1,)), ((), ()))  # of both sides


class Walk(NamedTuple):
    """Visits by keys: the j-th block of keys is seen by blocks of queries q[start[j]:start[j + 1]]."""

    start: Int[Array, "rows nk+1"]
    q: Int[Array, "rows n"]
    flags: Int[Array, "rows n"]

    @classmethod
    def of(cls, plan: Plan, q_at: Coordinates, k_at: Coordinates) -> Walk:
        found = visits(plan.scores.mask, q_at, k_at, plan.q, plan.k, by_keys=True)
        xp = jnp if isinstance(found.flags, jax.Array) else np
        # Sorted, the places of what is not marked come last; each block of keys has one that is.
        marked = lambda flag: xp.sort(xp.where(found.flags & flag != 0, xp.arange(found.q.shape[1])[None], 2**30), 1)
        first, last = (marked(flag)[:, : plan.k.n] for flag in (FIRST, LAST))
        return cls(xp.concatenate([first, last[:, -1:] + 1], 1).astype(np.int32), found.q, found.flags)


class Refs(NamedTuple):
    """g: query heads, or blocks of folded ones, of the group. lanes, lanes_v: of one of them."""

    q: Any  # (1, tq, g lanes)
    k: Any  # (1, bk, lanes)
    v: Any  # (1, bk, lanes_v)
    do: Any  # (1, tq, g lanes_v)
    lse: Any  # (1, g fold, 1, tq), of base 2
    delta: Any  # (1, g fold, 1, tq)
    places: list[Any]  # (1, 1, tq) of queries, (1, 1, bk) of keys
    sums: list[Any]  # dk and dv so far, or nothing
    dq: Any
    dk: Any
    dv: Any
    dq_sum: Any  # (g, lanes, tq): dq'
    dk_sum: Any  # (lanes, bk)
    dv_sum: Any  # (lanes_v, bk)
    kt: Any  # (lanes, bk): k'
    columns: list[Any]  # (bk, LANES): places of keys, the same in all lanes

    @classmethod
    def of(cls, refs: tuple[Any, ...], places: int, sums: int) -> Refs:
        a, b = 6 + places, 6 + places + sums
        return cls(*refs[:6], list(refs[6:a]), list(refs[a:b]), *refs[b : b + 7], list(refs[b + 7 :]))


def call(
    plan: Plan,
    buffers: int,
    walk: Walk,
    arrays: tuple[Array, ...],
    places: tuple[Array, ...],
    sums: tuple[Array, ...],
    *,
    interpret: bool,
) -> tuple[Float[Array, "b tq lanes"], Float[Array, "b tk lanes"], Float[Array, "b tk lanes"]]:
    """dq, dk and dv.

    arrays:  q, k, v, do (b, t, lanes); lse, of base 2 and BLIND where nothing is seen, and delta (b, h, 1, tq).
    sums:    of other queries' dk and dv, float32 and without their scale, to which those of these are added.
    buffers: 2: queries of the next heads are fetched meanwhile.
    """
    layout, (q, k, v, *_), bk = plan.layout, arrays, plan.k.c
    specs = _Specs(plan)
    wide, wide_v = layout.group * layout.lanes, layout.group * layout.lanes_v
    keys = [specs.keys(layout.lanes), specs.keys(layout.lanes_v)]
    numbers, half = specs.numbers(), len(places) // 2
    # Parts that are yet to be added, and heads whose keys were repeated, are not rounded before their sum.
    partial_sums = bool(sums) or (layout.fold > 1 and layout.h > layout.kv)
    shapes = [q, *(jax.ShapeDtypeStruct(x.shape, jnp.float32 if partial_sums else x.dtype) for x in (k, v))]
    f32 = partial(pltpu.VMEM, dtype=jnp.float32)
    return pl.pallas_call(
        partial(_kernel, plan, walk.flags.shape[0], len(places), len(sums), _dot_on_cpu if interpret else _dot),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(walk),
            grid=(q.shape[0], layout.blocks // layout.group, plan.k.n),
            in_specs=[
                *(specs.queries(wide, buffers), *keys, specs.queries(wide_v, buffers), numbers, numbers),
                *map(specs.q_place, places[:half]),
                *map(specs.k_place, places[half:]),
                *keys[: len(sums)],
            ],
            out_specs=[specs.queries(wide), *keys],
            scratch_shapes=[
                f32((layout.group, layout.lanes, plan.tq)),
                f32((layout.lanes, bk)),
                f32((layout.lanes_v, bk)),
                pltpu.VMEM((layout.lanes, bk), k.dtype),
                *(pltpu.VMEM((bk, LANES), jnp.int32) for _ in places[half:]),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes],
        input_output_aliases={len(walk) + len(arrays) + len(places) + i: 1 + i for i in range(len(sums))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=_cost(plan, walk, arrays),
        name="attention_backward",
        interpret=interpret,
    )(*walk, *arrays, *places, *sums)


class _Specs(NamedTuple):
    """Blocks of the grid (b, groups of heads, blocks of keys)."""

    plan: Plan

    def queries(self, width: int, buffers: int = 2) -> pl.BlockSpec:
        """All queries of a group."""
        mode = None if buffers == 2 else pl.Buffered(buffers)
        return pl.BlockSpec((1, self.plan.tq, width), lambda b, h, j, *_: (b, 0, h), pipeline_mode=mode)

    def keys(self, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, self.plan.k.c, width), lambda b, h, j, *_: (b, j, h))

    def numbers(self) -> pl.BlockSpec:
        """One for each query and head of a group."""
        heads = self.plan.layout.group * self.plan.layout.fold
        return pl.BlockSpec((1, heads, 1, self.plan.tq), lambda b, h, j, *_: (b, h, 0, 0))

    def q_place(self, x: Array) -> pl.BlockSpec:
        row = min(1, x.shape[0] - 1)
        return pl.BlockSpec((1, 1, self.plan.tq), lambda b, h, j, *_: (b * row, 0, 0))

    def k_place(self, x: Array) -> pl.BlockSpec:
        row = min(1, x.shape[0] - 1)
        return pl.BlockSpec((1, 1, self.plan.k.c), lambda b, h, j, *_: (b * row, 0, j))


def _cost(plan: Plan, walk: Walk, arrays: tuple[Array, ...]) -> pl.CostEstimate:
    layout, (q, k, v, *_) = plan.layout, arrays
    pairs = q.shape[0] * layout.h * walk.q.shape[1] * plan.q.c * plan.k.c
    return pl.CostEstimate(
        flops=pairs * 2 * (3 * layout.d + 2 * layout.dv),
        transcendentals=pairs,
        bytes_accessed=sum(x.nbytes for x in arrays) + q.nbytes + k.nbytes + v.nbytes,
    )


def _kernel(plan: Plan, rows: int, places: int, sums: int, dot: Dot, *refs: Any) -> None:
    (start, q_blocks, flags), refs = refs[:3], Refs.of(refs[3:], places, sums)
    row, j = pl.program_id(0) if rows > 1 else 0, pl.program_id(2)

    def visit(n: Any, _: None) -> None:
        i, flag = q_blocks[row, n], flags[row, n]
        live, masked = flag & LIVE != 0, flag & MASKED != 0
        see = partial(_visible, plan, refs, flag, i, j)
        pl.when(live & ~masked)(partial(_attend, plan, dot, refs, i, lambda: None))
        pl.when(live & masked)(partial(_attend, plan, dot, refs, i, see))

    pl.when(j == 0)(partial(_start, refs))
    _start_keys(refs)
    lax.fori_loop(start[row, j], start[row, j + 1], visit, None)
    _finish_keys(plan, refs)
    pl.when(j == plan.k.n - 1)(partial(_finish, plan, refs))


def _start(refs: Refs) -> None:
    refs.dq_sum[...] = jnp.zeros_like(refs.dq_sum)


def _start_keys(refs: Refs) -> None:
    refs.kt[...] = refs.k[0].T
    for i, total in enumerate((refs.dk_sum, refs.dv_sum)):
        total[...] = refs.sums[i][0].T if refs.sums else jnp.zeros_like(total)
    for column, place in zip(refs.columns, refs.places[len(refs.columns) :], strict=True):
        column[...] = jnp.broadcast_to(place[0], column.shape[::-1]).T


def _attend(plan: Plan, dot: Dot, refs: Refs, i: Any, see: Any) -> None:
    """The i-th block of queries, of each head of the group in turn, against the block of keys."""
    group = plan.layout.group
    if group == 1:
        return _block(plan, dot, refs, i, 0, see())
    lax.fori_loop(0, group, lambda g, _: _block(plan, dot, refs, i, g, see()), None)


def _block(plan: Plan, dot: Dot, refs: Refs, i: Any, g: Any, see: Bool[Array, "bk bq"] | None) -> None:
    layout = plan.layout
    rows = _span(i, plan.q.c)
    q, do = refs.q[0, rows, _span(g, layout.lanes)], refs.do[0, rows, _span(g, layout.lanes_v)]
    k, v, q_t, do_t = refs.k[0], refs.v[0], q.T, do.T
    for head in range(layout.fold):
        mine = slice(None) if layout.fold == 1 else slice(head * layout.wide, (head + 1) * layout.wide)
        number = lambda x, head=head: x[0, g * layout.fold + head, :, rows]
        s = dot(k, _of_head(plan, head, q), BY_LANES)
        dp = dot(v, _of_head(plan, head, do), BY_LANES)
        p, slope = _probabilities(plan, s, number(refs.lse), see)
        ds = p * (dp - number(refs.delta))
        ds = (ds if slope is None else ds * slope).astype(q.dtype)
        refs.dv_sum[mine] += dot(do_t[mine], p.astype(do.dtype), BY_LANES)
        refs.dk_sum[mine] += dot(q_t[mine], ds, BY_LANES)
        refs.dq_sum[g, mine, rows] += dot(refs.kt[mine], ds, MATMUL)


def _dot(a: Array, b: Array, dims: Any) -> Array:
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _dot_on_cpu(a: Array, b: Array, dims: Any) -> Array:
    """XLA's CPU backend refuses some bfloat16 products with a float32 result; in float32 they are exact."""
    return _dot(a.astype(jnp.float32), b.astype(jnp.float32), dims)


def _probabilities(plan: Plan, s: Array, lse: Array, see: Array | None) -> tuple[Array, Array | None]:
    """p, and the slope of the soft cap."""
    scale, cap, slope = plan.scores.scale, plan.scores.softcap, None
    if cap is None:
        x = s * (LOG2E * scale) - lse
    else:
        t = jnp.tanh(s * (scale / cap))
        x, slope = t * (LOG2E * cap) - lse, 1 - t * t
    return jnp.exp2(x if see is None else jnp.where(see, x, HIDDEN)), slope


def _visible(plan: Plan, refs: Refs, flag: Any, i: Any, j: Any) -> Bool[Array, "bk bq"]:
    (bq, bk), half = (plan.q.c, plan.k.c), len(refs.columns)
    k_index = j * bk + lax.broadcasted_iota(jnp.int32, (bk, 1), 0)
    q_position, k_position = i * bq + lax.broadcasted_iota(jnp.int32, (1, bq), 1), k_index
    across, column = lambda n: refs.places[:half][n][0, :, _span(i, bq)], lambda n: refs.columns[n][:, :1]
    if plan.positions:
        q_position, k_position = across(0), column(0)
    q_segment, k_segment = (across(-1), column(-1)) if plan.segments else (None, None)
    see = tile_visible(plan.scores.mask, q_position, k_position, q_segment, k_segment, k_index, plan.k.t, flag)
    return jnp.broadcast_to(see, (bk, bq))


def _finish_keys(plan: Plan, refs: Refs) -> None:
    scale = 1.0 if refs.sums else plan.scores.scale
    refs.dk[0] = (refs.dk_sum[...] * scale).astype(refs.dk.dtype).T
    refs.dv[0] = refs.dv_sum[...].astype(refs.dv.dtype).T


def _finish(plan: Plan, refs: Refs) -> None:
    layout, n = plan.layout, plan.q.n

    def piece(x: Any, _: None) -> None:
        g, i = (0, x) if layout.group == 1 else (lax.div(x, n), lax.rem(x, n))
        rows = _span(i, plan.q.c)
        dq = (refs.dq_sum[g, :, rows] * plan.scores.scale).astype(refs.dq.dtype)
        refs.dq[0, rows, _span(g, layout.lanes)] = dq.T

    lax.fori_loop(0, n * layout.group, piece, None)


def _span(i: Any, size: int) -> pl.Slice:
    """The i-th piece of this size."""
    return pl.ds(pl.multiple_of(i * size, size), size)


def _of_head(plan: Plan, head: int, x: Array) -> Array:
    """x in the lanes of a head, 0 in those of the others that share the block."""
    if plan.layout.fold == 1:
        return x
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return jnp.where(lane >> (plan.layout.wide.bit_length() - 1) == head, x, jnp.zeros_like(x))
