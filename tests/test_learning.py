"""Which stacks of mixers learn to recall, and which cannot: the cheap test of learning that all mixers share.

A new mixer that should recall is one line in LEARN; one that is known not to, a line in CANNOT.
"""

import functools

import jax
import pytest

from longwave import layers
from longwave.models import Backbone
from longwave.tasks.recall.induction_heads import InductionHeads
from longwave.tasks.recall.mqar import MQAR
from longwave.training.optimizer import AdamW, warmup_constant
from longwave.training.program import build
from longwave.training.run import Run

ATTENTION = functools.partial(layers.Attention, heads=2)
S4D = functools.partial(layers.S4D, N=16)
DELTA = functools.partial(layers.DeltaNet, heads=2)
LEARN = {"attention": (ATTENTION, ATTENTION), "s4d-attention": (S4D, ATTENTION)}  # two layers each, no MLP
RECURRENT = {"deltanet": (DELTA, DELTA)}  # asked for associative recall
CANNOT = {"s4d": (S4D, S4D)}  # what is written into the state must depend on what is read: here it does not

RECALL = MQAR(vocab=64, length=32, pairs=4, sizes=(20_000, 64, 512))
INDUCTION = InductionHeads(length=32, sizes=(64, 512))


def accuracy(task, mixers, steps):
    """On test, after so many steps of 64 rows."""
    backbone = functools.partial(Backbone, width=64, depth=len(mixers), mixers=mixers)
    optimizer = AdamW(lr=3e-3, schedule=warmup_constant(warmup=20))
    run = Run(task=task, backbone=backbone, optimizer=optimizer, steps=steps, batch_size=64)
    program = build(run, jax.devices()[:1])
    with jax.set_mesh(program.mesh):
        key = program.key()
        state, stream = program.init(key), program.stream("train")
        for _ in range(steps):
            state, _ = program.train_step(state, program.global_batch(next(stream)), key)
        return program.evaluate(state, "test")["accuracy"]


@pytest.mark.full
@pytest.mark.parametrize(
    "mixers",
    [
        pytest.param(m, id=name, marks=[pytest.mark.large] * (name != "attention"))
        for name, m in (LEARN | RECURRENT).items()
    ],
)
def test_associative_recall_is_learned(mixers):
    assert accuracy(RECALL, mixers, steps=400) > 0.95


@pytest.mark.full
@pytest.mark.large
@pytest.mark.parametrize("mixers", LEARN.values(), ids=LEARN)
def test_induction_is_learned(mixers):
    assert accuracy(INDUCTION, mixers, steps=400) > 0.95


@pytest.mark.full
@pytest.mark.parametrize("mixers", CANNOT.values(), ids=CANNOT)
def test_recall_tells_mixers_apart(mixers):
    assert accuracy(RECALL, mixers, steps=400) < 0.5
