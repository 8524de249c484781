"""The TPU kernels of linear_attention with an erase gate: interpreted, against loops in float64; and compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longwave.kernels import aot
from longwave.kernels.aot import poison
from longwave.kernels.linear_attention import (
    linear_attention,
    pallas_tpu,
    tpu_erase_inverse,
    tpu_forward,
    tpu_layout,
)
from longwave.kernels.linear_attention.reference import SPAN, Inputs
from longwave.kernels.linear_attention.tpu_layout import Plan
from tests.kernels.linear_attention_oracle import oracle
from tests.kernels.test_linear_attention import SCALE, Case, compare, draw, masks
from tests.kernels.test_linear_attention_tpu import SLICES, abstract, interpreted, kernels, needs_libtpu, run
from tests.tolerances import BFLOAT16_FACTOR, FORWARD, assert_close, relative_error

full, large = pytest.mark.full, pytest.mark.large
__all__ = ["interpreted"]  # a fixture


@pytest.fixture
def rolled(monkeypatch):
    """One chunk in a stretch of code: compiles faster."""
    monkeypatch.setattr(tpu_erase_inverse, "TOGETHER", 1)
    monkeypatch.setattr(tpu_forward, "TOGETHER", (1, 1))


def drawn(case, *, seed=0, **how):
    """Keys of length 1, a quarter of them the same one, and erase gates up to 2; of the same key 1, or keys blow up."""
    p = draw(case, seed=seed, **how)
    rng, same = np.random.default_rng(seed + 7), slice(case.t // 4, case.t // 2)
    p["k"] /= np.linalg.norm(p["k"], axis=-1, keepdims=True)
    p["k"][:, same] = p["k"][:, same][:, :1]
    p["beta"] = rng.uniform(0, 2, p["v"].shape[:3]).astype(np.float32)
    p["beta"][:, same] = 1
    return p


CASES = [
    Case("scalar", 200),
    pytest.param(Case("none", 129, (2, 1, 4), K=20, V=40), marks=full),
    pytest.param(Case("scalar", 40, (1, 2, 2), K=130, V=130), marks=[full, large]),
    pytest.param(Case("none", 257, (2, 2, 2), K=16, V=64, masked=False, gated=False), marks=full),
    pytest.param(
        Case("scalar", 1100, (2, 2, 2), K=16, V=16), marks=[full, large]
    ),  # five spans: over several grid steps
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_every_gradient(case, interpreted, rolled, monkeypatch):
    monkeypatch.setattr(tpu_layout, "MOST", 4)
    p, given, weights = drawn(case), masks(case), drawn(case, seed=1)
    expected = oracle(p, weights["v"], weights["state"], scale=SCALE, **given)
    compare(run(pallas_tpu, p, weights["v"], weights["state"], **given), expected)


@full
def test_chunks_side_by_side(interpreted):
    case = Case("scalar", 600, (1, 1, 1), masked=False)
    p, weights = drawn(case, b=1), drawn(case, b=1, seed=1)
    plan = Plan.of(Inputs(p["q"], p["k"], p["v"], p["g"], p["w"], None, None, p["beta"]), SCALE, streams=4)
    assert (tpu_erase_inverse.together(plan), plan.together(*tpu_forward.TOGETHER)[0]) == (3, 3)
    expected = oracle(p, weights["v"], weights["state"], scale=SCALE)
    compare(run(pallas_tpu, p, weights["v"], weights["state"]), expected)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_the_inverse_where_every_key_is_the_same(beta):
    """Powers of such a triangle pass 1e30; its inverse is of the order of 1."""
    k = np.random.default_rng(0).normal(size=(2, 128, 16))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    k[1] = k[1, :1]
    M = np.triu(beta * np.einsum("nik,njk->nij", k, k), 1)
    found = jax.jit(tpu_erase_inverse.inverses)(list(M.astype(np.float32)))
    for x, m in zip(found, M, strict=True):
        assert_close(x, np.linalg.inv(np.eye(128) + m), FORWARD["float32"], f"inverse, beta {beta}")


@full
def test_gates_that_keep_or_erase_all_or_nothing(interpreted, rolled):
    """exp(g) is 1, or 0 in float32, even of -inf; the erase gate is shut, takes all, or turns it around."""
    case = Case("scalar", 140, masked=False)
    p, weights = drawn(case), drawn(case, seed=1)
    pick = np.random.default_rng(2)
    p["g"] = np.where(pick.random(p["g"].shape) < 0.5, 0, -1e-4).astype(np.float32)
    p["g"][0, 30], p["g"][1, 60, 0], p["g"][:, 131] = -150, -np.inf, -30
    p["w"] *= pick.choice([-1, 0, 1], p["w"].shape).astype(np.float32)
    p["beta"] = pick.choice([0, 1, 2], p["beta"].shape, p=[0.3, 0.6, 0.1]).astype(np.float32)
    expected = oracle(p, weights["v"], weights["state"], scale=SCALE)
    compare(run(pallas_tpu, p, weights["v"], weights["state"]), expected)


def test_nothing_enters_from_padding_or_crosses_a_reset(interpreted, rolled):
    """Even NaN does not, and what stands there has no gradient."""
    case = Case("scalar", 20)
    at = np.arange(case.t)[None].repeat(3, 0)
    p, weights = ({k: x.repeat(3, 0) for k, x in drawn(case, b=1, seed=seed).items()} for seed in (0, 1))
    do, padding = weights["v"], at >= 15
    for x in (p[name] for name in ("q", "k", "v", "g", "w", "beta")):
        x[1][padding[1]] = np.nan
    do[1][padding[1]] = np.nan
    p["k"][2, :6] *= 2
    values, gradients = run(pallas_tpu, p, do, weights["state"], valid=~padding, reset=at == 6)
    for x in jax.tree.leaves((values, gradients)):
        np.testing.assert_array_equal(x[0], x[1])
    for name in ("q", "k", "v", "g", "w", "beta"):
        assert not np.any(gradients[name][:, 15:]), name
        np.testing.assert_array_equal(gradients[name][0, 6:], gradients[name][2, 6:])
    np.testing.assert_array_equal(values[0][0, 6:], values[0][2, 6:])
    assert np.any(values[0][0, :6] != values[0][2, :6])


@full
def test_bfloat16_rounds_what_it_multiplies_and_no_more(interpreted, rolled):
    """Of the largest number within two units of bfloat16, gate gradients too: states, sums and solving are float32."""
    case = Case("scalar", 300, (1, 1, 2), K=32, V=32, masked=False)
    cast = lambda p: {k: jnp.asarray(v, jnp.bfloat16 if k in ("q", "k", "v") else jnp.float32) for k, v in p.items()}
    p, weights = cast(drawn(case)), cast(drawn(case, seed=1))
    exact = lambda p: {k: np.asarray(v, np.float64) for k, v in p.items()}
    (o, final), gradients = oracle(exact(p), exact(weights)["v"], exact(weights)["state"], scale=SCALE)
    found = run(pallas_tpu, p, weights["v"], weights["state"])
    assert found[0][0].dtype == found[1]["q"].dtype == jnp.bfloat16
    pairs = {"o": (found[0][0], o), "final": (found[0][1], final), **{n: (found[1][n], gradients[n]) for n in p}}
    errors = {name: relative_error(np.asarray(x, np.float64), y) for name, (x, y) in pairs.items()}
    assert max(errors.values()) <= BFLOAT16_FACTOR * 2.0**-8, errors


@full
@large
def test_on_poisoned_memory_and_two_cores(rolled):
    """Whatever stood in VMEM before; no two cores meet."""
    case = Case("scalar", 130, (1, 1, 2))
    p, weights = drawn(case, b=1), drawn(case, b=1, seed=1)
    given = {name: mask[:1] for name, mask in masks(case).items()}
    expected = oracle(p, weights["v"], weights["state"], scale=SCALE, **given)
    with poison.interpreted():
        found = jax.block_until_ready(run(pallas_tpu, p, weights["v"], weights["state"], **given))
    compare(found, expected)


def run_segments(p, do, dfinal, ids, reset):
    """As `run`, with a state for each segment."""

    def both(p, do, dfinal, ids):
        inputs = Inputs(p["q"], p["k"], p["v"], p["g"], p["w"], reset, ids >= 0, p.get("beta"))
        o, final, saved = pallas_tpu.forward_segments(inputs, p["state"], ids, scale=SCALE)
        back = pallas_tpu.backward_segments(inputs, p["state"], saved, ids, do, dfinal, scale=SCALE)
        return (o, final), {name: back[1] if name == "state" else getattr(back[0], name) for name in p}

    return jax.jit(both)(p, do, dfinal, ids)


def of_runs(*runs):
    return np.repeat(*zip(*runs, strict=True))


ROWS = [  # (segment, tokens); runs start at multiples of 256
    of_runs((1, 250), (-1, 6), (3, 300), (-1, 212), (0, 32)),
    of_runs((-1, 512), (2, 288)),  # padding before the first
    of_runs((-1, 800)),  # nothing at all
]


@full
@pytest.mark.parametrize("erases", [True, pytest.param(False, marks=large)])
def test_segments_go_on_with_states_of_their_own(interpreted, rolled, erases):
    """Of 4 states a row those that do not come stay, and so do their gradients."""
    case = Case("scalar", 800)
    p, weights = (drawn(case, b=3, segments=4, seed=seed) for seed in (0, 1))
    p = p if erases else {name: x for name, x in p.items() if name != "beta"}
    ids, reset = np.stack(ROWS), np.isin(np.arange(800), (5, 600))[None].repeat(3, 0)
    expected = oracle(p, weights["v"], weights["state"], scale=SCALE, reset=reset, segment_ids=ids)
    found = run_segments(p, weights["v"], weights["state"], ids, reset)
    compare(found, expected)
    np.testing.assert_array_equal(found[0][1][2], p["state"][2])
    np.testing.assert_array_equal(found[1]["state"][0, 2], weights["state"][0, 2])


@full
def test_segments_on_poisoned_memory_and_two_cores(rolled):
    case, ids = Case("scalar", 300), of_runs((1, 256), (0, 44))[None]
    p, weights = (drawn(case, b=1, segments=3, seed=seed) for seed in (0, 1))
    reset = np.arange(300)[None] == 5
    expected = oracle(p, weights["v"], weights["state"], scale=SCALE, reset=reset, segment_ids=ids)
    with poison.interpreted():
        found = jax.block_until_ready(run_segments(p, weights["v"], weights["state"], ids, reset))
    compare(found, expected)


def erasing(*args, **kwargs):
    inputs = abstract(*args, **kwargs)
    return inputs._replace(w=inputs.g, beta=inputs.g)


def test_what_is_refused():
    assert pallas_tpu.refusal(erasing()) is None
    assert pallas_tpu.refusal(erasing(t=1001, heads=(1, 3, 6), K=20, V=200)) is None
    assert "a gate for each of K" in pallas_tpu.refusal(erasing()._replace(beta=erasing(g=4).g))
    assert pallas_tpu.refusal(erasing(), chunk=512) is None
    assert "multiples of 64" in pallas_tpu.refusal(erasing(), chunk=64)


def test_blocks_cover_whole_spans():
    for t in (2, 128, 129, 257, 4096, 5000):
        for streams, dtype in ((2, jnp.bfloat16), (4, jnp.float32)):
            plan = Plan.of(erasing(dtype, t=t, heads=(1, 2, 4), K=256, V=200), 1.0, streams=streams)
            assert t <= plan.n * plan.tokens < t + SPAN
            assert (plan.heads, plan.chunk, plan.wide_k, plan.wide_v) == (1, 128, 256, 256)
            assert plan.chunks % plan.each == 0
            assert plan.each == (1 if t <= 128 else 2)


NAMES = {"linear_attention", "linear_attention_erase_backward", "linear_attention_inverse"}


@full
@needs_libtpu
@pytest.mark.parametrize("chip", [pytest.param(chip, marks=[large] * (chip != "v5e")) for chip in SLICES])
@pytest.mark.parametrize(
    ("dtype", "heads", "K", "V", "masked", "segments"),
    [
        (jnp.bfloat16, (2, 2, 2), 128, 64, True, 3),
        pytest.param(jnp.float32, (1, 2, 2), 64, 256, False, None, marks=large),
        pytest.param(jnp.bfloat16, (1, 2, 4), 256, 16, True, None, marks=large),
    ],
)
def test_compiles_with_gradient(chip, dtype, heads, K, V, masked, segments):
    """The operation's forward and backward are the kernels."""
    mesh = aot.mesh(aot.topology(SLICES[chip])[:1], {"x": 1})
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))
    inputs = erasing(dtype, heads=heads, K=K, V=V)
    flags = jax.ShapeDtypeStruct(inputs.v.shape[:2], bool) if masked else None

    how = {"reset": flags, "valid": flags}
    if segments:
        how["segment_ids"] = jax.ShapeDtypeStruct(inputs.v.shape[:2], jnp.int32)
        how["state"] = jax.ShapeDtypeStruct((2, segments, heads[2], K, V), jnp.float32)

    def loss(arrays, how):
        chunk = SPAN if segments else None
        o, final = linear_attention(*arrays[:4], w=arrays.w, beta=arrays.beta, chunk=chunk, **how)
        return jnp.sum(o.astype(jnp.float32) ** 2) + jnp.sum(final**2)

    args = jax.tree.map(place, (inputs, how))
    assert set(kernels(aot.compile(jax.grad(loss), *args, mesh=mesh).hlo)) == NAMES
