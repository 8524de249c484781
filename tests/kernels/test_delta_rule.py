"""linear_attention with an erase gate against a loop over tokens in float64."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from longwave.kernels.linear_attention import chunked, erase, linear_attention, reference
from longwave.kernels.linear_attention.reference import Inputs
from longwave.kernels.partition import Axes
from tests.kernels.linear_attention_oracle import oracle
from tests.kernels.test_linear_attention import SCALE, compare, masks, run
from tests.kernels.test_linear_attention import draw as draw_without
from tests.tolerances import BFLOAT16_FACTOR, FORWARD, GATE_GRADIENT, assert_close, relative_error


class Case(NamedTuple):
    """decay and erase: "none", "scalar" or "vector"; as in test_linear_attention."""

    decay: str
    erase: str
    t: int
    heads: tuple[int, int, int] = (1, 1, 2)
    K: int = 4
    V: int = 3
    masked: bool = True
    gated: bool = True


def draw(case, *, b=2, segments=None, seed=0):
    """Keys of length 1, beta between 0 and 2."""
    p = draw_without(case, b=b, segments=segments, seed=seed)
    rng = np.random.default_rng(seed + 100)
    shape = p["v"].shape[:3] + ((case.K,) if case.erase == "vector" else ())
    p["k"] /= np.linalg.norm(p["k"], axis=-1, keepdims=True)
    if case.erase != "none":
        p["beta"] = (2 * rng.random(shape)).astype(np.float32)
    return p


LONG = Case("scalar", "scalar", 300, (1, 1, 2))  # three tests compile it once
DEFAULT = [LONG, Case("vector", "vector", 70, (1, 2, 2), K=5), Case("vector", "vector", 1)]
MORE = [
    *(Case("none", erases, 70, (2, 1, 4), gated=False) for erases in ("scalar", "vector")),
    Case("scalar", "vector", 257, (2, 4, 4)),
    Case("vector", "scalar", 33, gated=False),
    Case("scalar", "scalar", 256, masked=False),
    *(Case("scalar", "scalar", 70, K=K, V=V) for K, V in ((16, 256), (256, 16))),
    Case("vector", "vector", 70, K=64, V=48),
]


@pytest.mark.parametrize("case", [*DEFAULT, *(pytest.param(case, marks=pytest.mark.full) for case in MORE)], ids=str)
def test_values_and_every_gradient(case):
    p, given = draw(case), masks(case)
    weights = draw(case, seed=1)
    do, dfinal = weights["v"], weights["state"]
    compare(run(p, do, dfinal, **given), oracle(p, do, dfinal, scale=SCALE, **given))


def repeat(k, *, seed=4):
    """Nine of ten keys become the same."""
    return np.where(np.random.default_rng(seed).random((*k.shape[:3], 1)) < 0.9, k[:, :1, :1], k)


@pytest.mark.parametrize("case", [LONG, pytest.param(Case("vector", "vector", 70), marks=pytest.mark.full)], ids=str)
def test_gates_and_keys_at_their_extremes(case):
    """Keys that come again and again, and are erased whole, under g = 0, -30, -150 and -inf."""
    weights = draw(case, seed=1)
    do, dfinal = weights["v"], weights["state"]
    given = {name: np.full((2, case.t), name == "valid") for name in ("reset", "valid")}
    for seed in (2, 3):
        p = draw(case)
        p["k"], p["beta"] = repeat(p["k"]), np.ones_like(p["beta"])
        pick = np.random.default_rng(seed).random(p["g"].shape[1:])
        if seed == 2:
            p["g"][0] = 0
            p["g"][1] = np.where(pick < 0.2, -30, np.where(pick < 0.4, -150, -0.01 * pick))
        else:
            p["g"][0] = np.where(pick < 0.2, -np.inf, -0.3 * pick)
            p["g"][1] = -30
        outputs, grads = run(p, do, dfinal, **given)
        want, want_grads = oracle(p, do, dfinal, scale=SCALE)
        for row in range(2):
            of = lambda tree, row=row: jax.tree.map(lambda x: x[row], tree)
            compare((of(outputs), of(grads)), (of(want), of(want_grads)))


def test_nothing_enters_from_padding():
    """Whatever stands there, even NaN; and no gradient returns to it."""
    p, given = draw(LONG), masks(LONG)
    hide = lambda x: np.where(given["valid"].reshape(2, LONG.t, *[1] * (x.ndim - 2)), x, np.nan).astype(np.float32)
    dirty = {name: x if name == "state" else hide(x) for name, x in p.items()}
    weights = draw(LONG, seed=1)
    clean, same = (run(x, weights["v"], weights["state"], **given) for x in (p, dirty))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), clean, same)
    assert not np.any(np.asarray(same[1]["beta"])[~given["valid"]])


@pytest.mark.parametrize("c", [1, 4, 64, 128])
def test_inverse(c):
    """Of what repeated keys make: with beta = 1 the powers of L reach 10^20 and more, its inverse stays near 1."""
    rng = np.random.default_rng(0)
    k = rng.normal(size=(2, c, 3, 4))
    k = repeat(k / np.linalg.norm(k, axis=-1, keepdims=True))
    L = np.tril(np.einsum("nihk,njhk->nhij", k, k), -1)
    actual = jax.jit(erase.inverse)(L.astype(np.float32))
    assert_close(actual, np.linalg.inv(np.eye(c) + L), FORWARD["float32"], "inverse")


@pytest.mark.full
@pytest.mark.parametrize(("decay", "c"), [("scalar", 128), ("vector", 64)])
def test_every_chunk_length_is_the_same_function(decay, c):
    case = Case(decay, decay, 300)
    p, given, weights = draw(case), masks(case), draw(case, seed=1)
    p["k"] = repeat(p["k"])
    inputs = Inputs(*(p.get(name) for name in ("q", "k", "v", "g", "w")), **given, beta=p["beta"])
    form = {"scale": SCALE, "way": chunked.WAYS["gpu"]._replace(chunk=c)}

    @jax.jit
    def both(inputs, state, do, dfinal):
        o, final, saved = chunked.forward(inputs, state, **form)
        grads, dstate = chunked.backward(inputs, saved, do, dfinal, **form)
        return (o, final), {**{k: v for k, v in grads._asdict().items() if v is not None}, "state": dstate}

    do, dfinal = weights["v"], weights["state"]
    compare(both(inputs, p["state"], do, dfinal), oracle(p, do, dfinal, scale=SCALE, **given))


@pytest.mark.parametrize("decay", ["scalar", pytest.param("vector", marks=pytest.mark.full)])
def test_a_state_for_every_segment(decay):
    """Some of one chunk and some of many, past a span; documents inside; padding between; one that never comes."""
    case = Case(decay, decay, 330, masked=False)
    p = draw(case, segments=4)
    run_of = lambda *runs: np.concatenate([np.full(n, i) for i, n in runs])
    ids = np.stack((run_of((2, 48), (0, 272), (-1, 10)), run_of((1, 16), (-1, 16), (3, 16), (2, 282))))
    rng = np.random.default_rng(3)
    given = {"segment_ids": ids, "valid": rng.random(ids.shape) < 0.9, "reset": rng.random(ids.shape) < 0.02}
    weights = draw(case, segments=4, seed=1)
    do, dfinal = weights["v"], weights["state"]
    actual = run(p, do, dfinal, **given, chunk=16)
    given["reset"] &= given["valid"]
    compare(actual, oracle(p, do, dfinal, scale=SCALE, **given))
    assert np.array_equal(actual[0][1][0, [1, 3]], p["state"][0, [1, 3]])


@pytest.mark.full
def test_bfloat16():
    """The gradients of gates come in float32 from products that were not rounded."""
    case = Case("scalar", "scalar", 64, masked=False)
    p = {name: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for name, x in draw(case).items()}
    low = {name: jnp.asarray(x, jnp.bfloat16 if name in ("q", "k", "v") else jnp.float32) for name, x in p.items()}
    do = jnp.asarray(draw(case, seed=1)["v"], jnp.bfloat16)
    dfinal = np.zeros_like(p["state"])
    (o, final), grads = run(low, do, dfinal)
    (want, _), want_grads = oracle(p, np.asarray(do, np.float64), dfinal, scale=SCALE)
    assert o.dtype == grads["k"].dtype == jnp.bfloat16
    assert final.dtype == grads["beta"].dtype == jnp.float32
    inputs = Inputs(low["q"], low["k"], low["v"], low["g"], low["w"], None, None, low["beta"])
    plain = jax.jit(partial(reference.attend, scale=SCALE))(inputs, low["state"])[0]
    assert relative_error(o, want) <= BFLOAT16_FACTOR * relative_error(plain, want)
    for name in ("g", "w", "beta"):
        assert_close(grads[name], want_grads[name], GATE_GRADIENT["float32"], name)


@pytest.mark.full
def test_memory_of_the_gradient():
    """Little more than o, its cotangent and the saved states: never all (c, c) matrices, nor all W."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    keys, values, gates = array(2, 8192, 4, 32), array(2, 8192, 4, 32), array(2, 8192, 4)
    args = keys, keys, values, gates, gates
    f = lambda q, k, v, g, beta: jnp.sum(linear_attention(q, k, v, g, w=beta, beta=beta)[0] ** 2)
    compiled = jax.jit(jax.grad(f, argnums=(0, 1, 2, 3, 4))).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2.2 * sum(4 * x.size for x in args)


@pytest.mark.full
@pytest.mark.parametrize("decay", ["scalar", pytest.param("vector", marks=pytest.mark.full)])
def test_split_over_devices(decay):
    """Rows, heads and time over two devices each: a device hands a matrix of the state on, and a state."""
    case = Case(decay, decay, 64, (1, 2, 2))
    p, given, weights = draw(case), masks(case), draw(case, seed=1)
    do, dfinal = weights["v"], weights["state"]
    mesh = jax.make_mesh((2, 2, 2), ("rows", "heads", "time"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    axes = Axes(batch="rows", heads="heads", seq="time")
    place = lambda x, dims: jax.device_put(x, NamedSharding(mesh, axes.spec(dims)))
    dims = {"q": "bt..", "k": "bth.", "v": "bth.", "w": "bth", "state": "bh.."}
    with jax.set_mesh(mesh):
        split = {name: place(x, dims.get(name, "bth."[: x.ndim])) for name, x in p.items()}
        split_masks = {name: place(mask, "bt") for name, mask in given.items()}
        actual = run(split, place(do, "bth."), place(dfinal, "bh.."), axes=axes, **split_masks)
    compare(actual, oracle(p, do, dfinal, scale=SCALE, **given))
