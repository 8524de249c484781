"""MemMamba against its oracle token by token, in both profiles and every choice; what α = 0 is; cost; bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longwave.layers import memmamba
from longwave.layers.attention import Attention
from longwave.layers.fusion import Conv1d, Gated, Product, Residual, Weighted
from longwave.layers.lru import LRU
from longwave.layers.mamba import Mamba
from longwave.layers.memmamba import MemMamba, memmamba_long
from longwave.layers.mixer import Context, parameter_roles
from longwave.layers.note_choices import (
    FIFO,
    Above,
    Every,
    Learned,
    Periodic,
    Priority,
    Reservoir,
    Slots,
    StepSize,
    Windows,
    pool_mean,
    pool_min,
    pool_rms,
    pool_softmax,
)
from tests.layers import memmamba_oracle as oracle
from tests.layers.test_lru import oracle as lru
from tests.layers.test_lru import parameters
from tests.tolerances import FORWARD, GRADIENT, assert_close

partial = functools.partial
WIDTH, T = 6, 40
BASE = partial(LRU, N=2, output=None)
SMALL = {"mixer": BASE, "summary": 5, "heads": 2, "p": 1}
HALF = partial(Weighted, alpha=0.5)
periodic = lambda position, score: position % 6 < 3
every = lambda position, score: True


def case(make, *, k, window=1, note=every, read=every, pool="pool_max", replace, **hyper):
    settings = oracle.Settings(k, window, 2, note, read, oracle.POOL_FNS[pool], replace)
    return partial(make, k=k, window=window, **{**SMALL, **hyper}), settings


def own_draw(c):
    return int(Reservoir(seed=3).draw(jnp.asarray([c]))[0])


SIX = Periodic(period=6, on=3)
above = lambda position, score: score > 0.5
CASES = {
    "paper": case(
        partial(MemMamba, note=SIX, read=SIX), k=4, note=periodic, read=periodic, replace=oracle.fifo, fusion=HALF
    ),
    "long": case(memmamba_long, k=3, window=3, replace=oracle.priority, fusion=HALF),
    "learned trigger, mean, gated": case(
        partial(MemMamba, note=Above(threshold=0.5), read=Every(), scorer=Learned, pool_fn=pool_mean, fusion=Gated),
        k=3, window=2, note=above, pool="pool_mean", replace=oracle.fifo,
    ),
    "reservoir, rms, product": case(
        partial(MemMamba, note=Every(), read=SIX, replace=Reservoir(seed=3), pool_fn=pool_rms, fusion=Product),
        k=3, window=2, read=periodic, pool="pool_rms", replace=oracle.reservoir(own_draw),
    ),
    "softmax, conv1d": case(
        partial(memmamba_long, pool_fn=pool_softmax, fusion=Conv1d),
        k=2, window=4, pool="pool_softmax", replace=oracle.priority,
    ),
    "min, residual": case(
        partial(MemMamba, note=SIX, read=Every(), pool_fn=pool_min, fusion=Residual),
        k=9, window=4, note=periodic, pool="pool_min", replace=oracle.fifo,
    ),
}  # fmt: skip


FUSION = {name: fusion for name in CASES for fusion in oracle.FUSIONS if fusion.lower() in name}


def build(make, width=WIDTH, seed=0):
    """Made in one compiled function: eagerly every draw is compiled by itself."""
    new = lambda: make(width, rngs=nnx.Rngs(seed))
    return nnx.merge(nnx.graphdef(nnx.eval_shape(new)), jax.jit(lambda: nnx.state(new()))())


def built(name):
    model = build(CASES[name][0])
    if isinstance(model.fusion, Conv1d):  # its taps start at zero
        model.fusion.w[...] = jax.random.normal(jax.random.key(1), model.fusion.w.shape)
    return model


def expected(name, p, x, *, below=None, resets=()):
    """y (b, t, d), the summaries and the last pools, row by row."""
    settings, fuse = CASES[name][1], oracle.FUSIONS[FUSION.get(name, "Weighted")]
    us, peaks, pools = [], [], []
    for row in range(len(x)):
        lower = [] if below is None else [[s[row, t] for t in range(x.shape[1])] for s in below]
        tok, lay, peak, pool = oracle.notes_and_reads(p, x[row], lower, settings, resets)
        us.append(fuse(p, x[row], tok, lay))
        peaks.append(peak), pools.append(pool)
    y, _ = lru({path[6:]: v for path, v in p.items() if path.startswith("mixer/")}, np.stack(us))
    return y, peaks, pools


def inputs():
    return np.random.default_rng(0).normal(size=(4, 2, T, WIDTH)).astype(np.float32)


RARE = ("min, residual", "learned trigger, mean, gated", "reservoir, rms, product")  # what they try, others try too


def later(names, now):
    marks = lambda name: [] if name in now else [pytest.mark.full] + [pytest.mark.large] * (name in RARE)
    return [pytest.param(name, marks=marks(name)) for name in names]


@pytest.mark.parametrize("name", later(CASES, now=("paper",)))
def test_values_and_gradients(name, monkeypatch):
    """y, what upper layers are shown, the pool, and the gradient of every parameter along a random direction."""
    monkeypatch.setattr(memmamba, "SPAN", 16)  # three, and the last is not whole
    model = built(name)
    x, weight, *_ = inputs()
    lower = np.random.default_rng(1).normal(size=(2, 2, T, 5)).astype(np.float32)
    below = tuple({"summary": s, "noted": np.ones((2, T), bool)} for s in lower)
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, x):
        loss = lambda state, x: (jnp.sum((out := nnx.merge(graph, state)(x, None, ctx)).y * weight), out)
        ctx = Context(below=below)
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(state, x)

    (d_state, dx), out = run(state, x)
    p = parameters(model) | {"x": x.astype(np.float64)}
    value = lambda p: expected(name, p, p["x"], below=lower.astype(np.float64))
    y, peaks, pools = value(p)
    assert_close(out.y, y, FORWARD["float32"], "y")
    for row in range(2):
        assert [peak is not None for peak in peaks[row]] == list(out.aux["noted"][row])
        shown = np.stack([np.zeros(5) if peak is None else peak for peak in peaks[row]])
        assert_close(out.aux["summary"][row], shown, FORWARD["float32"], "summary")
        held = out.carry["pool"]
        slots = [s for s in np.argsort(held["number"][row]) if held["number"][row, s] >= 0]
        pool = sorted(pools[row], key=lambda s: s["number"])
        assert [s["number"] for s in pool] == list(held["number"][row][np.array(slots)])
        notes = np.stack([np.append(s["summary"], s["score"]) for s in pool])
        assert_close(held["note"][row][np.array(slots)], notes, FORWARD["float32"], "pool")
    gradients = parameters(nnx.merge(graph, d_state)) | {"x": np.asarray(dx, np.float64)}
    assert gradients.keys() == p.keys()
    rng = np.random.default_rng(2)
    for path, v in p.items():
        move = rng.normal(size=v.shape) * 1e-6
        up, down = (np.sum(value(p | {path: v + sign * move})[0] * weight) for sign in (1, -1))
        assert_close(2 * np.sum(gradients[path] * move), up - down, GRADIENT["float32"], path)


@pytest.mark.parametrize("name", later(("paper", "long"), now=("long",)))
def test_streaming_and_resets_against_the_oracle(name):
    """Two chunks and single tokens, documents that begin inside; then nothing of the first document is left."""
    model = built(name)
    x = inputs()[0]
    starts = (7, 25)
    reset = np.broadcast_to(np.isin(np.arange(T), starts), (2, T))
    p = parameters(model)
    u = [expected(name, p, x[:, a:b].astype(np.float64))[0] for a, b in zip((0, *starts), (*starts, T), strict=True)]
    run = jax.jit(lambda model, x, carry, reset: model(x, carry, Context(reset=reset)))
    carry, ys = model.init_carry(2), []
    for a, b in [(0, 11), (11, 22), *((t, t + 1) for t in range(22, T))]:
        out = run(model, x[:, a:b], carry, reset[:, a:b])
        assert jax.tree.map(jnp.shape, out.carry) == jax.tree.map(jnp.shape, carry)
        carry = out.carry
        ys.append(out.y)
    assert_close(np.concatenate(ys, 1), np.concatenate(u, 1), FORWARD["float32"], "y")


@pytest.mark.full
@pytest.mark.parametrize("name", ["paper", "long"])
def test_spans_documents_and_padding_in_one_call(name, monkeypatch):
    """Documents that begin inside spans, padding on the left and on the right, in three spans and in one."""
    model, x = built(name), inputs()[0]
    runs = ([(2, 9), (9, 31), (31, T)], [(0, 20), (20, 37)])  # of each row
    valid, reset, p = np.zeros((2, T), bool), np.zeros((2, T), bool), parameters(model)
    y = np.zeros_like(x, np.float64)
    for row, documents in enumerate(runs):
        for a, b in documents:
            valid[row, a:b], reset[row, a] = True, True
            y[row, a:b] = expected(name, p, x[row : row + 1, a:b].astype(np.float64))[0][0]
    ctx = Context(reset=reset, valid=valid)
    for span in (16, T):
        monkeypatch.setattr(memmamba, "SPAN", span)
        got = jax.jit(lambda model, x: model(x, None, ctx).y)(model, np.where(valid[..., None], x, np.nan))
        assert_close(got, y, FORWARD["float32"], f"spans of {span}")


@pytest.mark.full
def test_a_stack_reads_its_lower_layers_where_it_should():
    """p = 2 and g = 3: layers 2 and 4 read 2 and 3 lower layers, layers 0, 1 and 3 none."""
    make = partial(CASES["long"][0], p=2, g=3)
    stack = [build(make, seed=i) for i in range(5)]

    @jax.jit
    def run(stack, x):
        below, ys = (), []
        for layer in stack:
            x, _, aux = layer(x, None, Context(below=below))
            below = (*below, aux)
            ys.append(x)
        return ys

    x = inputs()[0]
    h, shown = x.astype(np.float64), []
    for i, (layer, y) in enumerate(zip(stack, run(stack, x), strict=True)):
        read = [] if i in (0, 1, 3) else shown[-3:]
        rows = []
        for row in range(2):
            settings = CASES["long"][1]
            tok, lay, peak, _ = oracle.notes_and_reads(parameters(layer), h[row], [s[row] for s in read], settings)
            rows.append((oracle.FUSIONS["Weighted"](parameters(layer), h[row], tok, lay), peak))
        shown.append([peak for _, peak in rows])
        base = {path[6:]: v for path, v in parameters(layer).items() if path.startswith("mixer/")}
        h, _ = lru(base, np.stack([u for u, _ in rows]))
        assert_close(y, h, 5 * FORWARD["float32"], f"layer {i}")


@pytest.mark.parametrize("mixer", [BASE, pytest.param(partial(Mamba, N=4), marks=pytest.mark.full)])
def test_alpha_zero_is_the_mixer_bit_for_bit(mixer):
    x = np.random.default_rng(0).normal(size=(2, 24, 16)).astype(np.float32)
    model = build(partial(memmamba_long, mixer=mixer, window=4, p=None), 16)
    run = jax.jit(lambda model, x: (model(x).y, model.mixer(x).y))
    y, base = run(model, x)
    assert np.array_equal(y, base)
    model.fusion.alpha_tok[...] = jnp.asarray(0.1, jnp.float32)
    assert not np.array_equal(run(model, x)[0], base)


@pytest.mark.full
def test_the_delta_trigger_asks_the_mixer():
    """StepSize is the Δ of Mamba on a sequence of one token, mean over channels."""
    make = partial(MemMamba, mixer=partial(Mamba, N=2), p=None, scorer=StepSize, note=Above(threshold=0.01))
    model = build(make, 8)
    x = np.random.default_rng(0).normal(size=(1, 5, 8)).astype(np.float32)
    p = {k.removeprefix("mixer/"): v for k, v in parameters(model).items()}
    v = x.astype(np.float64) @ p["in_x/kernel"] * p["conv"][-1] + p["conv_bias"]
    v = v / (1 + np.exp(-v))
    delta = np.log1p(np.exp(v @ p["to_dt/kernel"] @ p["dt/kernel"] + p["dt_bias"])).mean(-1)
    assert_close(model.scorer(x, model.mixer), delta, FORWARD["float32"])
    assert int(jax.jit(lambda model, x: model(x).carry)(model, x)["pool"]["rank"][0]) == np.sum(delta > 0.01)


@pytest.mark.full
@pytest.mark.large
def test_memory_is_linear_in_time():
    def temporaries(t):
        model = memmamba_long(16, mixer=BASE, summary=8, window=8, k=4, p=None, rngs=nnx.Rngs(0))
        graph, state = nnx.split(model)
        loss = lambda state, x: jnp.sum(nnx.merge(graph, state)(x).y)
        compiled = jax.jit(jax.grad(loss)).lower(state, jnp.zeros((1, t, 16))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(4000) < 2.2 * temporaries(2000)


def test_sizes_of_the_paper():
    """2 605 056 parameters beside those of a Mamba layer (and two α), with both attentions in every layer."""
    model = nnx.eval_shape(lambda: MemMamba(768, mixer=BASE, rngs=nnx.Rngs(0)))
    count = lambda m: sum(v.size for v in jax.tree.leaves(nnx.state(m, nnx.Param)))
    assert count(model) - count(model.mixer) == 2 * (2 * 768**2 + 2 * 64 * 768) + 64 * 768 + 2
    assert parameter_roles(model)["fusion/alpha_tok"] == "norm"  # without decay, which would undo what was learned


@pytest.mark.parametrize(("period", "on"), [(200, 50), (6, 3), (5, 5), (7, 1)])
def test_most_is_a_bound_that_is_reached(period, on):
    trigger = Periodic(period=period, on=on)
    mask = np.asarray(trigger(jnp.arange(3 * period)[None], jnp.ones((1, 3 * period))))[0]
    for t in range(1, 2 * period, max(1, period // 9)):
        assert trigger.most(t) == max(mask[i : i + t].sum() for i in range(period))


def test_of_equal_scores_the_older_stay():
    new = Windows(jnp.asarray([[1.0, 1, 1, 2, 1]]), jnp.arange(5)[None], jnp.ones((1, 5), bool))
    held = Slots(jnp.zeros((1, 2)), jnp.full((1, 2), -1))
    assert Priority()(new, held).tolist() == [[0, 1, 2, 1, 2]]
    assert FIFO()(new, held).tolist() == [[0, 1, 0, 1, 0]]


@pytest.mark.full
def test_a_reservoir_keeps_every_window_equally_often():
    k, windows, seeds = 4, 12, 400
    number = jnp.arange(windows)[None]
    new = Windows(jnp.ones((1, windows)), number, jnp.ones((1, windows), bool))
    held = Slots(jnp.zeros((1, k)), jnp.full((1, k), -1))
    kept = np.zeros(windows)
    for slots in np.asarray(jax.jit(jax.vmap(lambda seed: Reservoir(seed=seed)(new, held)[0]))(np.arange(seeds))):
        last = {int(s): c for c, s in enumerate(slots)}
        kept[[c for s, c in last.items() if s < k]] += 1
    np.testing.assert_allclose(kept / seeds, k / windows, atol=4 * np.sqrt(2 / 9 / seeds))


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"k": 0}, "MemMamba.k = 0"),
        ({"heads": 4}, "heads = 4 must divide width = 6"),
        ({"replace": Priority()}, "replace = Priority.* needs a scorer"),
        ({"note": Above()}, "note = Above.* needs a scorer"),
        ({"mixer": partial(Attention, heads=1, causal=False)}, "Attention must be causal"),
    ],
)
def test_bad_settings(hyper, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: MemMamba(6, **{"mixer": BASE, "rngs": nnx.Rngs(0), **hyper}))
