"""Attention kernels for TPUs with one fault each: on the interpreter the oracle, poison or a race finds it."""

import functools

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from longwave.kernels.aot.poison import RaceFound, interpreted
from longwave.kernels.attention import blocks, pallas_tpu, tpu_backward, tpu_forward
from longwave.kernels.attention.blocks import BackwardCut, Cut
from longwave.kernels.attention.mask import Mask, Window
from longwave.kernels.attention.reference import Coordinates, Scores
from tests.kernels import attention_oracle as oracle
from tests.tolerances import ATTENTION_FORWARD, ATTENTION_GRADIENT, assert_close

full = pytest.mark.full
T = 200  # two blocks of 128, the second of them ragged
SIZE = 150  # of a window that hides nothing within the first block, and a corner between the two
SCORES = Scores(Window(SIZE), 0.1)
AT = Coordinates(), Coordinates()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of the backward kernel too, and one block of keys a step."""
    monkeypatch.setattr(blocks, "backward", lambda *_: BackwardCut(128, 128, 1, 256, 2))


def problem(tq=T, h=1):
    """Numbers, and what is to come of them: tq queries and T keys."""
    x = oracle.inputs(1, tq, T, h, h, 128, 128)
    age = np.arange(tq)[:, None] - np.arange(T)[None]
    return x, oracle.attention(x, abs(age) < SIZE, scale=SCORES.scale)


def forward(tq=T, h=1, **how):
    """Runs the kernel on the interpreter, then compares."""
    x, want = problem(tq, h)
    kernel = functools.partial(pallas_tpu.forward, scores=SCORES, cut=Cut(128, 128, (128, 128), (128, 128)))
    with interpreted(**how):
        got = jax.block_until_ready(jax.jit(kernel)(x.q, x.k, x.v, *AT))
    for name, actual in zip(("o", "lse"), got, strict=True):
        assert_close(actual, getattr(want, name), ATTENTION_FORWARD["float32"], name)


def backward(tq=T, h=1, **how):
    """Likewise, from the lse and delta of the oracle."""
    x, want = problem(tq, h)
    lse, delta = np.float32(want.lse), np.float32((want.o * x.do).sum(-1) - x.dlse)
    kernel = functools.partial(pallas_tpu.backward, scores=SCORES)
    with interpreted(**how):
        got = jax.block_until_ready(jax.jit(kernel)(x.q, x.k, x.v, *AT, lse, delta, x.do))
    for name, actual in zip(("dq", "dk", "dv"), got, strict=True):
        assert_close(actual, getattr(want, name), ATTENTION_GRADIENT["float32"], name)


@pytest.mark.parametrize("kernel", [forward, backward])
def test_the_right_kernel_passes_on_poisoned_memory_and_two_cores(kernel):
    """A head each."""
    kernel(h=2, cores=2)


def without_mask(monkeypatch, module):
    see = module.tile_visible
    monkeypatch.setattr(module, "tile_visible", lambda mask, *args: see(Mask(), *args))


def one_key_too_many(monkeypatch, module):
    see = module.tile_visible
    monkeypatch.setattr(module, "tile_visible", lambda mask, *args: see(Window(SIZE, SIZE), *args))


def masked_tiles_as_whole(monkeypatch, module):
    parts = module.parts
    monkeypatch.setattr(module, "parts", lambda *args: [part._replace(masked=False) for part in parts(*args)])


@pytest.mark.parametrize(
    ("kernel", "module", "fault"),
    [
        (forward, tpu_forward, one_key_too_many),
        (backward, tpu_backward, one_key_too_many),
        pytest.param(forward, tpu_forward, without_mask, marks=full),
        pytest.param(backward, tpu_backward, without_mask, marks=full),
        pytest.param(forward, tpu_forward, masked_tiles_as_whole, marks=full),
    ],
)
def test_a_wrong_mask_is_far_from_the_oracle(kernel, module, fault, monkeypatch):
    fault(monkeypatch, module)
    with pytest.raises(AssertionError, match="relative error"):
        kernel(cores=1, races=False)


@pytest.mark.parametrize("kernel", [forward, pytest.param(backward, marks=full)])
def test_visits_shared_out_to_cores_race(kernel, monkeypatch):
    """Two blocks of keys on two cores at once: both write what they have of the same o, or of the same dq."""
    params = pltpu.CompilerParams
    parallel = lambda dimension_semantics, **rest: params(dimension_semantics=("parallel",) * 3, **rest)
    monkeypatch.setattr(pltpu, "CompilerParams", parallel)
    with pytest.raises(RaceFound):
        kernel(tq=100, cores=2)


@full
@pytest.mark.parametrize(("kernel", "module"), [(forward, tpu_forward), (backward, tpu_backward)])
def test_sums_that_nobody_starts_are_found_by_poison_alone(kernel, module, monkeypatch):
    """From memory that happens to be 0 they come out right."""
    monkeypatch.setattr(module, "_start", lambda *_: None)
    kernel(tq=100, cores=1, races=False, poison=False)
    with pytest.raises(AssertionError, match="relative error nan"):
        kernel(tq=100, cores=1, races=False)
