"""The attention mixer against a float64 loop over documents and queries; its carries, capacity and limits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longwave.kernels.attention import Causal, Sinks, Window
from longwave.layers import dropped_attention
from longwave.layers.attention import Attention
from longwave.layers.mixer import Context, Unsupported, parameter_roles
from tests.tolerances import FORWARD, assert_close

WIDTH, T = 8, 17
F32 = FORWARD["float32"]
FAST = {"xla_backend_optimization_level": 0}
FORMS = {
    "full": {"heads": 2},
    "grouped, biased, unturned": {"heads": 4, "kv_heads": 2, "bias": True, "rope": None, "head_dim": 6},
    "window": {"heads": 4, "kv_heads": 1, "window": 4},
    "window and sinks": {"heads": 2, "window": 3, "sinks": 2, "rope": 100.0},
    "blocks": {"heads": 2, "block": 4},
    "both sides": {"heads": 2, "causal": False},
    "both sides, window": {"heads": 2, "causal": False, "window": 3},
}
CAUSAL = [name for name, form in FORMS.items() if form.get("causal", True)]


def build(**form):
    mixer = Attention(WIDTH, **form, rngs=nnx.Rngs(0))
    noise = lambda path, p: p + 0.3 * jax.random.normal(jax.random.key(len(str(path))), p.shape)
    nnx.update(mixer, jax.tree_util.tree_map_with_path(noise, nnx.state(mixer, nnx.Param)))
    return mixer


def oracle(
    mixer,
    x,
    *,
    heads,
    kv_heads=None,
    head_dim=None,
    causal=True,
    window=None,
    sinks=0,
    block=None,
    rope=10_000.0,
    bias=False,
):
    """One document x (t, width)."""
    kv_heads, head_dim = kv_heads or heads, head_dim or WIDTH // heads

    def project(layer, x):
        y = x @ np.asarray(layer.kernel[...], np.float64)
        return y + np.asarray(layer.bias[...], np.float64) if bias else y

    def turned(x):
        if rope is None:
            return x
        half = head_dim // 2
        angle = np.arange(len(x))[:, None] * rope ** (-np.arange(half) / half)
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
        return np.concatenate([z.real, z.imag], -1)

    q = turned(project(mixer.q, x).reshape(len(x), heads, head_dim))
    k = turned(project(mixer.k, x).reshape(len(x), kv_heads, head_dim))
    v = project(mixer.v, x).reshape(len(x), kv_heads, head_dim)
    o = np.zeros_like(q)
    for i, h in np.ndindex(len(x), heads):
        seen = [j for j in range(len(x)) if j <= i or not causal]
        seen = [j for j in seen if window is None or abs(i - j) < window or j < sinks]
        seen = [j for j in seen if block is None or i // block == j // block]
        s = k[seen, h * kv_heads // heads] @ q[i, h] / np.sqrt(head_dim)
        p = np.exp(s - s.max())
        o[i, h] = p @ v[seen, h * kv_heads // heads] / p.sum()
    return project(mixer.out, o.reshape(len(x), -1))


SPANS = [
    [(0, 9), (9, 17)],
    [(3, 17)],
    [(0, 4), (4, 10), (10, 13)],
    [],
]  # documents of four rows; the rest is padding


def packed():
    """x, reset, valid of four rows: two documents, padded left, three documents padded right, all padding."""
    x = np.random.default_rng(0).normal(size=(4, T, WIDTH))
    reset, valid = np.zeros((4, T), bool), np.zeros((4, T), bool)
    for row, spans in enumerate(SPANS):
        for start, end in spans:
            reset[row, start], valid[row, start:end] = True, True
    return x, reset, valid


def expected(mixer, form):
    x, _, _ = packed()
    y = np.zeros_like(x)
    for row, spans in enumerate(SPANS):
        for start, end in spans:
            y[row, start:end] = oracle(mixer, x[row, start:end], **form)
    return y


def caller(mixer):
    graphdef, state = nnx.split(mixer)
    call = jax.jit(lambda state, x, carry, ctx: nnx.merge(graphdef, state)(x, carry, ctx), compiler_options=FAST)
    return partial(call, state)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name == "blocks" else ()) for name in FORMS]
)
def test_one_call_equals_the_oracle(name):
    mixer = build(**FORMS[name])
    x, reset, valid = packed()
    out = caller(mixer)(x.astype(np.float32), None, Context(reset=reset, valid=valid))
    assert_close(out.y, expected(mixer, FORMS[name]), F32)
    plain = caller(mixer)(x.astype(np.float32), None, Context())
    assert_close(plain.y[1], oracle(mixer, x[1], **FORMS[name]), F32)


@pytest.mark.parametrize("name", CAUSAL)
def test_any_split_equals_the_oracle(name):
    """Tokens one by one, and chunks that resets and padding cut anywhere, behind each other's carries."""
    mixer = build(**FORMS[name])
    call = caller(mixer)
    x, reset, valid = packed()
    for lengths in ([1] * T, [5, 1, 5, 1, 5]):
        carry, y = mixer.init_carry(4, capacity=14), []
        for end, n in zip(np.cumsum(lengths), lengths, strict=True):
            at = np.s_[:, end - n : end]
            out = call(x[at].astype(np.float32), carry, Context(reset=reset[at], valid=valid[at]))
            assert jax.tree.map(jnp.shape, out.carry) == jax.tree.map(jnp.shape, carry)
            carry, y = out.carry, [*y, out.y]
        assert_close(np.concatenate(y, 1), expected(mixer, FORMS[name]), F32)
    np.testing.assert_array_equal(carry["position"], [8, 14, 3, 0])


