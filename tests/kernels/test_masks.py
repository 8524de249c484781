"""Masks against their definitions, pair by pair; what they say of blocks against the pairs; and inside a TPU kernel."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from longwave.kernels import aot
from longwave.kernels.attention.mask import (
    And,
    Blocks,
    BlockSparse,
    Butterfly,
    Causal,
    ChunkSummary,
    Global,
    Mask,
    Or,
    Prefix,
    Sinks,
    Window,
    granularity,
    tables,
)
from longwave.kernels.attention.reference import Coordinates
from longwave.kernels.attention.visits import Split, tile_visible, visits

LOW, HIGH = -5, 35  # positions, negative ones too: a row padded left starts there
TABLE = np.random.default_rng(0).random((5, 6)) < 0.5


def in_table(table, block):
    def sees(i, j):
        i, j = i // block, j // block
        return 0 <= i < table.shape[0] and 0 <= j < table.shape[1] and table[i, j]

    return sees


# What a query at i sees at j, one pair after the other.
LEAVES = {
    Mask(): lambda i, j: True,
    Causal(): lambda i, j: j <= i,
    Causal(2): lambda i, j: j <= i + 2,
    Causal(-3): lambda i, j: j <= i - 3,
    Window(3): lambda i, j: abs(i - j) < 3,
    Window(3, 0): lambda i, j: j in (i - 2, i - 1, i),
    Window(2, ahead=5): lambda i, j: j in range(i - 1, i + 6),
    Prefix(4): lambda i, j: j < 4,
    Global(3): lambda i, j: i < 3 or j < 3,
    Blocks(3): lambda i, j: i // 3 == j // 3,
    Blocks(4): lambda i, j: i // 4 == j // 4,
    ChunkSummary(3): lambda i, j: j < i // 3,
    ChunkSummary(4): lambda i, j: j < i // 4,
    Butterfly(1): lambda i, j: (i < 0) == (j < 0) and (i ^ j).bit_count() < 2,
    Butterfly(3): lambda i, j: (i < 0) == (j < 0) and (i // 3 ^ j // 3).bit_count() < 2,
    Butterfly(2, 2): lambda i, j: (i // 2) ^ (j // 2) in (0, 1, 2),
    BlockSparse(TABLE, 4): in_table(TABLE, 4),
    BlockSparse(TABLE[:3], 5): in_table(TABLE[:3], 5),
}
JOINED = [
    Causal() & (Window(2) | Sinks(1)),
    Causal() & Blocks(4),
    Causal() | Prefix(7),
    ChunkSummary(5) & Window(9),
    Butterfly(4) | Global(4),
    (BlockSparse(TABLE, 4) | Causal(-8)) & Window(9),
]


def pairs(mask):
    at = np.arange(LOW, HIGH)
    return np.broadcast_to(mask.visible(at[:, None], at[None, :]), (len(at), len(at)))


@pytest.mark.parametrize("mask", LEAVES, ids=str)
def test_visible_is_its_definition(mask):
    at = range(LOW, HIGH)
    np.testing.assert_array_equal(pairs(mask), [[bool(LEAVES[mask](i, j)) for j in at] for i in at])


@pytest.mark.parametrize("mask", [*LEAVES, *JOINED], ids=str)
def test_live_is_never_wrongly_no_nor_whole_wrongly_yes(mask):
    seen, n = pairs(mask), 30
    lo = np.arange(LOW, LOW + n)
    q, k = lo[:, None], lo[None, :]
    for more_q, more_k in itertools.product((0, 1, 2, 3, 5, 8), repeat=2):
        corners = q, q + more_q, k, k + more_k
        live, whole = (np.broadcast_to(f(*corners), (n, n)) for f in (mask.live, mask.whole))
        tiles = np.lib.stride_tricks.sliding_window_view(seen, (more_q + 1, more_k + 1))[:n, :n]
        some, every = tiles.any((2, 3)), tiles.all((2, 3))
        assert not (some & ~live).any()
        assert not (whole & ~every).any()
        if mask in LEAVES:  # a mask alone knows it exactly
            np.testing.assert_array_equal(live, some)
            np.testing.assert_array_equal(whole, every)


def test_answers_are_the_same_for_arrays_that_are_traced():
    """Positions are data where sequences are packed: every mask answers inside a compiled program as outside."""
    masks, lo = (
        [Blocks(3), ChunkSummary(3), Butterfly(1), Butterfly(3, 2), *JOINED[-2:]],
        np.arange(LOW, HIGH, dtype=np.int32),
    )
    q, k = lo[:, None], lo[None, :]

    def answers(q, k):
        of = lambda mask: (mask.visible(q, k), mask.live(q, q + 6, k, k + 3), mask.whole(q, q + 1, k, k + 2))
        return [x for mask in masks for x in of(mask)]

    for got, want in zip(jax.jit(answers)(q, k), answers(q, k), strict=True):
        np.testing.assert_array_equal(got, want)


def test_two_names_of_a_mask_and_what_is_shorthand():
    assert Sinks is Prefix
    np.testing.assert_array_equal(pairs(Window(4, 0)), pairs(Causal() & Window(4)))
    np.testing.assert_array_equal(pairs(Window(4, 3)), pairs(Window(4)))
    np.testing.assert_array_equal(pairs(Butterfly(2, 1)), pairs(Blocks(4)))  # one factor joins two neighbours


def test_the_butterfly_is_the_support_of_a_sum_of_butterfly_factors():
    """Factor m of n = 8 blocks: a block-diagonal matrix whose blocks of 2 ** (m + 1) are [[D, D], [D, D]]."""
    n, block = 8, 4
    factor = lambda m: np.kron(np.eye(n >> (m + 1)), np.kron(np.ones((2, 2)), np.eye(1 << m)))
    at = np.arange(n * block)
    for factors in (1, 2, 3):
        support = np.kron(sum(factor(m) for m in range(factors)), np.ones((block, block))) > 0
        np.testing.assert_array_equal(Butterfly(block, factors).visible(at[:, None], at[None, :]), support)
    np.testing.assert_array_equal(Butterfly(block).visible(at[:, None], at[None, :]), support)


def test_masks_are_constants():
    """Equal masks are one constant of a compiled program; a table counts by what it holds."""
    assert BlockSparse(TABLE, 4) == BlockSparse(TABLE.tolist(), 4) == BlockSparse(TABLE.astype(int), 4)
    assert hash(BlockSparse(TABLE, 4)) == hash(BlockSparse(TABLE.copy(), 4))
    assert BlockSparse(TABLE, 4) not in (BlockSparse(~TABLE, 4), BlockSparse(TABLE, 5), BlockSparse(TABLE.T, 4))
    assert And(Causal(), Window(2)) != Or(Causal(), Window(2))
    assert "\\x" not in repr(BlockSparse(TABLE, 4))


def test_tables_and_what_blocks_must_divide():
    one, two = BlockSparse(TABLE, 12), BlockSparse(~TABLE, 8)
    mask = (one | Causal()) & two & (one | Window(3))
    assert (tables(mask), granularity(mask)) == ((one, two), 4)
    assert (tables(Butterfly(4) & Causal()), granularity(Causal())) == ((), None)


def test_wrong_sizes_are_named():
    for mask, field in ((Window, "size"), (Blocks, "size"), (ChunkSummary, "size"), (Butterfly, "block")):
        with pytest.raises(ValueError, match=rf"{mask.__name__}.{field} = 0; it must be at least 1"):
            mask(0)
    with pytest.raises(ValueError, match=r"Window.ahead = -1"):
        Window(3, -1)
    with pytest.raises(ValueError, match=r"Butterfly.factors = 0"):
        Butterfly(4, 0)
    with pytest.raises(ValueError, match=r"BlockSparse.block = 0"):
        BlockSparse(TABLE, 0)
    for layout in (TABLE[0], TABLE * 0.5):
        with pytest.raises(ValueError, match=r"BlockSparse.layout: a table of bools"):
            BlockSparse(layout, 4)


# Tiles of (8, 128) inside kernels: what a table says of one, a bit of the visit's flags tells.
Q, K = Split(16, 8), Split(250, 128)
CELLS = BlockSparse([[1, 0], [0, 1]], 128), BlockSparse([[0, 1], [1, 0]], 128)
TABLED = [*CELLS, (CELLS[0] | Causal(-4)) & (CELLS[1] | Window(100)) & CELLS[0]]


def test_a_tile_shows_what_the_mask_does():
    masks = [Causal(), Butterfly(64) | Global(4), *TABLED]
    steps = [visits(mask, Coordinates(), Coordinates(), Q, K) for mask in masks]

    @jax.jit
    def tiles(steps):
        q, k = jnp.arange(Q.c)[:, None], jnp.arange(K.c)[None, :]
        of = lambda mask: (
            lambda i, j, flags: tile_visible(mask, q + i * Q.c, k + j * K.c, None, None, k + j * K.c, K.t, flags)
        )
        return [jax.vmap(of(mask))(*(x[0] for x in rows)) for mask, rows in zip(masks, steps, strict=True)]

    i, j = np.arange(Q.t)[:, None], np.arange(K.n * K.c)[None, :]
    for mask, rows, got in zip(masks, steps, tiles(steps), strict=True):
        want = (mask.visible(i, j) & (j < K.t)).reshape(Q.n, Q.c, K.n, K.c)[rows.q[0], :, rows.k[0]]
        np.testing.assert_array_equal(np.broadcast_to(got, want.shape), want, str(mask))


def test_a_table_in_a_kernel_asks_for_flags():
    at = jnp.zeros((8, 128), jnp.int32)
    with pytest.raises(ValueError, match="needs the flags of the visit"):
        tile_visible(CELLS[0], at, at, None, None, at, K.t)


@pytest.mark.skipif(aot.missing() is not None, reason=aot.missing() or "")
def test_masks_compile_inside_a_tpu_kernel():
    masks = [*(mask for mask in [*LEAVES, *JOINED] if not tables(mask)), *TABLED]

    def kernel(flags, o):
        q = jax.lax.broadcasted_iota(jnp.int32, (8, 1), 0)
        k = jax.lax.broadcasted_iota(jnp.int32, (1, 128), 1)
        for m, mask in enumerate(masks):
            o[m] = jnp.where(tile_visible(mask, q, k, None, None, k, 100, flags[m]), o[m], 0)

    out = jax.ShapeDtypeStruct((len(masks), 8, 128), jnp.int32)
    call = pl.pallas_call(kernel, in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)], out_shape=out, name="masks")
    mesh, rows = aot.mesh(aot.topology("v5e:2x2"), {"data": 4}), jax.sharding.PartitionSpec("data")
    flags = jax.ShapeDtypeStruct((4 * len(masks),), jnp.int32, sharding=jax.sharding.NamedSharding(mesh, rows))
    each = jax.shard_map(call, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    assert "tpu_custom_call" in aot.compile(each, flags, mesh=mesh).hlo
