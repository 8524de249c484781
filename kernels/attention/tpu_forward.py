"""The forward kernel of flash attention on TPUs.

A grid step is one visit: a block of queries against one of keys. The running maximum m, sum l and output o of a
block of queries stay in VMEM over its visits; o is divided by l once, at the last (FlashAttention-2,
arXiv:2307.08691).

    s = scale log2(e) q k     m' = max(m, max_k s)     p = 2^(s - m')     o <- 2^(m - m') o + p v

What makes it fast: the live tiles of a block are computed in straight-line code (tpu_plan.py), so that the compiler
overlaps the softmax of one with the matmuls of others, and only those that need it are masked; m lies broadcast over
128 lanes and l is summed over lanes at the end, so that an element of s costs a product, a maximum, a subtraction, a
power, an addition and a conversion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from longwave.kernels.attention.blocks import VMEM_LIMIT
from longwave.kernels.attention.tpu_layout import LANES
from longwave.kernels.attention.tpu_plan import BITS, Pattern, Plan, Specs, Steps, parts
from longwave.kernels.attention.visits import FIRST, LAST, tile_visible

HIDDEN = -1e30  # score of an invisible key
FLOOR = -1e29  # where the running maximum starts: above HIDDEN, so that 2^(HIDDEN - m) is 0 even if no key is seen
LOG2E = math.log2(math.e)
LONGEST = 512  # keys whose scores are held at once
UNROLLED = 2  # heads in a block of lanes whose code stands in one stretch
NT = (((1,), (1,)), ((), ()))  # a b' of matrices


class Refs(NamedTuple):
    q: Any  # (1, bq, lanes)
    k: Any  # (1, bk, lanes)
    v: Any  # (1, bk, lanes_v)
    places: list[Any]  # (1, 1, bq) of queries, (1, 1, bk) of keys
    o: Any  # (1, bq, lanes_v)
    lse: Any  # (1, fold, 1, bq)
    m: Any  # (fold, bq, LANES), the same in all lanes
    l: Any  # (fold, bq, LANES), to be summed over lanes
    acc: Any  # (bq, lanes_v)
    columns: list[Any]  # (bq, LANES): places of queries, the same in all lanes

    @classmethod
    def of(cls, refs: tuple[Any, ...], places: int) -> Refs:
        (q, k, v), refs = refs[:3], refs[3:]
        (o, lse, m, l, acc), columns = refs[places : places + 5], refs[places + 5 :]
        return cls(q, k, v, list(refs[:places]), o, lse, m, l, acc, list(columns))


def call(
    plan: Plan,
    patterns: tuple[Pattern, ...],
    steps: Steps,
    q: Float[Array, "b tq lanes"],
    k: Float[Array, "b tk lanes"],
    v: Float[Array, "b tk lanes"],
    *places: Array,
    interpret: bool,
) -> tuple[Float[Array, "b tq lanes"], Float[Array, "b h 1 tq"]]:
    """o in v's dtype and the log-sum-exp."""
    layout, b, bq, specs = plan.layout, q.shape[0], plan.q.c, Specs(plan, steps.rows)
    f32 = partial(pltpu.VMEM, dtype=jnp.float32)
    n = steps.flags.shape[1]
    pairs = b * layout.h * n * plan.q.c * plan.k.c
    return pl.pallas_call(
        partial(_kernel, plan, patterns, steps.rows, len(places)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(steps),
            grid=(b, layout.blocks, n),
            in_specs=[
                specs.lanes("q", layout.lanes),
                specs.lanes("k", layout.lanes),
                specs.lanes("k", layout.lanes_v),
                *specs.places(places),
            ],
            out_specs=[specs.lanes("q", layout.lanes_v), specs.row()],
            scratch_shapes=[
                f32((layout.fold, bq, LANES)),
                f32((layout.fold, bq, LANES)),
                f32((bq, layout.lanes_v)),
                *(pltpu.VMEM((bq, LANES), jnp.int32) for _ in places[: len(places) // 2]),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((b, plan.tq, layout.blocks * layout.lanes_v), v.dtype),
            jax.ShapeDtypeStruct((b, layout.h, 1, plan.tq), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * (layout.d + layout.dv),
            transcendentals=pairs,
            bytes_accessed=2 * q.nbytes
            + b * layout.blocks * n * plan.k.c * (layout.lanes + layout.lanes_v) * v.itemsize,
        ),
        name="attention_forward",
        interpret=interpret,
    )(*steps, q, k, v, *places)


def _kernel(plan: Plan, patterns: tuple[Pattern, ...], rows: int, places: int, *refs: Any) -> None:
    (q_steps, k_steps, flags, found), refs = refs[:4], Refs.of(refs[4:], places)
    row, i = pl.program_id(0) if rows > 1 else 0, pl.program_id(2)
    flag, starts = flags[row, i], (q_steps[row, i] * plan.q.c, k_steps[row, i] * plan.k.c)
    start, finish = partial(_start, refs), partial(_finish, plan, refs)

    def piece(n: Any, _: None) -> None:
        code = lax.shift_right_logical(found[row, i], n * BITS) & (1 << BITS) - 1
        at = n // plan.pieces[1] * plan.piece[0], n % plan.pieces[1] * plan.piece[1]
        for number, pattern in enumerate(patterns, 1):
            compute = partial(_piece, plan, refs, pattern, flag, starts, at)
            pl.when(code == number)(_in_turn(start, compute, finish) if plan.single else compute)

    if plan.single:  # in one stretch of code
        piece(jnp.int32(0), None)
        pl.when(found[row, i] == 0)(_in_turn(start, finish))
        return
    pl.when(flag & FIRST != 0)(start)
    lax.fori_loop(0, math.prod(plan.pieces), piece, None)
    pl.when(flag & LAST != 0)(finish)


def _in_turn(*steps: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        for step in steps:
            step()

    return run


def _start(refs: Refs) -> None:
    """Where m is FLOOR, no key was seen yet: what l and acc hold there is of no account, and is not cleared."""
    refs.m[...] = jnp.full_like(refs.m, FLOOR)
    for column, place in zip(refs.columns, refs.places, strict=False):
        column[...] = jnp.broadcast_to(place[0], column.shape[::-1]).T


def _piece(plan: Plan, refs: Refs, pattern: Pattern, flag: Any, block: tuple[Any, Any], piece: tuple[Any, Any]) -> None:
    """block, piece: where they start, the piece within the block."""

    def attend(*heads: Any) -> None:
        for part in parts(plan, pattern, LONGEST):
            rows, keys = (
                pl.ds(pl.multiple_of(at, size) + start, end - start)
                for at, size, (start, end) in zip(piece, plan.tile, (part.q, part.k), strict=True)
            )
            see = _visible(plan, refs, flag, *block, rows, keys) if part.masked else None
            _attend(plan, refs, heads, rows, keys, see)

    if plan.layout.fold <= UNROLLED:
        attend(*range(plan.layout.fold))
    else:
        lax.fori_loop(0, plan.layout.fold, lambda head, _: attend(head), None)


def _attend(
    plan: Plan, refs: Refs, heads: Sequence[Any], rows: Any, keys: Any, see: Bool[Array, "rows keys"] | None
) -> None:
    """These keys into the sums of these rows, for these of the heads in the block of lanes."""
    q, k, v = refs.q[0, rows], refs.k[0, keys], refs.v[0, keys]
    cap, scale = plan.scores.softcap, plan.scores.scale
    probabilities, fades, before = [], [], []
    for head in heads:
        s = lax.dot_general(q, _of_head(plan, head, k, 0), NT, preferred_element_type=jnp.float32)
        s = scale * LOG2E * s if cap is None else LOG2E * plan.scores.cap(scale * s)
        if see is not None:
            s = jnp.where(see, s, HIDDEN)
        m = refs.m[head, rows]
        m_new = jnp.maximum(m, jnp.max(s, 1, keepdims=True))
        p, fade = jnp.exp2(s - _wide(m_new, s.shape[1])), jnp.exp2(m - m_new)
        refs.m[head, rows] = m_new
        l = jnp.where(m == FLOOR, 0.0, refs.l[head, rows] * fade)
        refs.l[head, rows] = l + sum(jnp.split(p, p.shape[1] // LANES, 1))
        probabilities.append(p.astype(v.dtype))
        fades.append(_of_head(plan, head, _wide(fade, refs.acc.shape[1]), 1))
        before.append(_of_head(plan, head, _wide(m, refs.acc.shape[1]), 0))
    p, v = jnp.concatenate(probabilities, 1), jnp.concatenate([_of_head(plan, head, v, 0) for head in heads])
    acc = jnp.where(sum(before) == FLOOR, 0.0, refs.acc[rows] * math.prod(fades))
    refs.acc[rows] = acc + jnp.dot(p, v, preferred_element_type=jnp.float32)


def _finish(plan: Plan, refs: Refs) -> None:
    lanes = refs.acc.shape[1]

    def finish(head: Any, _: None) -> None:
        m = refs.m[head]
        l = jnp.broadcast_to(jnp.sum(refs.l[head], 1, keepdims=True), m.shape)
        m_row, l_row = _row(m), _row(l)
        refs.lse[0, head] = jnp.where(m_row == FLOOR, -jnp.inf, m_row / LOG2E + jnp.log(l_row))
        acc = refs.acc[...] * _of_head(plan, head, _wide(1 / l, lanes), 1)
        refs.acc[...] = jnp.where(_of_head(plan, head, _wide(m, lanes), 0) == FLOOR, 0.0, acc)

    lax.fori_loop(0, plan.layout.fold, finish, None, unroll=plan.layout.fold <= UNROLLED)
    refs.o[0] = refs.acc[...].astype(refs.o.dtype)


def _row(x: Float[Array, "bq 128"]) -> Float[Array, "1 bq"]:
    """What is the same in all lanes, along lanes: cheaper than a transpose."""
    diagonal = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0) == lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
    return jnp.concatenate(
        [jnp.sum(jnp.where(diagonal, y, 0), 0, keepdims=True) for y in jnp.split(x, x.shape[0] // LANES)], 1
    )


def _visible(plan: Plan, refs: Refs, flag: Any, q_start: Any, k_start: Any, rows: Any, keys: Any) -> Array:
    half = len(refs.columns)
    k_index = k_start + keys.start + lax.broadcasted_iota(jnp.int32, (1, keys.size), 1)
    q_position, k_position = q_start + rows.start + lax.broadcasted_iota(jnp.int32, (rows.size, 1), 0), k_index
    column = lambda i: refs.columns[i][rows][:, :1]
    across = lambda i: refs.places[half:][i][0, :, keys]
    if plan.positions:
        q_position, k_position = column(0), across(0)
    q_segment, k_segment = (column(-1), across(-1)) if plan.segments else (None, None)
    return tile_visible(plan.scores.mask, q_position, k_position, q_segment, k_segment, k_index, plan.k.t, flag)


def _wide(x: Float[Array, "bq 128"], lanes: int) -> Float[Array, "bq lanes"]:
    """What is the same in all lanes, over more of them."""
    return jnp.tile(x, (1, lanes // LANES))


def _of_head(plan: Plan, head: Any, x: Float[Array, "t lanes"], other: float) -> Float[Array, "t lanes"]:
    """x in the lanes of a head, `other` in those of the heads that share the block."""
    if plan.layout.fold == 1:
        return x
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return jnp.where(lane >> (plan.layout.wide.bit_length() - 1) == head, x, jnp.full_like(x, other))