def test_a_long_stream_goes_round_the_ring():
    """Fifty tokens through five slots."""
    form = {"heads": 2, "window": 3, "sinks": 2}
    mixer = build(**form)
    x = np.random.default_rng(1).normal(size=(1, 50, WIDTH))
    step = lambda carry, x: mixer(x[:, None], carry)[1::-1]
    carry, y = jax.lax.scan(step, mixer.init_carry(1), jnp.moveaxis(jnp.asarray(x, jnp.float32), 1, 0))
    assert carry["k"].shape == (1, 5, 2, 4)
    assert_close(y[:, 0, 0], oracle(mixer, x[0], **form), F32)


# Dropout of the weights.


def test_the_form_that_can_drop_equals_the_oracle_where_it_drops_nothing(monkeypatch):
    """At a rate that rounds to nothing: over many blocks of queries, each with the keys within reach alone."""
    monkeypatch.setattr(dropped_attention, "BLOCK", 3)
    form = FORMS["window"]
    mixer = build(**form, dropout=1e-12)
    x, reset, valid = packed()
    call, carry, y = caller(mixer), mixer.init_carry(4), []
    for at in (np.s_[:, :8], np.s_[:, 8:16]):
        ctx = Context(reset=reset[at], valid=valid[at], key=jax.random.key(0))
        out = call(x[at].astype(np.float32), carry, ctx)
        carry, y = out.carry, [*y, out.y]
    assert_close(np.concatenate(y, 1), expected(mixer, form)[:, :16], F32)


def test_dropout_zeroes_weights_and_scales_the_rest():
    """With the unit vectors as values, outputs are weights. Each falls on its own, the same in the backward pass."""
    t, rate = 40, 0.3
    q, k = np.random.default_rng(3).normal(size=(2, 3, t, 2, 4)).astype(np.float32)
    v = jnp.broadcast_to(jnp.eye(t)[None, :, None], (3, t, 2, t))

    @partial(jax.jit, compiler_options=FAST)
    def dropped(v, key):
        weights = lambda v: dropped_attention.dropped_attention(q, k, v, rate=rate, key=key)[0]
        return weights(v), jax.grad(lambda v: weights(v).sum())(v)

    weights, gradient = dropped(v, jax.random.key(2))
    scores = np.exp(np.einsum("bqhd,bkhd->bqhk", np.float64(q), np.float64(k)) / 2)
    ratio = np.float64(weights) / (scores / scores.sum(-1, keepdims=True))
    kept = ratio > 0.5
    assert_close(ratio, np.where(kept, 1 / (1 - rate), 0), F32)
    assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / kept.size)
    other = np.asarray(dropped(v, jax.random.key(3))[0]) > 0
    for a, b in ((kept[0], kept[1]), (kept[:, :, 0], kept[:, :, 1]), (kept[:, 1:], kept[:, :-1]), (kept, other)):
        assert abs((a == b).mean() - (1 - 2 * rate * (1 - rate))) < 5 * np.sqrt(0.25 / a.size)
    assert_close(gradient[..., 0], np.float64(weights).sum(1).swapaxes(1, 2), F32)


def test_dropout_acts_only_with_a_key():
    """Without one, the program is that of a mixer without dropout, which the oracle checks."""
    program = lambda dropout, ctx: str(jax.make_jaxpr(build(heads=2, dropout=dropout))(x, None, ctx))
    x, dropping = packed()[0][:1].astype(np.float32), Context(key=jax.random.key(0))
    assert program(0.5, Context()) == program(0.0, Context())
    assert program(0.5, dropping) != program(0.0, dropping)
    with pytest.raises(ValueError, match=r"dropout = 1\.0"):
        build(heads=2, dropout=1.0)(x, None, Context(key=jax.random.key(0)))


