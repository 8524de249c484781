"""linear_attention against a loop over tokens in float64: values, gradients, gates, masks, segments, devices."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from longwave.kernels import aot
from longwave.kernels.linear_attention import chunked, linear_attention, reference
from longwave.kernels.linear_attention.reference import Inputs
from longwave.kernels.partition import Axes
from tests.kernels.linear_attention_oracle import oracle
from tests.tolerances import BFLOAT16_FACTOR, FORWARD, GATE_GRADIENT, GRADIENT, assert_close, relative_error

SCALE = 0.5


class Case(NamedTuple):
    """decay: "none", "scalar" or "vector"; t tokens; hq, hk, h heads; K, V; with masks; with a write gate."""

    decay: str
    t: int
    heads: tuple[int, int, int] = (1, 1, 2)
    K: int = 4
    V: int = 3
    masked: bool = True
    gated: bool = True


def draw(case, *, b=2, segments=None, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    (hq, hk, h), t, K, V = case.heads, case.t, case.K, case.V
    p = {"q": normal(b, t, hq, K), "k": normal(b, t, hk, K), "v": normal(b, t, h, V)}
    if case.decay != "none":
        p["g"] = -0.3 * np.abs(normal(*((b, t, h) if case.decay == "scalar" else (b, t, h, K))))
    if case.gated:
        p["w"] = np.abs(normal(b, t, h))
    p["state"] = normal(b, *([] if segments is None else [segments]), h, K, V)
    return p


def masks(case):
    """Two rows: padding on the right, and on the left; documents of many lengths, some inside one chunk."""
    at, t = np.arange(case.t), case.t
    valid = np.stack((at < t - t // 4, at >= t // 4))
    starts = (0, 3, 4, t // 2, t - 2), (t // 4 + 1, t - 1)
    return {"reset": np.stack([np.isin(at, s) for s in starts]), "valid": valid} if case.masked else {}


@partial(jax.jit, static_argnames=("chunk", "axes"))
def run(p, do, dfinal, *, chunk=None, axes=Axes(), **given):
    """((o, final state), gradients), compiled in one."""
    how = {"scale": SCALE, "chunk": chunk, "axes": axes, **given}

    def f(p):
        gates = {name: p.get(name) for name in ("g", "w", "beta")}
        return linear_attention(p["q"], p["k"], p["v"], **gates, state=p["state"], **how)

    out, pull = jax.vjp(f, p)
    return out, pull((do, dfinal))[0]


def compare(actual, expected, tolerances=(FORWARD, GRADIENT, GATE_GRADIENT)):
    (outputs, grads), (want, want_grads) = actual, expected
    forward, gradient, gates = (t["float32"] for t in tolerances)
    single = lambda x: np.asarray(x, np.float32)  # what is less than 1e-45 is 0
    for name, x, y in zip(("o", "final state"), outputs, want, strict=True):
        assert_close(x, single(y), forward, name)
    for name, x in grads.items():
        tolerance = gates if name in ("g", "w", "beta") else gradient
        assert_close(x, single(want_grads[name]), tolerance, f"gradient of {name}")


DEFAULT = [
    Case("scalar", 300, (1, 1, 4)),
    Case("vector", 33, (1, 2, 2), K=5),
    Case("none", 40, (2, 1, 4), V=5),
]
MORE = [
    Case("scalar", 7, (2, 1, 2), masked=False, gated=False),
    *(Case("scalar", t, masked=False) for t in (1, 31, 32, 33, 256)),
    Case("none", 1),
    Case("vector", 300, (2, 2, 2), K=3, V=7),
    Case("none", 300, (1, 1, 1), masked=False, gated=False),
    Case("scalar", 257, (2, 4, 4), K=16, V=8),
    Case("vector", 1, masked=False),
]


@pytest.mark.parametrize("case", [*DEFAULT, *(pytest.param(case, marks=pytest.mark.full) for case in MORE)], ids=str)
def test_values_and_every_gradient(case):
    p, given = draw(case), masks(case)
    weights = draw(case, seed=1)
    do, dfinal = weights["v"], weights["state"]
    compare(run(p, do, dfinal, **given), oracle(p, do, dfinal, scale=SCALE, **given))


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_gates_at_their_extremes(decay):
    """Rows that keep all, that forget a third at random beside gates of -30, -150 and -inf, and that are all -30.

    Among strong decays the weak ones keep their digits; and where every decay is strong, its tiny gradient does too.
    """
    case = Case(decay, 70, masked=False)
    p = draw(case, b=4)
    pick = np.random.default_rng(2).random(p["g"].shape[1:])
    p["g"][0] = 0
    p["g"][1] = np.where(pick < 0.2, -30, np.where(pick < 0.4, -150, -0.01 * pick))
    p["g"][2] = np.where(pick < 0.2, -np.inf, -0.3 * pick)
    p["g"][3] = -30
    weights = draw(case, b=4, seed=1)
    do, dfinal = weights["v"], weights["state"]
    outputs, grads = run(p, do, dfinal)
    want, want_grads = oracle(p, do, dfinal, scale=SCALE)
    for row in range(4):
        of = lambda tree, row=row: jax.tree.map(lambda x: x[row], tree)
        compare((of(outputs), of(grads)), (of(want), of(want_grads)))


def test_parts_one_after_another():
    """Cut at any token, with the state handed over, and into single tokens at the end."""
    case = Case("scalar", 40)
    p, given = draw(case), masks(case)
    (want, final), _ = oracle(p, scale=SCALE, **given)
    state, outputs, ends = jnp.asarray(p["state"]), [], (5, 38, 39, 40)
    part_of = jax.jit(partial(linear_attention, scale=SCALE))
    for start, end in zip((0, *ends), ends, strict=False):
        cut = lambda x, part=slice(start, end): x[:, part]
        tokens = (cut(p[name]) for name in "qkvg")
        flags = {name: cut(mask) for name, mask in given.items()}
        o, state = part_of(*tokens, w=cut(p["w"]), state=state, **flags)
        outputs.append(o)
    assert_close(np.concatenate(outputs, 1), want, FORWARD["float32"], "o")
    assert_close(state, final, FORWARD["float32"], "final state")


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.full) for way in ("gpu", "tpu")])
@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_every_chunk_length_is_the_same_function(decay, way):
    case = Case(decay, 300, K=3)
    p, given = draw(case), masks(case)
    inputs = Inputs(*(p.get(name) for name in ("q", "k", "v", "g", "w")), **given)
    weights = draw(case, seed=1)

    @jax.jit
    def both(inputs, state, do, dfinal):
        o, final, saved = chunked.forward(inputs, state, scale=SCALE, way=chunked.WAYS[way])
        grads, dstate = chunked.backward(inputs, saved, do, dfinal, scale=SCALE, way=chunked.WAYS[way])
        return (o, final), {**{k: v for k, v in grads._asdict().items() if v is not None}, "state": dstate}

    do, dfinal = weights["v"], weights["state"]
    compare(both(inputs, p["state"], do, dfinal), oracle(p, do, dfinal, scale=SCALE, **given))


@pytest.mark.parametrize(
    "decay", ["scalar", *(pytest.param(decay, marks=pytest.mark.full) for decay in ("none", "vector"))]
)
def test_a_state_for_every_segment(decay):
    """In any order, some of one chunk and some of many, past a span; padding between them; one that never comes."""
    case = Case(decay, 330, masked=False)
    p = draw(case, segments=4)
    run_of = lambda *runs: np.concatenate([np.full(n, i) for i, n in runs])
    ids = np.stack((run_of((2, 48), (0, 272), (-1, 10)), run_of((1, 16), (-1, 16), (3, 16), (2, 282))))
    given = {"segment_ids": ids, "valid": np.random.default_rng(3).random(ids.shape) < 0.9}
    weights = draw(case, segments=4, seed=1)
    do, dfinal = weights["v"], weights["state"]
    actual = run(p, do, dfinal, **given, chunk=16)
    compare(actual, oracle(p, do, dfinal, scale=SCALE, **given))
    assert np.array_equal(actual[0][1][0, [1, 3]], p["state"][0, [1, 3]])
    token = {name: x[:, :1] for name, x in p.items() if name != "state"} | {"state": p["state"]}
    first = {name: mask[:, :1] for name, mask in given.items()}
    compare(run(token, do[:, :1], dfinal, **first, chunk=16), oracle(token, do[:, :1], dfinal, scale=SCALE, **first))


def test_nothing_enters_from_padding():
    """Whatever stands there, even NaN; and no gradient returns to it."""
    case = Case("scalar", 40)
    p, given = draw(case), masks(case)
    hide = lambda x: np.where(given["valid"].reshape(2, 40, *[1] * (x.ndim - 2)), x, np.nan).astype(np.float32)
    dirty = {name: x if name == "state" else hide(x) for name, x in p.items()}
    weights = draw(case, seed=1)
    clean, same = (run(x, weights["v"], weights["state"], **given) for x in (p, dirty))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), clean, same)
    for name, x in same[1].items():
        assert name == "state" or not np.any(np.asarray(x)[~given["valid"]])
    assert not np.any(np.asarray(same[0][0])[~given["valid"]])


def test_normaliser():
    """A column of ones beside v, whose output divides those of v; the state has it too."""
    case, eps = Case("scalar", 40), 0.1
    p, given = draw(case), masks(case)
    weights = draw(case, seed=1)
    for name in ("q", "k", "state"):
        p[name] = np.abs(p[name])
    p["state"] = np.concatenate((p["state"], np.ones_like(p["state"][..., :1])), -1)
    do, dfinal = weights["v"], np.concatenate((weights["state"], weights["state"][..., :1]), -1)

    @jax.jit
    def both(p, do, dfinal):
        how = {"scale": SCALE, "normaliser": eps, **given}
        f = lambda p: linear_attention(p["q"], p["k"], p["v"], p["g"], w=p["w"], state=p["state"], **how)
        out, pull = jax.vjp(f, p)
        return out, pull((do, dfinal))[0]

    beside = {**p, "v": np.concatenate((p["v"], np.ones_like(p["v"][..., :1])), -1)}
    (sums, final), _ = oracle(beside, scale=SCALE, **given)
    total = sums[..., -1:] + eps
    o = sums[..., :-1] / total
    dsums = np.concatenate((do / total, -np.sum(do * o, -1, keepdims=True) / total), -1)
    _, grads = oracle(beside, dsums, dfinal, scale=SCALE, **given)
    compare(both(p, do, dfinal), ((o, final), {**grads, "v": grads["v"][..., :-1]}))
    with pytest.raises(ValueError, match="normaliser = 0"):
        linear_attention(p["q"], p["k"], p["v"], normaliser=0)


def test_bfloat16():
    """Gate gradients come in float32 from products that were not rounded."""
    case = Case("scalar", 64, masked=False)
    p = {name: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for name, x in draw(case).items()}
    low = {name: jnp.asarray(x, jnp.bfloat16 if name in "qkv" else jnp.float32) for name, x in p.items()}
    do = jnp.asarray(draw(case, seed=1)["v"], jnp.bfloat16)
    dfinal = np.zeros_like(p["state"])
    (o, final), grads = run(low, do, dfinal)
    (want, _), want_grads = oracle(p, np.asarray(do, np.float64), dfinal, scale=SCALE)
    assert o.dtype == grads["q"].dtype == jnp.bfloat16
    assert final.dtype == grads["g"].dtype == jnp.float32
    inputs = Inputs(low["q"], low["k"], low["v"], low["g"], low["w"], None, None)
    plain = jax.jit(partial(reference.attend, scale=SCALE))(inputs, low["state"])[0]
    assert relative_error(o, want) <= BFLOAT16_FACTOR * relative_error(plain, want)
    for name in "gw":
        assert_close(grads[name], want_grads[name], GATE_GRADIENT["float32"], name)


@pytest.mark.parametrize(
    "decay", ["scalar", *(pytest.param(decay, marks=pytest.mark.full) for decay in ("none", "vector"))]
)
def test_split_over_devices(decay):
    """Rows, heads and time over two devices each: the same values and gradients, from small messages."""
    case = Case(decay, 64, (1, 2, 2))
    p, given, weights = draw(case), masks(case), draw(case, seed=1)
    do, dfinal = weights["v"], weights["state"]
    mesh = jax.make_mesh((2, 2, 2), ("rows", "heads", "time"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    axes = Axes(batch="rows", heads="heads", seq="time")
    place = lambda x, dims: jax.device_put(x, NamedSharding(mesh, axes.spec(dims)))
    dims = {"q": "bt..", "k": "bth.", "v": "bth.", "g": "bth."[: p["g"].ndim] if "g" in p else "", "w": "bth"}
    dims["state"] = "bh.."
    with jax.set_mesh(mesh):
        split = {name: place(x, dims[name]) for name, x in p.items()}
        split_masks = {name: place(mask, "bt") for name, mask in given.items()}
        actual = run(split, place(do, "bth."), place(dfinal, "bh.."), axes=axes, **split_masks)
    compare(actual, oracle(p, do, dfinal, scale=SCALE, **given))


@pytest.mark.parametrize("t", [8192, pytest.param(16384, marks=pytest.mark.full)])
def test_memory_of_the_gradient(t):
    """Little more than o, its cotangent and the saved states: never all (c, c) matrices."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    args = array(2, t, 1, 64), array(2, t, 1, 64), array(2, t, 4, 32), array(2, t, 4)
    f = lambda q, k, v, g: jnp.sum(linear_attention(q, k, v, g, w=g)[0] ** 2)
    compiled = jax.jit(jax.grad(f, argnums=(0, 1, 2, 3))).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2.2 * sum(4 * x.size for x in args)


