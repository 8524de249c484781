"""The training step: accumulation, guard, averaging, precision, and equality on any mesh."""

import dataclasses
import math
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longwave import layers, models
from longwave.kernels.partition import Axes
from longwave.layers.mixer import Context
from longwave.layers.mlp import MLP
from longwave.layers.norms import BatchNorm
from longwave.training.optimizer import AdamW, Plateau, warmup_constant
from longwave.training.program import build
from longwave.training.run import Run
from longwave.training.state import ModelDef, paths
from longwave.training.step import averages, make_eval_step, make_gradients
from longwave.training.task import Sums
from tests.models.decay import Decay
from tests.tolerances import GRADIENT, OTHER_MESH, assert_close


class Majority:
    """Which half of the vocabulary fills the row? Made from the batch number, as every stream is."""

    name, metric, larger_is_better, advice = "majority", "accuracy", True, ""
    inputs = models.Tokens(8, 12)

    def batch_spec(self, batch_size):
        spec = lambda shape, dtype: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
        return {
            "inputs": spec((12,), np.int32),
            "length": spec((), np.int32),
            "label": spec((), np.int32),
            "weight": spec((), np.float32),
        }

    def batch(self, k, size=16):
        rng = np.random.default_rng(k)
        inputs = rng.integers(0, 8, (size, 12))
        length = rng.integers(3, 13, size)
        upper = ((inputs >= 4) & (np.arange(12) < length[:, None])).sum(1)
        return {
            "inputs": inputs,
            "length": length,
            "label": (2 * upper > length).astype(np.int32),
            "weight": np.ones(size, np.float32),
        }

    def stream(self, split, *, batch_size, seed=0, step=0, rows=None):
        if split == "train":
            while True:
                yield self.batch(step, batch_size)
                step += 1
        for k in range(10_000, 10_003):
            batch = self.batch(k, batch_size)
            if k == 10_002:  # the last batch of a single pass is padded
                batch["weight"][batch_size // 2 :] = 0
            yield batch

    def head(self, backbone, *, rngs):
        return models.Classifier(backbone, classes=2, rngs=rngs)

    def loss(self, model, batch, key, axes):
        valid = jnp.arange(12)[None] < batch["length"][:, None]
        logits, _ = model(batch["inputs"], Context(valid=valid, key=key, axes=axes), train=key is not None)
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], axis=1)[:, 0]
        right = (logits.argmax(-1) == batch["label"]).astype(jnp.float32)
        w = batch["weight"]
        return Sums((w * loss).sum(), w.sum(), {"accuracy": (w * right).sum()})


def backbone(inputs, *, rngs, **kwargs):
    options = {"width": 8, "depth": 2, "mixers": (Decay,), "mlp": MLP, **kwargs}
    return models.Backbone(inputs, **options, rngs=rngs)


def noisy_backbone(inputs, *, rngs):
    return backbone(inputs, rngs=rngs, dropout=0.2, norm=BatchNorm)


def make_run(**changes):
    optimizer = AdamW(lr=0.01, weight_decay=0.05, schedule=warmup_constant(warmup=2))
    run = Run(task=Majority(), backbone=backbone, optimizer=optimizer, steps=10, batch_size=16, mesh={"data": 1})
    return dataclasses.replace(run, **changes)


PROGRAMS = {}  # compiled once for all tests that use the same settings


def train(run, steps, poison=()):
    names = ("backbone", "accumulate", "ema", "compute_dtype", "mesh", "optimizer")
    setting = repr([getattr(run, name) for name in names if name != "optimizer"] + [run.optimizer.plateau])
    if setting not in PROGRAMS:
        PROGRAMS[setting] = build(run, jax.devices()[: math.prod(run.mesh.values())])
    program = PROGRAMS[setting]
    with jax.set_mesh(program.mesh):
        key = program.key()
        state, log = program.init(key), []
        for k in range(steps):
            batch = run.task.batch(k)
            if k in poison:
                batch["weight"] = np.full(16, np.nan, np.float32)
            state, metrics = program.train_step(state, program.global_batch(batch), key)
            log.append(jax.device_get(metrics))
    return program, state, log


