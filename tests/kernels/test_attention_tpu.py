"""The forward kernel for TPUs, interpreted against the float64 oracle, and compiled for every generation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from longwave.kernels import aot
from longwave.kernels.attention import attention, blocks, pallas_tpu
from longwave.kernels.attention.blocks import Cut
from longwave.kernels.attention.mask import Blocks, BlockSparse, Butterfly, Causal, Mask, Prefix, Window
from longwave.kernels.attention.reference import Coordinates, Scores
from longwave.kernels.attention.tpu_plan import Plan, parts
from tests.kernels import attention_oracle as oracle
from tests.tolerances import ATTENTION_FORWARD, BFLOAT16_FACTOR, assert_close, relative_error

SMALL = Cut(256, 512, (256, 256), (128, 128))  # two pieces of four tiles a block
compiles = pytest.mark.skipif(aot.missing() is not None, reason=aot.missing() or "")
index = np.arange
TABLE = BlockSparse(np.random.default_rng(0).random((8, 8)) < 0.5, 512)


def check(x, see, scores, q_at=Coordinates(), k_at=Coordinates(), cut=None):
    forward = functools.partial(pallas_tpu.forward, scores=scores, cut=cut)
    o, lse = jax.jit(forward)(x.q, x.k, x.v, *jax.tree.map(jnp.asarray, (q_at, k_at)))
    known = {"scale": scores.scale, "softcap": scores.softcap}
    want, allowed = oracle.attention(x, see, **known), ATTENTION_FORWARD["float32"]
    blind = np.isneginf(want.lse)
    np.testing.assert_array_equal(np.isneginf(lse), blind)
    assert_close(np.where(blind, 0, lse), np.where(blind, 0, want.lse), allowed, "lse")
    assert o.dtype == x.v.dtype
    if o.dtype == jnp.bfloat16:
        plain = oracle.attention(x, see, **known, rounded=True).o
        allowed = BFLOAT16_FACTOR * relative_error(plain, want.o)
    assert_close(o, want.o, allowed, "o")


def test_causal_window_over_blocks_pieces_and_tiles():
    """Two query heads of 128 share a key head; the last block holds padding, and the window leaves some tiles dead."""
    x = oracle.inputs(1, 600, 600, 2, 1, 128, 128, dtype="bfloat16")
    age = index(600)[:, None] - index(600)[None]
    check(x, (age >= 0) & (age < 200), Scores(Causal() & Window(200), 128**-0.5), cut=SMALL)


def test_small_heads_share_lanes():
    """Six query heads of 24, padded to 64 so that two fill a block, and two key heads; some queries see nothing."""
    x = oracle.inputs(1, 150, 200, 6, 2, 24, 16)
    see = index(200)[None] <= index(150)[:, None] - 5
    check(x, see, Scores(Causal(-5), 0.2, softcap=3.0))


def test_decoding_reads_the_live_part_of_the_cache_once():
    """One token of eight heads on two key heads; keys that nobody has written yet are NaN, in a block not visited."""
    x = oracle.inputs(2, 1, 3000, 8, 2, 128, 128)
    end = np.array([700, 1])
    see = (index(3000)[None] < end[:, None])[:, None]
    written = index(3000)[:, None, None] < 2048
    q_at = Coordinates(end[:, None] - 1, np.zeros((2, 1), int))
    k_at = Coordinates(index(3000)[None], np.where(see[:, 0], 0, -1))
    forward = jax.jit(functools.partial(pallas_tpu.forward, scores=Scores(Causal(), 0.1)))
    o, lse = forward(x.q, jnp.where(written, x.k, jnp.nan), x.v, *jax.tree.map(jnp.asarray, (q_at, k_at)))
    want = oracle.attention(x, see, scale=0.1)
    assert_close(o, want.o, ATTENTION_FORWARD["float32"], "o")
    assert_close(lse, want.lse, ATTENTION_FORWARD["float32"], "lse")


@pytest.mark.full
@compiles
@pytest.mark.parametrize("slice_of", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_decoding_compiles_as_one_kernel(slice_of):
    """As a layer calls it: one token, a cache of rows of their own lengths, no form named."""
    device = aot.mesh(aot.topology(slice_of)[:1], {"x": 1})
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(device, PartitionSpec()))
    cache, ids = array(jnp.bfloat16, 2, 3000, 2, 128), array(jnp.int32, 2, 3000)

    def decode(q, k, v, end, held):
        return attention(q, k, v, mask=Causal(), positions=(end, None), segment_ids=(None, held))

    report = aot.compile(
        decode, array(jnp.bfloat16, 2, 1, 8, 128), cache, cache, array(jnp.int32, 2, 1), ids, mesh=device
    )
    assert aot.custom_calls(report.hlo)["tpu_custom_call"] == 1


def test_few_queries_of_a_group_look_up_a_table():
    table = np.array([[True, False, True]])
    x = oracle.inputs(1, 8, 384, 4, 2, 64, 64)
    check(x, np.broadcast_to(np.repeat(table, 128, 1), (8, 384)), Scores(BlockSparse(table, 128), 0.125))


def test_documents_in_rows_of_their_own():
    """Lists made as it runs, with tails of dead visits; a document that only queries have, and padding."""
    x = oracle.inputs(2, 400, 600, 2, 2, 64, 64)
    q_ids = np.stack([index(400) // 100, np.where(index(400) < 300, -1, 0)])
    k_ids = np.stack([index(600) // 200, np.where(index(600) < 500, 0, -1)])
    see = oracle.seen((index(600)[None] <= index(400)[:, None])[None], q_ids, k_ids)
    check(x, see, Scores(Causal(), 0.125), Coordinates(None, q_ids), Coordinates(None, k_ids), SMALL)


def test_positions_in_any_order():
    x = oracle.inputs(1, 100, 300, 1, 1, 80, 200)
    q_at, k_at = index(100) + 150, np.random.default_rng(0).permutation(300)
    see = (k_at[None] <= q_at[:, None]) & (k_at[None] > q_at[:, None] - 90)
    check(x, see, Scores(Causal() & Window(90), 0.1), Coordinates(q_at), Coordinates(k_at), SMALL)


MASKS = (
    Mask(),
    Causal(),
    Causal(-200),
    Causal() & (Window(300) | Prefix(4)),
    Window(100, 400),
    Butterfly(64) & Causal(),
    Blocks(200) | Butterfly(100, 2),
    TABLE,
)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("cut", [SMALL, Cut(512, 512, (256, 512), (128, 256))])
def test_every_visible_pair_is_computed_once_and_no_hidden_one_unmasked(mask, cut):
    q, k = (jax.ShapeDtypeStruct((1, t, 1, 128), jnp.bfloat16) for t in (1100, 1500))
    plan = Plan.of(q, k, k, Coordinates(), Coordinates(), Scores(mask, 1.0), cut)
    steps, patterns = plan.steps(Coordinates(), Coordinates())
    computed, bare = np.zeros((2, plan.tq, plan.tk), int)
    for i, j, packed in zip(steps.q[0], steps.k[0], steps.patterns[0], strict=True):
        for n in range(np.prod(plan.pieces)):
            if code := packed >> (3 * n) & 7:
                piece = np.array([n // plan.pieces[1], n % plan.pieces[1]]) * cut.piece + [i * cut.q, j * cut.k]
                for part in parts(plan, patterns[code - 1], 512):
                    at = tuple(slice(start + x, start + y) for start, (x, y) in zip(piece, part[:2], strict=True))
                    computed[at] += 1
                    bare[at] += not part.masked
    inside = (index(plan.tq)[:, None] < 1100) & (index(plan.tk)[None] < 1500)
    see = np.broadcast_to(mask.visible(index(plan.tq)[:, None], index(plan.tk)[None]), inside.shape) & inside
    assert computed.max() == 1
    assert not (see & (computed == 0)).any()
    assert not ((bare == 1) & ~see & (index(plan.tq)[:, None] < 1100)).any()  # rows of padding are cut off


def test_only_the_diagonal_of_a_causal_mask_is_masked():
    """Two patterns of code, and half the work: no dead tile is computed."""
    q = jax.ShapeDtypeStruct((1, 16384, 8, 128), jnp.bfloat16)
    cut = blocks.forward(q, q, q, Causal())
    plan = Plan.of(q, q, q, Coordinates(), Coordinates(), Scores(Causal(), 1.0), cut)
    steps, patterns = plan.steps(Coordinates(), Coordinates())
    n = 16384 // cut.q
    assert cut.q >= 512 <= cut.k
    assert steps.q.shape[1] == n * (n + 1) // 2
    assert len(patterns) == 2
    areas = [sum((b - a) * (d - c) for (a, b), (c, d), _ in parts(plan, pattern, 512)) for pattern in patterns]
    codes = [steps.patterns[0] >> (3 * i) & 7 for i in range(np.prod(plan.pieces))]
    assert sum(area * (np.array(codes) == 1 + i).sum() for i, area in enumerate(areas)) < 0.52 * 16384**2


def test_refusals_say_why():
    def reason(d=64, dtype=jnp.float32, mask=Causal(), b=1, t=1024, at=Coordinates()):
        q = jax.ShapeDtypeStruct((b, t, 2, d), dtype)
        return pallas_tpu.supports(q, q, q, at, at, Scores(mask, 1.0))

    assert reason() is None
    assert "width 264" in reason(d=264)
    assert "float16" in reason(dtype=jnp.float16)
    assert "empty" in reason(t=0)
    assert "192 positions" in reason(mask=BlockSparse(np.eye(6), 192))
    assert reason(mask=BlockSparse(np.eye(6), 384)) is None
    ids = jax.ShapeDtypeStruct((512, 32768), jnp.int32)
    assert "scalar memory" in reason(b=512, t=32768, at=Coordinates(None, ids))


@compiles
@pytest.mark.parametrize(
    ("slice_of", "t", "heads", "d", "dtype", "mask"),
    [
        ("v5e:2x2", 256, (2, 1), (128, 128), "bfloat16", Causal()),
        ("v5p:2x2x1", 300, (3, 3), (40, 24), "float32", Causal() & Window(100)),
        pytest.param("v6e:2x2", 700, (16, 4), (8, 8), "bfloat16", Butterfly(48) | Blocks(100), marks=pytest.mark.full),
        pytest.param("v5e:2x2", 4100, (2, 1), (64, 64), "bfloat16", Causal(), marks=pytest.mark.full),
        pytest.param(
            "v6e:2x2", 4096, (1, 1), (256, 256), "float32", BlockSparse(np.eye(8), 512), marks=pytest.mark.full
        ),
    ],
)
def test_compiles_as_one_kernel(slice_of, t, heads, d, dtype, mask):
    """Documents and positions as data where no table forbids it."""
    mesh = aot.mesh(aot.topology(slice_of)[:1], {"data": 1})
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    q, k, v = (array((2, t, h, w), dtype) for h, w in ((heads[0], d[0]), (heads[1], d[0]), (heads[1], d[1])))
    ids = None if isinstance(mask, BlockSparse) else array((2, t), jnp.int32)
    at = (Coordinates(ids, ids),) * 2
    assert pallas_tpu.supports(q, k, v, *at, Scores(mask, 0.1)) is None
    forward = jax.jit(functools.partial(pallas_tpu.forward, scores=Scores(mask, 0.1, softcap=30.0)))
    report = aot.compile(forward, q, k, v, *at, mesh=mesh)
    assert report.hlo.count('custom_call_target="tpu_custom_call"') == 1
