"""The TPU kernel of linear_scan: interpreted, against loops over tokens in float64; compiled, what it moves."""

import itertools
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import longwave.kernels.linear_scan as operation
from longwave import layers
from longwave.kernels import aot
from longwave.kernels.aot import budget, poison
from longwave.kernels.linear_scan import Pair, associative, linear_scan, pallas_tpu
from longwave.kernels.linear_scan.reference import Sweep, Tokens
from longwave.kernels.partition import Axes
from tests.kernels.test_linear_scan import close, draw, masks, oracle, to_jax, to_numpy
from tests.tolerances import BFLOAT16_FACTOR, FORWARD, GRADIENT, relative_error

full = pytest.mark.full
needs_libtpu = pytest.mark.skipif(aot.missing() is not None, reason=aot.missing() or "")
SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@pytest.fixture
def kernel(monkeypatch):
    """The kernel in the place of the form for CPUs."""
    monkeypatch.setattr(operation, "_by_platform", lambda form, kernel, *args: kernel(*args))
    monkeypatch.setattr(pallas_tpu.pl, "pallas_call", partial(pl.pallas_call, interpret=True))


def adjoint_oracle(p, weights, *, reverse=False, reset=None, valid=None):
    """Gradients of sum(weights h) + sum(weights final): the loop over tokens of `oracle`, run backwards."""
    x, h = p["x"], p["state"]
    b, t, d = x.shape
    a = np.broadcast_to(p["a"], (b, t, d))
    reset = np.zeros((b, t), bool) if reset is None else reset
    valid = np.ones((b, t), bool) if valid is None else valid
    order, before = [*reversed(range(t))] if reverse else [*range(t)], [None] * t
    for i in order:
        starts, counts = reset[:, i, None], valid[:, i, None]
        before[i] = h if reverse else np.where(starts, 0, h)
        after = a[:, i] * before[i] + x[:, i]
        h = np.where(counts, np.where(starts, 0, after) if reverse else after, h)
    g, da, dx = weights["state"], np.zeros_like(x), np.zeros_like(x)
    for i in reversed(order):
        starts, counts = reset[:, i, None], valid[:, i, None]
        kept = np.where(starts, 0, g) if reverse else g
        dx[:, i] = np.where(counts, weights["x"][:, i] + kept, 0)
        da[:, i] = dx[:, i] * np.conj(before[i])
        back = np.conj(a[:, i]) * dx[:, i]
        g = np.where(counts, back if reverse else np.where(starts, 0, back), g)
    return {"a": da if p["a"].ndim == 3 else da.sum((0, 1)), "x": dx, "state": g}


def given_masks(b, t):
    return {name: np.resize(mask, (b, t)) for name, mask in masks(t).items()}


def compare(b, t, d, *, is_complex, varying, reverse, masked):
    p, weights = (draw(t, is_complex=is_complex, varying=varying, b=b, d=d, seed=seed) for seed in (0, 1))
    p["a"] = np.clip(np.abs(p["a"]), 0.1, 0.99) * np.exp(1j * np.angle(p["a"])) if is_complex else np.tanh(p["a"])
    p["a"] = to_numpy(to_jax(p["a"])).astype(p["a"].dtype)
    given = {"reverse": reverse, **(given_masks(b, t) if masked else {})}

    @jax.jit
    def run(p):
        h, vjp = jax.vjp(lambda p: linear_scan(p["a"], p["x"], p["state"], **given), p)
        return h, vjp((to_jax(weights["x"]), to_jax(weights["state"])))[0]

    (h, final), gradients = run({name: to_jax(v) for name, v in p.items()})
    expected_h, expected_final = oracle(p, **given)
    close(h, expected_h, FORWARD["float32"], "h")
    close(final, expected_final, FORWARD["float32"], "final state")
    for name, expected in adjoint_oracle(p, weights, **given).items():
        close(gradients[name], expected, GRADIENT["float32"], name)