def test_no_carry_makes_room_for_the_call_alone():
    mixer = build(heads=2)
    x = jnp.ones((2, 5, WIDTH))
    carry = jax.eval_shape(mixer, x).carry
    assert carry["k"].shape == (2, 5, 2, 4)
    assert mixer.init_carry(2, capacity=9)["v"].shape == (2, 9, 2, 4)
    windowed = build(heads=2, window=3, sinks=1)
    assert jax.eval_shape(windowed, x).carry["k"].shape == windowed.init_carry(2)["k"].shape == (2, 4, 2, 4)


def test_what_exceeds_the_capacity_is_refused_or_becomes_nan():
    mixer = build(heads=2)
    with pytest.raises(ValueError, match="needs a capacity"):
        mixer.init_carry(2)
    with pytest.raises(ValueError, match="7 tokens do not fit the carry's capacity = 6"):
        mixer(jnp.ones((2, 7, WIDTH)), mixer.init_carry(2, capacity=6))
    x = np.random.default_rng(2).normal(size=(2, 12, WIDTH)).astype(np.float32)
    reset = np.zeros((2, 12), bool)
    reset[1, 5] = reset[0, 10] = True
    x[0, 6:10] = np.nan  # as the layer below would hand it on
    call, carry, y = caller(mixer), mixer.init_carry(2, capacity=6), []
    for s in (np.s_[:, :4], np.s_[:, 4:8], np.s_[:, 8:]):
        out = call(x[s], carry, Context(reset=reset[s]))
        carry, y = out.carry, [*y, out.y]
    y = np.concatenate(y, 1)
    lost = np.zeros((2, 12), bool)
    lost[0, 6:10], lost[1, 11:] = True, True
    np.testing.assert_array_equal(np.isnan(y).all(-1), lost)
    np.testing.assert_array_equal(np.isnan(y).any(-1), lost)
    assert_close(y[0, 10:], oracle(mixer, x[0, 10:].astype(float), heads=2), F32)


def test_a_carry_keeps_its_dtype_and_y_that_of_x():
    mixer = build(heads=2)
    out = jax.eval_shape(mixer, jnp.ones((1, 3, WIDTH), jnp.bfloat16), mixer.init_carry(1, capacity=4))
    assert out.y.dtype == jnp.bfloat16
    assert out.carry["k"].dtype == out.carry["v"].dtype == jnp.float32
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), nnx.state(mixer))
    nnx.update(mixer, half)
    assert mixer.init_carry(1, capacity=4)["k"].dtype == jnp.bfloat16


def test_a_window_alone_is_a_mask_that_every_kernel_knows():
    """Only distance counts in it, unlike with first tokens that stay visible."""
    assert build(heads=2, window=4).mask == Causal() & Window(4)
    assert build(heads=2, window=4, sinks=1).mask == Causal() & (Window(4) | Sinks(1))


def test_both_sides_refuse_a_carry():
    mixer = build(heads=2, causal=False)
    assert mixer.supports == {"reset"}
    with pytest.raises(Unsupported, match="not come yet"):
        mixer.init_carry(1, capacity=3)
    with pytest.raises(Unsupported, match="not come yet"):
        mixer(jnp.ones((1, 2, WIDTH)), build(heads=2).init_carry(1, capacity=3))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"heads": 3}, "heads = 3 must divide width = 8"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads = 3 must divide heads = 4"),
        ({"heads": 8}, "head_dim = 1 must be even for rope"),
        ({"heads": 2, "sinks": 1}, "sinks = 1 must be at least 0, and 0 without"),
        ({"heads": 2, "window": 0}, "window = 0 must be at least 1"),
        ({"heads": 2, "block": 0}, "block = 0 must be at least 1, and None with a window"),
        ({"heads": 2, "block": 3, "window": 3}, "block = 3 must be at least 1, and None with a window"),
    ],
)
def test_impossible_settings_are_named(form, message):
    with pytest.raises(ValueError, match=message):
        Attention(WIDTH, **form, rngs=nnx.Rngs(0))


def test_roles():
    roles = parameter_roles(build(heads=2, bias=True))
    of = {"kernel": "weight", "bias": "bias"}
    assert roles == {f"{p}/{n}": of[n] for p in ("q", "k", "v", "out") for n in of}