def test_what_is_refused():
    x, state = jnp.zeros((2, 6, 4, 3)), jnp.zeros((2, 4, 3, 3))
    with pytest.raises(ValueError, match=r"k.shape = \(2, 6, 3, 3\)"):
        linear_attention(x, x[:, :, :3], x)
    with pytest.raises(ValueError, match=r"g.shape = \(2, 6\)"):
        linear_attention(x, x, x, x[..., 0, 0])
    with pytest.raises(ValueError, match=r"state.shape = \(2, 3, 3\)"):
        linear_attention(x, x, x, state=state[:, 0])
    ids = jnp.zeros((2, 6), int)
    with pytest.raises(ValueError, match="chunk = None"):
        linear_attention(x, x, x, segment_ids=ids, state=state[:, None])
    with pytest.raises(ValueError, match="chunk = 16; it must be None"):
        linear_attention(x, x, x, chunk=16)
    with pytest.raises(ValueError, match=r"state.shape = None.*segments"):
        linear_attention(x, x, x, segment_ids=ids, chunk=16)
    mesh = jax.make_mesh((4,), ("time",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"t = 6.*4 devices"):
        linear_attention(x, x, x, axes=Axes(seq="time"))


@pytest.mark.full
@pytest.mark.large
@pytest.mark.skipif(aot.missing() is not None, reason=aot.missing() or "")
def test_chunks_compile_for_a_tpu():
    """What the kernels refuse: vector decays, with gradient."""
    mesh = aot.mesh(aot.topology("v5e:2x2"), {"data": 4})
    axes = Axes(batch="data")
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, axes.spec("b...."[: x.ndim])))
    p = jax.tree.map(place, draw(Case("vector", 512, K=64, V=64), b=4))
    f = lambda p: jnp.sum(linear_attention(p["q"], p["k"], p["v"], p["g"], w=p["w"], axes=axes)[0])
    assert aot.compile(jax.grad(f), p, mesh=mesh).fits
