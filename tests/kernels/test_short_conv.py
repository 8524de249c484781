"""short_conv against a loop over documents in float64: values, gradients, masks, carries, devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from longwave.kernels import aot
from longwave.kernels.partition import Axes
from longwave.kernels.short_conv import short_conv
from tests.tolerances import FORWARD, GRADIENT, assert_close

B, T, D = 3, 11, 2


def draw(width, *, t=T, b=B, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"x": (b, t, D), "w": (width, D), "bias": (D,), "state": (b, width - 1, D)}
    return {k: rng.normal(size=s).astype(np.float32).astype(np.float64) for k, s in shapes.items()}


def masks(t=T):
    """Three rows: padding on the right, on the left, and on both sides; a document of one token."""
    at = np.arange(t)
    valid = np.stack((at < t - 2, at >= 4, (at >= 1) & (at < t - 1)))
    starts = ((3, 4, t - 1), (2, t - 2), (1, 5))  # some on padding, where they mean nothing; one on a first token
    return {"reset": np.stack([np.isin(at, s) for s in starts]), "valid": valid}


def oracle(p, *, reset=None, valid=None):
    """Each row's inputs of the document so far in a list, which begins with the state."""
    b, t, d = p["x"].shape
    width = p["w"].shape[0]
    y, states = np.zeros((b, t, d)), np.zeros((b, width - 1, d))
    for row in range(b):
        document = [*p["state"][row]] if "state" in p else [np.zeros(d)] * (width - 1)
        for i in range(t):
            if valid is not None and not valid[row, i]:
                continue
            if reset is not None and reset[row, i]:
                document = [np.zeros(d)] * (width - 1)
            document.append(p["x"][row, i])
            taps = document[len(document) - width :]
            y[row, i] = p.get("bias", 0) + sum(w * v for w, v in zip(p["w"], taps, strict=True))
        states[row] = np.reshape(document[len(document) - width + 1 :], (width - 1, d))
    return y, states


def to_jax(tree):
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), tree)


def run(p, weights, given=(), axes=Axes()):
    """(y, state) and all gradients of their inner product with the weights."""
    call = lambda p: short_conv(p["x"], p["w"], p.get("bias"), state=p.get("state"), **dict(given), axes=axes)
    out, vjp = jax.vjp(call, p)
    return out, vjp(weights)[0]


def weights_of(p):
    rng = np.random.default_rng(1)
    b, _, d = p["x"].shape
    return tuple(rng.normal(size=s) for s in (p["x"].shape, (b, p["w"].shape[0] - 1, d)))


@pytest.mark.parametrize(
    ("width", "masked", "carried"),
    [
        (4, (), False),
        (4, ("valid", "reset"), True),
        (2, ("reset",), True),
        (3, ("valid",), False),
        (1, ("valid",), True),
    ],
)
def test_values_and_every_gradient_entry(width, masked, carried):
    """Gradients by differences of the oracle in every entry: of a map that is linear in each argument."""
    p, given = draw(width), {k: v for k, v in masks().items() if k in masked}
    if not carried:
        del p["state"], p["bias"]
    weights = weights_of(p)
    actual, gradients = jax.jit(run)(to_jax(p), to_jax(weights), given)
    for name, value, want in zip(("y", "state"), actual, oracle(p, **given), strict=True):
        assert_close(value, want, FORWARD["float32"], name)
    inner = lambda p: sum(np.sum(w * v) for w, v in zip(weights, oracle(p, **given), strict=True))
    start = inner(p)
    for name, value in p.items():
        moves = np.eye(value.size).reshape(value.size, *value.shape)
        expected = np.array([inner(p | {name: value + move}) - start for move in moves]).reshape(value.shape)
        assert_close(gradients[name], expected, GRADIENT["float32"], name)


def test_state_hand_over():
    """Parts one after another, shorter than the taps among them; one begins with a document."""
    p, given = draw(4), masks()
    expected, final = oracle(p, **given)
    part, ends, ys = to_jax(p), (1, 3, T), []
    step = jax.jit(short_conv)
    for start, end in zip((0, *ends), ends, strict=False):
        cut = {k: v[:, start:end] for k, v in given.items()}
        y, part["state"] = step(part["x"][:, start:end], part["w"], part["bias"], state=part["state"], **cut)
        ys.append(y)
    assert_close(np.concatenate(ys, 1), expected, FORWARD["float32"], "y")
    assert_close(part["state"], final, FORWARD["float32"], "state")


