"""RAT against its definition in float64 NumPy: chunk lengths, gradients, packed rows, any split, the first chunk."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from longwave.kernels.partition import Axes
from longwave.layers.mixer import Context, float32_parameters, parameter_roles
from longwave.layers.rat import RAT, last_of_chunks
from longwave.training.optimizer import AdamW
from tests.layers import rat_oracle
from tests.layers.test_mamba import assert_values_and_gradients, made, parameters, randomised
from tests.tolerances import FORWARD, GRADIENT, assert_close

F32 = FORWARD["float32"]
T = 18
FORMS = {
    "attention": {"L": 1, "H": 2, "G": 1},
    "2": {"L": 2, "H": 4},
    "4": {"L": 4, "H": 4, "rope": 100.0},
    "4, no positions": {"L": 4, "H": 4, "rope": None},
    "16": {"L": 16, "H": 2},
    "9, the whole length": {"L": 9, "H": 2},
    "the recurrent network": {"L": None, "H": 2, "span": 18},
}


def build(form, width=8):
    return randomised(RAT, width, **form)


def oracle_form(form):
    return {name: form[name] for name in ("L", "H", "G", "rope") if name in form}


def caller(mixer):
    graphdef, state = nnx.split(mixer)
    call = jax.jit(lambda state, x, carry, ctx: nnx.merge(graphdef, state)(x, carry, ctx))
    return partial(call, state)


def marked(soon, later):
    """Some forms soon, some with the long group, the others where there is time."""
    marks = lambda n: [] if n in soon else [pytest.mark.full, *[pytest.mark.large] * (n not in later)]
    return pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in FORMS])


@marked(soon=("4", "the recurrent network"), later=("attention", "16"))
def test_values_carry_and_every_gradient_entry(name):
    form, t = FORMS[name], 17 if name == "16" else 9
    oracle = lambda p, u: rat_oracle.rows(p, u, **oracle_form(form))
    assert_values_and_gradients(build(form), oracle, (1, t, 8))


# Documents of four rows; the rest is padding.
SPANS = [[(0, 7), (7, T)], [(2, T)], [(0, 4), (4, 9), (9, 15)], []]


def packed():
    """x, reset, valid of four rows: two documents, padded left, three documents padded right, all padding."""
    x = np.random.default_rng(0).normal(size=(4, T, 16))
    reset, valid = np.zeros((4, T), bool), np.zeros((4, T), bool)
    for row, spans in enumerate(SPANS):
        for start, end in spans:
            reset[row, start], valid[row, start:end] = True, True
    return np.where(valid[..., None], x, np.nan), reset, valid


def expected(mixer, form):
    x = packed()[0]
    y = np.zeros_like(x)
    for row, spans in enumerate(SPANS):
        for start, end in spans:
            y[row, start:end] = rat_oracle.document(parameters(mixer), x[row, start:end], **oracle_form(form))[0]
    return y


@marked(soon=("4",), later=("attention",))
def test_packed_rows_in_any_split(name):
    """Documents start anywhere. In one call, in pieces that cut chunks, and token by token from the very first."""
    mixer = build(FORMS[name], 16)
    call, want = caller(mixer), expected(mixer, FORMS[name])
    x, reset, valid = packed()
    assert_close(call(x.astype(np.float32), None, Context(reset=reset, valid=valid)).y, want, F32)
    for lengths in ([5, 1, 5, 1, 5, 1], [1] * T):
        carry, y = mixer.init_carry(4, capacity=T), []
        for end, n in zip(np.cumsum(lengths), lengths, strict=True):
            at = np.s_[:, end - n : end]
            out = call(x[at].astype(np.float32), carry, Context(reset=reset[at], valid=valid[at]))
            assert jax.tree.map(jnp.shape, out.carry) == jax.tree.map(jnp.shape, carry)
            carry, y = out.carry, [*y, out.y]
        assert_close(np.concatenate(y, 1), want, F32)


def test_the_carry_has_an_entry_for_each_chunk_and_one_more():
    """What is carried for T tokens: T / L summaries, and the running one; of the recurrent network one alone."""
    numbers = lambda mixer, capacity: sum(
        leaf.size for leaf in jax.tree.leaves(jax.eval_shape(partial(mixer.init_carry, 1, capacity=capacity)))
    )
    for L in (1, 4, 16):
        assert numbers(build({"L": L, "H": 2}), 64) == 2 * 8 * (64 // L + 1) + 1
    assert numbers(build(FORMS["the recurrent network"]), None) == 8


def test_decoding_starts_with_the_first_token():
    """In the first chunk the softmax has one entry: o is the running average."""
    mixer = build({"L": 4, "H": 2})
    x = np.random.default_rng(1).normal(size=(2, 3, 8)).astype(np.float32)
    step = lambda carry, x: mixer(x[:, None], carry)[1::-1]
    _, y = jax.lax.scan(step, mixer.init_carry(2, capacity=3), jnp.moveaxis(jnp.asarray(x), 1, 0))
    want = rat_oracle.rows(parameters(mixer), x.astype(float), L=None, H=2)[0]
    assert_close(y[:, :, 0].swapaxes(0, 1), want, F32)


def test_no_token_of_the_first_chunk_makes_a_gradient_nan():
    """Their attention over summaries sees nothing: a log-sum-exp of -inf, forward and backward."""
    mixer = build({"L": 4, "H": 2})
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 8, 8)), jnp.float32)
    early = lambda x: jnp.sum(jnp.square(mixer(x).y[:, :4]))
    dx = jax.jit(jax.grad(early))(x)
    assert np.isfinite(dx).all()
    assert not np.any(dx[:, 4:])
    assert np.any(dx[:, :4])


@pytest.mark.full
@pytest.mark.parametrize(
    ("L", "packed"), [(4, False), pytest.param(6, False, marks=pytest.mark.large), (4, True)], ids=str
)
def test_rows_heads_and_time_split_over_devices(L, packed):
    """Outputs and gradients as on one device; what is gathered along time are the scan's (b, d) maps alone.

    32 tokens, 16 on a device: chunks of 4, chunks of 6 that devices cut, documents that begin anywhere.
    """
    mixer, b, t = build({"L": L, "H": 4}, width=24), 6, 32
    graphdef, state = nnx.split(mixer)
    x, w = np.random.default_rng(3).normal(size=(2, b, t, 24)).astype(np.float32)
    reset = np.random.default_rng(4).random((b, t)) < 0.1 if packed else None

    def run(state, x, w, reset, axes):
        f = lambda state, x: nnx.merge(graphdef, state)(x, None, Context(reset=reset, axes=axes)).y
        y, pull = jax.vjp(f, state, x)
        return y, pull(w)

    want = jax.jit(partial(run, axes=Axes()))(state, x, w, reset)
    mesh = jax.make_mesh((2, 2, 2), ("rows", "time", "heads"), axis_types=(AxisType.Auto,) * 3)
    place = lambda a: None if a is None else jax.device_put(a, NamedSharding(mesh, P("rows", "time")))
    with jax.set_mesh(mesh):
        split = jax.jit(partial(run, axes=Axes("rows", "heads", "time")))
        compiled = split.lower(state, place(x), place(w), place(reset)).compile()
        got = compiled(state, place(x), place(w), place(reset))
    assert_close(got[0], want[0], F32)
    jax.tree.map(lambda a, b: assert_close(a, b, GRADIENT["float32"]), got[1], want[1])
    gathered = re.findall(r"= f32\[([\d,]*)\]\S* all-gather", compiled.as_text())
    assert gathered
    assert not [dims for dims in gathered if "32" in dims.split(",")], "a sequence is gathered"


def test_time_that_devices_do_not_divide_is_refused():
    mixer = build({"L": 4, "H": 2})
    mesh = jax.make_mesh((4,), ("time",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="6 tokens, which 4 devices"):
        jax.eval_shape(lambda x: mixer(x, None, Context(axes=Axes(seq="time"))).y, jnp.ones((1, 6, 8)))


def test_beyond_the_capacity_is_nan_until_the_next_document():
    mixer = build({"L": 4, "H": 2})
    with pytest.raises(ValueError, match="13 tokens do not fit the carry's 12"):
        mixer(jnp.ones((1, 13, 8)), mixer.init_carry(1, capacity=8))
    with pytest.raises(ValueError, match="needs a capacity"):
        mixer.init_carry(1)
    x = np.random.default_rng(2).normal(size=(1, 20, 8)).astype(np.float32)
    reset = np.arange(20)[None] == 15
    call, carry, y = caller(mixer), mixer.init_carry(1, capacity=8), []
    for at in (np.s_[:, :10], np.s_[:, 10:]):
        out = call(x[at], carry, Context(reset=reset[at]))
        carry, y = out.carry, [*y, out.y]
    y = np.concatenate(y, 1)
    p, form = parameters(mixer), {"L": 4, "H": 2}
    assert_close(y[0, :12], rat_oracle.document(p, x[0, :12].astype(float), **form)[0], F32)
    assert np.isnan(y[0, 12:15]).all()
    assert_close(y[0, 15:], rat_oracle.document(p, x[0, 15:].astype(float), **form)[0], F32)


def test_a_chunk_is_over_once_in_each_stretch_of_its_length():
    ends = np.array([[0, 0, 1, 0, 0, 0, 0, 1], [1, 0, 0, 1, 0, 0, 0, 0]], bool)
    x = np.arange(1.0, 17).reshape(2, 8)
    np.testing.assert_array_equal(last_of_chunks(x, ends, 3), [[3, 0, 8], [9, 12, 0]])
    np.testing.assert_array_equal(last_of_chunks(x, None, 3), [[3, 6], [11, 14]])
    np.testing.assert_array_equal(last_of_chunks(x[:, :2], ends[:, :2], 3), [[0], [9]])


def test_where_parameters_start():
    model = made(RAT, 256, L=16, H=8, G=2)
    p = parameters(model)
    assert {k: v.shape for k, v in p.items()} == {
        "in_z/kernel": (256, 256), "in_v/kernel": (256, 256), "in_g/kernel": (256, 256), "in_q/kernel": (256, 64),
        "in_k/kernel": (256, 64), "out/kernel": (256, 256), "b_g": (256,),
    }  # fmt: skip
    assert sum(v.size for v in p.values()) == int((4 + 2 * 2 / 8) * 256**2 + 256)
    b_g = np.exp(p["b_g"])
    np.testing.assert_allclose(np.quantile(b_g, [0, 0.5, 1]), [1, 8, 15], atol=1)
    assert b_g.min() >= 1
    assert b_g.max() <= 15 * (1 + 1e-6)
    for L in (1, 2):
        assert not np.any(parameters(made(RAT, 16, L=L))["b_g"])
    network = parameters(made(RAT, 16, L=None, span=100))
    assert sum(v.size for v in network.values()) == 4 * 16**2 + 16
    assert np.exp(network["b_g"]).max() > 50


def test_roles_and_float32():
    model = nnx.eval_shape(lambda: RAT(8, H=2, rngs=nnx.Rngs(0)))
    decay = {path: AdamW(lr=1.0, weight_decay=0.1).group(role)[1] for path, role in parameter_roles(model).items()}
    assert {path for path, rate in decay.items() if not rate} == {"b_g"}
    assert float32_parameters(model) == {"b_g"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"L": 0}, "RAT.L = 0"),
        ({"L": None}, "RAT.span = None"),
        ({"H": 3}, "RAT.H = 3 must divide width = 8"),
        ({"H": 4, "G": 3}, "RAT.G = 3"),
        ({"H": 8}, "heads of 1 must be even"),
        ({"span": 0}, "RAT.span = 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: RAT(8, rngs=nnx.Rngs(0), **settings))
