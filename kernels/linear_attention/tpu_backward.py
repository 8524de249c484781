"""The backward kernel of linear attention on TPUs: one pass from the last chunk to the first, dS in VMEM.

From the state S before each chunk, that the forward pass saved, and with A = scale q k' * E (see `tpu_forward.py`):

    dv = w (A' do + u k dS)            dA = (do (w v)') * E, summed over the heads that share q and k
    dq = scale dA k + r do S'          dk = scale dA' q + u w v dS'          dS <- e^(b_last) dS + q' (r do)

with r = scale e^b and u = e^(b_last - b). The gates need no products of their own:

    db = do . o - (w v) . (dv / w)     db_last += sum of the parts of (w v) . (dv / w) that dS gave, + e^(b_last) dS . S
    dw = v . (dv / w)

Here o is formed anew, in float32, from the same rounded A and w v as dv / w: what a pair of tokens adds to db at one
end of it, it takes away at the other, so that rounding cancels in the sums over a chunk that dg is. No sum passes over
chunks: what earlier ones are owed stands in db_last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from longwave.kernels.linear_attention.tpu_forward import cost
from longwave.kernels.linear_attention.tpu_gates import (
    NN,
    NT,
    TN,
    Gates,
    Matrix,
    decays,
    dot,
    gates,
    own,
    parts,
    scores,
    stack,
    times,
    visible,
)
from longwave.kernels.linear_attention.tpu_layout import LANES, Plan

TOGETHER = 2, 3  # as in the forward kernel


class Refs(NamedTuple):
    q: Any  # (1, tokens, K)
    k: Any  # (1, tokens, K)
    v: Any  # (1, tokens, heads V)
    do: Any  # (1, tokens, heads V)
    rows: Any  # (1, heads, gates, tokens), or None
    starts: Any  # (1, 1, tokens), or None
    saved: Any  # (1, chunks, heads V, K), before each chunk
    dstate: Any  # (1, heads V, K), of the state behind the last token, of the step's segment


class Outs(NamedTuple):
    dq: Any  # (1, tokens, K), of the heads of this program
    dk: Any  # (1, tokens, K)
    dv: Any  # (1, tokens, heads V)
    rows: Any  # (1, heads, gates, tokens): of the sums of log decays, and of write gates; or None
    dstate: Any  # (1, heads V, K), of the state before the first token


class Scratch(NamedTuple):
    """Sums over the heads of a program, of one chunk; float32."""

    dS: Any  # (heads V, K)
    scores: Any  # (parts, chunk, part)
    dA: Any  # (parts, chunk, part)
    dq: Any  # (K, chunk)
    dk: Any  # (K, chunk)


class Chunk(NamedTuple):
    """What the slabs of a chunk share."""

    q: Array
    k: Array
    starts: Array | None
    matrices: list[Matrix]


class Gradients(NamedTuple):
    """Of a slab. dA, dq, dk: its part of the sums; rows: of each head."""

    dv: Float[Array, "j lanes"]
    dA: list[Matrix]
    dq: Float[Array, "K i"]
    dk: Float[Array, "K j"]
    dS: Float[Array, "V K"]
    rows: list[list[Float[Array, "1 i"]]]


def call(plan: Plan, ids: Int[Array, "b n"] | None, *arrays: Array | None) -> Outs:
    """ids: see `Plan.of_steps`.    arrays: as `Refs`. dq and dk of every program."""
    specs, given = plan.specs(reverse=True), Refs(*arrays)
    keys, values, gates = specs.keys(), specs.values(), (specs.rows(), specs.starts())
    blocks, shapes = outputs(plan, given.v, given.rows, given.dstate)
    high, triangle = plan.heads * plan.wide_v, (len(parts(plan)), plan.chunk, plan.chunk // len(parts(plan)))
    turned = plan.wide_k, plan.chunk
    sizes = (high, plan.wide_k), triangle, triangle, turned, turned
    none = [] if plan.gates else [None]

    def kernel(ids: Any, refs: Refs, *out: Any) -> None:
        _kernel(plan, ids, refs, Outs(*out[:3], *none, *out[3:-1]), out[-1])

    found = specs.call(
        kernel,
        ids,
        given,
        ins=Refs(keys, keys, values, values, *gates, specs.saved(), specs.state()),
        outs=tuple(spec for spec, x in zip(blocks, shapes, strict=True) if x is not None),
        shape=tuple(x for x in shapes if x is not None),
        state=4 - len(none),
        scratch=[Scratch(*(pltpu.VMEM(size, jnp.float32) for size in sizes))],
        cost_estimate=cost(plan, passes=2),
        name="linear_attention_backward",
    )
    return Outs(*found[:3], *none, *found[3:])


def outputs(plan: Plan, v: Array, rows: Array | None, dstate: Array) -> tuple[Outs, Outs]:
    """Their blocks and shapes."""
    specs, like = plan.specs(reverse=True), jax.ShapeDtypeStruct
    own, f32 = specs.keys(shared=False), jnp.float32
    summed = plan.groups < plan.h // plan.heads  # over programs, outside
    keys = (plan.b, plan.n * plan.tokens, plan.h // plan.heads * plan.wide_k)
    of_keys = like(keys, f32 if summed else plan.dtype)
    shapes = Outs(
        of_keys,
        of_keys,
        like(v.shape, plan.dtype),
        rows if rows is None else like(rows.shape, f32),
        like(dstate.shape, f32),
    )
    return Outs(own, own, specs.values(), specs.rows(), specs.state()), shapes


def _kernel(plan: Plan, ids: Any, refs: Refs, outs: Outs, scratch: Scratch) -> None:
    @pl.when(plan.specs(reverse=True).enters(ids))
    def _() -> None:
        scratch.dS[...] = refs.dstate[0]

    together = plan.together(*TOGETHER)[0]

    def visit(n: Any, _: None) -> None:
        places = [plan.chunks - 1 - n * together - x for x in range(together)]
        if plan.slabs == 1:
            _one_slab(plan, refs, outs, scratch, places)
        else:
            _many_slabs(plan, refs, outs, scratch, places[0])

    lax.fori_loop(0, plan.chunks // together, visit, None, unroll=plan.chunks == together)
    outs.dstate[0] = scratch.dS[...]


def _one_slab(plan: Plan, refs: Refs, outs: Outs, scratch: Scratch, places: list[Any]) -> None:
    """Some chunks, from the last of them on."""
    at = [pl.ds(pl.multiple_of(place * plan.chunk, plan.chunk), plan.chunk) for place in places]
    chunks = [_load(plan, refs, tokens) for tokens in at]
    loaded = [
        (refs.v[0, tokens], refs.do[0, tokens], refs.saved[0, place], _gates(plan, refs, 0, tokens))
        for tokens, place in zip(at, places, strict=True)
    ]
    dS, made = scratch.dS[...], []
    for chunk, (v, do, S, by_head) in zip(chunks, loaded, strict=True):
        made.append(_slab(plan, chunk, v, do, S, dS, by_head))
        dS = made[-1].dS
    keys = [_keys(plan, chunk, slab.dA, slab.dq, slab.dk) for chunk, slab in zip(chunks, made, strict=True)]
    for tokens, slab, of_keys in zip(at, made, keys, strict=True):
        outs.dv[0, tokens] = slab.dv
        _store_rows(plan, outs, 0, tokens, slab)
        outs.dq[0, tokens], outs.dk[0, tokens] = (x.astype(ref.dtype) for x, ref in zip(of_keys, outs[:2], strict=True))
    scratch.dS[...] = dS


def _many_slabs(plan: Plan, refs: Refs, outs: Outs, scratch: Scratch, place: Any) -> None:
    """One chunk, whose slabs add to sums in VMEM."""
    at = pl.ds(pl.multiple_of(place * plan.chunk, plan.chunk), plan.chunk)
    slabs, whole = plan.together(*TOGETHER)[1], _load(plan, refs, at)
    for n, (part, matrix) in enumerate(zip(parts(plan), whole.matrices, strict=True)):
        scratch.scores[n, part.writers] = matrix
        scratch.dA[n, part.writers] = jnp.zeros_like(matrix)
    scratch.dq[...] = jnp.zeros_like(scratch.dq)
    scratch.dk[...] = jnp.zeros_like(scratch.dk)

    def some(m: Any, _: None) -> None:
        numbers = [m * slabs + n for n in range(slabs)]
        lanes = [pl.ds(pl.multiple_of(n * plan.lanes, plan.lanes), plan.lanes) for n in numbers]
        chunk = whole._replace(matrices=[scratch.scores[x, part.writers] for x, part in enumerate(parts(plan))])
        loaded = [
            (refs.v[0, at, x], refs.do[0, at, x], refs.saved[0, place, x], scratch.dS[x], _gates(plan, refs, n, at))
            for n, x in zip(numbers, lanes, strict=True)
        ]
        made = [_slab(plan, chunk, *slab) for slab in loaded]
        for n, here, slab in zip(numbers, lanes, made, strict=True):
            outs.dv[0, at, here] = slab.dv
            scratch.dS[here] = slab.dS
            _store_rows(plan, outs, n, at, slab)
        for x, part in enumerate(parts(plan)):
            scratch.dA[x, part.writers] += sum(slab.dA[x] for slab in made)
        scratch.dq[...] += sum(slab.dq for slab in made)
        scratch.dk[...] += sum(slab.dk for slab in made)

    lax.fori_loop(0, plan.slabs // slabs, some, None, unroll=plan.slabs == slabs)
    dA = [scratch.dA[n, part.writers] for n, part in enumerate(parts(plan))]
    dq, dk = _keys(plan, whole, dA, scratch.dq[...], scratch.dk[...])
    outs.dq[0, at], outs.dk[0, at] = dq.astype(outs.dq.dtype), dk.astype(outs.dk.dtype)


def _load(plan: Plan, refs: Refs, at: Any) -> Chunk:
    q, k = refs.q[0, at], refs.k[0, at]
    starts = None if refs.starts is None else refs.starts[0, :, at]
    return Chunk(q, k, starts, [scores(plan, part, q, k, starts) for part in parts(plan)])


def _gates(plan: Plan, refs: Refs, slab: Any, at: Any) -> list[Gates]:
    starts = None if refs.starts is None else refs.starts[0, :, at]
    return [gates(plan, refs.rows, starts, slab * plan.fold + e, at) for e in range(plan.fold)]


def _store_rows(plan: Plan, outs: Outs, slab: Any, at: Any, made: Gradients) -> None:
    for e, rows in enumerate(made.rows):
        for x, row in enumerate(rows):
            outs.rows[0, slab * plan.fold + e, x : x + 1, at] = row


def _keys(plan: Plan, chunk: Chunk, dA: list[Matrix], dq: Array, dk: Array) -> tuple[Array, Array]:
    """dq and dk of a chunk (tokens, K). dq, dk: what came through states, (K, tokens)."""
    turned, into, of_writers = chunk.k.T, [], []
    ds = [visible(x, part, chunk.starts) for x, part in zip(dA, parts(plan), strict=True)]
    ds = [(x if plan.scale == 1 else plan.scale * x).astype(chunk.q.dtype) for x in ds]
    for part, of_pairs in zip(parts(plan), ds, strict=True):
        into.append(dot(turned[:, part.writers], of_pairs, NN))
        later = [x for x in parts(plan) if x.start >= part.start]
        of_writers.append(sum(dot(ds[x.start // LANES][part.readers], chunk.q[x.readers], NN) for x in later))
    return (dq + jnp.concatenate(into, 1)).T, dk.T + jnp.concatenate(of_writers)


def _slab(plan: Plan, chunk: Chunk, v: Array, do: Array, S: Array, dS: Array, by_head: list[Gates]) -> Gradients:
    v, do, dtype = v.T, do.T, chunk.q.dtype
    heads, both = [own(plan, e) for e in range(plan.fold)], plan.chunk > LANES
    S_low, dS_low = S.astype(dtype), dS.astype(dtype)
    written = [times(v[head], found.write).astype(dtype) for head, found in zip(heads, by_head, strict=True)]
    read = dot(S_low, chunk.q, NT) if plan.decay else None
    through = dot(dS_low, chunk.k, NT)
    if both:
        first = stack([times(w[:, :LANES], found.up).astype(dtype) for w, found in zip(written, by_head, strict=True)])
        second = stack([times(do[x, LANES:], f.down).astype(dtype) for x, f in zip(heads, by_head, strict=True)])
        crossing = chunk.matrices[1][:LANES].astype(dtype)
        passed = dot(first, crossing, NN) if plan.decay else None
        returned = dot(second, crossing, NT)
    dv, rows, readers, writers, left = [], [], [], [], []
    dA: list[Any] = [0.0] * len(parts(plan))
    for e, (head, found) in enumerate(zip(heads, by_head, strict=True)):
        inside, o = _pairs(plan, chunk.matrices, written[e], do[head], found, dA)
        tail = times(through[head], found.keep)
        before: Any = times(read[head], found.read) if plan.decay else None
        dwritten, crosses = inside + tail, None
        if both:
            to_first = times(returned[head], found.up)
            dwritten = _add(dwritten, to_first, 0)
            if plan.decay:
                to_second = times(passed[head], found.down)
                before = _add(before, to_second, LANES)
                crosses = to_first, to_second
        rows.append([])
        if plan.decay:
            db = _sum(do[head] * (o + before) - written[e] * dwritten)
            rows[-1].append(_at_ends(db, found, do[head], written[e], tail, S[head], dS[head], crosses))
        if plan.write:
            rows[-1].append(_sum(v[head] * dwritten))
        dv.append(times(dwritten, found.write).astype(dtype))
        readers.append(times(do[head], found.read).astype(dtype))
        writers.append(times(written[e], found.keep).astype(dtype))
        left.append(times(dS[head], found.carry))
    back, forth = stack(readers), stack(writers)
    if both:
        dA = [dA[0], jnp.concatenate([dot(first, second, TN), dA[1]])]
    of_keys = dot(S_low, back, TN), dot(dS_low, forth, TN)
    return Gradients(stack(dv).T, dA, *of_keys, stack(left) + dot(back, chunk.q, NN), rows)


def _pairs(
    plan: Plan, matrices: list[Matrix], written: Array, do: Array, found: Gates, dA: list[Any]
) -> tuple[Float[Array, "V j"], Any]:
    """(of w v, o or None) of one head, of pairs within a part; adds to dA."""
    inside, out = [], []
    for n, (part, s, E) in enumerate(zip(parts(plan), matrices, decays(plan, found), strict=True)):
        here = part.readers
        A = times(s[here], E).astype(written.dtype)
        inside.append(dot(do[:, here], A, NT))
        if plan.decay:
            out.append(dot(written[:, here], A, NN))
        dA[n] = dA[n] + times(dot(written[:, here], do[:, here], TN), E)
    return jnp.concatenate(inside, 1), jnp.concatenate(out, 1) if out else None


def _at_ends(
    db: Array, found: Gates, do: Array, written: Array, tail: Array, S: Array, dS: Array, crosses: Any
) -> Float[Array, "1 i"]:
    """db with what the ends of the chunk, and of its first part, are owed: see above."""
    total = lambda x: jnp.sum(_sum(x), 1, keepdims=True)
    at = lax.broadcasted_iota(jnp.int32, db.shape, 1)
    db = db + jnp.where(at == db.shape[1] - 1, total(written * tail) + found.carry * total(S * dS), 0)
    if crosses is None:
        return db
    to_first, to_second = crosses
    owed = total(written[:, :LANES] * to_first) - total(do[:, LANES:] * to_second)
    return db + jnp.where(at == LANES - 1, owed, 0)


def _add(x: Float[Array, "V i"], part: Float[Array, "V 128"], start: int) -> Float[Array, "V i"]:
    """x with `part` added to 128 of its tokens."""
    return jnp.concatenate([x[:, :LANES] + part, x[:, LANES:]] if not start else [x[:, :LANES], x[:, LANES:] + part], 1)


def _sum(x: Float[Array, "V i"]) -> Float[Array, "1 i"]:
    return jnp.sum(x, 0, keepdims=True)
