"""The backward kernel of flash attention on TPUs: one kernel, five matmuls a tile, at any length.

    s = scale k q'     p = 2^(log2(e) s - lse)     dp = v do'     ds = p * (dp - delta)
    dv += p do         dk += scale ds q            dq += scale ds' k

A grid step is a few blocks of keys, whose dk and dv stay in VMEM while it walks through the queries that see them.
What it walks over stays there too: q, do and the float32 sums of dq of all queries of the group of heads that share
the keys, so that a visit moves nothing and costs its matmuls, and p is formed once (two kernels would form it twice:
14 n^2 d operations instead of 10). A longer sequence of queries comes in parts, which hand the sums of dk and dv on.

Scores stand transposed, keys in sublanes and queries in lanes: lse and delta, one number a query, are then rows, which
spread over sublanes for nothing. Where heads share 128 lanes gradients stand transposed too, lanes of heads in
sublanes: a head of 64 lanes then costs half a matmul of 128, and what is summed of each head is apart without a mask.
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

from longwave.kernels.attention.blocks import BACKWARD_VMEM_LIMIT, BackwardCut
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
BY_ROWS = (((0,), (0,)), ((), ()))


class Walk(NamedTuple):
    """Visits by keys: a grid step with the j-th keys makes those from start[j] to start[j + 1]."""

    start: Int[Array | np.ndarray, "rows steps+1"]
    q: Int[Array | np.ndarray, "rows n"]
    k: Int[Array | np.ndarray, "rows n"]
    flags: Int[Array | np.ndarray, "rows n"]

    @classmethod
    def of(cls, plan: Plan, cut: BackwardCut, q_at: Coordinates, k_at: Coordinates) -> Walk:
        found = visits(plan.scores.mask, q_at, k_at, plan.q, plan.k, by_keys=True)
        xp = jnp if isinstance(found.flags, jax.Array) else np
        # Sorted, the places of what is not marked come last; each block of keys has one that is.
        marked = lambda flag: xp.sort(xp.where(found.flags & flag != 0, xp.arange(found.q.shape[1])[None], 2**30), 1)
        first, last = (marked(flag)[:, : plan.k.n] for flag in (FIRST, LAST))
        start = xp.concatenate([first[:, :: cut.tiles], last[:, -1:] + 1], 1).astype(np.int32)
        return cls(start, found.q, found.k, found.flags)


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
    dq_sum: Any  # (g, tq, lanes); transposed (g, lanes, tq), and the next two likewise
    dk_sum: Any  # (bk, lanes)
    dv_sum: Any  # (bk, lanes_v)
    columns: list[Any]  # (bk, LANES): places of keys, the same in all lanes
    k_t: Any  # (lanes, bk): k transposed; None where gradients are not

    @classmethod
    def of(cls, refs: tuple[Any, ...], places: int, sums: int) -> Refs:
        inputs, outputs = refs[: 6 + places + sums], refs[6 + places + sums :]
        columns, k_t = outputs[6 : 6 + places // 2], outputs[6 + places // 2 :]
        given, totals = inputs[6 : 6 + places], inputs[6 + places :]
        return cls(*inputs[:6], list(given), list(totals), *outputs[:6], list(columns), k_t[0] if k_t else None)


def call(
    plan: Plan,
    cut: BackwardCut,
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
    """
    layout, (q, k, v, *_), bk = plan.layout, arrays, plan.k.c * cut.tiles
    specs = _Specs(plan, cut)
    wide, wide_v = layout.group * layout.lanes, layout.group * layout.lanes_v
    keys = [specs.keys(layout.lanes), specs.keys(layout.lanes_v)]
    numbers, half = specs.numbers(), len(places) // 2
    # Parts that are yet to be added, and heads whose keys were repeated, are not rounded before their sum.
    partial_sums = bool(sums) or (layout.fold > 1 and layout.h > layout.kv)
    shapes = [q, *(jax.ShapeDtypeStruct(x.shape, jnp.float32 if partial_sums else x.dtype) for x in (k, v))]
    f32, turned = partial(pltpu.VMEM, dtype=jnp.float32), lambda shape: shape[::-1] if _is_transposed(plan) else shape
    return pl.pallas_call(
        partial(_kernel, plan, cut, walk.flags.shape[0], len(places), len(sums), _dot_on_cpu if interpret else _dot),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(walk),
            grid=(q.shape[0], layout.blocks // layout.group, plan.k.n // cut.tiles),
            in_specs=[
                *(specs.queries(wide), *keys, specs.queries(wide_v), numbers, numbers),
                *map(specs.q_place, places[:half]),
                *map(specs.k_place, places[half:]),
                *keys[: len(sums)],
            ],
            out_specs=[specs.queries(wide), *keys],
            scratch_shapes=[
                f32((layout.group, *turned((plan.tq, layout.lanes)))),
                f32(turned((bk, layout.lanes))),
                f32(turned((bk, layout.lanes_v))),
                *(pltpu.VMEM((bk, LANES), jnp.int32) for _ in places[half:]),
                *[pltpu.VMEM((layout.lanes, bk), k.dtype)] * _is_transposed(plan),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes],
        input_output_aliases={len(walk) + len(arrays) + len(places) + i: 1 + i for i in range(len(sums))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=BACKWARD_VMEM_LIMIT
        ),
        cost_estimate=_cost(plan, walk, arrays),
        name="attention_backward",
        interpret=interpret,
    )(*walk, *arrays, *places, *sums)


class _Specs(NamedTuple):
    """Blocks of the grid (b, groups of heads, a few tiles of keys)."""

    plan: Plan
    cut: BackwardCut

    def queries(self, width: int) -> pl.BlockSpec:
        """All queries of a group."""
        mode = None if self.cut.buffers == 2 else pl.Buffered(self.cut.buffers)
        return pl.BlockSpec((1, self.plan.tq, width), lambda b, h, j, *_: (b, 0, h), pipeline_mode=mode)

    def keys(self, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, self.cut.k * self.cut.tiles, width), lambda b, h, j, *_: (b, j, h))

    def numbers(self) -> pl.BlockSpec:
        """One for each query and head of a group."""
        heads = self.plan.layout.group * self.plan.layout.fold
        return pl.BlockSpec((1, heads, 1, self.plan.tq), lambda b, h, j, *_: (b, h, 0, 0))

    def q_place(self, x: Array) -> pl.BlockSpec:
        row = min(1, x.shape[0] - 1)
        return pl.BlockSpec((1, 1, self.plan.tq), lambda b, h, j, *_: (b * row, 0, 0))

    def k_place(self, x: Array) -> pl.BlockSpec:
        row = min(1, x.shape[0] - 1)
        return pl.BlockSpec((1, 1, self.cut.k * self.cut.tiles), lambda b, h, j, *_: (b * row, 0, j))


