"""The TPU kernels of linear_attention: interpreted, against loops over tokens in float64; compiled, what they take."""

import itertools
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import longwave.kernels.linear_attention as operation
from longwave.kernels import aot
from longwave.kernels.aot import budget, poison
from longwave.kernels.linear_attention import linear_attention, pallas_tpu, tpu_layout
from longwave.kernels.linear_attention.reference import Inputs
from longwave.kernels.linear_attention.tpu_layout import Plan
from tests.kernels.linear_attention_oracle import oracle
from tests.kernels.test_linear_attention import SCALE, Case, compare, draw, masks
from tests.tolerances import BFLOAT16_FACTOR, relative_error

full = pytest.mark.full
needs_libtpu = pytest.mark.skipif(aot.missing() is not None, reason=aot.missing() or "")
SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
NAMES = ["linear_attention", "linear_attention_backward"]


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))


def run(form, p, do, dfinal, *, reset=None, valid=None):
    """((o, final state), gradients) of a form's two functions."""

    def both(p, do, dfinal):
        inputs = Inputs(p["q"], p["k"], p["v"], p.get("g"), p.get("w"), reset, valid, p.get("beta"))
        o, final, saved = form.forward(inputs, p["state"], scale=SCALE)
        gradients, dstate = form.backward(inputs, saved, do, dfinal, scale=SCALE)
        return (o, final), {name: dstate if name == "state" else getattr(gradients, name) for name in p}

    return jax.jit(both)(p, do, dfinal)


