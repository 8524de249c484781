"""mLSTM's layer against its equations in float64 NumPy, from the raw parameters; where they start; roles; errors."""

import numpy as np
import pytest
from flax import nnx

from longwave.layers.mixer import float32_parameters, parameter_roles
from longwave.layers.mlstm import MLSTM, SigmoidGated
from tests.layers.test_mamba import affine, assert_values_and_gradients, convolved, made, parameters, randomised, silu


def blocks(p, name, x):
    """x W with W block-diagonal, or dense; and a bias if there is one."""
    W = p[f"{name}/kernel"]
    if W.ndim == 3:
        full = np.zeros((x.shape[-1],) * 2)
        for n, block in enumerate(W):
            at = slice(n * len(block), (n + 1) * len(block))
            full[at, at] = block
        W = full
    return x @ W + p.get(f"{name}/bias", 0.0)


def normed(p, x):
    """Every head's vector by itself, (b, t, h, p)."""
    x = x - np.mean(x, -1, keepdims=True)
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * p["norm/scale"] + p["norm/bias"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def oracle_of(heads, *, exponential=True):
    """The whole layer token by token, in the paper's form that nothing stabilises: gates here are small."""

    def oracle(p, u):
        inner = affine(p, "in_x", u)
        c, taps = convolved(p, "conv", inner)
        q, k, v = blocks(p, "q", c), blocks(p, "k", c), blocks(p, "v", inner)
        qkv = np.concatenate((q, k, v), -1)
        i, f = affine(p, "to_i", qkv), sigmoid(affine(p, "to_f", qkv))
        i = np.exp(i) if exponential else sigmoid(i)
        b, t, channels = c.shape
        P = channels // heads
        q, k, v = (x.reshape(b, t, heads, P) for x in (q / np.sqrt(P), k, v))
        C, n, o = np.zeros((b, heads, P, P)), np.zeros((b, heads, P)), np.zeros_like(v)
        m = np.full((b, heads), -np.inf)
        for s in range(t):
            C = f[:, s, :, None, None] * C + i[:, s, :, None, None] * k[:, s, :, :, None] * v[:, s, :, None]
            n = f[:, s, :, None] * n + i[:, s, :, None] * k[:, s]
            m = np.maximum(np.log(f[:, s]) + m, np.log(i[:, s]))
            d = np.maximum(np.abs(np.sum(n * q[:, s], -1)), 1) + 1e-6 * np.exp(m) if exponential else np.ones_like(m)
            o[:, s] = np.einsum("bhkv,bhk->bhv", C, q[:, s]) / d[..., None]
        y = normed(p, o).reshape(b, t, channels) + p["skip"] * c
        unit = np.exp(m)[..., None]
        cell = (C / unit[..., None], n / unit, m) if exponential else C
        return affine(p, "out", y * silu(affine(p, "in_z", u))), {"conv": taps, "cell": cell}

    return oracle


@pytest.mark.parametrize(
    ("settings", "exponential"),
    [
        ({"block": 2}, True),
        pytest.param(
            {"block": None, "bias": True, "conv_bias": False}, True, marks=[pytest.mark.full, pytest.mark.large]
        ),
        pytest.param({"block": 3, "cell": SigmoidGated()}, False, marks=pytest.mark.full),
    ],
    ids=["as the paper", "dense, biases", "sigmoid gates"],
)
def test_values_and_every_gradient_entry(settings, exponential):
    model = randomised(MLSTM, 3, heads=2, conv=2, **settings)
    model.to_f.bias[...] = np.array([0.5, 2.0], np.float32)
    oracle = oracle_of(2, exponential=exponential)

    def with_state(p, u):
        y, carry = oracle(p, u)
        if exponential:
            carry["cell"] = type(model.init_carry(1)["cell"])(*carry["cell"])
        return y, carry

    assert_values_and_gradients(model, with_state, (2, 4, 3))


@pytest.mark.full
def test_where_parameters_start():
    model = made(MLSTM, 64, heads=4, residuals=9)
    p = parameters(model)
    assert {k: v.shape for k, v in p.items()} == {
        "in_x/kernel": (64, 128), "in_z/kernel": (64, 128), "conv": (4, 128), "conv_bias": (128,),
        "q/kernel": (32, 4, 4), "k/kernel": (32, 4, 4), "v/kernel": (32, 4, 4),
        "to_i/kernel": (384, 4), "to_i/bias": (4,), "to_f/kernel": (384, 4), "to_f/bias": (4,),
        "norm/scale": (4, 32), "norm/bias": (4, 32), "skip": (128,), "out/kernel": (128, 64),
    }  # fmt: skip
    np.testing.assert_allclose(p["to_f/bias"], [3, 4, 5, 6])
    assert 0 < np.abs(p["to_i/bias"]).max() < 0.5
    assert not np.any(p["to_i/kernel"])
    assert not np.any(p["to_f/kernel"])
    np.testing.assert_allclose(np.max(np.abs(p["out/kernel"])), 128**-0.5 / 3, rtol=1e-2)
    assert np.max(np.abs(p["q/kernel"])) <= 0.5


def test_roles_and_float32():
    model = nnx.eval_shape(lambda: MLSTM(8, rngs=nnx.Rngs(0)))
    roles = parameter_roles(model)
    assert {path for path, role in roles.items() if role == "weight"} == {
        "in_x/kernel", "in_z/kernel", "to_i/kernel", "to_f/kernel", "out/kernel",
    }  # fmt: skip
    assert {path for path, role in roles.items() if role == "kernel"} == {"conv", "q/kernel", "k/kernel", "v/kernel"}
    assert float32_parameters(model) == {"to_i/kernel", "to_i/bias", "to_f/kernel", "to_f/bias"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "MLSTM.heads = 3"),
        ({"block": 3}, "MLSTM.block = 3"),
        ({"conv": 0}, "MLSTM.conv = 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: MLSTM(4, rngs=nnx.Rngs(0), **settings))