def test_it_learns():
    _, _, log = train(make_run(), 60)
    assert np.mean([m["accuracy"] for m in log[-10:]]) > 0.8 > np.mean([m["accuracy"] for m in log[:5]])


def test_micro_batches_sum_to_the_batch():
    _, whole, log = train(make_run(), 2)
    _, parts, log4 = train(make_run(accumulate=4), 2)
    assert_close(log4[0]["grad_norm"], log[0]["grad_norm"], GRADIENT["float32"])
    for a, b in zip(jax.tree.leaves(parts.opt), jax.tree.leaves(whole.opt), strict=True):
        assert_close(a, b, GRADIENT["float32"])


def test_a_side_loss_is_added_in_training_and_logged():
    """2 y^2 per example beside 3 y^2: its gradient counts too. In evaluation there is none."""

    class Number(nnx.Module):
        roles = {"y": "D"}

        def __init__(self, rngs):
            self.y = nnx.Param(jnp.float32(0.5))

    class Told(Majority):
        def loss(self, model, batch, key, axes):
            square, weight = jnp.square(model.y[...]), batch["weight"].sum()
            return Sums(3 * square * weight, weight, {}, ({"square": square},))

    run = make_run(task=Told(), side_loss=lambda aux: 2 * aux[0]["square"], accumulate=2)
    model = ModelDef(Number)
    params, rest = model.init(jax.random.key(0))
    batch = {"weight": np.ones(4, np.float32)}
    gradients = make_gradients(model, run.task, run, Axes())
    sums, grads, _ = gradients(types.SimpleNamespace(params=params, model_state=rest), batch, jax.random.key(0))
    assert averages(sums) == {"loss": 5 * 0.25, "side_loss": 2 * 0.25}
    assert sums.aux == ()
    assert grads == {"y": 10 * 0.5}
    evaluated = make_eval_step(model, run.task, run, Axes())(params, rest, batch)
    assert averages(evaluated) == {"loss": 3 * 0.25}
    assert evaluated.aux == ()


