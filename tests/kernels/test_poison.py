"""Kernels with one fault each: the interpreter's poison, bounds and races find it; the right kernel passes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from longwave.kernels.aot import poison
from longwave.kernels.aot.poison import RaceFound, interpreted
from tests.tolerances import FORWARD, assert_close

F32 = FORWARD["float32"]
BLOCK = 16


def input_of(rows):
    return np.random.default_rng(0).normal(size=(rows, 128)).astype(np.float32)


def rows_summed(x, *, masked=True, initialised=True):
    """(8, 128) sums over blocks of rows, accumulated in scratch; the last block may reach beyond the array."""
    rows, steps = x.shape[0], pl.cdiv(x.shape[0], BLOCK)

    def kernel(x_ref, o_ref, total):
        step = pl.program_id(0)

        @pl.when(step == (0 if initialised else -1))
        def _():
            total[...] = jnp.zeros_like(total)

        block = x_ref[...]
        if masked:
            row = step * BLOCK + jax.lax.broadcasted_iota(jnp.int32, block.shape, 0)
            block = jnp.where(row < rows, block, 0)
        total[...] += jnp.sum(block.reshape(-1, 8, 128), axis=0)

        @pl.when(step == steps - 1)
        def _():
            o_ref[...] = total[...]

    return pl.pallas_call(
        kernel,
        grid=(steps,),
        in_specs=[pl.BlockSpec((BLOCK, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((8, 128), x.dtype),
        scratch_shapes=[pltpu.VMEM((8, 128), x.dtype)],
    )(x)


def summed(x):
    padded = np.pad(x, ((0, -len(x) % 8), (0, 0)))
    return padded.astype(np.float64).reshape(-1, 8, 128).sum(0)


@pytest.mark.parametrize("rows", [40, *(pytest.param(rows, marks=pytest.mark.full) for rows in (32, 3))])
def test_the_right_kernel_passes_whole_and_ragged(rows):
    x = input_of(rows)
    with interpreted():
        total = rows_summed(x)
    assert_close(total, summed(x), F32)


@pytest.mark.parametrize(("rows", "fault"), [(40, {"masked": False}), (32, {"initialised": False})])
def test_a_ragged_edge_without_mask_and_scratch_before_it_is_written_are_nan(rows, fault):
    x = input_of(rows)
    with interpreted():
        total = rows_summed(x, **fault)
    assert np.isnan(total).any()
    with pytest.raises(AssertionError, match="nan"):
        assert_close(total, summed(x), F32)


@pytest.mark.full
def test_without_poison_memory_begins_as_zero():
    x = input_of(32)
    with interpreted(poison=False):
        total = rows_summed(x, initialised=False)
    assert_close(total, summed(x), F32)


def doubled(x, *, own_block=True):
    """Every step writes a block of its own; else all of them, on two cores at once, the first."""
    return pl.pallas_call(
        lambda x_ref, o_ref: o_ref.__setitem__(..., 2 * x_ref[...]),
        grid=(x.shape[0] // 8,),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (i if own_block else 0, 0)),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    )(x)


def test_two_cores_on_one_block_race_also_when_a_sound_kernel_runs_after(capsys, caplog):
    x = input_of(16)
    with pytest.raises(RaceFound, match="1 of 2 kernels"), interpreted():
        _, right = doubled(x, own_block=False), doubled(x)
    assert "RACE DETECTED" in capsys.readouterr().out + caplog.text  # jax 0.10 prints it, 0.12 logs it
    assert_close(right, 2.0 * x, F32)


@pytest.mark.full
def test_races_pass_where_they_are_not_asked_for():
    with interpreted(races=False):
        doubled(input_of(16), own_block=False)


def copied(x, *, waits=True):
    """x through VMEM by hand; without waiting, VMEM is read while the copy is under way."""

    def kernel(x_hbm, o_ref, buffer, semaphore):
        copy = pltpu.make_async_copy(x_hbm, buffer, semaphore)
        copy.start()
        if waits:
            copy.wait()
        o_ref[...] = buffer[...]
        if not waits:
            copy.wait()

    return pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
    )(x)


def test_reading_before_a_copy_has_ended_races_and_reads_poison():
    x = input_of(8)
    with interpreted():
        assert_close(copied(x), x, F32)
    with pytest.raises(RaceFound), interpreted():
        early = copied(x, waits=False)
    assert np.isnan(early).all()


def window(x, start, *, block=0, shift=0):
    """Eight rows of x from `start`, which the kernel reads as a number; the whole of x is its block number 0."""

    def kernel(start_ref, x_ref, o_ref, copy_ref):
        copy_ref[pl.ds(shift * start_ref[0], x.shape[0]), :] = x_ref[...]
        o_ref[...] = copy_ref[pl.ds(start_ref[0], 8), :]

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[pl.BlockSpec(x.shape, lambda i, start: (block, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i, start: (0, 0)),
            scratch_shapes=[pltpu.VMEM(x.shape, x.dtype)],
        ),
        out_shape=jax.ShapeDtypeStruct((8, 128), x.dtype),
    )(jnp.array([start], jnp.int32), x)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"start": 9}, "[Oo]ut-of-bounds"),
        pytest.param({"start": 8, "block": 1}, "[Oo]ut-of-bounds block index", marks=pytest.mark.full),
        pytest.param({"start": 1, "shift": 1}, "AssertionError|Out-of-bounds swap", marks=pytest.mark.full),
    ],
    ids=["read", "block", "write"],
)
def test_out_of_bounds_raises_and_the_interpreter_goes_on(fault, said):
    x = input_of(16)
    with pytest.raises(Exception, match=said), interpreted():
        jax.block_until_ready(window(x, **fault))
    with interpreted():
        assert_close(window(x, 8), x[8:], F32)


def test_a_block_in_which_nothing_was_interpreted_says_so():
    with pytest.raises(RuntimeError, match="no Pallas TPU kernel ran"), interpreted():
        jnp.ones(3).sum()


@pytest.mark.full
def test_a_compiled_kernel_is_interpreted_again_and_outside_nothing_is():
    step = jax.jit(partial(doubled, own_block=True))
    x = input_of(16)
    for _ in range(2):
        with interpreted():
            assert_close(step(x), 2.0 * x, F32)
    with pytest.raises(ValueError, match="interpret"):  # what a CPU says of a TPU's kernel
        step(x)


def test_a_jax_without_the_detectors_state_is_refused(monkeypatch):
    monkeypatch.setattr(poison, "_STATE", "Races")
    with pytest.raises(RuntimeError, match="races_found"), interpreted():
        pass