CASES = [  # b, t, d, complex, varying, reverse, masked
    (5, 7, 8, True, False, True, False),
    pytest.param((2, 129, 200, False, True, False, True), marks=full),
    pytest.param((2, 12, 128, True, True, True, False), marks=full),
    pytest.param((4, 20, 2048, False, True, False, True), marks=full),  # two registers a row
    pytest.param((2, 12, 1152, False, False, True, True), marks=full),  # a register and an eighth
]
ALL = [
    (2 + i % 3, t, d, *kind)
    for i, (t, d, kind) in enumerate(
        zip(
            itertools.cycle((2, 7, 127, 128, 129, 300)),
            itertools.cycle((8, 128, 200, 128, 8, 200, 200)),
            itertools.product((False, True), repeat=4),
        )
    )
]


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=[full, *[pytest.mark.large] * (i % 4 > 0)]) for i, case in enumerate(ALL))],
)
def test_values_and_gradients(case, kernel):
    *size, is_complex, varying, reverse, masked = case
    compare(*size, is_complex=is_complex, varying=varying, reverse=reverse, masked=masked)


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        ((2, 300, 1152), {"is_complex": False, "varying": True, "reverse": False, "masked": True}),
        pytest.param(
            (1, 300, 1152), {"is_complex": False, "varying": True, "reverse": True, "masked": False}, marks=full
        ),
        pytest.param(
            (18, 150, 128), {"is_complex": False, "varying": False, "reverse": False, "masked": True}, marks=full
        ),
        pytest.param((5, 260, 384), {"is_complex": True, "varying": True, "reverse": True, "masked": True}, marks=full),
    ],
)
def test_many_blocks_the_last_of_them_ragged(size, kind, kernel, monkeypatch):
    """Blocks of 128 tokens and one register, be it of one row or of several."""
    monkeypatch.setattr(pallas_tpu, "VMEM", 1)
    steps = pallas_tpu.grid(*size, pallas_tpu.choose(*size, 12))
    assert max(steps[:2]) > 1
    assert steps[2] > 1
    compare(*size, **kind)


def in_bfloat16():
    """Problem and weights of bfloat16 digits, and what turns them into arrays."""
    p, weights = (draw(40, is_complex=False, varying=True, b=2, d=128, seed=seed) for seed in (0, 1))
    p["a"] = np.tanh(p["a"])
    rounded = lambda v: np.asarray(jnp.asarray(v, jnp.bfloat16), np.float64)
    cast = lambda q: {k: jnp.asarray(v, jnp.float32 if k == "state" else jnp.bfloat16) for k, v in q.items()}
    return *({k: v if k == "state" else rounded(v) for k, v in q.items()} for q in (p, weights)), cast


def test_bfloat16_is_rounded_once(kernel):
    """To within half a unit of the last place."""
    p, _, cast = in_bfloat16()
    h, final = jax.jit(lambda p: linear_scan(p["a"], p["x"], p["state"]))(cast(p))
    expected_h, expected_final = oracle(p)
    assert h.dtype == jnp.bfloat16
    error = np.abs(np.asarray(h, np.float64) - expected_h)
    assert np.all(error <= 2.0**-8 * np.abs(expected_h) + FORWARD["float32"] * np.max(np.abs(expected_h)))
    close(final, expected_final, FORWARD["float32"])


