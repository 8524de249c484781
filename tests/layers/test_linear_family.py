"""The layers on the matrix-state recurrence against their papers' equations in float64 NumPy, from the raw parameters;
repeated tokens and extreme gates; cost; where they start; roles; errors."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longwave import layers
from longwave.layers.lightning import slopes
from longwave.layers.mixer import float32_parameters, parameter_roles
from longwave.training.optimizer import AdamW
from tests.layers import linear_family_oracle as oracle
from tests.layers.test_mamba import assert_values_and_gradients, made, parameters, randomised
from tests.tolerances import FORWARD, GRADIENT, assert_close

partial, FULL = functools.partial, pytest.mark.full
# mixer, its settings at width 4, the oracle
FAMILY = {
    "LinearAttention": (layers.LinearAttention, {"heads": 2}, partial(oracle.linear_attention, count=2)),
    "LinearAttention, no normaliser": (
        layers.LinearAttention,
        {"heads": 2, "normaliser": None, "scale": 0.3},
        partial(oracle.linear_attention, count=2, eps=None, scale=0.3),
    ),
    "RetNet": (layers.RetNet, {"heads": 2}, partial(oracle.retnet, count=2)),
    "LightningAttention": (
        layers.LightningAttention,
        {"heads": 2, "layer": 1, "layers": 3, "rank": 3},
        partial(oracle.lightning, count=2, slopes=(1 / 16, 1 / 256), depth=0.5 + 1e-5, silu_v=False),
    ),
    "LightningAttention, MiniMax": (
        layers.LightningAttention,
        {"heads": 1, "silu_v": True},
        partial(oracle.lightning, count=1, slopes=(1 / 256,), depth=1 + 1e-5, silu_v=True),
    ),
    "GLA": (layers.GLA, {"heads": 2, "expand_k": 1, "rank": 3}, partial(oracle.gla, count=2)),
    "DeltaNet": (layers.DeltaNet, {"heads": 2, "expand_v": 1.5}, partial(oracle.deltanet, count=2)),
    "DeltaNet, negative": (
        layers.DeltaNet,
        {"heads": 2, "conv": 2, "negative_eigenvalues": True},
        partial(oracle.deltanet, count=2, most=2),
    ),
    "GatedDeltaNet": (
        layers.GatedDeltaNet,
        {"heads": 2, "expand_k": 1, "expand_v": 1.5, "conv": 3},
        partial(oracle.gated_deltanet, count=2),
    ),
    "KDA": (layers.KDA, {"heads": 2, "expand_v": 0.5, "conv": 3, "rank": 2}, partial(oracle.kda, count=2)),
    "Based": (layers.Based, {"heads": 2, "feature_dim": 3}, partial(oracle.based, count=2)),
    "JRT": (layers.JRT, {"heads": 2, "feature_dim": 2, "prefix": 3}, partial(oracle.jrt, count=2, prefix=3)),
    "ShortConv": (layers.ShortConv, {}, oracle.short_conv),
    "ShortConv, gated": (layers.ShortConv, {"conv": 2, "gated": True}, oracle.short_conv),
}


# In the short run: one of each kind of gate. The others are alike, and the contract has them too.
OFTEN = ("LinearAttention", "RetNet", "LightningAttention", "GatedDeltaNet", "JRT")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[FULL] * (n not in OFTEN)) for n in FAMILY])
def test_values_and_every_gradient_entry(name):
    mixer, settings, expected = FAMILY[name]
    assert_values_and_gradients(randomised(mixer, 4, **settings), expected, (2, 5, 4))


@FULL
@pytest.mark.parametrize("name", ["DeltaNet", "GatedDeltaNet", pytest.param("KDA", marks=pytest.mark.large)])
def test_repeated_tokens_and_extreme_gates(name):
    """Runs of one token give one key again and again, with beta near 1: where inverses by series fail. Decays of g = 0,
    of about -1, and below -60. Gradients against differences of the oracle, along a direction each."""
    mixer, settings, expected = FAMILY[name]
    model, rng = randomised(mixer, 4, **settings), np.random.default_rng(2)
    x = np.repeat(rng.normal(size=(1, 5, 4)), 30, axis=1)
    model.beta.kernel[...] = np.sign(x[0].sum(0))[:, None] * np.float32([[4.0, 8.0]])  # beta of 1 and of 0
    weight = rng.normal(size=x.shape)

    @jax.jit
    def run(model, x):
        graph, state = nnx.split(model)
        loss = lambda state, x: (jnp.sum((y := nnx.merge(graph, state)(x).y) * weight), y)
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(state, x)

    for decay in (-30.0, 0.5, 60.0) if hasattr(model, "decay") else (None,):
        if decay is not None:
            model.decay.dt_bias[...] = jnp.full_like(model.decay.dt_bias[...], decay)
            model.decay.A_log[...] = jnp.zeros_like(model.decay.A_log[...])
        (d_state, dx), y = run(model, x.astype(np.float32))
        p = parameters(model) | {"x": x}
        gradient = parameters(nnx.merge(nnx.graphdef(model), d_state)) | {"x": np.asarray(dx, np.float64)}
        assert_close(y, expected(p, x)[0], FORWARD["float32"])
        whole = sum(np.sum(np.abs(g)) for g in gradient.values())
        for path, value in p.items():
            way = rng.choice([-1.0, 1.0], size=value.shape)
            up, down = (p | {path: value + step * way} for step in (1e-6, -1e-6))
            numeric = np.sum((expected(up, up["x"])[0] - expected(down, down["x"])[0]) * weight) / 2e-6
            size = np.sum(np.abs(gradient[path]))
            # What the extreme gates leave without any influence is left to rounding.
            assert abs(np.sum(gradient[path] * way) - numeric) < GRADIENT["float32"] * max(size, 1e-3 * whole), path


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[FULL, pytest.mark.large] * (n != "GatedDeltaNet")) for n in FAMILY]
)
def test_no_array_grows_faster_than_the_sequence(name):
    """Forward and gradient: nothing is of the size of all pairs of tokens."""
    mixer, settings, _ = FAMILY[name]
    model = made(mixer, 4, **settings)

    def largest(t):
        text = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(model(x).y)))(jnp.zeros((1, t, 4))))
        return max(math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text))

    assert 2048 < largest(4096) <= 2 * largest(2048)


def test_jrt_goes_on_where_its_prefix_ended():
    """The prompt in one call, one token at a time from there; a longer prefix would be the same prompt."""
    x = np.random.default_rng(0).normal(size=(2, 7, 4)).astype(np.float32)
    model = randomised(layers.JRT, 4, heads=2, feature_dim=3, prefix=4)
    step = jax.jit(lambda model, x, carry: model(x, carry)[:2])
    whole = step(model, x, None)[0]
    y, carry = step(model, x[:, :4], None)
    parts = [y]
    for i in range(4, 7):
        y, carry = step(model, x[:, i : i + 1], carry)
        parts.append(y)
    assert_close(np.concatenate(parts, 1), whole, FORWARD["float32"])
    model.prefix = 100
    assert_close(step(model, x[:, :4], None)[0], whole[:, :4], FORWARD["float32"])


def test_taylor_features_are_the_series_of_the_exponential():
    x, y = np.random.default_rng(0).normal(size=(2, 1, 1, 5, 16)).astype(np.float32)
    s = np.sum(x * y, -1) / 4
    features = layers.taylor(x)
    assert features.shape[-1] == 273
    assert_close(np.sum(np.asarray(features) * layers.taylor(y), -1), 1 + s + s**2 / 2, FORWARD["float32"])


def test_slopes_of_any_number_of_heads():
    assert slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    np.testing.assert_allclose(slopes(6), [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8], rtol=1e-12)
    assert slopes(1).tolist() == [1 / 256]


def test_a_width_that_rounding_misses():
    """1.1 * 10 is 11.000000000000002."""
    model = nnx.eval_shape(lambda: layers.GLA(10, heads=1, expand_k=1.1, expand_v=1.1, rngs=nnx.Rngs(0)))
    assert (model.K, model.V) == (11, 11)


# Parameters of a layer of width 128 with its defaults.
COUNTS = {
    "LinearAttention": 4 * 128**2,
    "RetNet": 8 * 128**2 + 2 * 256,
    "LightningAttention": 4 * 128**2 + 2 * 16 * 128 + 128,
    "GLA": 4 * 128**2 + 16 * (128 + 64) + 64 + 32,
    "DeltaNet": 4 * 128**2 + 3 * 4 * 128 + 8 * 128 + 16,
    "GatedDeltaNet": 6 * 128**2 + 4 * (96 + 96 + 192) + 2 * 6 * 128 + 2 * 6 + 32,
    "KDA": 4 * 128**2 + 3 * 4 * 128 + 16 * 128 + 2 * 8 * 256 + 16 + 128 + 128 + 8,
    "Based": 2 * 128 * 256 + 2 * 128**2,
    "JRT": 3 * 128 * 256 + 3 * 128**2,
    "ShortConv": 3 * 128,
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_roles_and_float32(name):
    """Gates stay float32 and do not decay, nor do norms; the rest does."""
    model = nnx.eval_shape(lambda: getattr(layers, name)(128, rngs=nnx.Rngs(0)))
    leaves = {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert sum(v.size for v in leaves.values()) == COUNTS[name]
    decay = {path: AdamW(lr=1.0, weight_decay=0.1).group(role)[1] for path, role in parameter_roles(model).items()}
    own = {"decay/A_log", "decay/dt_bias"} & decay.keys()
    assert float32_parameters(model) == own
    assert bool(own) == (name in ("GatedDeltaNet", "KDA"))
    assert {path for path, rate in decay.items() if not rate} == own | {
        path for path in decay if path.split("/")[-1] in ("bias", "scale")
    }


def test_where_gates_start():
    model = made(layers.GatedDeltaNet, 1024, heads=256, expand_k=0.25, expand_v=1)
    g = -np.exp(parameters(model)["decay/A_log"])
    assert -16 <= g.min() < -15
    assert g.max() < 0
    dt = np.log1p(np.exp(parameters(model)["decay/dt_bias"]))
    np.testing.assert_allclose(np.quantile(dt, [0, 0.5, 1]), [1e-3, 1e-2, 1e-1], rtol=0.3)
    kda = parameters(made(layers.KDA, 64, heads=2, A_init=(1.0, 4.0)))
    assert kda["decay/dt_bias"].shape == (2, 32)
    assert np.all((np.exp(kda["decay/A_log"]) > 1) & (np.exp(kda["decay/A_log"]) <= 4.001))


@pytest.mark.parametrize(
    ("mixer", "settings", "message"),
    [
        (layers.LinearAttention, {"heads": 3}, "LinearAttention.heads = 3 must divide 1 \\* width"),
        (layers.RetNet, {"heads": 4}, "RetNet.heads = 4"),
        (layers.LightningAttention, {"heads": 2, "layer": 2, "layers": 2}, "LightningAttention.layer = 2"),
        (layers.GLA, {"heads": 2, "tau": 0.0}, "GLA.tau = 0.0"),
        (layers.DeltaNet, {"heads": 2, "conv": 0}, "DeltaNet.conv = 0"),
        (layers.GatedDeltaNet, {}, "GatedDeltaNet.heads = 6 must divide expand_k \\* width = 0.75 \\* 4 = 3"),
        (layers.KDA, {"heads": 2, "A_init": (4.0, 1.0)}, "A_init = "),
        (layers.Based, {"heads": 2, "feature_dim": 0}, "Based.feature_dim = 0"),
        (layers.JRT, {"heads": 2, "prefix": 0}, "JRT.prefix = 0"),
        (layers.ShortConv, {"conv": 0}, "ShortConv.conv = 0"),
    ],
)
def test_bad_settings(mixer, settings, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: mixer(4, rngs=nnx.Rngs(0), **settings))
