"""The forward kernel: one pass over memory, states in VMEM, the state before every span written out."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from longwave.kernels.selective_scan import tpu_layout as layout
from longwave.kernels.selective_scan.tpu_layout import LANES, RESET, SPAN, TILE, VALID, Plan, Reads, lane, tile

MOST = 512  # states of 128 channels in a block: wide blocks spread B and C over the lanes less often
NAME = "selective_scan"


class Desks(NamedTuple):
    """In VMEM. delta, whose place y takes, and u = delta x; B, C in all lanes; sums over states; flags, or None."""

    delta: Any
    u: Any
    B: Any
    C: Any
    sums: Any
    marks: Any


def forward(
    reads: Reads, plan: Plan, *, softplus: bool, masked: bool
) -> tuple[Float[Array, "b t d"], Float[Array, "b n d"], Float[Array, "b spans n d"]]:
    """(y, the state after the last token, the state before every span)."""
    b, _, spans = plan.grid
    wide = plan.tiles * LANES
    blocks = layout.specs(reads, plan, lambda k: k)
    states = jax.ShapeDtypeStruct((b, plan.n, plan.d), jnp.float32)
    marks = pltpu.VMEM((SPAN, LANES), jnp.int32) if reads.flags is not None else None
    streams = [v for v in reads if v is not None]
    return pl.pallas_call(
        partial(_kernel, plan, softplus, masked),
        grid=plan.grid,
        in_specs=(blocks,),
        out_specs=(
            blocks.x,
            pl.BlockSpec((None, plan.n, wide), lambda i, j, k: (i, 0, j)),
            pl.BlockSpec((None, None, plan.n, wide), lambda i, j, k: (i, k, 0, j)),
        ),
        out_shape=(
            jax.ShapeDtypeStruct(reads.x.shape, reads.x.dtype),
            states,
            jax.ShapeDtypeStruct((b, spans, plan.n, plan.d), jnp.float32),
        ),
        scratch_shapes=(Desks(plan.desk(), plan.desk(), plan.spread(), plan.spread(), plan.sums(), marks),),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=layout.VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * b * plan.t * plan.d * plan.n,
            transcendentals=b * plan.t * plan.d * plan.n,
            bytes_accessed=sum(v.size * v.dtype.itemsize for v in streams) + reads.x.size * reads.x.dtype.itemsize,
        ),
        name=NAME,
    )(reads)


def _kernel(plan: Plan, softplus: bool, resets: bool, reads: Reads, y: Any, last: Any, saved: Any, desks: Desks):
    """`last` stays in VMEM for all spans of its channels, and is the state."""
    tokens, groups = plan.trips

    @pl.when(pl.program_id(2) == 0)
    def _():
        last[:] = reads.state[:]

    saved[:] = last[:]
    layout.lay_flags(reads.flags, desks.marks)

    def before(i: Array, _: None) -> None:
        lay = partial(layout.lay_steps, reads=reads, desks=desks, softplus=softplus)
        layout.prepare(i, reads, desks, plan, lay)

    def group(g: Array, _: None) -> None:
        channels = [g * plan.group + j for j in range(plan.group)]
        states = [last[:, lane(c)] for c in channels]
        states = jax.lax.fori_loop(0, tokens, partial(_advance, reads, desks, channels, resets), states)
        for c, state in zip(channels, states, strict=True):
            last[:, lane(c)] = state

    def after(i: Array, _: None) -> None:
        rows = tile(i)
        for j in range(plan.tiles):
            out = desks.delta[j, rows]
            if reads.D is not None:
                out = out + reads.D[:, lane(j)] * layout.read(reads.x, rows, j)
            if reads.z is not None:
                half = 0.5 * layout.read(reads.z, rows, j)
                out = out * (half + half * jnp.tanh(half))  # silu(z), with no division
            if desks.marks is not None:
                out = jnp.where(layout.has(desks.marks[rows], VALID), out, 0.0)
            y[rows, lane(j)] = out.astype(y.dtype)

    jax.lax.fori_loop(0, tokens, before, None)
    jax.lax.fori_loop(0, groups, group, None)
    jax.lax.fori_loop(0, tokens, after, None)


def _advance(reads: Reads, desks: Desks, channels: list, resets: bool, i: Array, states: list) -> list:
    """The recurrence over a tile of tokens; C h takes the place of delta."""
    n = reads.A.shape[0]

    def step(k: Array, states: list) -> list:
        token, after = i * TILE + k, []
        B, C = desks.B[token], desks.C[token]
        cut = layout.has(layout.row(desks.marks, token, n=n), RESET) if resets else None
        for j, (c, h) in enumerate(zip(channels, states, strict=True)):
            delta, u = layout.row(desks.delta, c, token, n=n), layout.row(desks.u, c, token, n=n)
            h = h if cut is None else jnp.where(cut, 0.0, h)
            after.append(jnp.exp2(delta * reads.A[:, lane(c)]) * h + B * u)
            layout.lay_down(desks.sums, j, k, C * after[-1])
        return after

    states = layout.each_token(step, states)
    for j, c in enumerate(channels):
        desks.delta[c, tile(i)] = layout.summed(desks.sums, j)
    return states