@pytest.mark.full  # the loop's own test of another mesh is in the default suite
@pytest.mark.parametrize(
    "mesh", [pytest.param({"data": 8}, marks=pytest.mark.large), {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_another_mesh_gives_the_same_run(mesh):
    _, one, log = train(make_run(backbone=noisy_backbone), 3)
    _, many, log8 = train(make_run(backbone=noisy_backbone, mesh=mesh), 3)
    assert_close(log8[-1]["loss"], log[-1]["loss"], OTHER_MESH)
    for name, a, b in zip(
        paths(one.model_state),
        jax.tree.leaves(many.model_state),
        jax.tree.leaves(one.model_state),
        strict=True,
    ):
        assert_close(a, b, 10 * OTHER_MESH, name)


def three_mixers(inputs, *, rngs):
    """Time goes round a ring, is composed over devices, and is gathered: one layer of each kind."""
    mixers = (partial(layers.Attention, heads=2), partial(layers.LRU, N=4), partial(layers.S4D, N=4))
    return backbone(inputs, rngs=rngs, depth=3, mixers=mixers, tie_dropout=False)


@pytest.mark.full
def test_time_over_devices_gives_the_same_run():
    _, one, log = train(make_run(backbone=three_mixers), 3)
    _, many, logs = train(make_run(backbone=three_mixers, mesh={"data": 2, "seq": 2, "tensor": 2}), 3)
    assert_close(logs[-1]["loss"], log[-1]["loss"], OTHER_MESH)
    for name, a, b in zip(
        paths(one.model_state), *map(jax.tree.leaves, (many.model_state, one.model_state)), strict=True
    ):
        assert_close(a, b, 10 * OTHER_MESH, name)


def test_parameters_are_split_as_the_rules_say():
    _program, state, _ = train(make_run(mesh={"fsdp": 4, "tensor": 2}), 1)
    up = state.params["backbone"]["layers"]["0"]["mlp"]["up"]["kernel"]
    assert up.sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    assert up.addressable_shards[0].data.shape == (2, 16)
    moment = state.opt[0].mu["backbone"]["layers"]["0"]["mlp"]["up"]["kernel"]
    assert moment.sharding == up.sharding


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters():
    run = make_run(ema=0.9)
    _, before, _ = train(run, 3)
    program, after, log = train(run, 5, poison=(3, 4))
    assert [int(m["skipped_in_a_row"]) for m in log] == [0, 0, 0, 1, 2]
    assert int(after.step) == 5
    for name in ("params", "model_state", "opt", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    poisoned = run.task.batch(3) | {"weight": np.full(16, np.nan, np.float32)}
    with jax.set_mesh(program.mesh):
        finite = program.diagnosis(after, program.global_batch(poisoned), program.key())
    assert set(finite) == set(program.model.roles)
    assert not any(bool(f) for f in finite.values())


def test_ema_follows_the_parameters():
    run = make_run(ema=0.75)
    expected, states = None, [train(run, n)[1] for n in range(4)]
    for state in states:
        kernel = np.float64(state.params["out"]["kernel"])
        expected = kernel if expected is None else 0.75 * expected + 0.25 * kernel
    assert_close(states[-1].ema["out"]["kernel"], expected, 1e-6)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_where_named():
    program, state, log = train(make_run(compute_dtype="bfloat16"), 2)
    cast = program.model.cast(state.params, "bfloat16")
    kinds = {path: leaf.dtype for path, leaf in zip(paths(cast), jax.tree.leaves(cast), strict=True)}
    kept = {"backbone/layers/0/mixer/A", "backbone/layers/1/mixer/A", "out/kernel", "out/bias"}
    assert {kinds.pop(path) for path in kept} == {jnp.dtype(jnp.float32)}
    assert set(kinds.values()) == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    assert_close(log[0]["loss"], train(make_run(), 1)[2][0]["loss"], 0.02)


def test_evaluation_counts_every_example_once():
    run = make_run()
    program, state, _ = train(run, 3)
    with jax.set_mesh(program.mesh):
        scores = program.evaluate(state, "valid")
    model = program.model.merge(state.params, state.model_state)
    single = jax.jit(lambda row: run.task.loss(model, row, None, Axes()))
    rows = [
        single({name: values[i : i + 1] for name, values in batch.items()})
        for batch in run.task.stream("valid", batch_size=16)
        for i in np.flatnonzero(batch["weight"])
    ]
    assert len(rows) == 40
    assert_close(scores["accuracy"], np.mean([row.metrics["accuracy"] for row in rows]), 1e-6)
    assert_close(scores["loss"], np.mean([row.loss for row in rows]), 1e-5)


def test_the_plateau_moves_with_evaluations():
    run = make_run(optimizer=AdamW(lr=0.01, plateau=Plateau(factor=0.5, patience=0)))
    program, state, _ = train(run, 1)
    with jax.set_mesh(program.mesh):
        for accuracy in (0.5, 0.4):
            state = program.evaluated(state, {"accuracy": accuracy})
        assert int(state.evaluated) == 1
        _, metrics = program.train_step(state, program.global_batch(run.task.batch(1)), program.key())
    assert float(metrics["lr"]) == np.float32(0.005)


def test_batch_and_mesh_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"batch_size = 16 must be a multiple of 24"):
        build(make_run(accumulate=4, mesh={"data": 6}, batch_size=16), jax.devices()[:6])
    with pytest.raises(ValueError, match=r"mesh names \['modle'\]"):
        build(make_run(mesh={"modle": 2}))
    with pytest.raises(ValueError, match="does not fill 8 devices"):
        build(make_run(mesh={"data": 3}), jax.devices())
