"""A tiled matmul as an operation that the autotuner and the report know: the least that such a module holds."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from longwave.kernels.aot.estimate import Case, Launch
from longwave.kernels.aot.tune import Candidate, Entry

N = 512
PROBLEM = f"n={N} bfloat16"


def matmul(x, y, *, block):
    """x y in tiles of `block` rows and columns, the inner dimension whole."""

    def kernel(x_ref, y_ref, o_ref):
        o_ref[...] = jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32).astype(o_ref.dtype)

    return pl.pallas_call(
        kernel,
        grid=(N // block, N // block),
        in_specs=[pl.BlockSpec((block, N), lambda i, j: (i, 0)), pl.BlockSpec((N, block), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((block, block), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((N, N), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name=f"matmul_{block}",
    )(x, y)


def copies(x, *, rows):
    """Doubles x with blocks of `rows` rows: too many do not fit the chip's VMEM."""
    return pl.pallas_call(
        lambda x_ref, o_ref: o_ref.__setitem__(..., 2 * x_ref[...]),
        grid=(x.shape[0] // rows,),
        in_specs=[pl.BlockSpec((rows, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((rows, 128), lambda i: (i, 0)),
        out_shape=x,
        name=f"double_{rows}",
    )(x)


def _matmul(chip, block):
    x = jax.ShapeDtypeStruct((N, N), jnp.bfloat16)
    launch = Launch(steps=(N // block) ** 2, flops=2 * N**3)
    case = Case(f"{PROBLEM} {block}", chip, partial(matmul, block=block), (x, x), {f"matmul_{block}": launch})
    return Candidate(case, {"n": block})


def _double(chip, rows):
    x = jax.ShapeDtypeStruct((1 << 18, 128), jnp.float32)
    launch = Launch(steps=x.shape[0] // rows)
    case = Case(f"double {rows}", chip, partial(copies, rows=rows), (x,), {f"double_{rows}": launch})
    return Candidate(case, {"rows": rows})


def cases(chip):
    """Ours at a fair block size, and the same kernel with small blocks in a peer's place."""
    return [
        Entry(PROBLEM, "tiled", [_matmul(chip, 256)]),
        Entry(PROBLEM, "small tiles", [_matmul(chip, 128)], peer=True),
    ]


def candidates(chip):
    return [
        Entry(PROBLEM, "tiled", [_matmul(chip, block) for block in (128, 256)]),
        Entry("double", "doubled", [_double(chip, rows) for rows in (1 << 11, 1 << 16)]),
    ]
