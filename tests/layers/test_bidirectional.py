"""Both directions against each document reversed by hand."""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longwave.layers.attention import Attention
from longwave.layers.bidirectional import Bidirectional, mirror_index
from longwave.layers.mixer import Context, Mixer, Out, Unsupported, parameter_roles
from tests.tolerances import FORWARD, GRADIENT, assert_close


class Decay(Mixer):
    """h_t = a h_(t-1) + w x_t in float32, cut at resets; with a key, its noise is added."""

    roles: ClassVar = {"a": "A", "w": "weight"}

    def __init__(self, width, *, rngs):
        self.a = nnx.Param(jax.random.uniform(rngs.params(), (width,)))
        self.w = nnx.Param(jax.random.normal(rngs.params(), (width,)))

    def __call__(self, x, carry=None, ctx=Context()):
        valid = jnp.ones(x.shape[:2], bool) if ctx.valid is None else ctx.valid
        reset = jnp.zeros(x.shape[:2], bool) if ctx.reset is None else ctx.reset

        def step(h, xs):
            x, reset, valid = xs
            new = jnp.where(reset[:, None], 0, h) * self.a[...][None] + self.w[...][None] * x
            h = jnp.where(valid[:, None], new, h)
            return h, jnp.where(valid[:, None], h, 0)

        in_time = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (x, reset, valid))
        h, y = jax.lax.scan(step, jnp.zeros_like(x[:, 0]), in_time)
        y = jnp.moveaxis(y, 0, 1)
        if ctx.key is not None:
            y = y + jax.random.normal(ctx.key, y.shape)
        return Out(y, h, {"tokens": jnp.sum(valid)})


def oracle(x, there, back):
    """One document (t, d), each direction with its own (a, w)."""

    def scan(x, a, w):
        h, y = np.zeros(x.shape[1]), []
        for token in x:
            h = a * h + w * token
            y.append(h)
        return np.stack(y)

    return scan(x, *there) + scan(x[::-1], *back)[::-1]


T, WIDTH = 11, 3
SPANS = [[(0, 11)], [(0, 4), (4, 9), (9, 11)], [(3, 6), (6, 11)], [(0, 2), (2, 7)], [(4, 9)], []]


def packed():
    x = np.random.default_rng(0).normal(size=(len(SPANS), T, WIDTH)).astype(np.float32)
    reset, valid = np.zeros(x.shape[:2], bool), np.zeros(x.shape[:2], bool)
    for row, spans in enumerate(SPANS):
        for start, end in spans:
            reset[row, start], valid[row, start:end] = True, True
    return x, reset, valid


def expected(mixer, x):
    numbers = lambda m: [np.asarray(p[...], np.float64) for p in (m.a, m.w)]
    there, back = numbers(mixer.forward), numbers(mixer.forward if mixer.tied else mixer.backward)
    y = np.zeros(x.shape)
    for row, spans in enumerate(SPANS):
        for start, end in spans:
            y[row, start:end] = oracle(x[row, start:end].astype(np.float64), there, back)
    return y


@pytest.mark.parametrize("tied", [False, True])
def test_each_document_is_reversed_within_its_length(tied):
    mixer = Bidirectional(WIDTH, mixer=Decay, tied=tied, rngs=nnx.Rngs(0))
    x, reset, valid = packed()
    out = jax.jit(mixer)(x, None, Context(reset=reset, valid=valid))
    assert_close(out.y, expected(mixer, x), FORWARD["float32"])
    assert out.carry == ()
    assert [out.aux[side]["tokens"] for side in ("forward", "backward")] == [valid.sum()] * 2
    assert_close(mixer(x[:1]).y, expected(mixer, x)[:1], FORWARD["float32"], "without masks")