CASES = [
    Case("scalar", 300),
    pytest.param(Case("none", 129, (2, 1, 4), K=20, V=40), marks=full),
    pytest.param(Case("scalar", 40, (1, 2, 2), K=130, V=130), marks=full),
    pytest.param(Case("scalar", 520, (1, 1, 6), K=64, V=64, gated=False), marks=full),  # slabs, one after another
    pytest.param(Case("none", 300, (1, 1, 6), K=8, V=64, gated=False), marks=[full, pytest.mark.large]),
    pytest.param(Case("scalar", 600, (3, 3, 3), K=16, V=16, masked=False), marks=full),  # chunks beside each other
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_every_gradient(case, interpreted):
    p, given, weights = draw(case), masks(case), draw(case, seed=1)
    expected = oracle(p, weights["v"], weights["state"], scale=SCALE, **given)
    compare(run(pallas_tpu, p, weights["v"], weights["state"], **given), expected)


@full
def test_programs_that_share_keys_over_several_grid_steps(interpreted, monkeypatch):
    """Each has its own part of dq and dk; states pass from step to step."""
    monkeypatch.setattr(tpu_layout, "WIDEST", 128)
    monkeypatch.setattr(tpu_layout, "MOST", 1)
    case = Case("scalar", 600, (1, 1, 4), K=8, V=64)
    p, given, weights = draw(case), masks(case), draw(case, seed=1)
    plan = Plan.of(Inputs(p["q"], p["k"], p["v"], p["g"], p["w"], None, None), SCALE, streams=2)
    assert plan.grid == (2, 2, 3)
    expected = oracle(p, weights["v"], weights["state"], scale=SCALE, **given)
    compare(run(pallas_tpu, p, weights["v"], weights["state"], **given), expected)


@full
def test_gates_that_keep_all_or_nothing(interpreted):
    """exp(g) is 1, or 0 in float32, even of -inf; and the write gate shuts, or has the other sign."""
    case = Case("scalar", 140, masked=False)
    p, weights = draw(case), draw(case, seed=1)
    pick = np.random.default_rng(2)
    p["g"] = np.where(pick.random(p["g"].shape) < 0.5, 0, -1e-4).astype(np.float32)
    p["g"][0, 30], p["g"][1, 60, 0], p["g"][:, 131] = -150, -np.inf, -150
    p["w"] *= pick.choice([-1, 0, 1], p["w"].shape).astype(np.float32)
    expected = oracle(p, weights["v"], weights["state"], scale=SCALE)
    compare(run(pallas_tpu, p, weights["v"], weights["state"]), expected)


def test_nothing_enters_from_padding_or_crosses_a_reset(interpreted):
    """Even NaN does not, and what stands there has no gradient."""
    case = Case("scalar", 20)
    p, weights = draw(case, b=1), draw(case, b=1, seed=1)
    at = np.arange(case.t)[None]
    given = {"valid": at < 15, "reset": at == 6}
    run_ = partial(run, pallas_tpu, **given)
    clean = run_(p, weights["v"], weights["state"])
    hidden = {
        k: v if k == "state" else np.where((at >= 15).reshape(1, -1, *[1] * (v.ndim - 2)), np.nan, v)
        for k, v in p.items()
    }
    do = np.where(at[..., None, None] >= 15, np.nan, weights["v"]).astype(np.float32)
    dirty = run_({k: v.astype(np.float32) for k, v in hidden.items()}, do, weights["state"])
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    for name in "qkvgw":
        assert not np.any(clean[1][name][:, 15:]), name


@full
def test_bfloat16_rounds_what_it_multiplies_and_no_more(interpreted):
    """Of the largest number within two units of bfloat16, gate gradients too: states and sums are float32."""
    case = Case("scalar", 300, (1, 1, 2), K=32, V=32, masked=False)
    cast = lambda p: {k: jnp.asarray(v, jnp.bfloat16 if k in "qkv" else jnp.float32) for k, v in p.items()}
    p, weights = cast(draw(case)), cast(draw(case, seed=1))
    exact = lambda p: {k: np.asarray(v, np.float64) for k, v in p.items()}
    (o, final), gradients = oracle(exact(p), exact(weights)["v"], exact(weights)["state"], scale=SCALE)
    found = run(pallas_tpu, p, weights["v"], weights["state"])
    assert found[0][0].dtype == found[1]["q"].dtype == jnp.bfloat16
    for name, x, y in (
        ("o", found[0][0], o),
        ("final", found[0][1], final),
        *((n, found[1][n], gradients[n]) for n in p),
    ):
        error = relative_error(np.asarray(x, np.float64), y)
        assert error <= BFLOAT16_FACTOR * 2.0**-8, (name, error)


@full
def test_on_poisoned_memory_and_two_cores():
    """Whatever stood in VMEM before; no two cores meet."""
    case = Case("scalar", 200, (1, 1, 2))
    p, given, weights = draw(case), masks(case), draw(case, seed=1)
    expected = oracle(p, weights["v"], weights["state"], scale=SCALE, **given)
    with poison.interpreted():
        found = jax.block_until_ready(run(pallas_tpu, p, weights["v"], weights["state"], **given))
    compare(found, expected)


def abstract(dtype=jnp.bfloat16, *, b=2, t=300, heads=(1, 1, 2), K=64, V=64, g=3):
    of = lambda *shape: jax.ShapeDtypeStruct((b, t, *shape), dtype)
    gate = jax.ShapeDtypeStruct((b, t, heads[2], K)[: g + (g > 3)], jnp.float32)
    return Inputs(of(heads[0], K), of(heads[1], K), of(heads[2], V), gate, None, None, None)


def test_what_is_refused():
    assert pallas_tpu.refusal(abstract()) is None
    assert pallas_tpu.refusal(abstract(t=1001, heads=(1, 3, 6), K=20, V=200)) is None
    assert "float16" in pallas_tpu.refusal(abstract(jnp.float16))
    assert "a decay for each of K" in pallas_tpu.refusal(abstract(g=4))
    assert "V = 300" in pallas_tpu.refusal(abstract(V=300))


def test_blocks_cover_everything_and_fit():
    heads = ((1, 1, 24), (16, 16, 16), (1, 3, 6), (1, 1, 80), (8, 8, 64), (1, 1, 1))
    for shared, t, K, V in itertools.product(heads, (2, 129, 4096, 5000), (16, 64, 256), (16, 64, 96, 256)):
        for streams, dtype in itertools.product((2, 4), (jnp.bfloat16, jnp.float32)):
            plan = Plan.of(abstract(dtype, t=t, heads=shared, K=K, V=V), 1.0, streams=streams)
            assert t <= plan.n * plan.tokens < t + plan.chunk
            assert plan.chunk in (128, 256)
            assert (plan.heads * plan.wide_v) % 128 == 0
            assert shared[2] % (plan.groups * plan.heads) == 0
            width = (plan.heads * plan.wide_v + plan.wide_k) * plan.dtype.itemsize * streams * plan.chunk
            states = 4 * plan.heads * plan.wide_v * plan.wide_k * plan.chunks
            assert 2 * (width * plan.chunks + states) <= tpu_layout.VMEM_LIMIT * 3 // 4


# Compiled for TPUs


def kernels(hlo):
    return sorted(re.findall(r"/(linear_attention\w*)/pallas_call", "\n".join(re.findall(".*tpu_custom_call.*", hlo))))


@full
@needs_libtpu
@pytest.mark.parametrize("chip", [pytest.param(chip, marks=[pytest.mark.large] * (chip != "v5e")) for chip in SLICES])
@pytest.mark.parametrize(
    ("dtype", "heads", "K", "V", "masked"),
    [
        (jnp.bfloat16, (1, 1, 6), 128, 64, True),
        pytest.param(jnp.float32, (2, 2, 2), 64, 64, False, marks=pytest.mark.large),
        pytest.param(jnp.bfloat16, (1, 2, 4), 16, 256, True, marks=pytest.mark.large),
        pytest.param(jnp.float32, (1, 1, 80), 128, 64, True, marks=pytest.mark.large),
    ],
)
def test_compiles_with_gradient(chip, dtype, heads, K, V, masked):
    """The operation's forward and backward are the two kernels."""
    mesh = aot.mesh(aot.topology(SLICES[chip])[:1], {"x": 1})
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))
    inputs = abstract(dtype, heads=heads, K=K, V=V)
    flags = jax.ShapeDtypeStruct(inputs.g.shape[:2], bool)
    args = jax.tree.map(place, (*inputs[:4], inputs.g))

    def loss(q, k, v, g, w, **masks):
        o, final = linear_attention(q, k, v, g, w=w, **masks)
        return jnp.sum(o.astype(jnp.float32) ** 2) + jnp.sum(final**2)

    gradient = jax.grad(loss, argnums=(0, 1, 2, 3, 4))
    call = (lambda reset, valid, *args: gradient(*args, reset=reset, valid=valid)) if masked else gradient
    report = aot.compile(call, *([place(flags)] * 2 if masked else []), *args, mesh=mesh)
    assert kernels(report.hlo) == NAMES


