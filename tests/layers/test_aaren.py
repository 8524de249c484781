"""Aaren against the softmax that it is, in float64 NumPy; extreme scores; roles; errors."""

import jax
import numpy as np
import pytest
from flax import nnx

from longwave.kernels.mlstm import State
from longwave.layers.aaren import Aaren
from longwave.layers.mixer import parameter_roles
from tests.layers.test_mamba import affine, assert_values_and_gradients, parameters, randomised
from tests.tolerances import FORWARD, assert_close


def oracle(p, u):
    """Every prefix's softmax by itself, and the sums behind the last one."""
    (heads, P), (b, t, _) = p["q"].shape, u.shape
    k, v = (affine(p, name, u).reshape(b, t, heads, P) for name in "kv")
    s = np.einsum("bthp,hp->bth", k, p["q"]) / np.sqrt(P)
    o = np.zeros_like(v)
    for i in range(t):
        m = s[:, : i + 1].max(1)
        weights = np.exp(s[:, : i + 1] - m[:, None])
        w = np.einsum("bth,bthp->bhp", weights, v[:, : i + 1])
        o[:, i] = w / weights.sum(1)[..., None]
    return affine(p, "out", o.reshape(u.shape)), State(w[:, :, None], weights.sum(1)[..., None], m)


def test_values_and_every_gradient_entry():
    assert_values_and_gradients(randomised(Aaren, 4, heads=2), oracle, (2, 5, 4))


def test_extreme_scores():
    """Scores of +-90 and more: exp of them is no float32."""
    model = randomised(Aaren, 8, heads=2)
    x = 60 * np.random.default_rng(1).normal(size=(2, 40, 8)).astype(np.float32)
    p = parameters(model)
    scores = np.einsum("bthp,hp->bth", (x @ p["k/kernel"]).reshape(2, 40, 2, 4), p["q"]) / 2
    assert scores.max() > 90
    assert scores.min() < -90
    y, _ = oracle(p, x.astype(np.float64))
    assert_close(jax.jit(lambda x: model(x).y)(x), y, FORWARD["float32"])


def test_parameters_are_an_attentions_without_w_q():
    model = nnx.eval_shape(lambda: Aaren(16, heads=4, rngs=nnx.Rngs(0)))
    assert sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))) == 3 * 16**2 + 16
    roles = {"q": "embed", "k/kernel": "weight", "v/kernel": "weight", "out/kernel": "weight"}
    assert parameter_roles(model) == roles


def test_bad_settings():
    with pytest.raises(ValueError, match=r"Aaren\.heads = 3"):
        nnx.eval_shape(lambda: Aaren(4, heads=3, rngs=nnx.Rngs(0)))
