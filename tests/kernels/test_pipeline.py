"""What a kernel says of itself before it is compiled: where it is found, and the bytes that its blocks move."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from longwave.kernels.aot import pipeline
from tests.kernels.estimated import matmul, square

abstract = jax.ShapeDtypeStruct


def called(fn, *args):
    return list(pipeline.equations(jax.make_jaxpr(fn)(*args).jaxpr))


def blocks(grid, index, block, shape, *, dtype=jnp.float32, prefetch=(), **spec):
    """The equation of a kernel whose only large operand is moved in blocks."""
    specs = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(prefetch),
        grid=grid,
        in_specs=[pl.BlockSpec(block, index, **spec)],
        out_specs=pl.BlockSpec(memory_space=pltpu.SMEM),
    )
    out = abstract((1, 1), jnp.int32)
    call = pl.pallas_call(lambda *refs: None, grid_spec=specs, out_shape=out, name="moves")
    (equation,) = called(call, *[abstract(np.shape(t), jnp.int32) for t in prefetch], abstract(shape, dtype))
    return equation


def moved(grid, index, block, shape, size):
    """Elements moved, by a walk over the grid: a block each time when it is another, without what is over the edge."""
    total, last = 0, None
    for step in np.ndindex(*grid):
        at = tuple(int(i) for i in index(*step))
        if at != last:
            total += np.prod([min(b, s - i * b) for i, b, s in zip(at, block, shape, strict=True)])
        last = at
    return int(total) * size


@pytest.mark.parametrize(
    ("grid", "index", "block", "shape"),
    [
        ((4, 3), lambda i, j: (i, j), (8, 128), (32, 384)),
        ((4, 3), lambda i, j: (i, 0), (8, 128), (32, 384)),
        ((4, 3), lambda i, j: (j, i % 2), (8, 128), (32, 384)),
        ((3, 2, 4), lambda i, j, k: (k // 2, i), (16, 128), (40, 384)),  # the last block hangs over the edge
        ((7,), lambda i: (0, 0), (24, 256), (24, 256)),
    ],
)
def test_a_block_is_moved_when_its_index_changes(grid, index, block, shape):
    read = pipeline.read(blocks(grid, index, block, shape))
    assert (read.bytes, read.exact) == (moved(grid, index, block, shape, 4), True)
    assert read.grid == grid


def test_blocks_move_in_the_tiles_in_which_they_lie():
    read = lambda block, shape, dtype: pipeline.read(blocks((2,), lambda i: (i, 0, 0), block, shape, dtype=dtype))
    assert read((None, 16, 64), (2, 16, 64), jnp.bfloat16).bytes == 2 * 16 * 128 * 2
    assert read((1, 3, 128), (2, 3, 128), jnp.float32).bytes == 2 * 4 * 128 * 4
    assert read((1, 9, 130), (2, 9, 130), jnp.float32).bytes == 2 * 16 * 256 * 4


def test_tables_steer_the_blocks_exactly():
    index, table = lambda n, t: (t[0, n], t[1, n] // 2), np.array([[3, 3, 0, 1, 1], [0, 1, 1, 2, 3]], np.int32)
    equation = blocks((5,), index, (8, 128), (32, 512), prefetch=(table,))
    known, unknown = pipeline.read(equation, (table,)), pipeline.read(equation)
    tables = 2 * 5 * 4
    assert known.bytes == moved((5,), lambda n: index(n, table), (8, 128), (32, 512), 4) + tables
    assert (known.exact, unknown.exact) == (True, False)
    assert unknown.bytes == 5 * 8 * 128 * 4 + tables  # every step, at worst
    with pytest.raises(
        ValueError, match=r"kernel moves: prefetch has shapes \[\(2, 4\)\], its operands have \[\(2, 5\)\]"
    ):
        pipeline.read(equation, (table[:, :4],))


def test_a_hundred_thousand_steps_are_counted_in_a_second():
    table = np.random.default_rng(0).integers(0, 4, 10**5).astype(np.int32)
    equation = blocks((10**5,), lambda n, t: (t[n], 0), (8, 128), (32, 128), prefetch=(table,))
    pipeline.read(blocks((4,), lambda n, t: (t[n], 0), (8, 128), (32, 128), prefetch=(table[:4],)), (table[:4],))
    start = time.process_time()
    read = pipeline.read(equation, (table,))
    assert time.process_time() - start < 1
    assert read.bytes == (1 + np.count_nonzero(np.diff(table))) * 8 * 128 * 4 + table.nbytes


def test_memory_of_windows_and_scratch():
    (equation,) = called(partial(matmul, blocks=(128, 256, 128)), *[abstract((512, 512), jnp.bfloat16)] * 2)
    read = pipeline.read(equation)
    assert read.vmem == 2 * 2 * (128 * 256 * 2 + 128 * 128) + 4 * 128 * 128
    assert (read.name, read.grid, read.parallel, read.steps) == ("matmul", (4, 4, 2), True, 32)


def test_copies_by_hand_are_not_guessed():
    equation = blocks((2,), None, None, (32, 128), memory_space=pltpu.HBM)
    assert (pipeline.read(equation).bytes, pipeline.read(equation).exact) == (0, False)


def hidden(x):
    """Kernels behind a branch by platform, a custom gradient, a map and a loop."""
    on = jax.lax.platform_dependent(x, tpu=square, default=lambda x: x @ x)
    return (
        jax.vmap(square)(jnp.stack([on, x])).sum() + jax.lax.fori_loop(0, 3, lambda _, x: jax.jit(square)(x), x).sum()
    )


def test_kernels_are_found_wherever_they_are_called():
    x = abstract((128, 128), jnp.float32)
    assert [e.params["name"] for e in called(hidden, x)] == ["forward"] * 3
    names = [
        e.params["name"]
        for e in called(jax.grad(lambda x: jax.vmap(square)(x).sum()), abstract((2, 8, 8), jnp.float32))
    ]
    assert names == ["forward", "backward"]
