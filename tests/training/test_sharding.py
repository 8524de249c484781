"""The table of shardings, and what the compiled step makes of it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from longwave import layers, models
from longwave.kernels import aot
from longwave.layers.mixer import parameter_roles
from longwave.tasks.language_modelling.next_token import NextToken
from longwave.training import sharding
from longwave.training.optimizer import AdamW
from longwave.training.program import build
from longwave.training.run import Run
from longwave.training.state import paths
from tests.tolerances import GRADIENT, OTHER_MESH, assert_close
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
                    width=64,
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
        large = role == "weight" or path.endswith("embedding")
        assert large == (spec != P()), f"{name}: {path} ({role}) is {spec}"


def test_every_parameter_of_every_model_matches_exactly_one_rule():
    seen = set()
    for name, make in every_model():
        roles = parameter_roles(nnx.eval_shape(lambda make=make: make(nnx.Rngs(0))))
        check_rules(roles, name)
        seen |= set(roles.values())
    assert {"A", "B", "C", "D", "dt", "norm", "bias", "embed", "weight"} <= seen


INTO, OUT = P("fsdp", "tensor"), P("tensor", "fsdp")
SHARED = P(("tensor", "fsdp"), None)  # read by all channels: partial sums are small, channels are not


@pytest.mark.parametrize(
    ("mixer", "expected"),
    [
        (
            layers.Mamba,
            {"in_x": INTO, "in_z": INTO, "to_dt": SHARED, "to_B": SHARED, "to_C": SHARED, "dt": INTO, "out": OUT},
        ),
        (layers.Mamba2, {"in_x": INTO, "in_z": INTO, "in_B": INTO, "in_C": INTO, "in_dt": INTO, "out": OUT}),
        (
            layers.KDA,
            {f"qkv/{name}": INTO for name in "qkv"}
            | {f"{gate}/low": P("fsdp", None) for gate in ("a", "gate")}
            | {"a/up": INTO, "gate/up": INTO, "beta": INTO, "out": OUT},
        ),
        (
            functools.partial(layers.MemMamba, mixer=functools.partial(layers.LRU, N=4), p=None),
            {
                "token/W_q": INTO,
                "token/W_k": INTO,
                "token/W_v": INTO,
                "token/W_o": OUT,
                "W_n": P("fsdp", None),
                "mixer/output/value": INTO,
                "mixer/output/gate": INTO,
            },
        ),
    ],
    ids=["Mamba", "Mamba2", "KDA", "MemMamba"],
)
def test_channels_and_heads_are_split_together(mixer, expected):
    """What makes channels, what works in them and what leaves them: each device its own. All else is whole."""
    roles = parameter_roles(nnx.eval_shape(lambda: mixer(64, rngs=nnx.Rngs(0))))
    found = {path: sharding.rule_of(f"layers/0/mixer/{path}", role) for path, role in roles.items()}
    split = {path.removesuffix("/kernel"): spec for path, spec in found.items() if spec != P()}
    assert split == expected


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
    assert spec("mixer/to_B/kernel", "weight", (24, 3)) == P(("tensor", "fsdp"), None)
    assert spec("mixer/to_B/kernel", "weight", (12, 3)) == P(None, None)
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


def classifier(inputs, *, rngs):
    both = functools.partial(layers.Bidirectional, mixer=functools.partial(layers.Mamba, N=4))
    return models.Backbone(inputs, width=16, depth=1, mixers=(both,), rngs=rngs)


def language_model(mixer, depth, inputs, *, rngs):
    return models.Backbone(inputs, width=16, depth=depth, mixers=(mixer,), norm=layers.RMSNorm, rngs=rngs)


MAMBA = functools.partial(layers.Mamba, N=4)
NOTES = functools.partial(layers.memmamba_long, mixer=MAMBA, window=2, k=3, summary=6, p=1, heads=2)
TEXT = NextToken(length=12)


def batch_of(task):
    """Random; the text with documents that begin anywhere, the classifier's rows padded."""
    if task is not TEXT:
        return task.batch(0, 8)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (8, 13), dtype=np.int32)
    return {
        "inputs": ids[:, :-1],
        "target": ids[:, 1:],
        "reset": rng.random((8, 12)) < 0.2,
        "ids_per_byte": np.ones(8, np.float32),
        "weight": np.ones(8, np.float32),
    }


EXAMPLES, TIME = {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "seq": 2, "tensor": 2}
STEPS = {
    "Mamba": (TEXT, functools.partial(language_model, MAMBA, 1)),
    "Mamba2": (TEXT, functools.partial(language_model, functools.partial(layers.Mamba2, N=4, P=8), 1)),
    "MemMamba": (TEXT, functools.partial(language_model, NOTES, 2)),
    "Bidirectional": (Majority(), classifier),
}


@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        ("Mamba", EXAMPLES),
        ("Mamba2", TIME),
        ("Bidirectional", EXAMPLES),
        *(
            pytest.param(*case, marks=pytest.mark.large)
            for case in (
                ("Mamba", TIME),
                ("Mamba2", EXAMPLES),
                ("MemMamba", EXAMPLES),
                ("MemMamba", TIME),
                ("Bidirectional", TIME),
            )
        ),
    ],
    ids=str,
)
def test_a_sharded_step_is_the_step(model, mesh):
    """Loss, gradients (through Adam's average) and updated parameters."""
    task, backbone = STEPS[model]
    # eps as large as the gradients: a rate that forgot their size would let rounding decide signs.
    run = Run(task=task, backbone=backbone, optimizer=AdamW(lr=1.0, eps=1.0), steps=1, batch_size=8, mesh={"data": 1})

    def step(run, devices):
        program = build(run, jax.devices()[:devices])
        with jax.set_mesh(program.mesh):
            state = program.init(program.key())
            state, metrics = program.train_step(state, program.global_batch(batch_of(task)), program.key())
            return jax.device_get((metrics["loss"], state.opt[0].mu, state.params))

    (loss, *alone), (sharded_loss, *together) = step(run, 1), step(dataclasses.replace(run, mesh=mesh), 8)
    assert_close(sharded_loss, loss, OTHER_MESH)
    for found, expected, tolerance in zip(together, alone, (GRADIENT["float32"], OTHER_MESH), strict=True):
        for name, a, b in zip(paths(expected), *map(jax.tree.leaves, (found, expected)), strict=True):
            assert_close(a, b, tolerance, name)


def test_large_parameters_are_split_over_fsdp():
    mesh = sharding.make_mesh({"fsdp": 8})
    shape = (64, 256)
    placed = sharding.parameter_sharding("layers/0/mlp/up/kernel", "weight", shape, mesh)
    assert np.prod(placed.shard_shape(shape)) * 8 == np.prod(shape)
