"""Sampling against float64 NumPy; generation against full recomputation, for every mixer that has a carry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longwave import layers, models
from longwave.layers.mixer import Mixer
from longwave.models.generate import NOTHING, Speed, generate, left_padded
from longwave.models.sampling import GREEDY, Below, MinP, Repetition, Sampling, Temperature, TopK, TopP, sampling
from tests.tolerances import FORWARD, assert_close

RNG = np.random.default_rng(0)
LOGITS = np.round(RNG.normal(size=(3, 9)), 1)  # with ties
SEEN = RNG.random((3, 9)) < 0.4
PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 3, 2]]


def softmax(logits):
    p = np.exp(logits - logits.max())
    return p / p.sum()


def kept_by_top_k(logits, k):
    return logits >= sorted(logits)[-min(k, len(logits))]


def kept_by_top_p(logits, p):
    """Ids are added from the most probable on until p is reached; level ones together."""
    total, least = 0.0, np.inf
    for probability, logit in sorted(zip(softmax(logits), logits, strict=True), reverse=True):
        if total >= p:
            break
        total, least = total + probability, logit
    return logits >= least


def kept_by_min_p(logits, p):
    probability = softmax(logits)
    return probability >= p * probability.max() * (1 - 1e-12)


@pytest.mark.parametrize(
    ("transform", "kept"),
    [
        (Below(4), lambda logits: np.arange(9) < 4),
        (TopK(1), functools.partial(kept_by_top_k, k=1)),
        (TopK(4), functools.partial(kept_by_top_k, k=4)),
        (TopK(99), functools.partial(kept_by_top_k, k=99)),
        (TopP(0.05), functools.partial(kept_by_top_p, p=0.05)),
        (TopP(0.6), functools.partial(kept_by_top_p, p=0.6)),
        (TopP(0.9), functools.partial(kept_by_top_p, p=0.9)),
        (MinP(0.3), functools.partial(kept_by_min_p, p=0.3)),
        (MinP(1.0), functools.partial(kept_by_min_p, p=1.0)),
    ],
)
def test_what_a_cut_keeps(transform, kept):
    expected = np.stack([np.where(kept(row), row, -np.inf) for row in LOGITS])
    assert np.isfinite(expected).sum() > 0
    np.testing.assert_array_equal(transform(jnp.asarray(LOGITS, jnp.float32), SEEN), expected.astype(np.float32))


def test_temperature_and_repetition():
    logits = jnp.asarray(LOGITS, jnp.float32)
    assert_close(Temperature(0.7)(logits, SEEN), LOGITS / 0.7, FORWARD["float32"])
    penalised = np.where(SEEN, np.where(LOGITS > 0, LOGITS / 1.5, LOGITS * 1.5), LOGITS)
    assert_close(Repetition(1.5)(logits, jnp.asarray(SEEN)), penalised, FORWARD["float32"])


def test_transforms_come_in_the_usual_order_and_draws_have_their_frequencies():
    choice = sampling(temperature=0.5, top_k=4, top_p=0.9, min_p=0.05, repetition_penalty=1.3)
    assert choice.transforms == (Repetition(1.3), Temperature(0.5), TopK(4), TopP(0.9), MinP(0.05))
    assert sampling(temperature=0) == GREEDY
    row, seen = LOGITS[0], SEEN[0]
    row = np.where(seen, np.where(row > 0, row / 1.3, row * 1.3), row) / 0.5
    row = np.where(kept_by_top_k(row, 4), row, -np.inf)
    row = np.where(kept_by_top_p(row, 0.9), row, -np.inf)
    row = np.where(kept_by_min_p(row, 0.05), row, -np.inf)
    n = 20_000
    repeat = lambda a: jnp.broadcast_to(jnp.asarray(a)[None], (n, 9))
    keys = jax.vmap(jax.random.key)(jnp.arange(n))
    drawn = choice(repeat(np.float32(LOGITS[0])), repeat(seen), keys, jnp.zeros(n, jnp.int32))
    share = np.bincount(np.asarray(drawn), minlength=9) / n
    p = softmax(row)
    assert (np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / n)).all(), (share, p)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Below(0), "Below.n = 0: expected at least 1"),
        (lambda: Repetition(0), "Repetition.penalty = 0: expected more than 0"),
        (lambda: Temperature(-1), "Temperature.value = -1: expected more than 0"),
        (lambda: TopK(0), "TopK.k = 0: expected at least 1"),
        (lambda: TopP(1.5), "TopP.p = 1.5: expected more than 0, at most 1"),
        (lambda: MinP(0), "MinP.p = 0: expected more than 0, at most 1"),
        (lambda: sampling(temperature=0, top_k=3), "temperature = 0 with top_k = 3"),
    ],
)
def test_values_without_meaning_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def language_model(mixer, depth=2, head=1):
    """Small embeddings, so that the mixers decide; 11 ids in a table of 16 rows."""
    embedding = lambda inputs, width, rngs: models.TokenEmbedding(inputs, width, std=0.1, multiple=8, rngs=rngs)
    options = {"width": 16, "depth": depth, "mixers": (mixer,), "encoder": embedding}
    body = models.Backbone(models.Tokens(11, 64), **options, rngs=nnx.Rngs(0))
    return models.LanguageModel(body, vocab=11, tied=False, rngs=nnx.Rngs(head))


def written(model, prompts=PROMPTS, **kwargs):
    return np.concatenate(list(generate(model, prompts, **{"tokens": 7, "block": 4, **kwargs})), axis=1)


def recomputed(model, tokens):
    """Greedy, each token by a call of the whole sequences so far, filled up behind, without a carry."""
    f = jax.jit(lambda model, ids: model(ids).logits[..., :11])
    texts, rows = [list(prompt) for prompt in PROMPTS], np.zeros((3, 12), np.int32)
    for _ in range(tokens):
        for row, text in zip(rows, texts, strict=True):
            row[: len(text)] = text
        logits = np.asarray(f(model, rows))
        for text, scores in zip(texts, logits, strict=True):
            text.append(int(scores[len(text) - 1].argmax()))
    return np.array([text[-tokens:] for text in texts])


def held_to_recomputation(mixer, head=1):
    model = language_model(mixer, head=head)
    expected = recomputed(model, 7)
    assert len(np.unique(expected)) > 2, "the text says nothing"
    np.testing.assert_array_equal(written(model, sampling=GREEDY, piece=2), expected)


@pytest.mark.parametrize("name", ["Attention", "Mamba"])
def test_text_is_that_of_full_recomputation(name):
    held_to_recomputation(layers.MIXERS[name])


SMALL = {"Mamba2": functools.partial(layers.Mamba2, N=8, P=8), "S4": functools.partial(layers.S4, N=8, l_max=32)}


OFTEN = ("LRU", "Mamba2", "SGConv")  # of the long tests, in every run of them


@pytest.mark.full
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.large] * (n not in OFTEN)) for n in layers.MIXERS])
def test_text_of_every_mixer_is_that_of_full_recomputation(name):
    """All of them have a carry."""
    head = 3 if name in ("S4", "S4D") else 1  # one with which the text says something
    held_to_recomputation(SMALL.get(name, layers.MIXERS[name]), head)


class Counter(Mixer):
    """y follows from x and the number of its token: the cheapest mixer with a carry, of room for `capacity` tokens."""

    def __init__(self, width, *, rngs):
        del width, rngs

    def init_carry(self, batch, *, capacity=None):
        return {"number": jnp.zeros(batch, jnp.int32), "room": jnp.zeros((batch, capacity))}

    def __call__(self, x, carry=None, ctx=None):
        valid = jnp.ones(x.shape[:2], bool) if ctx.valid is None else ctx.valid
        carry = self.init_carry(x.shape[0], capacity=x.shape[1]) if carry is None else carry
        assert x.shape[1] <= carry["room"].shape[1], "as attention: a call may not be longer than the room"
        number = carry["number"][:, None] + jnp.cumsum(valid, axis=1)
        return layers.Out(jnp.sin(x * number[..., None]), carry | {"number": number[:, -1].astype(jnp.int32)}, {})


@pytest.fixture(scope="module")
def model():
    return language_model(Counter, depth=1)


def test_prompts_in_one_pass_and_in_pieces_are_the_same(model):
    expected = recomputed(model, 7)
    for piece in (None, 1, 3, 50):
        np.testing.assert_array_equal(written(model, sampling=GREEDY, piece=piece), expected)


def test_a_row_does_not_depend_on_the_others(model):
    choice = sampling(temperature=1.5, top_k=9, repetition_penalty=1.2)
    together = written(model, seeds=[5, 6, 7], sampling=choice)
    assert len(np.unique(together)) > 4
    np.testing.assert_array_equal(written(model, [PROMPTS[1]], seeds=[6], sampling=choice)[0], together[1])
    other = written(model, seeds=[5, 6, 8], sampling=choice, block=3)
    np.testing.assert_array_equal(other[:2], together[:2])
    assert (other[2] != together[2]).any()


def test_a_row_ends_at_a_stop_token_and_the_rest_goes_on(model):
    free = written(model, seeds=[1, 2, 3], tokens=20)
    stop = int(free[0, 4])
    expected = free.copy()
    for row in expected:
        if (at := np.flatnonzero(row == stop)).size:
            row[at[0] :] = NOTHING
    speeds = []
    found = written(model, seeds=[1, 2, 3], tokens=20, stop=(stop,), report=speeds.append)
    np.testing.assert_array_equal(found, expected[:, : found.shape[1]])
    assert (expected[:, found.shape[1] :] == NOTHING).all()
    assert speeds[0].written == (expected != NOTHING).sum()
    assert speeds[0].prompt == 9
    everything = written(model, tokens=20, stop=tuple(range(11)))
    assert everything.shape == (3, 4), "no block after the one in which all ended"
    assert (everything == NOTHING).all()


def test_the_penalty_sees_prompt_and_text_but_no_padding(model):
    """With a penalty that nothing survives, greedy text repeats no id, prompt included, while there are others."""
    ban = Sampling((lambda logits, seen: jnp.where(seen, -1e30, logits),), greedy=True)
    for prompt, row in zip(PROMPTS, written(model, tokens=6, sampling=ban), strict=True):
        assert len({*prompt, *row.tolist()}) == len(prompt) + 6
    # Id 0 is what padding holds: it must not count as seen.
    only = Sampling((lambda logits, seen: jnp.where(seen | (jnp.arange(16) > 0)[None], -1e30, logits),), greedy=True)
    assert written(model, tokens=1, sampling=only).ravel().tolist() == [0, 0, 0]


def test_padding_is_left():
    ids, valid = left_padded([[1, 2, 3], [4]], multiple=4)
    assert ids.tolist() == [[0, 1, 2, 3], [0, 0, 0, 4]]
    assert valid.tolist() == [[False, True, True, True], [False, False, False, True]]


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [[1], []]}, r"\[1, 0\] tokens"),
        ({"prompts": [[1], [3, 11]]}, "has the id 11: expected 0 to 10"),
        ({"prompts": [[-1]]}, "has the id -1"),
        ({"tokens": 0}, "tokens = 0"),
        ({"piece": 0}, "piece = 0"),
        ({"seeds": [1]}, "seeds are 1, prompts 3"),
    ],
)
def test_arguments_without_meaning_are_refused(model, kwargs, said):
    with pytest.raises(ValueError, match=said):
        written(model, **kwargs)


def test_speed_in_words():
    said = str(Speed(compiling=1.26, prompt=1000, reading=0.5, written=30, writing=2.0))
    assert said == "prompt 1,000 tokens, 2,000 tokens/s; text 30 tokens, 15 tokens/s; compiled in 1.3 s"
