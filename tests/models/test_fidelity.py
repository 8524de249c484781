"""ETMF and ECLMF against float64 NumPy straight from the definitions, on numbers and on small language models."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from longwave.models import Backbone, LanguageModel, TokenEmbedding, Tokens
from longwave.models.fidelity import eclmf, etmf, fidelity, recorded
from tests.layers.toy_mixers import Leaky
from tests.tolerances import FORWARD, assert_close


def slow_etmf(read, told, shift, valid):
    cosines = []
    for row in range(len(read)):
        for j in range(len(read[row])):
            if 0 <= (i := j + shift) < len(read[row]) and valid[row, j] and valid[row, i]:
                a, b = read[row, j], told[row, i]
                cosines.append(a @ b / np.sqrt((a @ a) * (b @ b)))
    return np.mean(cosines)


def slow_eclmf(states, gap, valid, ridge=1e-4):
    """Ridge regression as least squares over rows that pull W towards zero."""
    scores = []
    for l in range(len(states) - gap):
        X, Y = (states[i][valid] for i in (l, l + gap))
        d = X.shape[1]
        more = np.vstack([X, np.sqrt(ridge) * np.eye(d)]), np.vstack([Y, np.zeros((d, d))])
        error = np.sqrt(np.sum((Y - X @ np.linalg.lstsq(*more, rcond=None)[0]) ** 2))
        total = np.sum((Y - Y.mean(0)) ** 2)
        scores.append([1 - error / (np.sqrt(np.sum(X**2)) + 1e-6), 1 - error**2 / total])
    return np.mean(scores, axis=0)


def padding(b, t):
    valid = np.ones((b, t), bool)
    valid[0, :3], valid[1, -4:] = False, False
    return valid


@pytest.mark.parametrize("shift", [0, -1, 4])
def test_etmf(shift):
    read, told = np.random.default_rng(0).normal(size=(2, 3, 12, 5))
    valid = padding(3, 12)
    assert_close(etmf(read, told, shift=shift, valid=valid), slow_etmf(read, told, shift, valid), FORWARD["float64"])
    everywhere = slow_etmf(read, told, shift, np.ones_like(valid))
    assert_close(etmf(read, told, shift=shift), everywhere, FORWARD["float64"])
    assert etmf(read, 3 * read) == pytest.approx(1)


@pytest.mark.parametrize("gap", [1, 3])
def test_eclmf(gap):
    states = list(np.random.default_rng(0).normal(size=(5, 3, 12, 5)))
    states[4] = states[1] @ np.random.default_rng(1).normal(size=(5, 5))
    valid = padding(3, 12)
    assert_close(eclmf(states, gap=gap, valid=valid), slow_eclmf(states, gap, valid), FORWARD["float64"])


def test_what_is_linear_below_is_kept_in_full():
    x = np.random.default_rng(0).normal(size=(2, 30, 5))
    score, r2 = eclmf([x, x, x @ np.ones((5, 5))], gap=2)
    assert score == pytest.approx(1, abs=1e-4)
    assert r2 == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("depth", [3, pytest.param(8, marks=pytest.mark.full)])  # from 8 on the layers are scanned
def test_a_language_model(depth):
    encoder = functools.partial(TokenEmbedding, std=0.5, multiple=8)
    new = lambda: LanguageModel(
        Backbone(
            Tokens(vocab=11, length=20), width=6, depth=depth, mixers=(Leaky,), encoder=encoder, rngs=nnx.Rngs(0)
        ),
        vocab=11, rngs=nnx.Rngs(1),
    )  # fmt: skip
    model = nnx.merge(nnx.graphdef(nnx.eval_shape(new)), jax.jit(lambda: nnx.state(new()))())
    ids = np.random.default_rng(0).integers(11, size=(2, 20))
    got = fidelity(model, ids, distances=(8, 32), gaps=(2, 10))
    assert set(got) == {"ETMF", "ETMF next", "ETMF 8", "ECLMF 2", "R2 2"}  # text and model end before the others

    out, own = jax.jit(lambda model, ids: (model(ids), recorded(model.backbone)(ids)))(model, ids)
    states = [np.asarray(aux["output"], np.float64) for aux in own.aux]
    assert len(states) == depth
    logits, E = np.asarray(out.logits, np.float64), np.asarray(model.backbone.encoder.embedding[...], np.float64)
    norm = lambda h: (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    assert_close((norm(states[-1]) @ E.T)[..., :11], logits[..., :11], FORWARD["float32"], "logits of the last state")
    p = np.exp(logits - logits.max(-1, keepdims=True))
    told = p / p.sum(-1, keepdims=True) @ E
    everywhere = np.ones(ids.shape, bool)
    for name, shift in (("ETMF", 0), ("ETMF next", -1), ("ETMF 8", 8)):
        assert_close(got[name], slow_etmf(E[ids], told, shift, everywhere), FORWARD["float32"], name)
    assert_close((got["ECLMF 2"], got["R2 2"]), slow_eclmf(states, 2, everywhere), FORWARD["float32"], "ECLMF")
    same = fidelity(model, ids, valid=everywhere, distances=(8,), gaps=(2,))
    assert_close(list(same.values()), list(got.values()), FORWARD["float32"], "no padding")


def test_bad_settings():
    x = np.ones((1, 4, 2))
    with pytest.raises(ValueError, match="shift = 4: expected less than the 4 tokens"):
        etmf(x, x, shift=4)
    with pytest.raises(ValueError, match="gap = 2: expected 1 to 1"):
        eclmf([x, x], gap=2)
