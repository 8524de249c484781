"""The table of shardings, and what the compiled step makes of it."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from longwave import layers, models
from longwave.kernels import aot
from longwave.layers.mixer import parameter_roles
from longwave.training import sharding
from longwave.training.optimizer import AdamW
from longwave.training.program import build
from longwave.training.run import Run
from tests.training.test_step import Majority


def every_model():
    """One around every mixer with each kind of part. The runs of configs/ are looked at where they are built, in
    tests/configs/test_golden.py."""
    mixers = {**layers.MIXERS, "Bidirectional": functools.partial(layers.Bidirectional, mixer=layers.S4D)}
    for name, mixer in mixers.items():
        for mlp, norm in ((layers.MLP, layers.RMSNorm), (layers.GLU, layers.BatchNorm)):

            def make(rngs, mixer=mixer, mlp=mlp, norm=norm):
                body = models.Backbone(
                    models.Features(3, 8),
                    width=16,
                    depth=2,
                    mixers=(mixer,),
                    mlp=mlp,
                    norm=norm,
                    cls_token=True,
                    rngs=rngs,
                )
                return models.Classifier(body, classes=10, pooling=models.cls, rngs=rngs)

            yield f"{name} {mlp.__name__} {norm.__name__}", make


def check_rules(roles, name):
    """Every parameter matches one rule, which splits it if it is large."""
    for path, role in roles.items():
        spec = sharding.rule_of(path, role)  # raises unless exactly one
        large = role in ("weight", "embed") and path.endswith(("kernel", "embedding", "table"))
        assert large == (spec != P()), f"{name}: {path} ({role}) is {spec}"


def test_every_parameter_of_every_model_matches_exactly_one_rule():
    seen = set()
    for name, make in every_model():
        roles = parameter_roles(nnx.eval_shape(lambda make=make: make(nnx.Rngs(0))))
        check_rules(roles, name)
        seen |= set(roles.values())
    assert {"A", "B", "C", "D", "dt", "norm", "bias", "embed", "weight"} <= seen


def test_no_rule_and_two_rules_are_errors(monkeypatch):
    with pytest.raises(ValueError, match="matches 0 sharding rules"):
        sharding.rule_of("x/y", "no such role")
    monkeypatch.setattr(sharding, "RULES", (*sharding.RULES, ("norm", "", P())))
    with pytest.raises(ValueError, match="matches 2 sharding rules"):
        sharding.rule_of("x/scale", "norm")


def test_an_axis_that_does_not_divide_is_dropped_and_stacked_layers_are_never_split():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    spec = lambda path, role, shape: sharding.parameter_sharding(path, role, shape, mesh).spec
    assert spec("encoder/embedding", "embed", (18, 64)) == P("tensor", "fsdp")
    assert spec("encoder/embedding", "embed", (19, 64)) == P(None, "fsdp")
    assert spec("layers/0/mlp/up/kernel", "weight", (12, 64, 256)) == P(None, "fsdp", "tensor")
    assert spec("layers/0/mlp/down/kernel", "weight", (12, 256, 64)) == P(None, "tensor", "fsdp")


def test_an_axis_that_nothing_splits_over_is_refused():
    with pytest.raises(ValueError, match="nothing splits over 'replica'"):
        sharding.make_mesh({"replica": 2, "data": 4})


def test_local_rows_are_those_of_the_devices_of_this_process():
    class Rows:
        """A process whose devices hold two blocks that do not meet, one of them twice."""

        def addressable_devices_indices_map(self, shape):
            assert shape == (8,)
            return dict(enumerate([(slice(6, 8),), (slice(0, 2),), (slice(6, 8),)]))

    assert sharding.local_rows(Rows(), 8) == [0, 1, 6, 7]
    assert sharding.local_rows(sharding.batch_sharding(sharding.make_mesh({"data": 4, "tensor": 2})), 8) == [*range(8)]


@pytest.mark.parametrize(
    "mixer",
    [layers.S4D, pytest.param(functools.partial(layers.Attention, heads=4, causal=False), marks=pytest.mark.full)],
)
def test_the_compiled_step_gathers_no_activation(mixer):
    """Pure data parallelism needs no all-gather at all: parameters are whole, activations stay where they are."""

    def backbone(inputs, *, rngs):
        return models.Backbone(
            inputs, width=16, depth=1, mixers=(mixer,), mlp=layers.MLP, norm=layers.BatchNorm, dropout=0.1, rngs=rngs
        )

    run = Run(task=Majority(), backbone=backbone, optimizer=AdamW(lr=0.01), steps=1, batch_size=16, mesh={"data": 8})
    program = build(run)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(program.mesh):
        text = program.train_step.lower(program.state, program.batch, key).compile().as_text()
    assert aot.all_gathers(text) == []
    assert any(c.kind == "all-reduce" for c in aot.collectives(text))  # the gradient's


def test_large_parameters_are_split_over_fsdp():
    mesh = sharding.make_mesh({"fsdp": 8})
    shape = (64, 256)
    placed = sharding.parameter_sharding("layers/0/mlp/up/kernel", "weight", shape, mesh)
    assert np.prod(placed.shard_shape(shape)) * 8 == np.prod(shape)