def test_the_mirror_is_its_own_inverse_and_keeps_padding():
    _, reset, valid = packed()
    index = np.asarray(mirror_index(Context(reset=reset, valid=valid), *valid.shape))
    np.testing.assert_array_equal(np.take_along_axis(index, index, 1), np.broadcast_to(np.arange(T), index.shape))
    np.testing.assert_array_equal(np.take_along_axis(valid, index, 1), valid)
    np.testing.assert_array_equal(index[1], [3, 2, 1, 0, 8, 7, 6, 5, 4, 10, 9])


def test_gradient_by_central_differences():
    """y is linear in x: differences of the oracle are exact."""
    mixer = Bidirectional(WIDTH, mixer=Decay, rngs=nnx.Rngs(0))
    x, reset, valid = packed()
    w = np.random.default_rng(1).normal(size=x.shape)
    ctx = Context(reset=reset, valid=valid)
    got = jax.jit(jax.grad(lambda x: jnp.sum(mixer(x, None, ctx).y * w)))(x)
    want = np.zeros(x.shape)
    for t, d in np.ndindex(T, WIDTH):
        bump = np.zeros(x.shape)
        bump[:, t, d] = 1
        want[:, t, d] = np.sum((expected(mixer, x + bump) - expected(mixer, x - bump)) * w, (1, 2)) / 2
    assert_close(got, want, GRADIENT["float32"])


def test_directions_draw_different_randomness():
    mixer = Bidirectional(WIDTH, mixer=Decay, tied=True, rngs=nnx.Rngs(0))
    noise = mixer(jnp.zeros((1, 400, WIDTH)), None, Context(key=jax.random.key(0))).y
    mirrored = np.corrcoef(np.ravel(noise), np.ravel(noise[:, ::-1]))[0, 1]
    assert abs(mirrored) < 0.1  # one key for both would make them equal


def test_tied_has_half_the_parameters_and_roles_come_from_inside():
    both = parameter_roles(Bidirectional(8, mixer=partial(Attention, heads=2), rngs=nnx.Rngs(0)))
    one = parameter_roles(Bidirectional(8, mixer=partial(Attention, heads=2), tied=True, rngs=nnx.Rngs(0)))
    assert set(both) == set(one) | {path.replace("forward", "backward") for path in one}
    assert set(one.values()) == {"weight"}


def test_a_carry_is_refused_and_so_is_a_mixer_that_is_not_causal():
    mixer = Bidirectional(WIDTH, mixer=Decay, rngs=nnx.Rngs(0))
    with pytest.raises(Unsupported, match="starts at the end of the sequence"):
        mixer.init_carry(1)
    with pytest.raises(Unsupported, match="starts at the end of the sequence"):
        mixer(jnp.zeros((1, 2, WIDTH)), jnp.zeros((1, WIDTH)))
    with pytest.raises(ValueError, match="Attention must be causal"):
        Bidirectional(8, mixer=partial(Attention, heads=2, causal=False), rngs=nnx.Rngs(0))


class Reader(Mixer):
    """y = h + what the layers below summed up, h the sum of x so far, which it hands on."""

    reads_below = True

    def __init__(self, width, *, rngs):
        self.width = width

    def __call__(self, x, carry=None, ctx=Context()):
        h = jnp.cumsum(x, axis=1)
        return Out(h + sum(aux["h"] for aux in ctx.below), (), {"h": h})


def test_each_direction_reads_its_own_of_the_layers_below():
    x = np.random.default_rng(0).normal(size=(2, 5, 3))
    layers = [Bidirectional(3, mixer=Reader, rngs=nnx.Rngs(i)) for i in range(2)]
    first = layers[0](jnp.asarray(x, jnp.float32))
    second = layers[1](first.y, None, Context(below=(first.aux,)))
    up = lambda x: np.cumsum(x, axis=1)
    down = lambda x: np.cumsum(x[:, ::-1], axis=1)[:, ::-1]
    y = up(x) + down(x)
    assert layers[1].reads_below
    assert_close(second.y, up(y) + up(x) + down(y) + down(x), FORWARD["float32"])
