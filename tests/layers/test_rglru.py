"""RG-LRU and its block against their equations in float64 NumPy; the first token; where parameters start; errors."""

import jax
import numpy as np
import pytest
from flax import nnx

from longwave.layers.mixer import float32_parameters, parameter_roles
from longwave.layers.rglru import RGLRU
from tests.layers.test_mamba import affine, assert_values_and_gradients, made, parameters, randomised
from tests.layers.test_mlstm import blocks, sigmoid


def oracle(p, u):
    """The whole layer, token by token."""
    inner, w = affine(p, "in_x", u), p["conv"]
    seen = np.concatenate([np.zeros((len(u), len(w) - 1, inner.shape[2])), inner], axis=1)
    x = sum(w[j] * seen[:, j : j + u.shape[1]] for j in range(len(w))) + p["conv_bias"]
    r, i = sigmoid(blocks(p, "a", x)), sigmoid(blocks(p, "i", x))
    a = np.exp(-8 * np.log1p(np.exp(p["Lambda"])) * r)
    h, hs = i[:, 0] * x[:, 0], []
    for t in range(u.shape[1]):
        if t:
            h = a[:, t] * h + np.sqrt(1 - a[:, t] ** 2) * i[:, t] * x[:, t]
        hs.append(h)
    z = affine(p, "in_z", u)
    gelu = z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) / 2
    carry = {"conv": seen[:, u.shape[1] :], "h": h, "position": np.full(len(u), u.shape[1])}
    return affine(p, "out", np.stack(hs, 1) * gelu), carry


@pytest.mark.parametrize(
    "settings",
    [{"channels": 4, "blocks": 2}, pytest.param({"channels": 6, "blocks": 1, "bias": False}, marks=pytest.mark.full)],
    ids=["narrow", "wide, without biases"],
)
def test_values_and_every_gradient_entry(settings):
    model = randomised(RGLRU, 3, conv=2, **settings)
    model.Lambda[...] = np.linspace(-5, 0, settings["channels"]).astype(np.float32)
    assert_values_and_gradients(model, oracle, (2, 5, 3))


@pytest.mark.full
def test_a_gate_that_is_shut_has_a_gradient():
    """a = 1 to the last bit: sqrt(1 - a²) is 0, and its own derivative is not finite."""
    model = made(RGLRU, 16)
    model.a.bias[...] = np.full(16, -200, np.float32)
    x = np.random.default_rng(0).normal(size=(1, 4, 16)).astype(np.float32)
    gradients = jax.jit(jax.grad(lambda model, x: model(x).y.sum(), argnums=(0, 1)))(model, x)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))


@pytest.mark.full
def test_where_parameters_start():
    p = parameters(made(RGLRU, 256, channels=512, a_min=0.5, a_max=0.9, residuals=4))
    assert {k: v.shape for k, v in p.items()} == {
        "in_x/kernel": (256, 512), "in_x/bias": (512,), "in_z/kernel": (256, 512), "in_z/bias": (512,),
        "conv": (4, 512), "conv_bias": (512,), "a/kernel": (16, 32, 32), "a/bias": (512,), "i/kernel": (16, 32, 32),
        "i/bias": (512,), "Lambda": (512,), "out/kernel": (512, 256), "out/bias": (256,),
    }  # fmt: skip
    decay = np.exp(-8 * np.log1p(np.exp(p["Lambda"])))
    np.testing.assert_allclose(np.quantile(decay, [0, 0.5, 1]), [0.5, 0.7, 0.9], atol=0.04)
    np.testing.assert_allclose(np.max(np.abs(p["out/kernel"])), 512**-0.5 / 2, rtol=1e-3)
    np.testing.assert_allclose([np.std(p[f"{gate}/kernel"]) for gate in "ai"], 32**-0.5, rtol=0.03)
    assert not np.any([p["a/bias"], p["i/bias"]])


def test_roles_and_float32():
    model = nnx.eval_shape(lambda: RGLRU(16, rngs=nnx.Rngs(0)))
    roles = parameter_roles(model)
    assert {path for path, role in roles.items() if role == "kernel"} == {"conv", "a/kernel", "i/kernel"}
    assert roles["Lambda"] == "A"
    assert float32_parameters(model) == {"Lambda"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 3}, "RGLRU.blocks = 3"),
        ({"blocks": 2, "a_max": 1.0}, "RGLRU.a_min = 0.9, a_max = 1.0"),
        ({"blocks": 2, "c": 0.0}, "RGLRU.c = 0.0"),
        ({"channels": 0}, "RGLRU.channels = 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: RGLRU(4, rngs=nnx.Rngs(0), **settings))
