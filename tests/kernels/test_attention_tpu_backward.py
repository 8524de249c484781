"""The backward kernel for TPUs, interpreted against the float64 oracle, and compiled for every generation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from longwave.kernels import aot
from longwave.kernels.attention import blocks, chunked, flash, pallas_tpu, reference, tpu_backward
from longwave.kernels.attention.mask import Blocks, Causal, Mask, Prefix, Window
from longwave.kernels.attention.reference import Coordinates, Scores
from longwave.kernels.attention.tpu_layout import Layout
from longwave.kernels.attention.tpu_plan import Plan
from longwave.kernels.attention.visits import LIVE, MASKED
from tests.kernels import attention_oracle as oracle

FORMS = flash.Forms(default=flash.Form(chunked.forward, pallas_tpu.backward))
SLICES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
compiles = pytest.mark.skipif(aot.missing() is not None, reason=aot.missing() or "")
index = lambda t: np.arange(t)
lower = lambda tq, tk: index(tk)[None] <= index(tq)[:, None]


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks where the tests' lengths are one."""
    monkeypatch.setattr(blocks, "LONGEST", 128)


def check(x, see, scores, q_at=Coordinates(), k_at=Coordinates()):
    got = oracle.run(lambda q, k, v: flash.attention(FORMS, scores, q, k, v, q_at, k_at), x)
    known = {"scale": scores.scale, "softcap": scores.softcap}
    plain = oracle.attention(x, see, **known, rounded=True) if x.q.dtype == jnp.bfloat16 else None
    oracle.check(got, oracle.attention(x, see, **known), plain=plain)


@pytest.mark.usefixtures("small_blocks")
def test_causal_blocks_of_heads_that_share_lanes():
    """Whole, masked and no visits; 7 queries at the end; two key heads repeated for four query heads of 64 lanes."""
    x = oracle.inputs(1, 263, 263, 4, 2, 64, 64, dtype="bfloat16")
    check(x, lower(263, 263), Scores(Causal(), 0.125))


def test_one_small_head_has_the_lanes_to_itself():
    x = oracle.inputs(1, 40, 50, 1, 1, 24, 16)
    check(x, lower(40, 50), Scores(Causal(), 0.2))


@pytest.mark.usefixtures("small_blocks")
def test_group_of_heads_soft_cap_and_padded_keys():
    """Three query heads of 80 read one of dv 136: q and v of other widths, padded keys, queries that see nothing."""
    x = oracle.inputs(1, 140, 200, 3, 1, 80, 136)
    see = (index(200)[None] <= index(140)[:, None] - 3) & (index(200)[None] > index(140)[:, None] - 50)
    check(x, see, Scores(Causal(-3) & Window(50), 0.1, softcap=2.0))