def _cost(plan: Plan, walk: Walk, arrays: tuple[Array, ...]) -> pl.CostEstimate:
    layout, (q, k, v, *_) = plan.layout, arrays
    pairs = q.shape[0] * layout.h * walk.q.shape[1] * plan.q.c * plan.k.c
    return pl.CostEstimate(
        flops=pairs * 2 * (3 * layout.d + 2 * layout.dv),
        transcendentals=pairs,
        bytes_accessed=sum(x.nbytes for x in arrays) + q.nbytes + k.nbytes + v.nbytes,
    )


def _kernel(plan: Plan, cut: BackwardCut, rows: int, places: int, sums: int, dot: Dot, *refs: Any) -> None:
    walk, refs = Walk(*refs[:4]), Refs.of(refs[4:], places, sums)
    row, j = pl.program_id(0) if rows > 1 else 0, pl.program_id(2)

    def visit(n: Any, _: None) -> None:
        at, flag = _At(walk.q[row, n], walk.k[row, n], walk.k[row, n] - j * cut.tiles), walk.flags[row, n]
        live, masked = flag & LIVE != 0, flag & MASKED != 0
        see = partial(_visible, plan, refs, flag, at)
        pl.when(live & ~masked)(partial(_attend, plan, dot, refs, at, lambda: None))
        pl.when(live & masked)(partial(_attend, plan, dot, refs, at, see))

    pl.when(j == 0)(partial(_start, refs))
    _start_keys(plan, refs)
    lax.fori_loop(walk.start[row, j], walk.start[row, j + 1], visit, None)
    _finish_keys(plan, refs)
    pl.when(j == pl.num_programs(2) - 1)(partial(_finish, plan, refs))


class _At(NamedTuple):
    """A visit: blocks of queries and of keys, and which of the step's blocks of keys that is."""

    q: Any
    k: Any
    tile: Any


def _start(refs: Refs) -> None:
    refs.dq_sum[...] = jnp.zeros_like(refs.dq_sum)


def _start_keys(plan: Plan, refs: Refs) -> None:
    if _is_transposed(plan):
        refs.k_t[...] = refs.k[0].T
    for i, total in enumerate((refs.dk_sum, refs.dv_sum)):
        total[...] = _turned(plan, refs.sums[i][0]) if refs.sums else jnp.zeros_like(total)
    for column, place in zip(refs.columns, refs.places[len(refs.columns) :], strict=True):
        column[...] = jnp.broadcast_to(place[0], column.shape[::-1]).T


