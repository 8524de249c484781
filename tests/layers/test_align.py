"""Moving valid tokens into a frame and back: against a loop over rows; gradients against the transpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longwave.layers.align import frame_length, from_frame, to_frame

VALID = np.array([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
OFFSET = np.array([3, 0, 2, 1], np.int32)
LENGTH = 8


def loop(x, valid, offset, length):
    frame = np.zeros((len(x), length, *x.shape[2:]), x.dtype)
    filled = np.zeros((len(x), length), bool)
    for row, (tokens, mask, first) in enumerate(zip(x, valid, offset, strict=True)):
        for slot, token in enumerate(tokens[mask], start=first):
            frame[row, slot], filled[row, slot] = token, True
    return frame, filled


@pytest.fixture
def x(rng=np.random.default_rng(0)):
    return rng.normal(size=(4, 5, 3)).astype(np.float32)


def test_to_frame_is_the_loop(x):
    frame, filled = jax.jit(to_frame, static_argnums=3)(x, VALID, OFFSET, LENGTH)
    want, where = loop(x, VALID, OFFSET, LENGTH)
    np.testing.assert_array_equal(frame, want)
    np.testing.assert_array_equal(filled, where)


def test_flags_move_too():
    frame, _ = to_frame(jnp.asarray(VALID), jnp.asarray(VALID), jnp.asarray(OFFSET), LENGTH)
    np.testing.assert_array_equal(frame, loop(VALID, VALID, OFFSET, LENGTH)[0])


def test_from_frame_is_the_inverse(x):
    frame, _ = to_frame(jnp.asarray(x), jnp.asarray(VALID), jnp.asarray(OFFSET), LENGTH)
    back = from_frame(frame, jnp.asarray(VALID), jnp.asarray(OFFSET), 5)
    np.testing.assert_array_equal(back, np.where(VALID[..., None], x, 0))


def test_no_mask_means_all_valid(x):
    offset = jnp.asarray(OFFSET)
    frame, filled = to_frame(jnp.asarray(x), None, offset, LENGTH)
    np.testing.assert_array_equal(frame, loop(x, np.ones_like(VALID), OFFSET, LENGTH)[0])
    assert filled.sum() == 20
    np.testing.assert_array_equal(from_frame(frame, None, offset, 5), x)


def test_gradients_are_the_transposes(x):
    """The Jacobian of a gather is a matrix of zeros and ones: its transpose, built by probing, is exact."""
    valid, offset = jnp.asarray(VALID), jnp.asarray(OFFSET)
    there = lambda x: to_frame(x, valid, offset, LENGTH)[0]
    back = lambda f: from_frame(f, valid, offset, 5)
    for f, arg in ((there, x), (back, loop(x, VALID, OFFSET, LENGTH)[0] + 1)):
        y, pull = jax.vjp(f, jnp.asarray(arg))
        g = np.random.default_rng(1).normal(size=y.shape).astype(np.float32)
        units = np.eye(arg.size, dtype=np.float32).reshape(-1, *arg.shape)
        columns = np.asarray(jax.jit(jax.vmap(f))(units)).reshape(arg.size, -1)
        np.testing.assert_allclose(np.ravel(pull(g)[0]), columns @ np.ravel(g), rtol=1e-6)


def test_garbage_at_invalid_positions_has_no_value_and_no_gradient(x):
    dirty = np.where(VALID[..., None], x, np.nan)
    loss = lambda x: jnp.sum(to_frame(x, jnp.asarray(VALID), jnp.asarray(OFFSET), LENGTH)[0] ** 2)
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(dirty))
    assert np.isfinite(value)
    np.testing.assert_allclose(gradient, np.where(VALID[..., None], 2 * x, 0), rtol=1e-6)


@pytest.mark.parametrize(("t", "chunk", "slots"), [(1, 4, 4), (2, 4, 8), (5, 4, 8), (6, 4, 12), (7, 1, 7)])
def test_frame_length_holds_every_remainder(t, chunk, slots):
    assert frame_length(t, chunk) == slots
    assert slots % chunk == 0
    assert slots >= t + chunk - 1