@full
def test_bfloat16_gradients_are_no_worse_than_twice_the_plain_form(monkeypatch):
    p, weights, cast = in_bfloat16()

    def run(p):
        _, vjp = jax.vjp(lambda p: linear_scan(p["a"], p["x"], p["state"]), p)
        return vjp((cast(weights)["x"], cast(weights)["state"]))[0]

    monkeypatch.setattr(operation, "_by_platform", lambda form, kernel, *args: form(associative.sweep_tokens)(*args))
    plain = jax.jit(lambda p: run(p))(cast(p))
    monkeypatch.setattr(operation, "_by_platform", lambda form, kernel, *args: kernel(*args))
    monkeypatch.setattr(pallas_tpu.pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    gradients = jax.jit(lambda p: run(p))(cast(p))
    for name, expected in adjoint_oracle(p, weights).items():
        assert gradients[name].dtype == plain[name].dtype
        error, of_plain = (relative_error(np.asarray(g[name], np.float64), expected) for g in (gradients, plain))
        assert error <= BFLOAT16_FACTOR * of_plain, name


@pytest.mark.parametrize("reverse", [False, pytest.param(True, marks=full)])
def test_nothing_crosses_a_reset_or_enters_from_padding(reverse, kernel):
    """Even NaN does not, in values and in gradients."""
    t, cut, end = 24, 6, 20
    at = np.arange(t)
    reset, valid = (at == cut)[None], (at < end)[None]
    seen = at < cut if reverse else (at >= cut) & (at < end)
    p = {k: to_jax(v) for k, v in draw(t, is_complex=False, varying=True, b=1).items()}
    hide = lambda v: jnp.asarray(np.where(seen[None, :, None], v, np.nan), jnp.float32)

    @jax.jit
    def run(a, x, state):
        scan = lambda *args: linear_scan(*args, reverse=reverse, reset=reset, valid=valid)[0][:, seen]
        h, vjp = jax.vjp(scan, a, x, state)
        return h, vjp(jnp.ones_like(h))

    h, (da, dx, dstate) = run(*p.values())
    dirty_h, (dirty_da, dirty_dx, _) = run(hide(p["a"]), hide(p["x"]), p["state"] if reverse else np.nan * p["state"])
    assert np.array_equal(h, dirty_h)
    assert np.array_equal(da[:, seen], dirty_da[:, seen])
    assert np.array_equal(dx[:, seen], dirty_dx[:, seen])
    assert not np.any(dstate)
    assert not np.any(da[:, ~seen])
    assert not np.any(dx[:, ~seen])


@pytest.mark.parametrize("sweep", [Sweep(reverse=True, adjoint=True), pytest.param(Sweep(), marks=full)])
def test_the_map_of_all_tokens(sweep, kernel):
    """compose's (P, S), which devices along time exchange: P handed + S is what the last token hands on."""
    t, b = 9, 2
    p = {k: to_jax(v) for k, v in draw(t, is_complex=True, varying=True, b=b).items()}
    tokens = Tokens(p["a"], p["x"], None, None)
    P, S = jax.jit(lambda tokens: pallas_tpu.compose(tokens, sweep))(tokens)
    a, x, h = (to_numpy(p[k]).astype(np.complex128) for k in ("a", "x", "state"))
    expected = h
    for i in reversed(range(t)) if sweep.reverse else range(t):
        expected = np.conj(a[:, i]) * (x[:, i] + expected) if sweep.adjoint else a[:, i] * expected + x[:, i]
    close(to_numpy(P) * h + to_numpy(S), expected, FORWARD["float32"])


@full
def test_batched_by_vmap(kernel):
    """As replicas of a sweep are."""
    p = {k: to_jax(v) for k, v in draw(10, is_complex=False, varying=True, b=4).items()}
    both = jax.tree.map(lambda v: v.reshape(2, 2, *v.shape[1:]), p)
    loss = lambda p: sum(jnp.sum(v**2) for v in linear_scan(p["a"], p["x"], p["state"]))
    expected = jax.jit(jax.grad(loss))(p)
    actual = jax.jit(jax.vmap(jax.grad(loss)))(both)
    for name, value in expected.items():
        close(actual[name].reshape(value.shape), value, GRADIENT["float32"], name)


def test_blocks_cover_everything_and_fit():
    for b, t, d, width in itertools.product((1, 3, 32), (2, 300, 4096, 100_000), (8, 128, 1152, 4096, 16_384), (4, 40)):
        size = pallas_tpu.choose(b, t, d, width)
        rows, channels, time = pallas_tpu.grid(b, t, d, size)
        assert rows * size.rows >= b
        assert channels * size.lanes * 128 >= d
        assert time * size.tiles * 8 >= t
        assert time == 1 or size.tiles % 16 == 0  # of flags, 128 stand in a row
        assert channels == 1 or size.lanes % 8 == 0
        assert 2 * width * size.rows * size.tiles * 8 * size.lanes * 128 <= pallas_tpu.VMEM


def test_what_the_kernel_refuses_is_logged_once(caplog):
    p = {k: jnp.asarray(v, jnp.float16) for k, v in draw(5, is_complex=False, varying=True).items()}
    operation._log.cache_clear()
    with caplog.at_level("INFO"):
        for _ in range(2):
            h, _ = jax.eval_shape(lambda a, x: linear_scan(a, x), p["a"], p["x"])
    (message,) = [r.message for r in caplog.records if r.name == operation.__name__]
    assert "associative_scan" in message
    assert "float16" in message
    assert h.dtype == jnp.float16


def test_on_poisoned_memory_and_two_cores():
    """Whatever stood in VMEM before, and behind the end of ragged blocks; no two cores meet."""
    b, t, d = 3, 5, 8
    p = {k: to_jax(v) for k, v in draw(t, is_complex=False, varying=True, b=b, d=d).items()}
    tokens = Tokens(p["a"], p["x"], *(jnp.asarray(mask)[..., None] for mask in given_masks(b, t).values()))
    with poison.interpreted():
        out, last = jax.block_until_ready(pallas_tpu.sweep_tokens(tokens, p["state"], Sweep()))
    expected, final = oracle({k: np.asarray(v, np.float64) for k, v in p.items()}, **given_masks(b, t))
    close(out, expected, FORWARD["float32"])
    close(last, final, FORWARD["float32"])


# Compiled for TPUs


def kernels(hlo):
    """Pallas kernels of a program, by name."""
    return sorted(re.findall(r"/(linear_scan\w*)/pallas_call", "\n".join(re.findall(".*tpu_custom_call.*", hlo))))


@full
@needs_libtpu
@pytest.mark.parametrize(
    ("is_complex", "varying", "d", "dtype", "chip"),
    [
        pytest.param(*case, chip, marks=[pytest.mark.large] * (i % 2 > 0 or chip != "v5e") * (i > 0))
        for i, case in enumerate(
            (
                (False, True, 1152, "bfloat16"),
                (True, False, 200, "float32"),
                (True, True, 8, "bfloat16"),
                (False, False, 4096, "float32"),
            )
        )
        for chip in SLICES
    ],
)
def test_compiles_with_gradient(chip, is_complex, varying, d, dtype):
    """Forward and backward are the kernel and nothing else, with masks and without, batched by vmap too."""
    b, t = 6, 300
    mesh = aot.mesh(aot.topology(SLICES[chip])[:1], {"x": 1})
    place = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
    number = lambda shape, dtype: Pair(place(shape, dtype), place(shape, dtype)) if is_complex else place(shape, dtype)
    args = (number((b, t, d) if varying else (d,), dtype), number((b, t, d), dtype), number((b, d), "float32"))
    flags = place((b, t), "bool")

    def loss(a, x, state, *masks):
        names = dict(zip(("reset", "valid"), masks, strict=False))
        return sum(jnp.sum(v.astype(jnp.float32) ** 2) for v in jax.tree.leaves(linear_scan(a, x, state, **names)))

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    for masks_ in ((), (flags, flags)):
        report = aot.compile(gradient, *args, *masks_, mesh=mesh)
        assert kernels(report.hlo) == ["linear_scan", "linear_scan_adjoint"]
    if chip == "v5e":
        more = jax.tree.map(lambda v: place((2, *v.shape), v.dtype), args)
        assert kernels(aot.compile(jax.vmap(gradient), *more, mesh=mesh).hlo) == ["linear_scan", "linear_scan_adjoint"]


@full
@needs_libtpu
@pytest.mark.parametrize("axes", [Axes(batch="x", heads="y"), Axes(batch="x", seq="y"), Axes(heads="x", seq="y")])
def test_sharded_over_every_axis(axes):
    b, t, d = 4, 512, 512
    mesh = aot.mesh(aot.topology("v5e:2x2"), {"x": 2, "y": 2})
    place = lambda shape, dims: jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, axes.spec(dims)))
    args = place((b, t, d), "bth"), place((b, t, d), "bth"), place((b, d), "bh")
    loss = lambda *args: sum(jnp.sum(v**2) for v in linear_scan(*args, axes=axes))
    report = aot.compile(jax.grad(loss, argnums=(0, 1, 2)), *args, mesh=mesh)
    maps = ["linear_scan_map"] * (2 if axes.seq else 0)
    assert kernels(report.hlo) == sorted(["linear_scan", "linear_scan_adjoint", *maps])
    assert all(c.bytes <= 4 * 2 * 2 * b * d for c in report.collectives)  # (decay, state) of both shards, no tokens