def _attend(plan: Plan, dot: Dot, refs: Refs, at: _At, see: Any) -> None:
    """The visit of each head of the group in turn."""
    group = plan.layout.group
    if group == 1:
        return _visit(plan, dot, refs, at, 0, see())
    lax.fori_loop(0, group, lambda g, _: _visit(plan, dot, refs, at, g, see()), None)


def _visit(plan: Plan, dot: Dot, refs: Refs, at: _At, g: Any, see: Bool[Array, "bk bq"] | None) -> None:
    layout, rows, keys = plan.layout, _span(at.q, plan.q.c), _span(at.tile, plan.k.c)
    q, do = refs.q[0, rows, _span(g, layout.lanes)], refs.do[0, rows, _span(g, layout.lanes_v)]
    k, v = refs.k[0, keys], refs.v[0, keys]
    for head in range(layout.fold):
        number = lambda x, head=head: x[0, g * layout.fold + head, :, rows]
        s = dot(k, _of_head(plan, head, q), BY_LANES)
        dp = dot(v, _of_head(plan, head, do), BY_LANES)
        p, slope = _probabilities(plan, s, number(refs.lse), see)
        ds = p * (dp - number(refs.delta))
        p, ds = p.astype(do.dtype), (ds if slope is None else ds * slope).astype(q.dtype)
        if _is_transposed(plan):
            mine = slice(head * layout.wide, (head + 1) * layout.wide)
            refs.dv_sum[mine, keys] += dot(do.T[mine], p, BY_LANES)
            refs.dk_sum[mine, keys] += dot(q.T[mine], ds, BY_LANES)
            refs.dq_sum[g, mine, rows] += dot(refs.k_t[mine, keys], ds, MATMUL)
        else:
            refs.dv_sum[keys] += dot(p, do, MATMUL)
            refs.dk_sum[keys] += dot(ds, q, MATMUL)
            refs.dq_sum[g, rows] += dot(ds, k, BY_ROWS)


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


def _visible(plan: Plan, refs: Refs, flag: Any, at: _At) -> Bool[Array, "bk bq"]:
    (bq, bk), half = (plan.q.c, plan.k.c), len(refs.columns)
    k_index = at.k * bk + lax.broadcasted_iota(jnp.int32, (bk, 1), 0)
    q_position, k_position = at.q * bq + lax.broadcasted_iota(jnp.int32, (1, bq), 1), k_index
    across = lambda n: refs.places[:half][n][0, :, _span(at.q, bq)]
    column = lambda n: refs.columns[n][_span(at.tile, bk), :1]
    if plan.positions:
        q_position, k_position = across(0), column(0)
    q_segment, k_segment = (across(-1), column(-1)) if plan.segments else (None, None)
    see = tile_visible(plan.scores.mask, q_position, k_position, q_segment, k_segment, k_index, plan.k.t, flag)
    return jnp.broadcast_to(see, (bk, bq))


def _finish_keys(plan: Plan, refs: Refs) -> None:
    scale = 1.0 if refs.sums else plan.scores.scale
    refs.dk[0] = _turned(plan, (refs.dk_sum[...] * scale).astype(refs.dk.dtype))
    refs.dv[0] = _turned(plan, refs.dv_sum[...].astype(refs.dv.dtype))


def _finish(plan: Plan, refs: Refs) -> None:
    layout, n = plan.layout, plan.q.n

    def piece(x: Any, _: None) -> None:
        g, i = (0, x) if layout.group == 1 else (lax.div(x, n), lax.rem(x, n))
        rows = _span(i, plan.q.c)
        dq = refs.dq_sum[(g, slice(None), rows) if _is_transposed(plan) else (g, rows)]
        refs.dq[0, rows, _span(g, layout.lanes)] = _turned(plan, (dq * plan.scores.scale).astype(refs.dq.dtype))

    lax.fori_loop(0, n * layout.group, piece, None)


def _is_transposed(plan: Plan) -> bool:
    """Whether gradients are summed transposed."""
    return plan.layout.fold > 1


def _turned(plan: Plan, x: Array) -> Array:
    return x.T if _is_transposed(plan) else x


def _span(i: Any, size: int) -> Any:
    """The i-th piece of this size."""
    return pl.ds(pl.multiple_of(i * size, size), size)


def _of_head(plan: Plan, head: int, x: Array) -> Array:
    """x in the lanes of a head, 0 in those of the others that share the block."""
    if plan.layout.fold == 1:
        return x
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return jnp.where(lane >> (plan.layout.wide.bit_length() - 1) == head, x, jnp.zeros_like(x))
