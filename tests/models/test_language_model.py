"""The language model's logits and costs against float64 NumPy, tied and untied, in parts, with a padded vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longwave import layers, models
from longwave.models import language_model
from longwave.models.language_model import next_token_costs, table_logits
from tests.models.decay import Decay
from tests.tolerances import FORWARD, GRADIENT, assert_close

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 11, (2, 6))
TARGET = np.where(RNG.random((2, 6)) < 0.3, -1, RNG.integers(0, 11, (2, 6)))


def make(*, tied=True, multiple=8, mixer=Decay, **kwargs):
    embedding = lambda inputs, width, rngs: models.TokenEmbedding(inputs, width, std=0.5, multiple=multiple, rngs=rngs)
    inputs, rngs = models.Tokens(11, 6), nnx.Rngs(0)
    body = models.Backbone(inputs, width=4, depth=1, mixers=(mixer,), encoder=embedding, rngs=rngs, **kwargs)
    return models.LanguageModel(body, vocab=11, tied=tied, rngs=rngs)


def oracle(y, table, target):
    """-log softmax over the 11 ids alone, in float64."""
    logits = np.float64(y) @ np.float64(table)[:11].T
    nll = np.log(np.exp(logits).sum(2)) - np.take_along_axis(logits, np.maximum(target, 0)[..., None], 2)[..., 0]
    return logits, np.where(target < 0, 0, nll)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_costs_are_those_of_the_vocabulary_alone(tied):
    model = make(tied=tied)
    table = model.backbone.encoder.embedding[...] if tied else model.head.kernel[...].T
    assert table.shape == (16, 4)
    logits, nll = oracle(model.backbone(jnp.asarray(IDS)).y, table, TARGET)
    found = model(jnp.asarray(IDS)).logits
    assert found.dtype == jnp.float32
    assert_close(found[..., :11], logits, FORWARD["float32"])
    assert_close(jax.nn.softmax(found)[..., 11:], np.zeros((2, 6, 5)), 0.0)
    costs = jax.jit(lambda target: model.costs(jnp.asarray(IDS), target).nll)
    assert_close(costs(TARGET), nll, FORWARD["float32"])
    assert_close(costs(TARGET[:, 4:]), nll[:, 4:], FORWARD["float32"], "of the last tokens")
    assert_close(model.last(jnp.asarray(IDS)).logits[..., :11], logits[:, -1:], FORWARD["float32"], "the last one")


def test_costs_and_gradients_in_parts_are_those_of_the_whole(monkeypatch):
    y, table = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((2, 7, 4), (16, 4)))
    target = np.concatenate([TARGET, [[3], [-1]]], axis=1)
    weights = jnp.asarray(RNG.normal(size=(2, 7)), jnp.float32)

    def both():
        f = lambda y, table: (weights * next_token_costs(y, table, jnp.asarray(target), 11)).sum()
        return next_token_costs(y, table, jnp.asarray(target), 11), *jax.jit(jax.grad(f, (0, 1)))(y, table)

    whole = both()
    monkeypatch.setattr(language_model, "LOGITS", 2 * 16 * 3)  # three tokens at a time, the last part not full
    lowered = jax.jit(lambda: next_token_costs(y, table, jnp.asarray(target), 11)).lower().as_text()
    assert "2x3x16xf32" in lowered
    assert "2x7x16xf32" not in lowered, "all logits at once"
    parts = both()
    # The gradient straight from p - onehot, in float64.
    logits, nll = oracle(y, table, target)
    p = np.exp(logits) / np.exp(logits).sum(2, keepdims=True) - np.eye(11)[np.maximum(target, 0)]
    p = p * (np.float64(weights) * (target >= 0))[..., None]
    d_table = np.zeros((16, 4))
    d_table[:11] = np.einsum("btv,btd->vd", p, np.float64(y))
    for found in (whole, parts):
        assert_close(found[0], nll, FORWARD["float32"])
        assert_close(found[1], p @ np.float64(table)[:11], GRADIENT["float32"])
        assert_close(found[2], d_table, GRADIENT["float32"])


def test_ids_that_are_no_tokens_are_not_silent():
    model = make()
    ids = jnp.array([[3, 11, 4, 10, 15, 16]])  # 11 to 15 have rows in the table, but are no ids
    bad = np.isnan(np.asarray(model.backbone.encoder(ids))).any(-1)[0]
    assert bad.tolist() == [False, True, False, False, True, True]


def test_bfloat16_logits_are_summed_in_float32():
    y = jnp.asarray(RNG.normal(size=(1, 2, 512)), jnp.bfloat16)
    table = jnp.asarray(RNG.normal(size=(3, 512)), jnp.bfloat16)
    logits = table_logits(y, table, 3)
    assert logits.dtype == jnp.float32
    assert_close(logits, np.float64(y) @ np.float64(table).T, FORWARD["float32"])


def test_what_cannot_be_a_language_model_is_refused():
    both = lambda width, rngs: layers.Attention(width, heads=1, causal=False, rngs=rngs)
    with pytest.raises(ValueError, match="Attention sees later tokens"):
        make(mixer=both)
    with pytest.raises(ValueError, match="cls_token = True; expected False"):
        make(cls_token=True)
    body = models.Backbone(models.Features(3, 6), width=4, depth=1, mixers=(Decay,), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="expected a TokenEmbedding"):
        models.LanguageModel(body, vocab=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="vocab = 17: expected 1 to the 16 rows"):
        models.LanguageModel(make().backbone, vocab=17, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="multiple = 0: expected at least 1"):
        make(multiple=0)