@full
@needs_libtpu
@pytest.mark.parametrize("mixer", [partial(layers.S5, P=32), partial(layers.LRU, N=16)], ids=["S5", "LRU"])
def test_layers_train_through_the_kernel(mixer):
    mesh = aot.mesh(aot.topology("v5e:2x2")[:1], {"x": 1})
    graphdef, params = nnx.split(mixer(32, rngs=nnx.Rngs(0)))
    place = lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, P()))
    args = jax.tree.map(place, (params, jax.ShapeDtypeStruct((2, 96, 32), jnp.float32)))
    loss = lambda params, x: jnp.sum(nnx.merge(graphdef, params)(x).y ** 2)
    assert kernels(aot.compile(jax.grad(loss), *args, mesh=mesh).hlo) == ["linear_scan", "linear_scan_adjoint"]


@full
@needs_libtpu
def test_moves_each_array_once():
    """No copy stands before or behind the kernel; XLA's associative form moves more than ten times as much."""
    b, t, d = 2, 1024, 1024
    device = NamedSharding(aot.mesh(aot.topology("v5e:2x2")[:1], {"x": 1}), P())
    args = (jax.ShapeDtypeStruct((b, t, d), jnp.bfloat16, sharding=device),) * 2
    program = lambda fn: jax.jit(fn).lower(*args).compile()
    moved = lambda fn: program(fn).cost_analysis()["bytes accessed"]
    need = 3 * 2 * b * t * d
    kernel = moved(lambda a, x: linear_scan(a, x)[0])
    assert need <= kernel <= 1.02 * need
    plain = lambda a, x: associative.sweep_tokens(Tokens(a, x, None, None), lambda P, S: jnp.zeros((b, d)), Sweep())[0]
    assert moved(plain) > 10 * kernel


