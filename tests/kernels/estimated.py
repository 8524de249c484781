"""Small kernels whose schedules tests read, and the samples of those schedules that are kept in `schedules/`.

python -m tests.kernels.estimated        # compiles and writes the samples anew
"""

import gzip
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from longwave.kernels import aot

FOLDER = Path(__file__).parent / "schedules"

# (blocks of m, k, n; size of the square matrices) -> seconds on a v5e in bf16, as JAX's guide to Pallas on TPUs prints
# them (docs/pallas/tpu/matmul), for the kernel that `matmul` is.
MEASURED = {
    ((128, 128, 128), 1024): 0.298e-3,
    ((128, 128, 128), 4096): 11.77e-3,
    ((128, 128, 128), 8192): 91.84e-3,
    ((512, 1024, 1024), 1024): 0.127e-3,
    ((512, 1024, 1024), 4096): 0.889e-3,
    ((512, 1024, 1024), 8192): 6.10e-3,
}


def _matmul(x_ref, y_ref, o_ref, sum_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        o_ref[...] = sum_ref[...].astype(o_ref.dtype)


def matmul(x, y, *, blocks):
    m, k, n = blocks
    return pl.pallas_call(
        _matmul,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(x.shape[0] // m, y.shape[1] // n, x.shape[1] // k),
            in_specs=[pl.BlockSpec((m, k), lambda i, j, l: (i, l)), pl.BlockSpec((k, n), lambda i, j, l: (l, j))],
            out_specs=pl.BlockSpec((m, n), lambda i, j, l: (i, j)),
            scratch_shapes=[pltpu.VMEM((m, n), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], y.shape[1]), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="matmul",
    )(x, y)


def matmul_case(chip, blocks, size, **launch):
    steps = int(np.prod([size // block for block in blocks]))
    x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    launches = {"matmul": aot.Launch(**{"steps": steps, "flops": 2 * size**3} | launch)}
    return aot.Case(f"{blocks} of {size}", chip, partial(matmul, blocks=blocks), (x, x), launches)


def _causal(q_ref, k_ref, v_ref, o_ref, max_ref, sum_ref, out_ref):
    i, j, block = pl.program_id(1), pl.program_id(2), q_ref.shape[0]

    @pl.when(j == 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, -1e30)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(j <= i)
    def _():
        scores = jax.lax.dot_general(
            q_ref[...], k_ref[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        row = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0) + i * block
        column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) + j * block
        scores = jnp.where(column <= row, scores, -1e30)
        largest = jnp.maximum(max_ref[...], scores.max(1, keepdims=True))
        decay, weight = jnp.exp(max_ref[...] - largest), jnp.exp(scores - largest)
        max_ref[...] = largest
        sum_ref[...] = decay * sum_ref[...] + weight.sum(1, keepdims=True)
        dot = jnp.dot(weight.astype(v_ref.dtype), v_ref[...], preferred_element_type=jnp.float32)
        out_ref[...] = decay * out_ref[...] + dot

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        o_ref[...] = (out_ref[...] / sum_ref[...]).astype(o_ref.dtype)


def causal(q, k, v, *, block):
    heads, length, width = q.shape
    size = (None, block, width)
    column = pltpu.VMEM((block, 1), jnp.float32)
    return pl.pallas_call(
        _causal,
        grid=(heads, length // block, length // block),
        in_specs=[
            pl.BlockSpec(size, lambda h, i, j: (h, i, 0)),
            pl.BlockSpec(size, lambda h, i, j: (h, j, 0)),
            pl.BlockSpec(size, lambda h, i, j: (h, j, 0)),
        ],
        out_specs=pl.BlockSpec(size, lambda h, i, j: (h, i, 0)),
        scratch_shapes=[column, column, pltpu.VMEM((block, width), jnp.float32)],
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="causal",
    )(q, k, v)


def causal_case(chip, block=128, length=1024, heads=2, width=128):
    n = length // block
    launch = aot.Launch(steps=heads * n * n, regions=((n + 1) / 2 / n,), flops=2 * heads * length**2 * width)
    x = jax.ShapeDtypeStruct((heads, length, width), jnp.bfloat16)
    return aot.Case(f"causal {block}", chip, partial(causal, block=block), (x, x, x), {"causal": launch})


def _walk(table, x_ref, y_ref, o_ref):
    n = pl.program_id(0)

    @pl.when(table[1, n] == 0)
    def _():
        o_ref[...] = jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

    @pl.when(table[1, n] == 1)
    def _():
        def add(n, _):
            o_ref[...] += n * jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

        jax.lax.fori_loop(0, 10, add, None)


def walk(table, x, y):
    """Walks through the (block of x, what to do with it) of a table."""
    return pl.pallas_call(
        _walk,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(table.shape[1],),
            in_specs=[
                pl.BlockSpec((128, 128), lambda n, t: (t[0, n], 0)),
                pl.BlockSpec((128, 128), lambda n, t: (0, 0)),
            ],
            out_specs=pl.BlockSpec((128, 128), lambda n, t: (t[0, n], 0)),
        ),
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.float32),
        name="walk",
    )(table, x, y)


TABLE = np.array([[0, 0, 1, 1, 3, 3, 3, 2], [0, 1, 0, 0, 0, 1, 0, 2]], np.int32)


def walk_case(chip):
    launch = aot.Launch(steps=8, regions=(5 / 8, 2 / 8), trips=(10,), prefetch=(TABLE,))
    shape = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    args = (shape(2, 8, dtype=jnp.int32), shape(512, 128), shape(128, 128))
    return aot.Case("walk", chip, walk, args, {"walk": launch})


@jax.custom_vjp
def square(x):
    return _product(x, "forward")


square.defvjp(lambda x: (square(x), x), lambda x, dy: (_product(x * dy, "backward"),))


def _product(x, name):
    def body(x_ref, o_ref):
        o_ref[...] = jnp.dot(x_ref[...], x_ref[...])

    return pl.pallas_call(body, out_shape=x, name=name)(x)


SAMPLES = {
    f"{kernel}_{chip}": case
    for chip in ("v5e", "v6e")
    for kernel, case in {
        "matmul": matmul_case(chip, (128, 128, 128), 256),
        "causal": causal_case(chip),
        "walk": walk_case(chip),
    }.items()
}


def sample(name):
    """The texts of the two files: bundles, utilisation."""
    return [gzip.decompress((FOLDER / f"{name}.{part}.gz").read_bytes()).decode() for part in ("bundles", "use")]


def _write_samples(folder):
    from longwave.kernels.aot import estimate

    for name, case in SAMPLES.items():
        dump = Path(folder, "dump")
        dump.mkdir()
        estimate._estimate(case, dump)
        for part, label in zip(("bundles", "use"), estimate._PASSES, strict=True):
            (file,) = dump.glob(f"*-{name.split('_')[0]}.1-*-{label}.txt")
            (FOLDER / f"{name}.{part}.gz").write_bytes(gzip.compress(file.read_bytes(), mtime=0))
        shutil.rmtree(dump)


if __name__ == "__main__":
    from longwave.kernels.aot.estimate import _FLAGS
    from tests.kernels import estimated

    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        flags = {"LIBTPU_INIT_ARGS": f"{_FLAGS}{folder}/dump", "XLA_FLAGS": ""}
        aot.in_subprocess(estimated._write_samples, folder, environment=flags)
    sys.stdout.write("".join(f"{file.name} {file.stat().st_size}\n" for file in sorted(FOLDER.glob("*.gz"))))
