"""Softmax attention against a float64 loop over queries, its memory, precision and partitioning."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from longwave.kernels.attention import Blocks, Causal, Mask, Sinks, Window, attention, chunked, flash, merge, reference
from longwave.kernels.attention.mask import And
from longwave.kernels.attention.reference import Coordinates, Scores
from longwave.kernels.partition import Axes
from tests.tolerances import (
    ATTENTION_FORWARD,
    ATTENTION_GRADIENT,
    BFLOAT16_FACTOR,
    assert_close,
    relative_error,
)

F32, G32 = ATTENTION_FORWARD["float32"], ATTENTION_GRADIENT["float32"]


class Case(NamedTuple):
    """Sizes, what a query at position i sees at j (not by the masks), and where tokens stand."""

    tq: int
    tk: int
    h: int
    kv: int
    mask: Mask
    sees: object
    at: object = lambda b, tq, tk: (np.arange(tq), np.arange(tk), None, None)


def documents(b, tq, tk):
    """Rows: padded left, padded right, two documents, all padding. Positions restart in each document."""
    segment = np.zeros((b, tk), int)
    segment[0, :7], segment[1, 17:], segment[2, 11:], segment[3] = -1, -1, 1, -1
    position = np.arange(tk) * np.ones((b, 1), int)
    position[0] -= 7
    position[2, 11:] -= 11
    return position[:, -tq:], position, segment[:, -tq:], segment


def cache(b, tq, tk):
    """Queries behind a ring of keys that stand in any order, some slots empty."""
    position = np.stack([np.random.default_rng(row).permutation(tk) for row in range(b)])
    live = position < np.array([tk, 9, 1, 0])[:, None]
    return np.arange(tq) + np.array([tk, 9, 1, 0])[:, None], position, np.zeros((b, tq), int), live - 1


CASES = {
    "full": Case(16, 16, 2, 2, Mask(), lambda i, j: True),
    "causal": Case(29, 29, 4, 2, Causal(), lambda i, j: j <= i),
    "window": Case(40, 40, 4, 1, Causal() & Window(5), lambda i, j: i - 5 < j <= i),
    "two-sided window": Case(21, 33, 1, 1, Window(4), lambda i, j: abs(i - j) < 4),
    "window and sinks": Case(
        37, 37, 4, 2, Causal() & (Window(6) | Sinks(2)), lambda i, j: j <= i and (i - j < 6 or j < 2)
    ),
    "documents": Case(23, 23, 2, 2, Causal(), lambda i, j: j <= i, documents),
    "documents, window and sinks": Case(
        20,
        23,
        2,
        1,
        Causal() & (Window(4) | Sinks(3)),
        lambda i, j: j <= i and (i - j < 4 or j < 3),
        documents,
    ),
    "cache": Case(6, 19, 4, 2, Causal() & Window(12), lambda i, j: i - 12 < j <= i, cache),
}
B, D, DV = 4, 8, 6


def inputs(case, *, dtype=np.float64):
    draw = np.random.default_rng(0).normal
    shapes = (case.tq, case.h, D), (case.tk, case.kv, D), (case.tk, case.kv, DV)
    q, k, v = (draw(size=(B, *shape)) for shape in shapes)
    do, dlse = draw(size=(B, case.tq, case.h, DV)), draw(size=(B, case.tq, case.h))
    return tuple(x.astype(dtype) for x in (q, k, v, do, dlse))


def oracle(case, q, k, v, do, dlse, scale=D**-0.5):
    """o, lse, and the gradients of <do, o> + <dlse, lse>, query after query."""
    places = [x if x is None or x.ndim == 2 else np.tile(x, (B, 1)) for x in case.at(B, case.tq, case.tk)]
    q_position, k_position, q_segment, k_segment = places
    o, lse = np.zeros_like(do), np.full(dlse.shape, -np.inf)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, i, h in np.ndindex(B, case.tq, case.h):
        g = h // (case.h // case.kv)
        seen = [j for j in range(case.tk) if case.sees(q_position[b, i], k_position[b, j])]
        if k_segment is not None:
            seen = [j for j in seen if q_segment[b, i] == k_segment[b, j] >= 0]
        if not seen:
            continue
        K, V = k[b, seen, g], v[b, seen, g]
        s = scale * K @ q[b, i, h]
        lse[b, i, h] = s.max() + np.log(np.exp(s - s.max()).sum())
        p = np.exp(s - lse[b, i, h])
        o[b, i, h] = p @ V
        dp = V @ do[b, i, h]
        ds = p * (dp - p @ dp + dlse[b, i, h])
        dq[b, i, h] = scale * ds @ K
        dk[b, seen, g] += scale * np.outer(ds, q[b, i, h])
        dv[b, seen, g] += np.outer(p, do[b, i, h])
    return o, lse, dq, dk, dv


def run(form, q, k, v, do, dlse):
    """o, lse and gradients of a form; the gradient that reaches lse = -inf is not a number on purpose."""

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
    def f(q, k, v, do, dlse):
        (o, lse), pull = jax.vjp(form, q, k, v)
        return o, lse, *pull((do.astype(o.dtype), jnp.where(lse == -jnp.inf, jnp.nan, dlse)))

    return f(q, k, v, do, dlse)


def compare(got, want):
    blind = np.isneginf(want[1])
    np.testing.assert_array_equal(np.isneginf(got[1]), blind)
    assert_close(np.where(blind, 0, got[1]), np.where(blind, 0, want[1]), F32, "lse")
    assert_close(got[0], want[0], F32, "o")
    for name, x, y in zip(("dq", "dk", "dv"), got[2:], want[2:], strict=True):
        assert_close(x, y, G32, name)


def in_blocks(mask, block, scale=D**-0.5):
    forms = flash.Forms(default=flash.Form(*(partial(f, block=block) for f in (chunked.forward, chunked.backward))))
    return partial(flash.attention, forms, Scores(mask, scale))


def of_blocks(case, block=8):
    q_position, k_position, q_segment, k_segment = case.at(B, case.tq, case.tk)
    at = jax.tree.map(jnp.asarray, (Coordinates(q_position, q_segment), Coordinates(k_position, k_segment)))
    return lambda q, k, v: in_blocks(case.mask, block)(q, k, v, *at)


def public(case, **more):
    at = case.at(B, case.tq, case.tk)
    return partial(attention, mask=case.mask, return_lse=True, positions=at[:2], segment_ids=at[2:], **more)


@pytest.mark.parametrize("name", CASES)
def test_blocks_equal_the_oracle(name):
    case = CASES[name]
    arrays = inputs(case)
    compare(run(of_blocks(case), *(x.astype(np.float32) for x in arrays)), oracle(case, *arrays))


@pytest.mark.parametrize("name", ["causal", "documents, window and sinks", "cache"])
def test_reference_equals_the_oracle(name):
    case = CASES[name]
    arrays = inputs(case)
    assert case.tq * case.tk <= 32**2  # what the public function serves by the reference
    compare(run(public(case), *(x.astype(np.float32) for x in arrays)), oracle(case, *arrays))


@pytest.mark.parametrize("name", ["window", "documents, window and sinks"])
def test_form_of_accelerators_equals_the_oracle(name, monkeypatch):
    monkeypatch.setattr(chunked.lax, "platform_dependent", lambda *xs, cpu, default: default(*xs))
    case = CASES[name]
    arrays = inputs(case)
    compare(run(of_blocks(case), *(x.astype(np.float32) for x in arrays)), oracle(case, *arrays))


@pytest.mark.parametrize("t", [128, 300])
def test_blocks_of_the_real_size_equal_the_oracle(t):
    case = Case(t, t, 1, 1, Causal() & Window(70), lambda i, j: i - 70 < j <= i)
    arrays = inputs(case)
    compare(run(public(case), *(x.astype(np.float32) for x in arrays)), oracle(case, *arrays))


def test_dead_blocks_are_not_visited():
    """Keys no query can see may hold anything: NaN in a visited block would spoil the output."""
    q = k = v = jnp.ones((1, 64, 1, 8))
    at = Coordinates(jnp.arange(64))
    dead = v.at[:, 8:40].set(jnp.nan)  # window of 8 before position 48, and a sink block
    mask = Causal() & (Window(8) | Sinks(2))
    form = in_blocks(mask, 8, scale=1.0)
    o, _ = jax.jit(form)(q[:, 48:], k, dead, Coordinates(at.position[48:]), at)
    assert_close(o, np.ones((1, 16, 1, 8)), F32)


@pytest.mark.parametrize(
    "mask",
    [Mask(), Causal(), Window(3), Sinks(2), Blocks(3), Causal() & (Window(2) | Sinks(1)), Causal() & Blocks(4)],
    ids=str,
)
def test_a_live_answer_is_never_wrongly_no(mask):
    for q_lo, q_n, k_lo, k_n in np.ndindex(10, 4, 10, 4):
        i, j = np.arange(q_lo, q_lo + q_n + 1)[:, None], np.arange(k_lo, k_lo + k_n + 1)[None, :]
        any_visible = np.any(np.broadcast_to(mask.visible(i, j), (q_n + 1, k_n + 1)))
        live = bool(mask.live(q_lo, q_lo + q_n, k_lo, k_lo + k_n))
        assert live or not any_visible
        assert live == any_visible or isinstance(mask, And)


def test_merge_of_disjoint_keys_is_attention_over_all():
    case = CASES["documents"]
    arrays = inputs(case)

    def form(q, k, v):
        q_position, k_position, q_segment, k_segment = case.at(B, case.tq, case.tk)
        part = lambda s: attention(
            q,
            k[:, s],
            v[:, s],
            mask=case.mask,
            positions=(q_position, k_position[:, s]),
            segment_ids=(q_segment, k_segment[:, s]),
            return_lse=True,
        )
        return merge(part(slice(0, 9)), part(slice(9, None)))

    compare(run(form, *(x.astype(np.float32) for x in arrays)), oracle(case, *arrays))


@pytest.mark.parametrize(("h", "kv"), [(4, 1), (4, 4), (3, 3)])
def test_sharded_over_batch_and_heads_equals_unsharded(h, kv):
    """Key heads fewer than the parts are shared out; query heads that the parts do not divide stay whole."""
    mesh = jax.make_mesh((4, 2), ("rows", "parts"), axis_types=(AxisType.Auto,) * 2)
    case = CASES["documents"]._replace(h=h, kv=kv)
    arrays = inputs(case, dtype=np.float32)
    with jax.set_mesh(mesh):
        got = run(public(case, axes=Axes(batch="rows", heads="parts")), *arrays)
    want = run(public(case), *arrays)
    for name, x, y in zip(("o", "dq", "dk", "dv"), (got[0], *got[2:]), (want[0], *want[2:]), strict=True):
        assert_close(x, y, F32, name)


def test_memory_is_linear_in_length():
    def bytes_of(form, t):
        at = Coordinates(jnp.arange(t))
        f = lambda q, k, v: jnp.sum(form(q, k, v, at, at)[0] ** 2)
        x = jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32)
        compiled = jax.jit(jax.grad(f, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    arrays = 2 * 4096 * 16 * 4
    blocks, scores = in_blocks(Causal(), chunked.BLOCK, scale=0.25), Scores(Causal(), 0.25)
    long, short = bytes_of(blocks, 4096), bytes_of(blocks, 2048)
    assert long < 2.2 * short
    assert long < 24 * arrays
    assert long < bytes_of(partial(reference.attention, scores=scores), 4096) / 20


def test_bfloat16_errs_no_more_than_twice_plain_bfloat16_attention():
    case = CASES["causal"]
    q, k, v, do, dlse = inputs(case)
    rounded = tuple(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (q, k, v))
    want = oracle(case, *rounded, do, 0 * dlse)

    def plain(q, k, v):
        k, v = (jnp.repeat(x, case.h // case.kv, axis=2) for x in (k, v))
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * jnp.bfloat16(D**-0.5)
        see = jnp.tril(jnp.ones((case.tq, case.tk), bool))[None, None]
        p = jax.nn.softmax(jnp.where(see, s, -jnp.inf), axis=-1)
        return jnp.einsum("bhqk,bkhd->bqhd", p, v), jnp.zeros((B, case.tq, case.h))

    arrays = (*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), jnp.asarray(do, jnp.float32))
    zero = jnp.zeros(dlse.shape, jnp.float32)
    baseline = run(plain, *arrays, zero)
    for form in (of_blocks(case), public(case)):
        got = run(form, *arrays, zero)
        assert got[0].dtype == jnp.bfloat16
        for i in (0, 2, 3, 4):
            assert relative_error(got[i], want[i]) <= BFLOAT16_FACTOR * relative_error(baseline[i], want[i])


def test_large_scores_stay_finite():
    case = CASES["causal"]
    arrays = inputs(case)
    arrays = (1e3 * arrays[0], 1e3 * arrays[1], *arrays[2:])
    got = run(of_blocks(case), *(x.astype(np.float32) for x in arrays))
    assert all(np.isfinite(x).all() for x in got)


def test_wrong_shapes_are_named():
    q = jnp.zeros((1, 3, 4, 8))
    with pytest.raises(ValueError, match="3 key heads must divide 4 query heads"):
        attention(q, q[:, :, :3], q[:, :, :3])
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 8\), \(1, 3, 4, 6\)"):
        attention(q, q[..., :6], q)
    for mask in (Window, Blocks):
        with pytest.raises(ValueError, match=rf"{mask.__name__}.size = 0"):
            mask(0)