def wide_and_narrow(chip):
    from longwave.kernels.linear_scan import report

    entries = [entry for entry in report.cases(chip) if entry.problem in PROBLEMS]
    return [candidate.case for entry in entries for candidate in entry.candidates]


PROBLEMS = ("wide bfloat16, gradient", "wide bfloat16, masks, gradient", "S5 float32, forward")


@full
@needs_libtpu
@pytest.mark.parametrize("chip", [pytest.param(chip, marks=[pytest.mark.large] * (chip != "v5e")) for chip in SLICES])
def test_static_estimate_at_the_memory_roofline_and_within_budget(chip):
    """At most 1 / 0.9 of the time that the arrays alone take at the bandwidth of HBM."""
    cases = wide_and_narrow(chip)
    measured = dict(zip((case.name for case in cases), aot.estimates(wide_and_narrow, chip), strict=True))
    tokens = 2 * 4 * 4096 * 4096
    arrays = {"linear_scan": 3 * tokens, "linear_scan_adjoint": 5 * tokens}  # a, x -> h;  a, dh, h -> dx, da
    for problem in PROBLEMS[:2]:
        assert {estimate.kernel for estimate in measured[problem]} == {*arrays}
        for estimate in measured[problem]:
            floor = arrays[estimate.kernel] / aot.CHIPS[chip].bandwidth
            assert estimate.time <= floor / 0.9, (problem, estimate)
            assert estimate.spills == 0
    budget.check(measured, Path(operation.__file__).with_name("budgets.json"))