@pytest.mark.usefixtures("small_blocks")
def test_documents_and_positions_in_parts(monkeypatch):
    """Queries that do not fit into VMEM come in parts, whose sums go on; lists of visits are made as it runs."""
    cut = lambda layout, tq, tk, *_: blocks.BackwardCut(128, 128, 2, 128, 1)
    monkeypatch.setattr(blocks, "backward", cut)
    rng = np.random.default_rng(0)
    q_at = Coordinates(None, np.repeat([[0, 1, 2], [0, 0, 1]], 60, 1).astype(np.int32)[:, :170])
    k_at = Coordinates(rng.permutation(150).astype(np.int32), np.where(index(150) < 20, -1, index(150) // 60))
    near = k_at.position[None] <= index(170)[:, None]
    see = oracle.seen(near[None], q_at.segment, k_at.segment[None])
    at = jax.tree.map(jnp.asarray, (q_at, k_at))
    check(oracle.inputs(2, 170, 150, 2, 1, 128, 128), see, Scores(Causal(), 0.3), *at)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("heads", "kv", "d"), [(8, 8, 64), (8, 8, 128), (8, 1, 128), (8, 8, 256)])
@pytest.mark.parametrize("t", [1, 100, 1000, 1100, 4096, 16384, 65536])
def test_what_stays_in_vmem_fits(t, heads, kv, d, itemsize):
    q, k = (jax.ShapeDtypeStruct((1, t, n, d), jnp.bfloat16) for n in (heads, kv))
    layout = Layout.of(q, k, k)
    cut = blocks.backward(layout, t, t, itemsize, Mask())
    assert cut.q % 128 == cut.k % 128 == cut.part % cut.q == 0
    a_query = layout.group * layout.lanes * (3 * itemsize * cut.buffers + 4)  # q, do, dq, and its sum
    assert cut.part * a_query <= blocks.BACKWARD_VMEM_LIMIT - 8 * 2**20
    assert -(-t // cut.k) % cut.tiles == 0
    assert cut.part >= min(t, 1024)


@pytest.mark.parametrize(("heads", "d", "q", "part"), [(71, 64, 256, 256), (64, 256, 128, 128), (128, 256, 128, 0)])
def test_many_heads_on_one_key_head_take_shorter_blocks_or_none(heads, d, q, part):
    """A 71st of VMEM does not hold 512 float32 queries."""
    x, one = (jax.ShapeDtypeStruct((1, 2048, n, d), jnp.float32) for n in (heads, 1))
    cut = blocks.backward(Layout.of(x, one, one), 2048, 2048, 4, Mask())
    assert (cut.q, cut.part) == (q, part)
    refused = pallas_tpu.supports(x, one, one, Coordinates(), Coordinates(), Scores(Causal(), 1.0))
    assert (refused is None) == (part > 0), refused
    assert part or f"groups of {heads} heads" in refused


def test_walk_stands_at_each_block_of_keys():
    q = jax.ShapeDtypeStruct((1, 700, 1, 128), jnp.bfloat16)
    cut = blocks.BackwardCut(128, 256, 1, 768, 2)
    plan = Plan.of(q, q, q, Coordinates(), Coordinates(), Scores(Causal(), 1.0), cut)
    of = lambda q_ids, k_ids: tpu_backward.Walk.of(plan, cut, Coordinates(None, q_ids), Coordinates(None, k_ids))
    data = jax.jit(of)(np.zeros((1, 700), int), np.where(index(700) < 256, -1, 0)[None])
    constant = tpu_backward.Walk.of(plan, cut, Coordinates(), Coordinates())
    for walk, first in ((data, 1), (constant, 6)):  # of what nobody sees, one visit that is not live
        assert np.asarray(walk.start).tolist() == [[0, first, first + 4, first + 6]]
        assert np.asarray(walk.q[0, first : first + 6]).tolist() == [2, 3, 4, 5, 4, 5]
        flags = np.asarray(walk.flags[0, first : first + 6])
        assert (flags & LIVE != 0).all()
        assert (flags & MASKED != 0).tolist() == [True, True, False, walk is data, True, True]


CALLS = {
    "causal": ((1, 1024, 4, 4, 128), Scores(Causal(), 0.1), {}),
    "folded documents": ((2, 1000, 8, 2, 64), Scores(Causal() & Window(100), 0.1), {"segment": (2, 1000)}),
    "group at positions": ((1, 300, 4, 2, 80), Scores(Causal() | Prefix(20), 0.1, 30.0), {"position": (300,)}),
    "wide, all that fits": ((1, 16384, 1, 1, 256), Scores(Mask(), 0.1), {}),
    "narrow float32": ((1, 256, 4, 4, 8), Scores(Causal() & Blocks(48), 0.1), {}),
    "parts": ((1, 32768, 2, 1, 128), Scores(Causal(), 0.1), {}),
    "parts of a wide float32 group": ((1, 700, 71, 1, 64), Scores(Causal(), 0.1), {}),
}


@pytest.mark.full
@compiles
@pytest.mark.parametrize(
    ("call", "slice_of"),
    [
        pytest.param(call, slice_of, marks=[pytest.mark.large] * (("v5e" not in slice_of and i > 0) or "parts" in call))
        for i, call in enumerate(CALLS)
        for slice_of in SLICES
    ],
)
def test_compiles(call, slice_of):
    (b, t, h, kv, d), scores, places = CALLS[call]
    dtype = jnp.float32 if "float32" in call else jnp.bfloat16
    device = aot.mesh(aot.topology(slice_of)[:1], {"x": 1})
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(device, PartitionSpec()))
    at = Coordinates(**{name: array(jnp.int32, *shape) for name, shape in places.items()})
    q, k, row = array(dtype, b, t, h, d), array(dtype, b, t, kv, d), array(jnp.float32, b, t, h)
    f = jax.jit(functools.partial(pallas_tpu.backward, scores=scores))
    report = aot.compile(f, q, k, k, at, at, row, row, q, mesh=device)
    assert "attention_backward" in report.hlo


@pytest.mark.full
@compiles
def test_memory_is_linear_in_time():
    """16,384 tokens forward and backward on a v5e: as much as q, k and v; naive attention needs thirty times that."""
    device = aot.mesh(aot.topology("v5e:2x2")[:1], {"x": 1})
    forms = flash.Forms(tpu=flash.Form(pallas_tpu.forward, pallas_tpu.backward))
    scores, at = Scores(Causal(), 0.1), Coordinates()

    x = jax.ShapeDtypeStruct((1, 16384, 8, 128), jnp.bfloat16, sharding=NamedSharding(device, PartitionSpec()))

    def temporaries(form):
        f = jax.grad(lambda q, k, v: jnp.sum(form(q, k, v)[0].astype(jnp.float32)), argnums=(0, 1, 2))
        report = aot.compile(f, x, x, x, mesh=device)
        return report.memory.temporaries if report.memory else report.needed

    ours = temporaries(lambda q, k, v: flash.attention(forms, scores, q, k, v, at, at))
    naive = temporaries(lambda q, k, v: reference.attention(q, k, v, at, at, scores))
    assert ours <= 1.5 * 3 * x.size * x.dtype.itemsize
    assert naive >= 30 * ours
