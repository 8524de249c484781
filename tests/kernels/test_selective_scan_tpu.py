"""The TPU kernels of selective_scan: interpreted, against the equations in float64; compiled, what they take."""

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

import longwave.kernels.selective_scan as operation
from longwave.kernels import aot
from longwave.kernels.aot import budget, poison
from longwave.kernels.selective_scan import pallas_tpu, tpu_backward, tpu_forward, tpu_layout
from longwave.kernels.selective_scan.reference import SPAN, Inputs
from longwave.kernels.selective_scan.tpu_layout import Plan
from tests.kernels.test_selective_scan import draw, masks, oracle
from tests.tolerances import FORWARD, GRADIENT, assert_close

full = pytest.mark.full
needs_libtpu = pytest.mark.skipif(aot.missing() is not None, reason=aot.missing() or "")
SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(tpu_layout, "UNROLL", 1)


def arguments(p, given, dtype="float32"):
    """(Inputs, state) as arrays."""
    wide = lambda k, v: jnp.asarray(v, dtype if k in ("x", "dt", "z", "B", "C") else "float32")
    state = jnp.asarray(p["state"], jnp.float32)
    return Inputs(**{k: wide(k, v) for k, v in p.items() if k != "state"}, **given), state


def compare(t, *, d, n, b=3, masked=False, bare=False, softplus=True):
    p = draw(t, b=b, d=d, n=n, bare=bare)
    if not softplus:
        p["dt"] = np.abs(p["dt"])
    given = {k: v[:b] for k, v in masks(t).items()} if masked else {}
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=s).astype(np.float32).astype(np.float64) for s in ((b, t, d), (b, n, d))]
    (y, final), expected = oracle(p, weights, softplus=softplus, **given)
    inputs, state = arguments(p, given)

    @jax.jit
    def run(inputs, state, dy, dfinal):
        y, final, saved = pallas_tpu.forward(inputs, state, softplus=softplus)
        return y, final, saved, pallas_tpu.backward(inputs, saved, dy, dfinal, softplus=softplus)

    got_y, got_final, saved, (gradients, dstate) = run(inputs, state, *(jnp.asarray(w, jnp.float32) for w in weights))
    assert_close(got_y, y, FORWARD["float32"], "y")
    assert_close(got_final, final, FORWARD["float32"], "final state")
    assert saved.shape == (b, -(-t // SPAN), n, d)
    np.testing.assert_array_equal(saved[:, 0], state)
    got = {**gradients._asdict(), "state": dstate}
    for name, value in expected.items():
        assert_close(got[name], value, GRADIENT["float32"], name)
    assert all(got[name] is None for name in got.keys() - expected.keys())


@pytest.mark.parametrize(
    "case",
    [
        {"t": 20, "d": 8, "n": 5, "masked": True},
        pytest.param({"t": 1, "d": 8, "n": 16, "b": 1}, marks=[full, pytest.mark.large]),
        pytest.param({"t": 129, "d": 130, "n": 16, "masked": True}, marks=full),
        pytest.param({"t": 33, "d": 8, "n": 4, "bare": True, "softplus": False}, marks=full),
        pytest.param({"t": 256, "d": 520, "n": 16, "b": 1}, marks=[full, pytest.mark.large]),
        pytest.param({"t": 300, "d": 300, "n": 40, "masked": True}, marks=[full, pytest.mark.large]),
    ],
    ids=str,
)
def test_values_and_gradients(case, interpreted):
    compare(**case)


@full
def test_bfloat16_is_rounded_once(interpreted):
    p = draw(24, b=1, d=8, n=16)
    rounded = {k: np.asarray(jnp.asarray(p[k], jnp.bfloat16), np.float64) for k in ("x", "dt", "z", "B", "C")}
    inputs, state = arguments(p, {}, "bfloat16")
    y, final, _ = jax.jit(partial(pallas_tpu.forward, softplus=True))(inputs, state)
    expected, expected_final = oracle({**p, **rounded})
    assert y.dtype == jnp.bfloat16
    error = np.abs(np.asarray(y, np.float64) - expected)
    assert np.all(error <= 2.0**-8 * np.abs(expected) + FORWARD["float32"] * np.max(np.abs(expected)))
    assert_close(final, expected_final, FORWARD["float32"])


@full
def test_nothing_crosses_a_reset_or_enters_from_padding(interpreted):
    """Even NaN does not."""
    t, cut, end = 24, 6, 20
    at = np.arange(t)
    seen = (at >= cut) & (at < end)
    given = {"reset": (at == cut)[None], "valid": (at < end)[None]}
    inputs, state = arguments(draw(t, b=1, d=8, n=8), given)

    @jax.jit
    def run(inputs, state):
        y, final, saved = pallas_tpu.forward(inputs, state, softplus=True)
        dy = jnp.where(seen[None, :, None], 1.0, 0.0) * jnp.ones_like(y)
        return y, final, pallas_tpu.backward(inputs, saved, dy, jnp.ones_like(final), softplus=True)

    hide = lambda v: jnp.where(seen[None, :, None], v, jnp.nan)
    dirty = inputs._replace(**{k: hide(getattr(inputs, k)) for k in ("x", "dt", "z", "B", "C")})
    y, final, (gradients, dstate) = run(inputs, state)
    dirty_y, dirty_final, (dirty_gradients, _) = run(dirty, jnp.nan * state)
    np.testing.assert_array_equal(y[:, seen], dirty_y[:, seen])
    np.testing.assert_array_equal(final, dirty_final)
    for name in ("x", "dt", "z", "B", "C"):
        np.testing.assert_array_equal(getattr(gradients, name)[:, seen], getattr(dirty_gradients, name)[:, seen])
    assert not np.any(np.asarray(dstate))
    assert not np.any(np.asarray(y)[:, end:])


@full
def test_on_poisoned_memory_and_two_cores(monkeypatch):
    """Whatever stood in VMEM before; no two cores meet."""
    monkeypatch.setattr(tpu_layout, "UNROLL", 1)
    t, b = 20, 2
    p, given = draw(t, b=b, d=8, n=8), {k: v[:b] for k, v in masks(t).items()}
    inputs, state = arguments(p, given)
    with poison.interpreted():
        y, final, _ = jax.block_until_ready(jax.jit(partial(pallas_tpu.forward, softplus=True))(inputs, state))
    expected, expected_final = oracle(p, **given)
    assert_close(y, expected, FORWARD["float32"])
    assert_close(final, expected_final, FORWARD["float32"])


@pytest.mark.parametrize("most", [tpu_forward.MOST, tpu_backward.MOST])
def test_blocks_cover_everything(most):
    for b, t, d, n in np.ndindex(2, 4, 6, 4):
        size = (1 + 2 * b, (1, 31, 300, 4096)[t], (1, 128, 768, 1536, 4096, 5120)[d], (1, 16, 40, 128)[n])
        plan = Plan.of(*size, most)
        blocks, spans = plan.grid[1:]
        assert plan.t >= size[1]
        assert plan.t % plan.tokens == plan.tokens % tpu_layout.TILE == 0
        assert plan.tokens == SPAN or spans == 1
        assert plan.d == blocks * plan.tiles * 128 >= size[2]
        assert plan.tiles % plan.group == 0
        assert plan.tiles * plan.n <= max(most, plan.n) + plan.group * plan.n


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"x": jnp.zeros((1, 4, 8), jnp.float16)}, "x is float16"),
        ({"B": jnp.zeros((1, 4, 16), jnp.float16)}, "B is float16"),
        ({"A": jnp.zeros((8, 129))}, "n is 129"),
    ],
)
def test_what_the_kernels_refuse_has_a_reason(change, reason):
    inputs, _ = arguments(draw(4, b=1, d=8, n=16), {})
    found = pallas_tpu.refusal(inputs._replace(**change))
    assert found is None if reason is None else reason in found


