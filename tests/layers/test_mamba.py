"""Mamba against its equations in float64 NumPy, from the raw parameters; where they start; roles; errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longwave.layers.mamba import Mamba
from longwave.layers.mixer import Context, float32_parameters, parameter_roles
from longwave.layers.norms import RMSNorm
from longwave.training.optimizer import AdamW
from tests.tolerances import FORWARD, GRADIENT, assert_close


def parameters(model):
    """Path -> float64 array."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): np.asarray(v[...], np.float64) for path, v in flat}


def made(mixer, width, **settings):
    """A new mixer, made in one compiled function: eagerly every operation would be compiled by itself."""
    new = lambda: mixer(width, rngs=nnx.Rngs(0), **settings)
    return nnx.merge(nnx.graphdef(nnx.eval_shape(new)), jax.jit(lambda: nnx.state(new()))())


def randomised(mixer, width, **settings):
    """Every parameter moved away from where it starts: a default of 0 or 1 hides what is left out."""
    model, draw = made(mixer, width, **settings), np.random.default_rng(0).normal
    move = lambda p: p + 0.3 * draw(size=p.shape).astype(np.float32)
    nnx.update(model, jax.tree.map(move, nnx.state(model, nnx.Param)))
    return model


def silu(x):
    return x / (1 + np.exp(-x))


def affine(p, name, x):
    return x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0.0)


def convolved(p, name, x):
    """silu(conv(x)) of (b, t, d), tap by tap; and the inputs behind which the next one would stand."""
    w = p[name]
    seen = np.concatenate([np.zeros((len(x), len(w) - 1, x.shape[2])), x], axis=1)
    y = sum(w[j] * seen[:, j : j + x.shape[1]] for j in range(len(w))) + p.get(f"{name}_bias", 0.0)
    return silu(y), seen[:, x.shape[1] :]


def rms(p, name, x):
    """RMSNorm of eps 1e-6, or x itself."""
    scale = p.get(f"{name}/scale")
    return x if scale is None else x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def oracle(p, u):
    """The whole layer, token by token and state by state: y, and the carry."""
    x, taps = convolved(p, "conv", affine(p, "in_x", u))
    z = affine(p, "in_z", u)
    dt, B, C = (rms(p, f"{name}_norm", x @ p[f"to_{name}/kernel"]) for name in ("dt", "B", "C"))
    delta = np.log1p(np.exp(dt @ p["dt/kernel"] + p["dt_bias"]))
    A = -np.exp(p["A_log"])
    y, h = np.zeros_like(x), np.zeros((len(u), *A.shape))
    for t in range(u.shape[1]):
        h = np.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * x[:, t])[..., None] * B[:, t, None]
        y[:, t] = np.einsum("bdn,bn->bd", h, C[:, t]) + p["D"] * x[:, t]
    return affine(p, "out", y * silu(z)), {"conv": taps, "ssm": np.moveaxis(h, 1, 2)}


def assert_values_and_gradients(model, oracle, shape):
    """y and carry against the oracle; gradients, of x too, against differences of the oracle along every entry."""
    x, weight = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, x):
        loss = lambda state, x: (jnp.sum((out := nnx.merge(graph, state)(x)).y * weight), out)
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(state, x)

    (d_state, dx), out = run(state, x)
    p = parameters(model) | {"u": x.astype(np.float64)}
    y, carry = oracle(p, p["u"])
    assert_close(out.y, y, FORWARD["float32"], "y")
    assert jax.tree.structure(out.carry) == jax.tree.structure(carry)
    jax.tree.map(lambda got, want: assert_close(got, want, FORWARD["float32"], "carry"), out.carry, carry)
    gradients = parameters(nnx.merge(graph, d_state)) | {"u": dx}
    assert gradients.keys() == p.keys()
    for name, value in p.items():
        expected = np.zeros_like(value)
        for i in np.ndindex(value.shape):
            move = np.zeros_like(value)
            move[i] = 1e-6
            up, down = (oracle(q, q["u"])[0] for q in (p | {name: value + move}, p | {name: value - move}))
            expected[i] = np.sum((up - down) * weight) / 2e-6
        assert_close(gradients[name], expected, GRADIENT["float32"], name)


