"""ELM against its equations in float64 NumPy, from the raw parameters; time constants; roles; errors."""

import numpy as np
import pytest
from flax import nnx

from longwave.layers.elm import ELM
from longwave.layers.mixer import float32_parameters, parameter_roles
from tests.layers.test_mamba import affine, assert_values_and_gradients, made, parameters, randomised


def oracle_of(branches, tau, dt):
    """The whole layer, token by token; `tau` gives the time constants from the parameters."""

    def oracle(p, u):
        tau_m = tau(p)
        b = m = 0.0
        synapses, ys = np.maximum(p["w_s"], 0) * u, []
        W = np.concatenate((p["from_b/kernel"], p["from_m/kernel"]))
        for t in range(u.shape[1]):
            b = np.exp(-dt / 5) * b + synapses[:, t].reshape(len(u), branches, -1).sum(-1)
            kept = np.exp(-dt / tau_m) * (m + np.zeros((len(u), len(tau_m))))
            hidden = np.maximum(np.concatenate((b, kept), 1) @ W + p["from_b/bias"], 0)
            delta = 1.7159 * np.tanh(2 * affine(p, "to_m", hidden) / 3)
            m = kept + (1 - np.exp(-5 * dt / tau_m)) * delta
            ys.append(affine(p, "out", m))
        return np.stack(ys, 1), {"b": b, "m": m}

    return oracle


def fixed(p):
    return np.geomspace(1, 1000, 3)


def learned(p):
    return 2 + (50 - 2) / (1 + np.exp(-p["tau_m"]))


@pytest.mark.parametrize(
    ("settings", "tau"),
    [
        ({"branches": 2, "tau_min": 2.0, "tau_max": 50.0, "learn_tau": True, "dt": 0.5}, learned),
        pytest.param({}, fixed, marks=[pytest.mark.full, pytest.mark.large]),
    ],
    ids=["branches, learned times", "as the paper"],
)
def test_values_and_every_gradient_entry(settings, tau):
    model = randomised(ELM, 4, memory=3, **settings)
    if tau is learned:  # a synapse that relu shuts
        model.w_s[...] = np.array([0.5, -0.3, 0.7, 0.2], np.float32)
        model.tau_m[...] = np.array([-1.0, 0.3, 2.0], np.float32)
    oracle = oracle_of(settings.get("branches", 4), tau, settings.get("dt", 1.0))
    assert_values_and_gradients(model, oracle, (2, 6, 4))


@pytest.mark.full
def test_where_parameters_start():
    """The shapes of the published neuron, and times that are log-spaced whether they are learned or not."""
    model = made(ELM, 12, memory=7, learn_tau=True)
    p = parameters(model)
    assert {k: v.shape for k, v in p.items()} == {
        "w_s": (12,), "from_b/kernel": (12, 14), "from_b/bias": (14,), "from_m/kernel": (7, 14),
        "to_m/kernel": (14, 7), "to_m/bias": (7,), "tau_m": (7,), "out/kernel": (7, 12), "out/bias": (12,),
    }  # fmt: skip
    np.testing.assert_array_equal(p["w_s"], 0.5)
    for part in (p["from_b/kernel"], p["from_m/kernel"]):
        assert 0.8 * 19**-0.5 < np.abs(part).max() <= 19**-0.5
    fixed = made(ELM, 12, memory=7)
    for tau in (model.tau(), fixed.tau()):
        np.testing.assert_allclose(tau, np.geomspace(1, 1000, 7), rtol=1e-4)
    assert fixed.tau_m is None


def test_roles_and_float32():
    model = nnx.eval_shape(lambda: ELM(4, memory=2, learn_tau=True, rngs=nnx.Rngs(0)))
    roles = parameter_roles(model)
    assert (roles["w_s"], roles["tau_m"]) == ("B", "dt")
    assert float32_parameters(model) == {"tau_m"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"branches": 3}, "ELM.branches = 3"),
        ({"memory": 0}, "ELM.memory = 0"),
        ({"tau_b": 0.0}, "ELM.tau_b = 0.0"),
        ({"tau_max": 0.5}, "ELM.tau_max = 0.5"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: ELM(4, rngs=nnx.Rngs(0), **settings))
