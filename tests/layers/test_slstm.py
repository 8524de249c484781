"""sLSTM against its equations in float64 NumPy, from the raw parameters; where they start; roles; errors."""

import jax
import numpy as np
import pytest
from flax import nnx

from longwave.layers.mixer import float32_parameters, parameter_roles
from longwave.layers.slstm import SLSTM, State, exponential_gate
from tests.layers.test_mamba import assert_values_and_gradients, convolved, made, parameters, randomised
from tests.layers.test_mlstm import blocks, normed, sigmoid
from tests.tolerances import FORWARD, assert_close


def oracle_of(heads, *, exponential=False):
    """The whole layer token by token, in the paper's form that nothing stabilises: gates here are small."""

    def oracle(p, u):
        x, taps = convolved(p, "conv", u) if "conv" in p else (u, np.zeros((len(u), 0, u.shape[2])))
        from_input = {g: blocks(p, g, x if g in "if" else u) for g in "zifo"}
        b, t, width = u.shape
        split = lambda a: a.reshape(*a.shape[:-1], heads, -1)
        c, n, h = np.zeros((3, b, heads, width // heads))
        m, hs = np.full_like(c, -np.inf), []
        for s in range(t):
            z, i, f, o = (
                split(from_input[g][:, s]) + np.einsum("bhp,hpq->bhq", h, p["R"][:, j]) for j, g in enumerate("zifo")
            )
            forget, write = np.exp(f) if exponential else sigmoid(f), np.exp(i)
            c, n, m = forget * c + write * np.tanh(z), forget * n + write, np.maximum(np.log(forget) + m, i)
            h = sigmoid(o) * c / n
            hs.append(h)
        y = normed(p, np.stack(hs, 1)).reshape(u.shape)
        return y, {"conv": taps, "cell": State(c / np.exp(m), n / np.exp(m), h, m)}

    return oracle


@pytest.mark.parametrize(
    ("settings", "oracle"),
    [
        ({"conv": 2}, oracle_of(2)),
        pytest.param(
            {"conv": None, "log_forget": exponential_gate}, oracle_of(2, exponential=True), marks=pytest.mark.full
        ),
    ],
    ids=["as the paper", "exponential forget gate"],
)
def test_values_and_every_gradient_entry(settings, oracle):
    model = randomised(SLSTM, 6, heads=2, **settings)
    model.f.bias[...] = np.array([0.5, 1.0, -1.0, 2.0, 0.0, 1.5], np.float32)
    model.i.bias = None  # it cancels in c / n: its gradient is rounding alone
    assert_values_and_gradients(model, oracle, (2, 5, 6))


@pytest.mark.full
def test_extreme_gates():
    """Pre-activations of +-60 overflow exponentials; the oracle takes them in float64."""
    model = randomised(SLSTM, 4, heads=2, conv=None)
    for gate in "if":
        getattr(model, gate).kernel[...] *= 100
    x = np.random.default_rng(2).normal(size=(2, 12, 4)).astype(np.float32)
    y, d = jax.jit(jax.value_and_grad(lambda x: np.sum(model(x).y[..., 0])))(x)
    want, _ = oracle_of(2)(parameters(model), x.astype(np.float64))
    assert_close(y, np.sum(want[..., 0]), 100 * FORWARD["float32"])
    assert np.all(np.isfinite(d))


@pytest.mark.full
def test_where_parameters_start():
    p = parameters(made(SLSTM, 16, heads=2))
    gates = {f"{g}/{part}": shape for g in "zifo" for part, shape in (("kernel", (2, 8, 8)), ("bias", (16,)))}
    assert {k: v.shape for k, v in p.items()} == {
        "conv": (4, 16), "conv_bias": (16,), "R": (2, 4, 8, 8), "norm/scale": (2, 8), "norm/bias": (2, 8), **gates
    }  # fmt: skip
    np.testing.assert_allclose(p["f/bias"], np.tile(np.linspace(3, 6, 8), 2), rtol=1e-6)


def test_roles_and_float32():
    model = nnx.eval_shape(lambda: SLSTM(8, rngs=nnx.Rngs(0)))
    roles = parameter_roles(model)
    assert {path for path, role in roles.items() if role == "kernel"} == {"conv", "R", *(f"{g}/kernel" for g in "zifo")}
    assert float32_parameters(model) == {"R"}


@pytest.mark.parametrize(("settings", "message"), [({"heads": 3}, "SLSTM.heads = 3"), ({"conv": 0}, "SLSTM.conv = 0")])
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: SLSTM(4, rngs=nnx.Rngs(0), **settings))
