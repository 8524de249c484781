"""Rotary embedding against complex rotation in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from longwave.layers.rope import rope
from tests.tolerances import FORWARD, assert_close


def oracle(x, positions, base):
    half = x.shape[-1] // 2
    turn = np.exp(1j * positions[..., None, None] * base ** (-np.arange(half) / half))
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize("base", [10_000.0, 100.0])
def test_rope_turns_pairs_by_position(base):
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 5, 3, 8)), rng.integers(0, 200, (2, 5))
    got = rope(jnp.asarray(x, jnp.float32), jnp.asarray(positions), base=base)
    assert_close(got, oracle(x, positions, base), FORWARD["float32"])
    shared = rope(jnp.asarray(x, jnp.float32), jnp.asarray(positions[0]), base=base)
    assert_close(shared, oracle(x, positions[:1], base), FORWARD["float32"])


def test_scores_depend_on_distance_alone():
    q, k = np.random.default_rng(1).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)
    score = lambda m, n: np.sum(rope(q, jnp.array([[m]])) * rope(k, jnp.array([[n]])))
    assert_close(score(13, 7), score(106, 100), FORWARD["float32"])
    assert abs(score(13, 7) - score(13, 8)) > 1e-2


def test_rope_refuses_an_odd_head_and_keeps_the_dtype():
    with pytest.raises(ValueError, match="even head dimension, got 7"):
        rope(jnp.zeros((1, 1, 1, 7)), jnp.zeros((1, 1), int))
    assert rope(jnp.zeros((1, 1, 1, 8), jnp.bfloat16), jnp.zeros((1, 1), int)).dtype == jnp.bfloat16