# Compiled for TPUs


def kernels(hlo):
    """Pallas kernels of a program, by name."""
    return sorted(re.findall(r"/(selective_scan\w*)/pallas_call", "\n".join(re.findall(".*tpu_custom_call.*", hlo))))


@full
@needs_libtpu
@pytest.mark.parametrize("chip", [pytest.param(chip, marks=[pytest.mark.large] * (chip != "v5e")) for chip in SLICES])
@pytest.mark.parametrize(
    ("size", "dtype", "masked"),
    [
        ((2, 300, 200, 16), "bfloat16", True),
        pytest.param((1, 256, 1536, 64), "float32", False, marks=pytest.mark.large),
    ],
)
def test_compiles_with_gradient(chip, size, dtype, masked):
    from longwave.kernels.selective_scan import report

    mesh = aot.mesh(aot.topology(SLICES[chip])[:1], {"x": 1})
    place = lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, P()))
    inputs, state = jax.tree.map(place, report.arguments(size, dtype, masked))
    tokens = lambda v: jnp.sum(v.astype(jnp.float32) ** 2)
    names = ("D", "z", "dt_bias", "state", "reset", "valid")

    def loss(floats, masks):
        x, dt, A, B, C, *rest = floats
        return sum(
            map(tokens, operation.selective_scan(x, dt, A, B, C, **dict(zip(names, (*rest, *masks), strict=True))))
        )

    floats = (*inputs[:5], inputs.D, inputs.z, inputs.dt_bias, state)
    report_ = aot.compile(jax.grad(loss), floats, (inputs.reset, inputs.valid), mesh=mesh)
    assert kernels(report_.hlo) == ["selective_scan", "selective_scan_backward"]


@full
@needs_libtpu
def test_moves_a_twentieth_of_what_xla_moves():
    from longwave.kernels.selective_scan import report

    size = (1, 256, 512, 16)
    kernel = report.moved(partial(pallas_tpu.forward, softplus=True), "v5e", size)
    assert report.moved(report.associative, "v5e", size) > 20 * kernel


def budgeted(chip):
    from longwave.kernels.selective_scan import report

    return [c.case for entry in report.cases(chip) if entry.problem in PROBLEMS for c in entry.candidates]


PROBLEMS = ("forward wide bfloat16", "backward wide bfloat16")
FORWARD_AT_MOST = {"v5e": 1.5, "v5p": 1.55, "v6e": 1.55}  # times the floor of the vector unit


@full
@needs_libtpu
@pytest.mark.parametrize("chip", [pytest.param(chip, marks=[pytest.mark.large] * (chip != "v5e")) for chip in SLICES])
def test_static_estimate_near_the_vector_unit_and_within_budget(chip):
    """Little longer than the operations of the recurrence alone take."""
    from longwave.kernels.selective_scan import report

    measured = dict(zip(PROBLEMS, aot.estimates(budgeted, chip), strict=True))
    (forward,), (backward,) = measured.values()
    assert forward.time <= FORWARD_AT_MOST[chip] * report.floor("forward", chip), forward
    assert backward.time <= 2 * report.floor("backward", chip), backward
    budget.check(measured, Path(operation.__file__).with_name("budgets.json"))