def reported(chip):
    from longwave.kernels.linear_attention import report

    return [candidate.case for entry in report.cases(chip) for candidate in entry.candidates]


TARGETS = {  # time that the arrays alone take at the bandwidth of HBM, over that of the forward kernel
    "heads of their own": {"v5e": 0.55, "v5p": 0.4, "v6e": 0.4},
    "Mamba-2": {"v5e": 0.48, "v5p": 0.3, "v6e": 0.36},
    "gated delta rule": {"v5e": 0.13, "v5p": 0.1, "v6e": 0.08},
}
ERASING = ["linear_attention", "linear_attention_erase_backward", *["linear_attention_inverse"] * 2]


@full
@needs_libtpu
@pytest.mark.parametrize("chip", [pytest.param(chip, marks=[pytest.mark.large] * (chip != "v5e")) for chip in SLICES])
def test_static_estimates_reach_their_targets_and_stay_within_budget(chip):
    from longwave.kernels.linear_attention import report

    measured = dict(zip((case.name for case in reported(chip)), aot.estimates(reported, chip), strict=True))
    for name in report.PROBLEMS:
        forward, backward = (measured[f"{name}, {way}"] for way in ("forward", "backward"))
        erases = report.PROBLEMS[name].erase
        assert sorted(e.kernel for e in (*forward, *backward)) == (ERASING if erases else NAMES)
        floor = report.arrays(name) / aot.CHIPS[chip].bandwidth
        assert sum(e.time for e in forward) <= floor / TARGETS[name][chip], (name, forward)
    budget.check(measured, Path(operation.__file__).with_name("budgets.json"))
