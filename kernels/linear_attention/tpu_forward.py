"""The forward kernel of linear attention on TPUs: chunks of 256 tokens, the state in VMEM from one to the next.

    o = (scale q k' * E) (w v) + scale e^b q S          S' = e^(b_last) S + (k e^(b_last - b))' (w v)

with E_ij = e^(b_i - b_j) for j <= i, and b the sum of log decays from the chunk's first token on
(Mamba-2, arXiv:2405.21060, section 6; all of it transposed, see `tpu_layout.py`). With an erase gate u = r Y takes the
place of w v, with r = w v - beta e^b k S and Y from `tpu_erase_inverse.py`.

A program holds heads that share q and k, whose scores are formed once a chunk. Several chunks, or slabs of heads, stand
in one stretch of code: loads come first and stores last, so that nothing keeps the compiler from running them side by
side. A chunk waits for the one before it only in the product and the addition that S is made of; with an erase gate in
k S and r Y, too.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from longwave.kernels.linear_attention.tpu_gates import (
    NN,
    NT,
    Gates,
    Matrix,
    across,
    decays,
    dot,
    gates,
    own,
    parts,
    scores,
    stack,
    times,
)
from longwave.kernels.linear_attention.tpu_layout import Plan

TOGETHER = 4, 3  # chunks of a program with one slab, slabs of a chunk: in one stretch of code, at most


class Refs(NamedTuple):
    q: Any  # (1, tokens, K)
    k: Any  # (1, tokens, K)
    v: Any  # (1, tokens, heads V)
    rows: Any  # (1, heads, gates, tokens), or None
    starts: Any  # (1, 1, tokens), or None
    inverse: Any  # (1, heads, tokens, chunk), see `tpu_erase_inverse.py`, or None
    state: Any  # (1, heads V, K), before the first token, of the step's segment


def call(
    plan: Plan, ids: Int[Array, "b n"] | None, *arrays: Array | None
) -> tuple[Float[Array, "b T hV"], Float[Array, "b s hV K"], Float[Array, "b spans hV K"]]:
    """(o, final states, the states before each span). ids: see `Plan.of_steps`.    arrays: as `Refs`."""
    specs, like, given = plan.specs(), jax.ShapeDtypeStruct, Refs(*arrays)
    keys, values, gates = specs.keys(), specs.values(), (specs.rows(), specs.starts())
    rows, whole = (n * plan.wide_v for n in (plan.heads, plan.h))
    saved = like((plan.b, plan.n * plan.chunks // plan.each, whole, plan.wide_k), jnp.float32)
    triangle = (len(parts(plan)), plan.chunk, plan.chunk // len(parts(plan)))
    return specs.call(
        partial(_kernel, plan),
        ids,
        given,
        ins=Refs(keys, keys, values, *gates, specs.inverses(), specs.state()),
        outs=(values, specs.state(), specs.saved()),
        shape=(like(given.v.shape, plan.dtype), like(given.state.shape, jnp.float32), saved),
        state=1,
        scratch=[pltpu.VMEM((rows, plan.wide_k), jnp.float32), pltpu.VMEM(triangle, jnp.float32)],
        cost_estimate=cost(plan, passes=1),
        name="linear_attention",
    )


def cost(plan: Plan, *, passes: int) -> pl.CostEstimate:
    """passes: over the arrays and products of a forward pass."""
    tokens, values = plan.b * plan.n * plan.tokens, plan.h * plan.wide_v
    states = 4 * values * plan.wide_k * (tokens // plan.chunk)
    return pl.CostEstimate(
        flops=passes * flops(plan),
        transcendentals=tokens * plan.h * plan.chunk // 2 * plan.decay,
        bytes_accessed=2 * passes * tokens * (values + plan.groups * plan.wide_k) * plan.dtype.itemsize + states,
    )


def flops(plan: Plan) -> int:
    """Of a forward pass: half a square of each chunk, the reading and the writing of the state."""
    tokens = plan.b * plan.t
    inside = plan.chunk * (plan.groups * plan.K + plan.h * plan.V)
    return tokens * (inside + 4 * plan.h * plan.K * plan.V)


def _kernel(plan: Plan, ids: Any, refs: Refs, o: Any, final: Any, saved: Any, state: Any, shared: Any) -> None:
    @pl.when(plan.specs().enters(ids))
    def _() -> None:
        state[...] = refs.state[0]

    chunks, slabs = plan.together(*TOGETHER)

    def save(place: Any, here: Any, S: Array) -> None:
        if plan.each == 1:
            saved[0, place, here] = S
            return

        @pl.when(lax.rem(place, jnp.int32(plan.each)) == 0)
        def _() -> None:
            saved[0, lax.div(place, jnp.int32(plan.each)), here] = S

    def visit(c: Any, _: None) -> None:
        places = [c * chunks + n for n in range(chunks)]
        at = [pl.ds(pl.multiple_of(place * plan.chunk, plan.chunk), plan.chunk) for place in places]
        q, k = ([ref[0, tokens] for tokens in at] for ref in (refs.q, refs.k))
        starts = [None if refs.starts is None else refs.starts[0, :, tokens] for tokens in at]
        found = [
            [scores(plan, part, *of, start) for part in parts(plan)] for *of, start in zip(q, k, starts, strict=True)
        ]
        if plan.slabs > slabs:  # then of one chunk
            for n, part in enumerate(parts(plan)):
                shared[n, part.writers] = found[0][n]

        def some(m: Any, _: None) -> None:
            numbers = [m * slabs + n for n in range(slabs)]
            lanes = [pl.ds(pl.multiple_of(n * plan.lanes, plan.lanes), plan.lanes) for n in numbers]
            before = [state[here] for here in lanes]
            gated = [
                [[gates(plan, refs.rows, start, n * plan.fold + e, tokens) for e in range(plan.fold)] for n in numbers]
                for tokens, start in zip(at, starts, strict=True)
            ]
            inverses = [[refs.inverse[0, n, tokens] if plan.erase else None for n in numbers] for tokens in at]
            values = [[refs.v[0, tokens, here] for here in lanes] for tokens in at]
            keep, out = [], []
            for n in range(chunks):
                matrices = found[n]
                if plan.slabs > slabs:
                    matrices = [shared[x, part.writers] for x, part in enumerate(parts(plan))]
                keep.append(before)
                ends = [
                    _slab(plan, q[n], k[n], v, S, matrices, by_head, solve)
                    for v, S, by_head, solve in zip(values[n], before, gated[n], inverses[n], strict=True)
                ]
                out.append([end[0] for end in ends])
                before = [end[1] for end in ends]
            for n, tokens in enumerate(at):
                for x, here in enumerate(lanes):
                    o[0, tokens, here] = out[n][x]
                    save(places[n], here, keep[n][x])
            for here, S in zip(lanes, before, strict=True):
                state[here] = S

        lax.fori_loop(0, plan.slabs // slabs, some, None, unroll=plan.slabs == slabs)

    lax.fori_loop(0, plan.chunks // chunks, visit, None, unroll=plan.chunks == chunks)
    final[0] = state[...]


def _slab(
    plan: Plan,
    q: Array,
    k: Array,
    v: Array,
    S: Array,
    matrices: list[Matrix],
    by_head: list[Gates],
    inverse: Matrix | None,
) -> tuple[Float[Array, "i lanes"], Float[Array, "V K"]]:
    """(o, the state behind the chunk) of the heads of a slab."""
    turned, read = v.T, dot(S.astype(q.dtype), q, NT)
    written = [times(turned[own(plan, e)], found.write) for e, found in enumerate(by_head)]
    if inverse is not None:
        written = [solved(written[0], dot(S.astype(k.dtype), k, NT), by_head[0], inverse)]
    passed = across(plan, written, matrices, by_head, q.dtype)
    out, writes, left = [], [], []
    for e, found in enumerate(by_head):
        here = []
        for part, s, E in zip(parts(plan), matrices, decays(plan, found), strict=True):
            A = times(s[part.readers], E).astype(q.dtype)
            here.append(dot(written[e][:, part.readers].astype(q.dtype), A, NN))
        if passed is not None:
            here[1] = here[1] + times(passed[own(plan, e)], found.down)
        out.append((jnp.concatenate(here, 1) + times(read[own(plan, e)], found.read)).astype(v.dtype))
        writes.append(times(written[e], found.keep).astype(q.dtype))
        left.append(times(S[own(plan, e)], found.carry))
    return stack(out).T, stack(left) + dot(stack(writes), k, NN)


def solved(given: Float[Array, "V i"], read: Float[Array, "V i"], found: Gates, inverse: Matrix) -> Array:
    """(V, i): what tokens write that first erase, (w v - beta e^b k S) Y.    given: w v.    read: k S."""
    erased = times(times(read, found.enter), found.erase)
    return dot((given.astype(jnp.float32) - erased).astype(inverse.dtype), inverse, NN)
