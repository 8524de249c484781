"""selective_scan against the equations in float64, token by token: values, gradients, masks, carries, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from longwave.kernels import aot
from longwave.kernels.partition import Axes
from longwave.kernels.selective_scan import chunked, reference, selective_scan
from tests.tolerances import FORWARD, GRADIENT, assert_close

B, D, N = 3, 4, 5
OPTIONAL = ("D", "z", "dt_bias")


def draw(t, *, b=B, d=D, n=N, seed=0, bare=False):
    """Arguments by name, float64 with float32 digits; `bare` without the optional ones."""
    rng = np.random.default_rng(seed)
    shapes = {"x": (b, t, d), "dt": (b, t, d), "A": (d, n), "B": (b, t, n), "C": (b, t, n)}
    shapes |= {"D": (d,), "z": (b, t, d), "dt_bias": (d,), "state": (b, n, d)}
    p = {k: rng.normal(size=s).astype(np.float32).astype(np.float64) for k, s in shapes.items()}
    p["A"] = -np.abs(p["A"]).astype(np.float32).astype(np.float64)
    p["dt"] -= 1
    return {k: v for k, v in p.items() if not (bare and k in OPTIONAL)}


def masks(t):
    """Three rows: padding on the right, on the left, and on both sides; documents of many lengths."""
    at = np.arange(t)
    valid = np.stack((at < t - t // 3, at >= t // 4, (at >= 1) & (at < t - 1)))
    starts = ((0, 3, 4), (1, t // 4, t - 2), (t - 5, t // 2))
    return {"reset": np.stack([np.isin(at, s) for s in starts]), "valid": valid}


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def oracle(p, weights=None, *, softplus=True, reset=None, valid=None):
    """(y, final state), and with weights (of y, of the state) also the gradients of their inner product."""
    (b, t, d), n = p["x"].shape, p["A"].shape[1]
    reset = np.zeros((b, t), bool) if reset is None else reset
    valid = np.ones((b, t), bool) if valid is None else valid
    skip, bias = p.get("D", np.zeros(d)), p.get("dt_bias", np.zeros(d))
    A, h = p["A"].T, p.get("state", np.zeros((b, n, d)))
    raw = p["dt"] + bias
    delta = np.logaddexp(0, raw) if softplus else raw
    gate = p["z"] * sigmoid(p["z"]) if "z" in p else np.ones_like(p["x"])
    y, core, befores = np.zeros_like(p["x"]), np.zeros_like(p["x"]), []
    keep = lambda i: ~(reset & valid)[:, i, None, None]
    for i in range(t):
        counts = valid[:, i, None, None]
        before = h * keep(i)
        befores.append(before)
        after = np.exp(delta[:, i, None] * A) * before + p["B"][:, i, :, None] * (delta * p["x"])[:, i, None]
        h = np.where(counts, after, h)
        core[:, i] = np.einsum("bn,bnd->bd", p["C"][:, i], h) + skip * p["x"][:, i]
        y[:, i] = core[:, i] * gate[:, i] * valid[:, i, None]
    if weights is None:
        return y, h
    dy = weights[0] * valid[..., None]
    grads = {k: np.zeros_like(v) for k, v in p.items()}
    if "z" in p:
        s = sigmoid(p["z"])
        grads["z"] = dy * core * (s + p["z"] * s * (1 - s))
    dy = dy * gate
    g = weights[1].copy()
    for i in reversed(range(t)):
        counts = valid[:, i, None, None]
        decay = np.exp(delta[:, i, None] * A)
        after = decay * befores[i] + p["B"][:, i, :, None] * (delta * p["x"])[:, i, None]
        here = (g + p["C"][:, i, :, None] * dy[:, i, None]) * counts
        grads["C"][:, i] = np.einsum("bnd,bd->bn", after * counts, dy[:, i])
        grads["B"][:, i] = np.einsum("bnd,bd->bn", here, (delta * p["x"])[:, i])
        through_B = np.einsum("bnd,bn->bd", here, p["B"][:, i])
        grads["x"][:, i] = delta[:, i] * through_B + skip * dy[:, i]
        slope = here * decay * befores[i]
        ddelta = np.sum(slope * A, 1) + p["x"][:, i] * through_B
        grads["dt"][:, i] = ddelta * (sigmoid(raw[:, i]) if softplus else 1)
        grads["A"] += np.einsum("bnd,bd->dn", slope, delta[:, i])
        g = np.where(counts, here * decay * keep(i), g)
    optional = {"D": np.sum(dy * p["x"], (0, 1)), "dt_bias": np.sum(grads["dt"], (0, 1)), "state": g}
    return (y, h), grads | {k: v for k, v in optional.items() if k in p}


def call(p, given=(), **how):
    lead = [p[k] for k in ("x", "dt", "A", "B", "C")]
    rest = {k: p[k] for k in (*OPTIONAL, "state") if k in p}
    return selective_scan(*lead, **rest, **dict(given), **how)


@functools.partial(jax.jit, static_argnames=("axes", "softplus"))  # compiled once for the tests whose shapes agree
def run(p, weights, given=(), **how):
    """(y, final state) and all gradients of their inner product with the weights."""
    out, vjp = jax.vjp(lambda p: call(p, given, **how), p)
    return out, vjp(weights)[0]


def to_jax(tree, dtype=jnp.float32):
    return jax.tree.map(lambda v: jnp.asarray(v, dtype), tree)


def weights_of(p, seed=9):
    rng = np.random.default_rng(seed)
    (b, _, d), n = p["x"].shape, p["A"].shape[1]
    return tuple(rng.normal(size=s).astype(np.float32).astype(np.float64) for s in (p["x"].shape, (b, n, d)))


def compare(p, given, **how):
    weights = weights_of(p)
    actual, gradients = run(to_jax(p), to_jax(weights), given, **how)
    expected, wanted = oracle(p, weights, **given, **how)
    for name, value, want in zip(("y", "final state"), actual, expected, strict=True):
        assert_close(value, want, FORWARD["float32"], name)
    assert set(gradients) == set(wanted)
    for name, want in wanted.items():
        assert_close(gradients[name], want, GRADIENT["float32"], f"gradient of {name}")


def test_the_oracle_s_gradients_are_differences():
    """Its adjoint against central differences in every entry, with all options and masks."""
    t = 7
    p, given = draw(t, b=3, d=2, n=2), masks(t)
    weights = weights_of(p)
    gradients = oracle(p, weights, **given)[1]
    inner = lambda p: sum(np.sum(w * v) for w, v in zip(weights, oracle(p, **given), strict=True))
    for name, value in p.items():
        expected, eps = np.zeros(value.size), 1e-5
        for i in range(value.size):
            move = np.zeros(value.size)
            move[i] = eps
            sides = [inner(p | {name: value + sign * move.reshape(value.shape)}) for sign in (1, -1)]
            expected[i] = (sides[0] - sides[1]) / (2 * eps)
        assert_close(gradients[name], expected.reshape(value.shape), FORWARD["float32"], name)


T = 45  # not whole chunks


@pytest.mark.parametrize("t", [129, *(pytest.param(t, marks=pytest.mark.full) for t in (7, T, 127, 128, 300))])
def test_values_and_every_gradient(t):
    """Everything given, padding on both sides and resets; lengths that fill neither chunks nor spans."""
    compare(draw(t), masks(t))


@pytest.mark.parametrize("t", [1, pytest.param(40, marks=pytest.mark.full)])
def test_values_and_every_gradient_of_the_bare_recurrence(t):
    p = draw(t, bare=True)
    p["dt"] = np.abs(p["dt"])
    del p["state"]
    compare(p, {}, softplus=False)


@pytest.mark.full
def test_values_and_every_gradient_of_one_token():
    compare(draw(1), {"reset": np.array([[True], [False], [False]]), "valid": np.array([[True], [True], [False]])})


def test_extreme_step_sizes():
    """A channel each: no step at all, a tiny one, one behind which nothing of the state is left, and all in turn."""
    p, extreme = draw(T), np.float32([-200, np.log(np.expm1(1e-4)), 30])
    p["dt_bias"] *= 0
    p["dt"][..., :3], p["dt"][..., 3] = extreme, np.resize(extreme, T)
    compare(p, masks(T))


def test_state_hand_over():
    """Parts one after another: several chunks, one token, a few more. One begins with a document."""
    ends = (T - 8, T - 7, T)
    p, given = draw(T), masks(T)
    given["reset"][:, T - 8] = True
    expected, final = oracle(p, **given)
    step, whole, ys = jax.jit(call), to_jax(p), []
    for start, end in zip((0, *ends), ends, strict=False):
        part = {k: v[:, start:end] if v.ndim == 3 and k != "state" else v for k, v in whole.items()}
        y, whole["state"] = step(part, {k: v[:, start:end] for k, v in given.items()})
        ys.append(y)
    assert_close(np.concatenate(ys, 1), expected, FORWARD["float32"], "y")
    assert_close(whole["state"], final, FORWARD["float32"], "final state")


@pytest.mark.full
def test_forms_agree():
    """The scan of the reference's step is the chunked form."""
    p, given = to_jax(draw(T)), masks(T)
    inputs = reference.Inputs(**{k: v for k, v in p.items() if k != "state"}, **given)
    y, final = jax.jit(reference.scan, static_argnames="softplus")(inputs, p["state"], softplus=True)
    form = jax.jit(chunked.forward, static_argnames="softplus")
    y_chunked, final_chunked, saved = form(inputs, p["state"], softplus=True)
    assert_close(y_chunked, y, FORWARD["float32"])
    assert_close(final_chunked, final, FORWARD["float32"])
    assert np.array_equal(saved[:, 0], p["state"])


