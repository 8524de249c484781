"""Softmax attention in plain JAX against the float64 oracle, its memory and partitioning; masks have test_masks.py,
lengths, widths and options test_attention_cases.py."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from longwave.kernels.attention import Causal, Mask, Sinks, Window, attention, chunked, flash, merge, reference
from longwave.kernels.attention.reference import Coordinates, Scores
from longwave.kernels.partition import Axes
from tests.kernels import attention_oracle as oracle
from tests.tolerances import ATTENTION_FORWARD, assert_close

F32 = ATTENTION_FORWARD["float32"]
B, D, DV = 4, 8, 6


class Case(NamedTuple):
    """Sizes, what a query at i sees at j (not by the masks), where tokens stand, and the cap of their scores."""

    tq: int
    tk: int
    h: int
    kv: int
    mask: Mask
    sees: object
    at: object = lambda tq, tk: (np.arange(tq), np.arange(tk), None, None)
    softcap: float | None = None

    def inputs(self, **how):
        return oracle.inputs(B, self.tq, self.tk, self.h, self.kv, D, DV, **how)

    def expected(self, x, **how):
        i, j, *segments = self.at(self.tq, self.tk)
        see = oracle.seen(self.sees(i[..., :, None], j[..., None, :]), *segments)
        return oracle.attention(x, see, scale=D**-0.5, softcap=self.softcap, **how)

    def in_blocks(self, block=8):
        i, j, q_segment, k_segment = self.at(self.tq, self.tk)
        at = jax.tree.map(jnp.asarray, (Coordinates(i, q_segment), Coordinates(j, k_segment)))
        return lambda q, k, v: in_blocks(Scores(self.mask, D**-0.5, self.softcap), block)(q, k, v, *at)

    def public(self, **how):
        at = self.at(self.tq, self.tk)
        where = {"positions": at[:2], "segment_ids": at[2:]}
        return partial(attention, mask=self.mask, softcap=self.softcap, return_lse=True, **where, **how)


def in_blocks(scores, block):
    form = flash.Form(*(partial(f, block=block) for f in (chunked.forward, chunked.backward)))
    return partial(flash.attention, flash.Forms(default=form), scores)


def documents(tq, tk):
    """Rows: padded left, padded right, two documents, all padding. Positions restart in each document."""
    segment = np.zeros((B, tk), int)
    segment[0, :7], segment[1, 17:], segment[2, 11:], segment[3] = -1, -1, 1, -1
    position = np.arange(tk) * np.ones((B, 1), int)
    position[0] -= 7
    position[2, 11:] -= 11
    return position[:, -tq:], position, segment[:, -tq:], segment


def cache(tq, tk):
    """Queries behind a ring of keys that stand in any order, some slots empty."""
    position = np.stack([np.random.default_rng(row).permutation(tk) for row in range(B)])
    length = np.array([tk, 9, 1, 0])[:, None]
    return np.arange(tq) + length, position, np.zeros((B, tq), int), (position < length) - 1


CASES = {
    "causal": Case(29, 29, 4, 2, Causal(), lambda i, j: j <= i),
    "documents, window and sinks": Case(
        20,
        23,
        2,
        1,
        Causal() & (Window(4) | Sinks(3)),
        lambda i, j: (j <= i) & ((i - j < 4) | (j < 3)),
        documents,
        softcap=0.7,
    ),
    "cache": Case(6, 19, 4, 2, Causal() & Window(12), lambda i, j: (j <= i) & (i - j < 12), cache),
}


@pytest.mark.parametrize("name", ["documents, window and sinks", "cache"])
def test_blocks_equal_the_oracle(name):
    x, form = CASES[name].inputs(), oracle.compiled(CASES[name].in_blocks())
    oracle.check(form(x), CASES[name].expected(x))
    of_large_scores = form(x._replace(q=1e3 * x.q, k=1e3 * x.k))
    assert all(np.isfinite(a[~np.isneginf(a)]).all() for a in of_large_scores)


@pytest.mark.parametrize("name", ["documents, window and sinks", "cache"])
def test_reference_equals_the_oracle(name):
    case = CASES[name]
    x = case.inputs()
    oracle.check(oracle.run(case.public(backend="reference"), x), case.expected(x))


def test_form_of_accelerators_equals_the_oracle(monkeypatch):
    monkeypatch.setattr(chunked.lax, "platform_dependent", lambda *xs, cpu, default: default(*xs))
    case = CASES["documents, window and sinks"]
    x = case.inputs()
    oracle.check(oracle.run(case.in_blocks(), x), case.expected(x))


def test_the_form_is_chosen_by_shape_unless_it_is_named():
    """Few scores or few queries: the reference. The chunked form is the one that loops."""

    def loops(t, tq=None, **how):
        q, k = jnp.zeros((1, tq or t, 1, D)), jnp.zeros((1, t, 1, D))
        return "while" in jax.jit(partial(attention, **how)).lower(q, k, k).as_text()

    assert not loops(32)
    assert not loops(500, tq=4)
    assert loops(33)
    assert loops(32, backend="chunked")
    assert not loops(33, backend="reference")


def test_positions_and_segments_may_be_given_once_or_for_one_side_alone():
    t = 12
    q, k, v = oracle.inputs(2, t, t, 2, 2, D, DV)[:3]
    at, ids = jnp.arange(t), jnp.zeros(t, jnp.int32)
    rows = jnp.stack([at, at + 3])
    same = [
        {"positions": at},
        {"positions": (None, at)},
        {"positions": rows},
        {"segment_ids": ids},
        {"segment_ids": (ids, None)},
        {"segment_ids": (None, ids)},
    ]
    others = [{"positions": (at + t, at)}, {"segment_ids": (None, ids - 1)}]  # behind all keys; all keys padding

    @jax.jit
    def outputs(q, k, v):
        f = partial(attention, q, k, v, backend="reference")
        return f(), [f(mask=Causal(), **how) for how in [{}, *same, *others]]

    everything, (plain, *rest, late, nothing) = outputs(q, k, v)
    for how, o in zip(same, rest, strict=True):
        assert_close(o, plain, F32, str(how))
    assert_close(late, everything, F32)
    assert_close(nothing, np.zeros(plain.shape), 0)


def test_dead_blocks_are_not_visited():
    """Keys no query can see may hold anything: NaN in a visited block would spoil the output."""
    q = k = v = jnp.ones((1, 64, 1, 8))
    at = Coordinates(jnp.arange(64))
    dead = v.at[:, 8:40].set(jnp.nan)  # window of 8 before position 48, and a sink block
    form = in_blocks(Scores(Causal() & (Window(8) | Sinks(2)), 1.0), 8)
    o, _ = jax.jit(form)(q[:, 48:], k, dead, Coordinates(at.position[48:]), at)
    assert_close(o, np.ones((1, 16, 1, 8)), F32)


def test_merge_of_disjoint_keys_is_attention_over_all():
    case = CASES["documents, window and sinks"]
    q_position, k_position, q_segment, k_segment = case.at(case.tq, case.tk)

    def form(q, k, v):
        part = lambda s: attention(
            q,
            k[:, s],
            v[:, s],
            mask=case.mask,
            positions=(q_position, k_position[:, s]),
            segment_ids=(q_segment, k_segment[:, s]),
            softcap=case.softcap,
            return_lse=True,
        )
        return merge(part(slice(0, 9)), part(slice(9, None)))

    x = case.inputs()
    oracle.check(oracle.run(form, x), case.expected(x))


@pytest.mark.parametrize(("h", "kv"), [(4, 1), (3, 3)])
def test_sharded_over_batch_and_heads_equals_the_oracle(h, kv):
    """Key heads fewer than the parts are shared out; query heads that the parts do not divide stay whole."""
    mesh = jax.make_mesh((4, 2), ("rows", "parts"), axis_types=(AxisType.Auto,) * 2)
    case = CASES["documents, window and sinks"]._replace(h=h, kv=kv)
    x = case.inputs()
    with jax.set_mesh(mesh):
        got = oracle.run(case.public(axes=Axes(batch="rows", heads="parts")), x)
    oracle.check(got, case.expected(x))


def test_memory_is_linear_in_length():
    t, scores = 4096, Scores(Causal(), 0.25)

    def bytes_of(form):
        at = Coordinates(jnp.arange(t))
        f = lambda q, k, v: jnp.sum(form(q, k, v, at, at)[0] ** 2)
        x = jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32)
        return jax.jit(jax.grad(f, (0, 1, 2))).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    blocks = bytes_of(partial(flash.attention, flash.Forms(), scores))
    assert blocks < 24 * (2 * t * 16 * 4)  # arrays such as q
    assert blocks < bytes_of(partial(reference.attention, scores=scores)) / 20


def test_reference_in_bfloat16_errs_no_more_than_twice_plain_bfloat16_attention():
    case = CASES["causal"]
    x = case.inputs(dtype="bfloat16")._replace(dlse=np.zeros((B, case.tq, case.h), np.float32))
    got = oracle.run(case.public(backend="reference"), x)
    oracle.check(got, case.expected(x), plain=case.expected(x, rounded=True))


def test_wrong_arguments_are_named():
    q = jnp.zeros((1, 3, 4, 8))
    with pytest.raises(ValueError, match="3 key heads must divide 4 query heads"):
        attention(q, q[:, :, :3], q[:, :, :3])
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 8\), \(1, 3, 4, 6\)"):
        attention(q, q[..., :6], q)
    with pytest.raises(ValueError, match="softcap = 0 must be positive"):
        attention(q, q, q, softcap=0)
    with pytest.raises(ValueError, match=r"positions of the keys have shape \(1,\); it must be \(3,\) or \(1, 3\)"):
        attention(q[:, :1], q, q, positions=jnp.array([2]))  # of one query, and not of three keys


def test_no_keys_and_no_rows():
    q, k = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 0, 2, 8))
    o, lse = attention(q, k, k, return_lse=True)
    np.testing.assert_array_equal(o, np.zeros((2, 3, 4, 8)))
    np.testing.assert_array_equal(lse, np.full((2, 3, 4), -np.inf))
    assert attention(q[:0], k[:0], k[:0]).shape == (0, 3, 4, 8)


def test_a_mesh_without_axes_is_left_to_the_forms_that_xla_can_split():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    q = jnp.ones((8, 64, 1, 8))
    compiled_for = lambda: str(jax.jit(lambda q: attention(q, q, q)).trace(q).jaxpr)
    assert "pallas_call" in compiled_for()
    with jax.set_mesh(mesh):
        assert "pallas_call" not in compiled_for()
        alone = jax.jit(lambda q: attention(q, q, q, axes=Axes(batch="x")))
        assert "pallas_call" in str(alone.trace(q).jaxpr)
