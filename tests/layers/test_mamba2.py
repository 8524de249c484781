"""Mamba-2 against its equations in float64 NumPy, from the raw parameters; where they start; roles; errors."""

import jax
import numpy as np
import pytest
from flax import nnx

from longwave.layers.mamba2 import GatedRMSNorm, Mamba2
from longwave.layers.mixer import Context, float32_parameters, parameter_roles
from longwave.training.optimizer import AdamW
from tests.layers.test_mamba import affine, assert_values_and_gradients, convolved, made, parameters, randomised, silu
from tests.tolerances import FORWARD, assert_close


def oracle_of(P, G, limit):
    """The whole layer, token by token, as a function of parameters and input; the single convolution of the paper."""

    def oracle(p, u):
        slices = [affine(p, f"in_{name}", u) for name in ("x", "B", "C")]
        widths = np.cumsum([s.shape[2] for s in slices])[:-1]
        one = {"conv": np.concatenate([p[f"conv_{name}"] for name in ("x", "B", "C")], axis=1)}
        if "conv_x_bias" in p:
            one["conv_bias"] = np.concatenate([p[f"conv_{name}_bias"] for name in ("x", "B", "C")])
        xBC, taps = convolved(one, "conv", np.concatenate(slices, axis=2))
        x, B, C = np.split(xBC, widths, axis=2)
        b, t, channels = x.shape
        heads = channels // P
        x = x.reshape(b, t, heads, P)
        B, C = (np.repeat(m.reshape(b, t, G, -1), heads // G, axis=2) for m in (B, C))
        delta = np.clip(np.log1p(np.exp(affine(p, "in_dt", u) + p["dt_bias"])), *limit)
        D, y, S = p["D"].reshape(heads, -1), np.zeros_like(x), np.zeros((b, heads, B.shape[3], P))
        for i in range(t):
            S = np.exp(-delta[:, i] * np.exp(p["A_log"]))[..., None, None] * S
            S = S + np.einsum("bhn,bhp->bhnp", B[:, i], delta[:, i][..., None] * x[:, i])
            y[:, i] = np.einsum("bhnp,bhn->bhp", S, C[:, i]) + D * x[:, i]
        v = (y.reshape(b, t, channels) * silu(affine(p, "in_z", u))).reshape(b, t, G, -1)
        v = (v / np.sqrt(np.mean(v**2, -1, keepdims=True) + 1e-5)).reshape(b, t, channels) * p["norm/scale"]
        conv = dict(zip(("x", "B", "C"), np.split(taps, widths, axis=2), strict=True))
        return affine(p, "out", v), {"conv": conv, "ssm": S}

    return oracle


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"P": 3}, marks=pytest.mark.full),
        {"P": 2, "G": 3, "bias": True, "conv_bias": False, "dt_limit": (0.1, 0.7), "D_per_channel": True},
    ],
    ids=["one group", "groups, limits, D per channel"],
)
def test_values_and_every_gradient_entry(settings):
    model = randomised(Mamba2, 3, N=2, conv=3, **settings)
    oracle = oracle_of(settings["P"], settings.get("G", 1), settings.get("dt_limit", (0, np.inf)))
    if "dt_limit" in settings:  # both limits are met
        model.dt_bias[...] = np.array([-4.0, 0.0, 1.5], np.float32)
    assert_values_and_gradients(model, oracle, (2, 5, 3))


@pytest.mark.full
def test_a_bias_reaches_no_tap_through_padding():
    model = randomised(Mamba2, 4, N=2, P=4, bias=True)
    x = np.random.default_rng(0).normal(size=(1, 5, 4)).astype(np.float32)
    run = jax.jit(lambda x, valid: model(x, None, Context(valid=valid)).y)
    valid = np.array([[False] * 3 + [True] * 5 + [False] * 2])
    padded = run(np.pad(x, ((0, 0), (3, 2), (0, 0)), constant_values=7.0), valid)
    want, _ = oracle_of(4, 1, (0, np.inf))(parameters(model), x.astype(np.float64))
    assert_close(padded[:, 3:8], want, FORWARD["float32"])
    assert not np.any(padded[:, :3])
    assert not np.any(padded[:, 8:])


def test_the_gate_comes_before_the_norm():
    """Scaling the gate by a constant where silu is nearly linear leaves a norm behind it unmoved."""
    norm = GatedRMSNorm(4, groups=2, eps=0.0)
    y, z = np.random.default_rng(0).normal(size=(2, 1, 3, 4)).astype(np.float32)
    large = 50 + np.abs(z)
    assert_close(norm(y, 3 * large), norm(y, large), 1e-6)
    assert_close(np.mean(np.square(norm(y, z).reshape(3, 2, 2)), -1), np.ones((3, 2)), 1e-5)


def test_where_parameters_start():
    model = made(Mamba2, 256, N=16, P=4, G=2, A_init=(2.0, 8.0), residuals=9)
    p = parameters(model)
    assert {k: v.shape for k, v in p.items()} == {
        "in_z/kernel": (256, 512), "in_x/kernel": (256, 512), "in_B/kernel": (256, 32), "in_C/kernel": (256, 32),
        "in_dt/kernel": (256, 128), "conv_x": (4, 512), "conv_B": (4, 32), "conv_C": (4, 32),
        "conv_x_bias": (512,), "conv_B_bias": (32,), "conv_C_bias": (32,), "dt_bias": (128,), "A_log": (128,),
        "D": (128,), "norm/scale": (512,), "out/kernel": (512, 256),
    }  # fmt: skip
    np.testing.assert_allclose(np.quantile(np.exp(p["A_log"]), [0, 0.5, 1]), [2, 5, 8], atol=0.7)
    assert np.exp(p["A_log"]).min() >= 2
    assert np.exp(p["A_log"]).max() <= 8.001
    dt = np.log1p(np.exp(p["dt_bias"]))
    assert dt.min() > 0.99e-3
    assert dt.max() < 0.101
    np.testing.assert_allclose(np.max(np.abs(p["out/kernel"])), 512**-0.5 / 3, rtol=1e-3)
    per_channel = nnx.eval_shape(lambda: Mamba2(16, P=8, D_per_channel=True, rngs=nnx.Rngs(0)))
    assert per_channel.D.shape == (32,)


def test_roles_and_float32():
    model = nnx.eval_shape(lambda: Mamba2(8, P=8, bias=True, rngs=nnx.Rngs(0)))
    decay = {path: AdamW(lr=1.0, weight_decay=0.1).group(role)[1] for path, role in parameter_roles(model).items()}
    projections = {f"{name}/kernel" for name in ("in_z", "in_x", "in_B", "in_C", "in_dt", "out")}
    assert {path for path, rate in decay.items() if rate} == {"conv_x", "conv_B", "conv_C", *projections}
    assert float32_parameters(model) == {"A_log", "dt_bias", "D"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"P": 3}, "Mamba2.P = 3"),
        ({"P": 4, "G": 3}, "Mamba2.G = 3"),
        ({"N": 0}, "Mamba2.N = 0"),
        ({"P": 4, "A_init": (0.0, 16.0)}, "Mamba2.A_init"),
        ({"P": 4, "dt_limit": (0.5, 0.1)}, "Mamba2.dt_limit"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: Mamba2(4, rngs=nnx.Rngs(0), **settings))