def test_nothing_crosses_a_reset_or_enters_from_padding():
    """Bitwise: whatever stands on padding or in the document before, even NaN; and no gradient returns to it."""
    cut, end = T - 9, T - 3
    p, at = draw(T), np.arange(T)
    given = {"reset": np.stack((at == cut, at == 0, at == cut)), "valid": np.stack((at < end, at >= cut, at >= 0))}
    seen = (at >= cut) & given["valid"]
    over_time = ("x", "dt", "B", "C", "z")
    put = lambda value, places: {k: np.where(places[..., None], value, v) for k, v in p.items() if k in over_time}
    forgotten = {"state": p["state"] * np.array([np.nan, 1, np.nan])[:, None, None]}
    weights = to_jax((seen[..., None] * np.ones(D), np.ones((B, N, D))))
    (y, final), gradients = run(to_jax(p | put(1.0, ~seen)), weights, given)
    (y_behind, final_behind), _ = run(to_jax(p | put(np.nan, ~seen) | forgotten), weights, given)
    assert np.array_equal(np.asarray(y)[seen], np.asarray(y_behind)[seen])
    assert np.array_equal(final, final_behind)
    assert not np.any(np.asarray(y_behind)[~given["valid"]])
    assert not np.any(np.asarray(gradients["state"])[[0, 2]])
    for name in over_time:
        assert not np.any(np.asarray(gradients[name])[~seen]), name
        assert np.all(np.asarray(gradients[name])[seen] != 0), name
    on_padding = put(np.nan, ~given["valid"])
    padded = {k: np.where(given["valid"][..., None], v, on_padding[k]) for k, v in put(1.0, ~seen).items()}
    for name, value in run(to_jax(p | padded), weights, given)[1].items():
        assert np.array_equal(value, gradients[name]), name


