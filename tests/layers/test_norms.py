"""Norms against float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from longwave.layers.norms import BatchNorm, LayerNorm, RMSNorm
from tests.tolerances import FORWARD, assert_close

RNG = np.random.default_rng(0)
X = RNG.normal(2.0, 3.0, (4, 7, 6))
LENGTHS = np.array([7, 3, 1, 0])
VALID = np.arange(7)[None] < LENGTHS[:, None]


def with_affine(norm):
    norm.scale[...] = jnp.asarray(RNG.normal(size=6), jnp.float32)
    if hasattr(norm, "bias"):
        norm.bias[...] = jnp.asarray(RNG.normal(size=6), jnp.float32)
    return norm, np.float64(norm.scale[...]), np.float64(norm.bias[...]) if hasattr(norm, "bias") else 0.0


def test_layer_norm():
    norm, scale, bias = with_affine(LayerNorm(6))
    centred = X - X.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias
    assert_close(norm(jnp.float32(X)), expected, FORWARD["float32"])


def test_rms_norm():
    norm, scale, _ = with_affine(RMSNorm(6))
    assert_close(norm(jnp.float32(X)), X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-6) * scale, FORWARD["float32"])


@pytest.mark.parametrize("ignore_padding", [True, False])
def test_batch_norm_in_training_moves_running_statistics_as_torch(ignore_padding):
    norm, scale, bias = with_affine(BatchNorm(6, ignore_padding=ignore_padding))
    rows = X[VALID] if ignore_padding else X.reshape(-1, 6)
    mean, var = rows.mean(0), rows.var(0)
    y = norm(jnp.float32(X), jnp.asarray(VALID), train=True)
    assert_close(y, (X - mean) / np.sqrt(var + 1e-5) * scale + bias, FORWARD["float32"])
    assert_close(norm.mean[...], 0.1 * mean, FORWARD["float32"])
    assert_close(norm.var[...], 0.9 + 0.1 * rows.var(0, ddof=1), FORWARD["float32"])


def test_batch_norm_ignores_what_stands_in_padding_even_nan():
    norm = BatchNorm(6)
    clean = norm(jnp.float32(X), jnp.asarray(VALID), train=True)
    poisoned = BatchNorm(6)(jnp.where(VALID[..., None], jnp.float32(X), jnp.nan), jnp.asarray(VALID), train=True)
    np.testing.assert_array_equal(np.asarray(clean)[VALID], np.asarray(poisoned)[VALID])


def test_batch_norm_in_evaluation_uses_running_statistics_and_leaves_them():
    norm = BatchNorm(6)
    norm.mean[...], norm.var[...] = jnp.full(6, 2.0), jnp.full(6, 9.0)
    assert_close(norm(jnp.float32(X)), (X - 2) / np.sqrt(9 + 1e-5), FORWARD["float32"])
    assert float(norm.mean[0]) == 2.0