@pytest.mark.parametrize(
    "settings",
    [
        {"conv": 4},
        pytest.param(
            {"conv": 2, "bias": True, "conv_bias": False, "norm": RMSNorm, "dt_rank": 2}, marks=pytest.mark.full
        ),
    ],
    ids=["as the paper", "norms, biases"],
)
def test_values_and_every_gradient_entry(settings):
    model = randomised(Mamba, 3, N=2, expand=2, **settings)
    assert_values_and_gradients(model, oracle, (2, 6, 3))


@pytest.mark.full
def test_a_bias_reaches_no_tap_through_padding():
    """With a bias the projection of a padding token is not zero: it must not stand in front of the first token."""
    model = randomised(Mamba, 4, N=2, bias=True)
    x = np.random.default_rng(0).normal(size=(1, 5, 4)).astype(np.float32)
    run = jax.jit(lambda x, valid: model(x, None, Context(valid=valid)).y)
    padded = run(
        np.pad(x, ((0, 0), (3, 2), (0, 0)), constant_values=7.0), np.array([[False] * 3 + [True] * 5 + [False] * 2])
    )
    assert_close(padded[:, 3:8], oracle(parameters(model), x.astype(np.float64))[0], FORWARD["float32"])
    assert not np.any(padded[:, :3])
    assert not np.any(padded[:, 8:])


def test_where_parameters_start():
    model = made(Mamba, 256, dt_min=1e-3, dt_max=1e-1, dt_floor=2e-3, dt_scale=0.5, residuals=24)
    p = parameters(model)
    assert {k: v.shape for k, v in p.items()} == {
        "in_x/kernel": (256, 512), "in_z/kernel": (256, 512), "conv": (4, 512), "conv_bias": (512,),
        "to_dt/kernel": (512, 16), "to_B/kernel": (512, 16), "to_C/kernel": (512, 16), "dt/kernel": (16, 512),
        "dt_bias": (512,), "A_log": (512, 16), "D": (512,), "out/kernel": (512, 256),
    }  # fmt: skip
    bounds = {"in_x/kernel": 256**-0.5, "conv": 0.5, "conv_bias": 0.5, "dt/kernel": 0.125, "to_B/kernel": 512**-0.5}
    for name, bound in (bounds | {"out/kernel": (512 * 24) ** -0.5}).items():
        assert 0.98 * bound < np.max(np.abs(p[name])) <= bound * (1 + 1e-6), name
        np.testing.assert_allclose(p[name].std(), bound / np.sqrt(3), rtol=0.05, err_msg=name)
    np.testing.assert_allclose(np.exp(p["A_log"]), np.tile(np.arange(1, 17.0), (512, 1)), rtol=1e-6)
    assert np.all(p["D"] == 1)
    log_dt = np.log(np.log1p(np.exp(p["dt_bias"])))
    floor, low, high = np.log([2e-3, 1e-3, 1e-1])
    share = (floor - low) / (high - low)
    assert log_dt.min() > floor - 1e-3
    assert abs(np.mean(log_dt < floor + 1e-3) - share) < 0.06
    np.testing.assert_allclose(np.quantile(log_dt, [0.5, 1]), [(low + high) / 2, high], atol=0.35)
    constant = made(Mamba, 32, dt_init="constant", dt_scale=2.0)
    np.testing.assert_allclose(constant.dt.kernel[...], 2.0 / np.sqrt(2), rtol=1e-6)


def test_roles_and_float32():
    """A, D and dt stay float32 and do not decay, as convolution and projections do."""
    model = nnx.eval_shape(lambda: Mamba(8, bias=True, norm=RMSNorm, rngs=nnx.Rngs(0)))
    decay = {path: AdamW(lr=1.0, weight_decay=0.1).group(role)[1] for path, role in parameter_roles(model).items()}
    projections = {f"{name}/kernel" for name in ("in_x", "in_z", "to_dt", "to_B", "to_C", "dt", "out")}
    assert {path for path, rate in decay.items() if rate} == {"conv", *projections}
    assert float32_parameters(model) == {"A_log", "dt_bias", "D"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"N": 0}, "Mamba.N = 0"),
        ({"conv": 0}, "Mamba.conv = 0"),
        ({"dt_rank": 0}, "Mamba.dt_rank = 0"),
        ({"dt_min": 0.2}, "dt_min is 0.2"),
        ({"dt_init": "zero"}, "Mamba.dt_init = 'zero'"),
        ({"residuals": 0}, "Mamba.residuals = 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: Mamba(4, rngs=nnx.Rngs(0), **settings))
