"""The backward kernel of linear attention with an erase gate: from the last span to the first, dS in VMEM.

A span's chunks are first run forward again, from the state that was saved before it: each needs the state S before it
and what its tokens wrote, u = r Y (see `tpu_erase_inverse.py`). Then, from the last chunk on,

    du = A' do + e^(b_last - b) k dS        dr = X' du        dv = w dr        dL = -dr u', strictly below the diagonal

for u = X r with r = w v - beta e^b k S and X = (I + L)^-1: the rule of the inverse, dL = -X' (du r') X', needs no
product of three matrices once u and dr are there. q sees S and u as in `tpu_backward.py`; k is also what erases:

    dS <- e^(b_last) dS + q' (scale e^b do) - k' (beta e^b dr)

A pair of tokens adds Z_ij = dA_ij A_ij + dL_ij L_ij to db_i and takes it from db_j; states count at one end alone. So
sums of db cancel digit for digit, and no sum passes over chunks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from longwave.kernels.linear_attention import tpu_backward
from longwave.kernels.linear_attention.tpu_backward import Outs
from longwave.kernels.linear_attention.tpu_forward import cost, solved
from longwave.kernels.linear_attention.tpu_gates import (
    NN,
    NT,
    TN,
    Gates,
    Matrix,
    Row,
    decays,
    dot,
    gates,
    parts,
    scores,
    times,
    visible,
)
from longwave.kernels.linear_attention.tpu_layout import Plan


class Refs(NamedTuple):
    q: Any  # (1, tokens, K)
    k: Any  # (1, tokens, K)
    v: Any  # (1, tokens, V)
    do: Any  # (1, tokens, V)
    rows: Any  # (1, 1, gates, tokens)
    starts: Any  # (1, 1, tokens), or None
    inverse: Any  # (1, 1, tokens, chunk)
    saved: Any  # (1, spans, V, K), before each span
    dstate: Any  # (1, V, K), of the state behind the last token, of the step's segment


class Chunk(NamedTuple):
    """What is loaded of one, and the state before it with what it leads to."""

    q: Float[Array, "i K"]
    k: Float[Array, "j K"]
    v: Float[Array, "V j"]
    do: Float[Array, "V i"]
    starts: Row | None
    found: Gates
    inverse: Matrix
    S: Any = None  # (V, K)
    read: Any = None  # (V, i): k S
    u: Any = None  # (V, j)


class Gradients(NamedTuple):
    dq: Float[Array, "i K"]
    dk: Float[Array, "j K"]
    dv: Float[Array, "j V"]
    rows: list[Row]


def call(plan: Plan, ids: Int[Array, "b n"] | None, *arrays: Array | None) -> Outs:
    """ids: see `Plan.of_steps`.    arrays: as `Refs`. dq and dk of every head."""
    specs, given = plan.specs(reverse=True), Refs(*arrays)
    keys, values, gates = specs.keys(), specs.values(), (specs.rows(), specs.starts())
    blocks, shapes = tpu_backward.outputs(plan, given.v, given.rows, given.dstate)
    found = specs.call(
        lambda ids, refs, *out: _kernel(plan, ids, refs, Outs(*out[:-1]), out[-1]),
        ids,
        given,
        ins=Refs(keys, keys, values, values, *gates, specs.inverses(), specs.saved(), specs.state()),
        outs=tuple(blocks),
        shape=tuple(shapes),
        state=4,
        scratch=[pltpu.VMEM((plan.wide_v, plan.wide_k), jnp.float32)],
        cost_estimate=cost(plan, passes=3),
        name="linear_attention_erase_backward",
    )
    return Outs(*found)


def _kernel(plan: Plan, ids: Any, refs: Refs, outs: Outs, dstate: Any) -> None:
    @pl.when(plan.specs(reverse=True).enters(ids))
    def _() -> None:
        dstate[...] = refs.dstate[0]

    spans = plan.chunks // plan.each

    def visit(n: Any, _: None) -> None:
        place = spans - 1 - n
        at = [_tokens(plan, place * plan.each + x) for x in range(plan.each)]
        chunks = _again(plan, refs.saved[0, place], [_load(plan, refs, tokens) for tokens in at])
        dS, made = dstate[...], []
        for chunk in reversed(chunks):
            dS, found = _back(plan, chunk, dS)
            made.append(found)
        for tokens, found in zip(reversed(at), made, strict=True):
            for ref, x in zip(outs[:3], found[:3], strict=True):
                ref[0, tokens] = x.astype(ref.dtype)
            for x, row in enumerate(found.rows):
                outs.rows[0, 0, x : x + 1, tokens] = row
        dstate[...] = dS

    lax.fori_loop(0, spans, visit, None, unroll=spans == 1)
    outs.dstate[0] = dstate[...]


def _tokens(plan: Plan, place: Any) -> Any:
    return pl.ds(pl.multiple_of(place * plan.chunk, plan.chunk), plan.chunk)


def _load(plan: Plan, refs: Refs, at: Any) -> Chunk:
    starts = None if refs.starts is None else refs.starts[0, :, at]
    found = gates(plan, refs.rows, starts, 0, at)
    q, k, v, do = (ref[0, at] for ref in refs[:4])
    return Chunk(q, k, v.T, do.T, starts, found, refs.inverse[0, 0, at])


def _again(plan: Plan, S: Float[Array, "V K"], chunks: list[Chunk]) -> list[Chunk]:
    """The forward pass over a span."""
    done = []
    for chunk in chunks:
        read = dot(S.astype(plan.dtype), chunk.k, NT)
        u = solved(times(chunk.v, chunk.found.write), read, chunk.found, chunk.inverse)
        done.append(chunk._replace(S=S, read=read, u=u))
        written = times(u, chunk.found.keep).astype(plan.dtype)
        S = times(S, chunk.found.carry) + dot(written, chunk.k, NN)
    return done


def _back(plan: Plan, chunk: Chunk, dS: Float[Array, "V K"]) -> tuple[Array, Gradients]:
    """(dS before the chunk, gradients of its tokens)."""
    (part,), (E,), dtype = parts(plan), decays(plan, chunk.found), plan.dtype
    q, k, v, do, starts, found, Y, S, read, u = chunk
    low = lambda x: x.astype(dtype)
    strictly = lambda x: visible(x, part, starts, strictly=True)
    A = times(scores(plan, part, q, k, starts), E)
    G = times(strictly(dot(k, k, NT)), E)  # L is beta G
    tail = times(dot(low(dS), k, NT), found.keep)
    dr = dot(low(dot(do, low(A), NT) + tail), Y, NT)

    dA, dL = dot(low(u), do, TN), -strictly(dot(low(u), low(dr), TN))
    dscores = low(plan.scale * times(visible(dA, part, starts), E))
    dgram = times(times(dL, E), found.erase)
    back = low(times(do, found.read))
    lost = low(-times(times(dr, found.enter), found.erase))
    queries, states = jnp.concatenate([q, k]), jnp.concatenate([low(dS), low(S)])
    dq = dot(jnp.concatenate([back, dscores]), jnp.concatenate([low(S), k]), TN)
    dk = dot(jnp.concatenate([low(times(u, found.keep)), lost]), states, TN)
    dk = dk + dot(jnp.concatenate([dscores, low(dgram + dgram.T)], 1), queries, NN)
    before = times(dS, found.carry) + dot(jnp.concatenate([back, lost], 1), queries, NN)

    erased = times(_sum(dr * read), found.enter)
    dbeta, rows = _sum(dL * G) - erased, []
    if plan.decay:
        Z = strictly(dA) * A + times(dL * G, found.erase)
        db = _sum(Z) - _sum(Z.T) + _sum(do * times(dot(low(S), q, NT), found.read)) - times(erased, found.erase)
        at_end = jnp.sum(_sum(u * tail), 1, keepdims=True) + found.carry * jnp.sum(_sum(S * dS), 1, keepdims=True)
        last = lax.broadcasted_iota(jnp.int32, db.shape, 1) == db.shape[1] - 1
        rows.append(db - _sum(u * tail) + jnp.where(last, at_end, 0))
    if plan.write:
        rows.append(_sum(v * dr))
    return before, Gradients(dq, dk, times(dr, found.write).T, [*rows, dbeta])


def _sum(x: Float[Array, "n i"]) -> Row:
    """Over values, or over what wrote."""
    return jnp.sum(x, 0, keepdims=True)
