"""The backward kernel: spans from the last to the first, each replayed from its saved state, then walked back.

With a_t = exp(delta_t A) and g_t the gradient of h_t, which takes all that comes later:

    g_t = C_t dy_t + a_{t+1} g_{t+1}        dB_t = sum_d g_t u_t        dC_t = sum_d h_t dy_t        u_t = delta_t x_t
    w_t = a_t g_t h_{t-1}                   dA = sum_t w_t delta_t      ddelta_t = sum_n (w_t A + g_t B_t x_t)

dB and dC are sums over channels: partial ones for every block, summed outside. The states of a span lie in VMEM for a
group of channels at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from longwave.kernels.selective_scan import tpu_layout as layout
from longwave.kernels.selective_scan.tpu_layout import LANES, LOG2E, RESET, SPAN, TILE, VALID, Plan, Reads, lane, tile

MOST = 256  # states of 128 channels in a block
NAME = "selective_scan_backward"


class Writes(NamedTuple):
    """Gradients: dx, ddt, dz (b, t, d); dA (b, n, d); dD, dbias (b, 1, d); dB, dC (b, blocks, n, t); dstate (b, n, d).

    dz, dD and dbias are None where there is no such input.
    """

    dx: Any
    ddt: Any
    dz: Any
    dA: Any
    dD: Any
    dbias: Any
    dB: Any
    dC: Any
    dstate: Any


class Desks(NamedTuple):
    """In VMEM, float32. For each token and channel: delta; u, whose place sum_n g B takes; dy of the ungated output;
    sum_n w A; and C h where the output is gated. For each token and state, in all lanes: B, C; dB, dC of the lane.

    h: the states of a group of channels, before a span and after each of its tokens.    sums: over states.
    """

    delta: Any
    u: Any
    dy: Any
    w: Any
    y: Any
    B: Any
    C: Any
    dB: Any
    dC: Any
    h: Any
    sums: Any
    more: Any
    marks: Any


def backward(reads: Reads, plan: Plan, *, softplus: bool, masked: bool) -> Writes:
    """masked: whether flags hold resets."""
    b, blocks, spans = plan.grid
    wide, last = plan.tiles * LANES, spans - 1
    into = layout.specs(reads, plan, lambda k: last - k)
    still = pl.BlockSpec((None, plan.n, wide), lambda i, j, k: (i, 0, j))
    row = pl.BlockSpec((None, 1, wide), lambda i, j, k: (i, 0, j))
    narrow = pl.BlockSpec((None, None, plan.n, SPAN), lambda i, j, k: (i, j, 0, last - k))
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    like = lambda v: None if v is None else jax.ShapeDtypeStruct(v.shape, v.dtype)
    rows = lambda v: None if v is None else float32(b, 1, plan.d)
    states, sums = float32(b, plan.n, plan.d), float32(b, blocks, plan.n, spans * SPAN)
    shapes = Writes(
        like(reads.x), like(reads.dt), like(reads.z), states, rows(reads.D), rows(reads.dt_bias), sums, sums, states
    )
    by_name = Writes(into.x, into.x, into.x, still, row, row, narrow, narrow, still)
    gated = reads.z is not None
    desks = Desks(
        *(plan.desk() for _ in range(4)),
        plan.desk() if gated else None,
        *(plan.spread() for _ in range(4)),
        pltpu.VMEM((plan.group * (plan.tokens + 1), plan.n, LANES), jnp.float32),
        plan.sums(),
        plan.sums(),
        pltpu.VMEM((SPAN, LANES), jnp.int32) if reads.flags is not None else None,
    )
    moved = [v for v in (*reads, *shapes) if v is not None]
    (out,) = pl.pallas_call(
        partial(_kernel, plan, softplus, masked),
        grid=plan.grid,
        in_specs=(into,),
        out_specs=(Writes(*(None if v is None else spec for v, spec in zip(shapes, by_name, strict=True))),),
        out_shape=(shapes,),
        scratch_shapes=(desks,),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=layout.VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=(21 + 2 * gated) * b * plan.t * plan.d * plan.n,
            transcendentals=2 * b * plan.t * plan.d * plan.n,
            bytes_accessed=sum(v.size * v.dtype.itemsize for v in moved),
        ),
        name=NAME,
    )(reads)
    return out


def _kernel(plan: Plan, softplus: bool, resets: bool, reads: Reads, writes: Writes, desks: Desks) -> None:
    """Gradients that sum over time wait in VMEM for all spans of their channels; so does a g, which `dstate` is."""
    tokens, groups = plan.trips

    @pl.when(pl.program_id(2) == 0)
    def _():
        writes.dstate[:] = reads.dfinal[:]
        for ref in (writes.dA, writes.dD, writes.dbias):
            if ref is not None:
                ref[:] = jnp.zeros_like(ref)

    layout.lay_flags(reads.flags, desks.marks)
    desks.dB[:], desks.dC[:] = jnp.zeros_like(desks.dB), jnp.zeros_like(desks.dC)

    def before(rows: Any, j: int) -> None:
        layout.lay_steps(rows, j, reads, desks, softplus=softplus)
        dy = layout.read(reads.dy, rows, j)
        if reads.z is not None:
            half = 0.5 * layout.read(reads.z, rows, j)
            dy = dy * (half + half * jnp.tanh(half))
        desks.dy[j, rows] = _seen(dy, rows, desks)

    def group(g: Array, _: None) -> None:
        channels = [g * plan.group + j for j in range(plan.group)]
        states = [reads.state[:, lane(c)] for c in channels]
        for j, state in enumerate(states):
            desks.h[j * (plan.tokens + 1)] = state
        jax.lax.fori_loop(0, tokens, partial(_replay, reads, desks, channels, resets), states)
        carry = [writes.dstate[:, lane(c)] for c in channels], [writes.dA[:, lane(c)] for c in channels]
        back = lambda i, carry: _walk_back(reads, desks, channels, resets, tokens - 1 - i, carry)
        for ref, found in zip((writes.dstate, writes.dA), jax.lax.fori_loop(0, tokens, back, carry), strict=True):
            for c, value in zip(channels, found, strict=True):
                ref[:, lane(c)] = value

    after = lambda i, _: _put_out(i, reads, writes, desks, softplus=softplus, tiles=plan.tiles)
    jax.lax.fori_loop(0, tokens, lambda i, _: layout.prepare(i, reads, desks, plan, before), None)
    jax.lax.fori_loop(0, groups, group, None)
    jax.lax.fori_loop(0, tokens, after, None)
    _put_narrow(tokens, desks.dB, writes.dB)
    _put_narrow(tokens, desks.dC, writes.dC)


def _seen(value: Array, rows: Any, desks: Desks) -> Array:
    return value if desks.marks is None else jnp.where(layout.has(desks.marks[rows], VALID), value, 0.0)


def _cut(desks: Desks, token: Any, n: int, resets: bool) -> Callable[[Array], Array]:
    """Zero in place of what a reset at this token cuts off."""
    if not resets:
        return lambda value: value
    cut = layout.has(layout.row(desks.marks, token, n=n), RESET)
    return lambda value: jnp.where(cut, 0.0, value)


def _replay(reads: Reads, desks: Desks, channels: list, resets: bool, i: Array, states: list) -> list:
    """The states after each token of a tile, and C h."""
    n = reads.A.shape[0]

    def step(k: Array, states: list) -> list:
        token, after = i * TILE + k, []
        B, C, cut = desks.B[token], desks.C[token], _cut(desks, token, n, resets)
        for j, (c, h) in enumerate(zip(channels, states, strict=True)):
            delta, u = layout.row(desks.delta, c, token, n=n), layout.row(desks.u, c, token, n=n)
            after.append(jnp.exp2(delta * reads.A[:, lane(c)]) * cut(h) + B * u)
            desks.h[j * (tokens + 1) + token + 1] = after[-1]
            if desks.y is not None:
                layout.lay_down(desks.sums, j, k, C * after[-1])
        return after

    tokens = desks.delta.shape[1]
    states = layout.each_token(step, states)
    if desks.y is not None:
        for j, c in enumerate(channels):
            desks.y[c, tile(i)] = layout.summed(desks.sums, j)
    return states


def _walk_back(reads: Reads, desks: Desks, channels: list, resets: bool, i: Array, carry: tuple) -> tuple:
    """(a g of the tile's first token, dA) from those of the token behind it; sum_n g B takes the place of u."""
    n, tokens = reads.A.shape[0], desks.delta.shape[1]

    def step(behind: Array, carry: tuple) -> tuple:
        k, found = TILE - 1 - behind, []
        token = i * TILE + k
        B, C, cut = desks.B[token], desks.C[token], _cut(desks, token, n, resets)
        dB, dC = desks.dB[token], desks.dC[token]
        for j, (c, handed, dA) in enumerate(zip(channels, *carry, strict=True)):
            delta, u, dy = (layout.row(v, c, token, n=n) for v in (desks.delta, desks.u, desks.dy))
            A, at = reads.A[:, lane(c)], j * (tokens + 1) + token
            g = C * dy + handed
            dC = dC + desks.h[at + 1] * dy
            dB = dB + g * u
            layout.lay_down(desks.sums, j, k, g * B)
            handed = cut(jnp.exp2(delta * A) * g)
            w = handed * cut(desks.h[at])
            layout.lay_down(desks.more, j, k, w * A)
            found.append((handed, dA + w * delta))
        desks.dB[token], desks.dC[token] = dB, dC
        return tuple(map(list, zip(*found, strict=True)))

    carry = layout.each_token(step, carry)
    for j, c in enumerate(channels):
        desks.u[c, tile(i)] = layout.summed(desks.sums, j)
        desks.w[c, tile(i)] = layout.summed(desks.more, j)
    return carry


def _put_out(i: Array, reads: Reads, writes: Writes, desks: Desks, *, softplus: bool, tiles: int) -> None:
    """What is a number for each token and channel; A is times log2(e) in the kernel."""
    rows = tile(i)
    for j in range(tiles):
        x, delta, dy, gB = (layout.read(reads.x, rows, j), *(v[j, rows] for v in (desks.delta, desks.dy, desks.u)))
        x = _seen(x, rows, desks)
        dx, ddt = delta * gB, desks.w[j, rows] * (1 / LOG2E) + x * gB
        if softplus:
            raw = layout.raw_step(reads, rows, j)
            ddt = ddt * jnp.exp2(LOG2E * (raw - layout.step_size(raw, softplus)))  # the logistic function of raw
        ddt = _seen(ddt, rows, desks)
        if reads.D is not None:
            dx = dx + reads.D[:, lane(j)] * dy
            writes.dD[:, lane(j)] += jnp.sum(x * dy, axis=0, keepdims=True)
        if reads.dt_bias is not None:
            writes.dbias[:, lane(j)] += jnp.sum(ddt, axis=0, keepdims=True)
        if reads.z is not None:
            z, y = layout.read(reads.z, rows, j), desks.y[j, rows]
            if reads.D is not None:
                y = y + reads.D[:, lane(j)] * x
            sigmoid = 0.5 + 0.5 * jnp.tanh(0.5 * z)
            dz = layout.read(reads.dy, rows, j) * y * sigmoid * (1.0 + z * (1.0 - sigmoid))
            writes.dz[rows, lane(j)] = _seen(dz, rows, desks).astype(writes.dz.dtype)
        writes.dx[rows, lane(j)] = dx.astype(writes.dx.dtype)
        writes.ddt[rows, lane(j)] = ddt.astype(writes.ddt.dtype)


def _put_narrow(tokens: int, lanes: Any, out: Any) -> None:
    """The sums over lanes of each token's numbers, side by side."""
    column = jax.lax.broadcasted_iota(jnp.int32, out.shape, 1)

    def put(i: Array, found: Array) -> Array:
        def place(k: Array, found: Array) -> Array:
            token = i * TILE + k
            return jnp.where(column == token, jnp.sum(lanes[token], axis=1, keepdims=True), found)

        return layout.each_token(place, found)

    out[:] = jax.lax.fori_loop(0, tokens, put, jnp.zeros(out.shape, jnp.float32))