def test_nothing_crosses_a_reset_or_enters_from_padding():
    """Bitwise: whatever stands on padding or in the document before, even NaN."""
    p, at, cut, end = draw(4), np.arange(T), 6, 9
    given = {"reset": np.tile(at == cut, (B, 1)), "valid": np.tile(at < end, (B, 1))}
    seen = (at >= cut) & (at < end)
    hidden = p | {"x": np.where(seen[:, None], p["x"], np.nan), "state": p["state"] * np.nan}
    call = jax.jit(lambda p: short_conv(p["x"], p["w"], p["bias"], state=p["state"], **given))
    (y, state), (y_hidden, state_hidden) = call(to_jax(p)), call(to_jax(hidden))
    assert np.array_equal(y[:, seen], y_hidden[:, seen])
    assert np.array_equal(state, state_hidden)
    assert not np.any(y_hidden[:, end:])


def test_bfloat16_is_rounded_only_at_the_border():
    p = draw(4)
    x = jnp.asarray(p["x"], jnp.bfloat16)
    y, state = jax.jit(short_conv)(x, *(jnp.asarray(p[k], jnp.float32) for k in ("w", "bias")))
    expected, final = oracle({"x": np.asarray(x, np.float64), "w": p["w"], "bias": p["bias"]})
    assert y.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32
    assert np.array_equal(state, final)
    assert np.all(np.abs(np.asarray(y, np.float64) - expected) <= 2.0**-8 * np.abs(expected) + FORWARD["float32"])


@pytest.mark.parametrize(
    ("sizes", "masked"), [((2, 1, 4), True), pytest.param((1, 2, 4), False, marks=pytest.mark.full)]
)
def test_split_over_devices(sizes, masked):
    """Rows, channels and time: values and gradients equal, and no activation is gathered."""
    b, t = 4, 16
    p, given = to_jax(draw(4, t=t, b=b)), {k: np.concatenate((v, v[1:2])) for k, v in masks(t).items()}
    given["valid"][3] = (np.arange(t) >= 5) & (
        np.arange(t) < 10
    )  # a state that belongs to the second shard and the first
    given = given if masked else {}
    weights = to_jax(weights_of(p))
    expected = jax.jit(run)(p, weights, given)
    mesh = jax.make_mesh(sizes, ("rows", "channels", "time"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    axes = Axes(batch="rows", heads="channels", seq="time")
    dims = {"x": "bth", "w": ".h", "bias": "h", "state": "b.h", "reset": "bt", "valid": "bt"}
    put = lambda tree: {k: jax.device_put(v, NamedSharding(mesh, axes.spec(dims[k]))) for k, v in tree.items()}
    weights = tuple(put(dict(zip(("x", "state"), weights, strict=True))).values())
    with jax.set_mesh(mesh):
        p, given = put(p), put(given)
        compiled = jax.jit(run, static_argnums=3).lower(p, weights, given, axes).compile()
        actual = compiled(p, weights, given)
    wanted = dict(jax.tree.leaves_with_path(expected))
    for path, value in jax.tree.leaves_with_path(actual):
        tolerance = FORWARD["float32"] if path[0].idx == 0 else GRADIENT["float32"]
        assert_close(value, wanted[path], tolerance, jax.tree_util.keystr(path))
    moved = aot.collectives(compiled.as_text())
    assert any(c.kind == "collective-permute" for c in moved)
    assert not aot.all_gathers(compiled.as_text())
    sizes = [np.prod(array.dims) for c in moved for array in c.operands]
    assert max(sizes) <= b * 3 * D  # never more than width - 1 tokens of every row


def test_what_is_refused():
    p = to_jax(draw(4))
    with pytest.raises(ValueError, match=r"w has shape \(2, 4\): .* must be \(width, 2\)"):
        short_conv(p["x"], p["w"].T)
    with pytest.raises(ValueError, match=r"bias has shape \(4, 2\): .* must be \(2,\)"):
        short_conv(p["x"], p["w"], p["w"])
    with pytest.raises(ValueError, match=r"state has shape \(3, 4, 2\): .* must be \(3, 3, 2\)"):
        short_conv(p["x"], p["w"], state=jnp.zeros((3, 4, 2)))
    mesh = jax.make_mesh((8,), ("time",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"16 tokens: 8 devices .* at least 3 each"):
        short_conv(jnp.zeros((1, 16, 2)), p["w"], axes=Axes(seq="time"))
