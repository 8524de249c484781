"""mLSTM's kernel against its equations in float64 NumPy: gradients, states, documents, padding; extreme gates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longwave.kernels.mlstm import State, chunked, empty, mlstm, reference
from longwave.kernels.partition import Axes
from tests.tolerances import FORWARD, GRADIENT, assert_close

NAMES = ("q", "k", "v", "i", "f", "C", "n", "m")


def oracle(x, reset, valid, *, eps=1e-6, plain=False):
    """o and the memory without its unit, (exp(m) C, exp(m) n), token by token. m only keeps the numbers finite."""
    q, k, v, i, f = (x[name] for name in NAMES[:5])
    C, n, m = (x[name] for name in NAMES[5:])
    o = np.zeros_like(v)
    for t in range(v.shape[1]):
        new, here = reset[:, t, None], valid[:, t, None]
        log_f = 0.0 * f[:, t] if plain else -np.logaddexp(0, -f[:, t])
        before = np.where(new, -np.inf, log_f + m)
        top = np.maximum(np.maximum(before, i[:, t]), -1e30)
        keep, write = np.exp(before - top), np.exp(i[:, t] - top)
        kv = k[:, t, :, :, None] * v[:, t, :, None]
        C = np.where(here[..., None, None], keep[..., None, None] * C + write[..., None, None] * kv, C)
        n = np.where(here[..., None], keep[..., None] * n + write[..., None] * k[:, t], n)
        m = np.where(here, top, m)
        query = q[:, t] * q.shape[-1] ** -0.5
        d = np.sum(n * query, -1)
        with np.errstate(over="ignore"):
            d = np.where(d == 0, 1, d) if plain else np.maximum(np.abs(d), np.exp(-m)) + eps
        read = np.einsum("bhkv,bhk->bhv", C, query) / d[..., None]
        o[:, t] = np.where(here[..., None], read, 0)
    return o, np.exp(m)[..., None, None] * C, np.exp(m)[..., None] * n


def drawn(*, b=2, t=9, h=2, K=3, V=2, gates=1.0, seed=0):
    """Inputs and a state; documents that start inside chunks, and padding on both sides."""
    draw = np.random.default_rng(seed)
    x = {name: draw.normal(size=(b, t, h, K)) for name in "qk"} | {"v": draw.normal(size=(b, t, h, V))}
    x |= {name: draw.uniform(-gates, gates, size=(b, t, h)) for name in "if"}
    x |= {"C": draw.normal(size=(b, h, K, V)), "n": draw.normal(size=(b, h, K)), "m": draw.normal(size=(b, h))}
    x = {name: value.astype(np.float32) for name, value in x.items()}
    reset, valid = np.zeros((b, t), bool), np.ones((b, t), bool)
    reset[0, [2, t // 2 + 1]] = True
    valid[0, -2:], valid[1, :2] = False, False
    return x, reset, valid


def run(x, reset, valid, *, form=mlstm, state=True, **options):
    state = State(x["C"], x["n"], x["m"]) if state else None
    f = None if options.get("plain") else x["f"]
    o, last = form(x["q"], x["k"], x["v"], x["i"], f, state=state, reset=reset, valid=valid, **options)
    return o, jnp.exp(last.m)[..., None, None] * last.C, jnp.exp(last.m)[..., None] * last.n


def by_tokens(q, k, v, i, f, *, state, reset, valid, eps=1e-6, plain=False):
    read = reference.Read(q.shape[-1] ** -0.5, eps, plain)
    return reference.attend(reference.Inputs(q, k, v, i, f, reset, valid), state, read)


def assert_all(x, reset, valid, form, **options):
    """o, the last state, and the gradient along every entry of every input and of the state."""
    wide = {name: value.astype(np.float64) for name, value in x.items()}
    want = oracle(wide, reset, valid, **options)
    weights = [np.random.default_rng(1).normal(size=a.shape).astype(np.float32) for a in want]

    def loss(x):
        out = run(x, reset, valid, form=form, **options)
        return sum(jnp.sum(a * w) for a, w in zip(out, weights, strict=True)), out

    gradients, got = jax.jit(jax.grad(loss, has_aux=True))(x)
    for name, a, w in zip(("o", "C", "n"), got, want, strict=True):
        assert_close(a, w, FORWARD["float32"], name)
    for name in [n for n in NAMES if not (n == "f" and options.get("plain"))]:
        expected = np.zeros_like(wide[name])
        for at in np.ndindex(expected.shape):
            move = np.zeros_like(expected)
            move[at] = 1e-6
            up, down = (
                sum(np.sum(a * w) for a, w in zip(oracle(moved, reset, valid, **options), weights, strict=True))
                for moved in (wide | {name: wide[name] + move}, wide | {name: wide[name] - move})
            )
            expected[at] = (up - down) / 2e-6
        assert_close(gradients[name], expected, GRADIENT["float32"], f"gradient of {name}")


@pytest.mark.parametrize(
    ("form", "plain"),
    [
        (mlstm, False),
        pytest.param(mlstm, True, marks=pytest.mark.full),
        pytest.param(by_tokens, False, marks=pytest.mark.full),
        pytest.param(by_tokens, True, marks=[pytest.mark.full, pytest.mark.large]),
    ],
    ids=["chunks", "plain chunks", "tokens", "plain tokens"],
)
def test_values_and_every_gradient_entry(form, plain, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 4)
    x, reset, valid = drawn()
    if plain:  # a denominator far from 0
        x |= {name: np.abs(x[name]) for name in ("q", "k", "n")}
    assert_all(x, reset, valid, form, plain=plain)


def extreme(t=150):
    """Gates of up to 60, and a few that forget all, or write nothing."""
    x, reset, valid = drawn(t=t, K=4, V=3, gates=60.0)
    x["f"][:, [20, 70]], x["f"][:, [33, 90]] = -1e4, -np.inf
    x["i"][:, [21, 34, 71]] = -np.inf
    return x, reset, valid


@pytest.mark.parametrize("form", [mlstm, pytest.param(by_tokens, marks=pytest.mark.full)])
def test_extreme_gates(form):
    """Outputs of up to 100 where the denominator cancels; entry by entry, too, where they are not small."""
    x, reset, valid = extreme()
    want = oracle({name: value.astype(np.float64) for name, value in x.items()}, reset, valid)[0]
    o = jax.jit(lambda x: run(x, reset, valid, form=form)[0])(x)
    assert_close(o, want, FORWARD["float32"])
    relative = np.abs(o - want) / np.maximum(np.abs(want), 1e-3)
    assert relative.max() < 1e-3


@pytest.mark.full
def test_gradients_of_extreme_gates(monkeypatch):
    """Both forms agree, where nothing depends on the unit that gradients take as a constant: with the least eps."""
    monkeypatch.setattr(chunked, "CHUNK", 16)
    x, reset, valid = extreme(t=100)
    loss = lambda x, form: jnp.sum(jnp.sin(run(x, reset, valid, form=form, eps=1e-12)[0]))
    in_chunks, in_tokens = (jax.jit(functools.partial(jax.grad(loss), form=form))(x) for form in (mlstm, by_tokens))
    for name in NAMES:
        assert_close(in_chunks[name], in_tokens[name], 2 * GRADIENT["float32"], name)


def test_neighbours_of_a_token_that_forgets_all_keep_their_digits():
    """Sums of gates are not taken from sums with -1e4 in them."""
    x, reset, valid = drawn(t=24)
    x["f"] *= 0.01
    x["f"][:, 3] = -1e4
    want = oracle({name: value.astype(np.float64) for name, value in x.items()}, reset, valid)[0]
    assert_close(jax.jit(lambda x: run(x, reset, valid)[0])(x), want, 2e-6)


@pytest.mark.full
def test_time_split_over_devices(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 4)
    x, reset, valid = drawn(t=24)
    mesh = jax.make_mesh((2, 2, 2), ("data", "seq", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    axes = Axes(batch="data", heads="tensor", seq="seq")
    weights = [np.random.default_rng(1).normal(size=a.shape).astype(np.float32) for a in oracle(x, reset, valid)]

    def loss(x, axes):
        out = run(x, reset, valid, axes=axes)
        return sum(jnp.sum(a * w) for a, w in zip(out, weights, strict=True)), out

    one = lambda axes: jax.jit(functools.partial(jax.grad(loss, has_aux=True), axes=axes))(x)
    want_gradients, want = one(Axes())
    with jax.set_mesh(mesh):
        gradients, got = one(axes)
    for a, w in zip(got, want, strict=True):
        assert_close(a, w, FORWARD["float32"])
    for name in NAMES:
        assert_close(gradients[name], want_gradients[name], GRADIENT["float32"], name)


def test_the_gradient_keeps_a_state_for_each_chunk_and_no_matrix_of_pairs():
    b, t, h, K, V = 1, 4 * chunked.CHUNK, 2, 8, 8
    shapes = {"q": (b, t, h, K), "k": (b, t, h, K), "v": (b, t, h, V), "i": (b, t, h), "f": (b, t, h)}
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes.values()]
    kept = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(lambda *a: mlstm(*a)[0], *args)[1], *args))
    inputs, states = sum(np.prod(s) for s in shapes.values()), 4 * h * (K * V + K + 1)
    assert sum(leaf.size for leaf in kept if leaf.dtype != bool) == inputs + states  # and the mask of one chunk


def test_a_new_state_is_none():
    """And one token from it is the same in both ways to call."""
    tokens = [drawn()[0][name][:, :1] for name in NAMES[:5]]
    both = jax.jit(lambda *tokens: (mlstm(*tokens), mlstm(*tokens, state=empty(2, 2, 3, 2))))
    (o, last), (other, again) = both(*tokens)
    np.testing.assert_array_equal(o, other)
    jax.tree.map(np.testing.assert_array_equal, last, again)


@pytest.mark.parametrize(
    ("field", "shape"),
    [("q", (2, 9, 1, 3)), ("k", (2, 9, 1, 3)), ("i", (2, 9)), ("f", (2, 9, 2, 3)), ("C", (2, 2, 3, 3))],
)
def test_bad_shapes(field, shape):
    x, reset, valid = drawn()
    with pytest.raises(ValueError, match=rf"mlstm: \w*\.?{field}\.shape"):
        run(x | {field: np.zeros(shape, np.float32)}, reset, valid)


def test_bad_eps():
    x, reset, valid = drawn()
    with pytest.raises(ValueError, match=r"mlstm: eps = 0\.0"):
        run(x, reset, valid, eps=0.0)