def test_rows_of_padding_alone():
    p = draw(T)
    given = {"valid": np.zeros((B, T), bool), "reset": np.ones((B, T), bool)}
    weights = to_jax(weights_of(p))
    (y, final), gradients = run(to_jax(p), weights, given)
    assert not np.any(y)
    assert np.array_equal(final, to_jax(p["state"]))
    assert np.array_equal(gradients.pop("state"), weights[1])
    assert not any(np.any(v) for v in gradients.values())


def test_bfloat16_is_rounded_only_at_the_borders():
    """Inputs, y and gradients of inputs in bfloat16; all between them, the state above all, in float32."""
    p = draw(T)
    kept = {"A", "D", "dt_bias", "state"}
    low = {k: jnp.asarray(v, jnp.float32 if k in kept else jnp.bfloat16) for k, v in p.items()}
    weights = weights_of(p)
    rounded = jnp.asarray(weights[0], jnp.bfloat16), jnp.asarray(weights[1], jnp.float32)
    (y, final), gradients = run(low, rounded)
    exact = {k: np.asarray(v, np.float64) for k, v in low.items()}
    (want_y, want_final), wanted = oracle(exact, tuple(np.asarray(w, np.float64) for w in rounded))
    assert y.dtype == jnp.bfloat16
    assert final.dtype == jnp.float32
    assert_close(final, want_final, FORWARD["float32"])

    def near(v, want):
        off = np.abs(np.asarray(v, np.float64) - want)
        return np.all(off <= 2.0**-8 * np.abs(want) + FORWARD["float32"] * np.abs(want).max())

    assert near(y, want_y)
    for name, want in wanted.items():
        assert gradients[name].dtype == low[name].dtype, name
        if name in kept:
            assert_close(gradients[name], want, GRADIENT["float32"], name)
        else:
            assert near(gradients[name], want), name


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((1, 1, 8), marks=pytest.mark.full)])
def test_split_over_devices(sizes):
    """Rows, channels and time over 8 devices: values and gradients equal, and no device sees another's tokens."""
    b, t = 4, 40
    p, given = to_jax(draw(t, b=b)), {k: np.concatenate((v, v[:1])) for k, v in masks(t).items()}
    given["reset"][3] = False  # a row whose state passes through all shards
    weights = to_jax(weights_of(p))
    expected = run(p, weights, given)
    mesh = jax.make_mesh(sizes, ("rows", "channels", "time"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    axes = Axes(batch="rows", heads="channels", seq="time")
    dims = {"x": "bth", "dt": "bth", "A": "h.", "B": "bt.", "C": "bt.", "D": "h", "z": "bth", "dt_bias": "h"}
    put = lambda tree, dims: {k: jax.device_put(v, NamedSharding(mesh, axes.spec(dims[k]))) for k, v in tree.items()}
    weights = tuple(put(dict(enumerate(weights)), ("bth", "b.h")).values())
    with jax.set_mesh(mesh):
        p, given = put(p, dims | {"state": "b.h"}), put(given, {"reset": "bt", "valid": "bt"})
        compiled = run.lower(p, weights, given, axes=axes).compile()
        actual = compiled(p, weights, given)
    wanted = dict(jax.tree.leaves_with_path(expected))
    for path, value in jax.tree.leaves_with_path(actual):
        tolerance = FORWARD["float32"] if path[0].idx == 0 else GRADIENT["float32"]
        assert_close(value, wanted[path], tolerance, jax.tree_util.keystr(path))
    gathered = aot.all_gathers(compiled.as_text())
    assert gathered
    rows, shards = b // sizes[0], sizes[2]
    for c in gathered:
        assert c.bytes <= 4 * 2 * shards * rows * N * D // sizes[1], c  # (decay, state) of every shard


@pytest.mark.full
def test_replicas_side_by_side():
    """Under `vmap`, over parameters alone, with masks: what each gives by itself."""
    p, given = to_jax(draw(T)), masks(T)
    weights = to_jax(weights_of(p))
    shared = ("x", "B", "reset", "valid")
    both = {k: v if k in shared else jnp.stack((v, 0.7 * v)) for k, v in p.items()}
    axis = {k: None if k in shared else 0 for k in p}
    got = jax.jit(jax.vmap(lambda p: run(p, weights, given), in_axes=(axis,)))(both)
    for i in range(2):
        alone = run({k: v if k in shared else v[i] for k, v in both.items()}, weights, given)
        for path, want in jax.tree.leaves_with_path(alone):
            value = dict(jax.tree.leaves_with_path(got))[path][i]
            tolerance = FORWARD["float32"] if path[0].idx == 0 else GRADIENT["float32"]
            assert_close(value, want, tolerance, jax.tree_util.keystr(path))


def test_memory_of_the_gradient_is_far_below_the_states():
    b, t, d, n = 2, 4096, 32, 16
    p = jax.eval_shape(lambda: to_jax(draw(1, b=b, d=d, n=n)))
    longer = lambda v: jax.ShapeDtypeStruct((b, t, *v.shape[2:]), v.dtype)
    p = {k: longer(v) if k in ("x", "dt", "B", "C", "z") else v for k, v in p.items()}
    compiled = run.lower(p, (p["x"], p["state"])).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * b * t * d * n / 10  # saved states alone: n / 128 of x


def test_what_is_refused():
    p = to_jax(draw(6))
    with pytest.raises(ValueError, match=r"A has shape \(5, 4\): with x of shape \(3, 6, 4\) it must be \(4, states\)"):
        call(p | {"A": p["A"].T})
    with pytest.raises(ValueError, match=r"B has shape \(3, 6, 4\).* must be \(3, 6, 5\)"):
        call(p | {"B": p["x"]})
    with pytest.raises(ValueError, match=r"at least one token"):
        call(p | {"x": p["x"][:, :0]})
    with pytest.raises(ValueError, match=r"state has shape \(3, 4, 5\).* must be \(3, 5, 4\)"):
        call(p | {"state": jnp.zeros((3, 4, 5))})
    mesh = jax.make_mesh((4,), ("time",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="6 tokens, which 4 devices"):
        call(p, axes=Axes(seq="time"))
