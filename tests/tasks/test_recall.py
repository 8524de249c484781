"""MQAR, induction heads, what all recall tasks share, and the grid: what is drawn, asked and counted."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longwave import layers, models
from longwave.layers.mixer import Context
from longwave.models.heads import TokenClassifier
from longwave.tasks.recall.batches import distinct
from longwave.tasks.recall.grid import Grid, curriculum, mixed
from longwave.tasks.recall.induction_heads import InductionHeads
from longwave.tasks.recall.mqar import MQAR
from longwave.tasks.recall.passkey import Passkey
from longwave.tasks.recall.recall import Group, recall_sums
from tests.tolerances import FORWARD, assert_close

SMALL = MQAR(vocab=64, length=32, pairs=5, sizes=(50, 10, 13))
PAIRS = ((8, 1), (12, 3), (16, 2))
GRID = Grid(
    task=MQAR(vocab=32),
    fields=("length", "pairs"),
    train=PAIRS[:2],
    test=PAIRS,
    rows=(12, 8),
    sizes=(3, 5),
)


def rows_of(batch):
    return zip(batch["inputs"], batch["position"], batch["label"], strict=True)


@pytest.mark.parametrize("filler", [True, False])
def test_mqar_rows(filler):
    task = MQAR(vocab=64, length=32, pairs=5, random_non_queries=filler)
    for tokens, position, label in rows_of(task.draw(np.random.default_rng(0), 200)):
        keys, values = tokens[0:10:2].tolist(), tokens[1:10:2].tolist()
        assert len(set(keys)) == len(set(values)) == 5
        assert 1 <= min(keys) <= max(keys) < 32 <= min(values) <= max(values) < 64
        assert len(set(position.tolist())) == 5
        assert np.all((position >= 10) & (position < 32) & (position % 2 == 0))
        look_up = dict(zip(keys, values, strict=True))
        assert [look_up[token] for token in tokens[position].tolist()] == label.tolist()
        rest = np.delete(tokens[10:], position - 10)
        assert np.all(rest == 0) or filler
        assert np.all((rest >= 0) & (rest < 64))


def test_mqar_ids_are_uniform():
    arrays = MQAR(vocab=16, length=16, pairs=2).draw(np.random.default_rng(0), 20_000)
    keys, values = arrays["inputs"][:, 0:4:2], arrays["inputs"][:, 1:4:2]
    for ids, low, high in ((keys, 1, 8), (values, 8, 16)):
        for column in ids.T:
            share = np.bincount(column, minlength=16)[low:high] / len(column)
            assert np.abs(share - 1 / (high - low)).max() < 0.012  # five standard errors


def test_mqar_slots_follow_the_power_law():
    """Against the probabilities of a draw without replacement, worked out term by term."""
    arrays = MQAR(vocab=64, length=12, pairs=2, power=0.3).draw(np.random.default_rng(0), 40_000)
    slots = (arrays["position"] - 4) // 2
    p = 0.3 * np.arange(1, 5) ** (0.3 - 1.0)
    p /= p.sum()
    first = p
    second = np.array([sum(p[i] * p[j] / (1 - p[i]) for i in range(4) if i != j) for j in range(4)])
    for column, expected in zip(slots.T, (first, second), strict=True):
        share = np.bincount(column, minlength=4) / len(column)
        np.testing.assert_allclose(share, expected, atol=0.0125)


def test_distinct_orders_are_uniform():
    drawn = distinct(np.random.default_rng(0), 24_000, 3, 4)
    assert all(len(set(row)) == 3 for row in drawn.tolist())
    counts = np.unique(drawn @ np.array([16, 4, 1]), return_counts=True)[1]
    assert len(counts) == 24  # every ordered choice of three out of four
    assert np.abs(counts - 1000).max() < 160  # five standard deviations


def test_induction_heads_rows():
    task, places = InductionHeads(vocab=8, length=9), set()
    for tokens, position, label in rows_of(task.draw(np.random.default_rng(0), 500)):
        special = np.flatnonzero(tokens == 7).tolist()
        assert len(special) == 2
        assert special[1] == position[0] == 8
        assert label[0] == tokens[special[0] + 1] < 7
        places.add(special[0])
    assert places == set(range(6))


FRESH = InductionHeads(length=12, sizes=(10, 13), epoch=50)


@pytest.mark.parametrize("task", [SMALL, FRESH], ids=lambda t: t.name)
def test_streams(task):
    assert task.splits == {"train": 50, "valid": 10, "test": 13}
    batches = list(task.stream("test", batch_size=4))
    assert [batch["weight"].sum() for batch in batches] == [4, 4, 4, 1]
    again = next(iter(task.stream("test", batch_size=13)))
    np.testing.assert_array_equal(np.concatenate([b["inputs"] for b in batches])[:13], again["inputs"])
    assert not np.array_equal(next(task.stream("valid", batch_size=4))["inputs"], batches[0]["inputs"])


LENGTHS = Grid(task=InductionHeads(vocab=8), fields=("length",), train=((8,), (9,)), test=((8,),), rows=(4, 4))


@pytest.mark.parametrize("task", [SMALL, FRESH, GRID, LENGTHS], ids=["fixed", "fresh", "fixed grid", "fresh grid"])
def test_training_batch_k_is_a_function_of_seed_and_k(task):
    stream = task.stream("train", batch_size=4, seed=1)
    third = [next(stream) for _ in range(3)][2]
    part = next(task.stream("train", batch_size=4, seed=1, step=2, rows=[3, 1]))
    for name, spec in task.batch_spec(4).items():
        assert (third[name].dtype, len(third[name])) == (spec.dtype, 4)
        assert third[name].shape[1:] == spec.shape[1:] or (isinstance(task, Grid) and third[name].shape < spec.shape)
        np.testing.assert_array_equal(part[name], third[name][[3, 1]])
    other = next(task.stream("train", batch_size=4, seed=2, step=2))["inputs"]
    assert not np.array_equal(other, third["inputs"])


def test_seeds_tell_sets_apart():
    tasks = [SMALL, InductionHeads(length=12)]
    tasks += [dataclasses.replace(task, seed=1) for task in tasks]
    grids = [dataclasses.replace(GRID, task=task) for task in (GRID.task, dataclasses.replace(GRID.task, seed=1))]
    assert len({task.fingerprint()["digest"] for task in (*tasks, *grids)}) == 6


def test_baselines():
    task = InductionHeads(vocab=4, length=16, sizes=(500, 500))
    test = task.draw(np.random.default_rng((2, 0)), 500)  # the set of split 2, seed 0
    hits = [np.bincount(row[row != 3], minlength=3).argmax() == answer[0] for row, _, answer in rows_of(test)]
    assert task.baselines["most frequent in the row"] == np.mean(hits)
    assert abs(task.baselines["majority"] - 1 / 3) < 0.1
    assert SMALL.baselines["a value of the row"] == 0.2
    assert SMALL.row({"test": {"accuracy": 1.0}}) == {"task": "mqar-32-5-vocab64", "test": 1.0, **SMALL.baselines}
    # One, three and two questions a row: a guess is right once, once and once in a row.
    assert GRID.baselines["a value of the row"] == pytest.approx((1 + 1 + 1) / (1 + 3 + 2))


def test_a_grid_asks_every_setting():
    seen = [(batch["inputs"].shape, batch["weight"].sum()) for batch in GRID.stream("test", batch_size=4)]
    assert seen == [((4, t), weight) for t, _ in PAIRS for weight in (4, 1)]
    assert GRID.splits == {"train": 20, "valid": 9, "test": 15}
    assert (GRID.inputs.length, GRID.batch_spec(4)["inputs"].shape) == (16, (4, 12))
    assert len(list(GRID.stream("test", batch_size=4, step=4))) == 2


def test_fixed_batches_of_a_grid_come_back_in_another_order():
    stream = GRID.stream("train", batch_size=4, seed=0)
    first, second = ([next(stream)["inputs"].tobytes() for _ in range(5)] for _ in range(2))
    assert len(set(first)) == 5
    assert sorted(first) == sorted(second)
    assert first != second


def test_orders():
    assert sorted(mixed((3, 2), 7, k) for k in range(5)) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    turns = [curriculum((3, 4), 7, k, epochs=2) for k in range(14)]
    assert [setting for setting, _ in turns] == [0] * 6 + [1] * 8
    epochs = (turns[:3], turns[3:6], turns[6:10], turns[10:])
    assert [sorted(number for _, number in epoch) for epoch in epochs] == [[0, 1, 2]] * 2 + [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MQAR(vocab=7), "vocab = 7"),
        (lambda: MQAR(vocab=8, pairs=4), "vocab = 8"),
        (lambda: MQAR(length=64, pairs=17), "length = 64, pairs = 17"),
        (lambda: MQAR(power=0.0), "power = 0.0"),
        (lambda: MQAR(sizes=(1, 0, 1)), "sizes"),
        (lambda: InductionHeads(length=3), "length = 3"),
        (lambda: InductionHeads(seed=-1), "seed = -1"),
        (lambda: InductionHeads(chunk=0), "chunk = 0"),
        (lambda: Passkey(sizes=(10, 12)), "multiples of 5"),
        (lambda: dataclasses.replace(GRID, fields=("lenght", "pairs")), "lenght"),
        (lambda: dataclasses.replace(GRID, fields=("length", "seed")), "seed"),
        (lambda: dataclasses.replace(GRID, train=((8,),)), r"Grid.train = \(\(8,\),\)"),
        (lambda: dataclasses.replace(GRID, rows=(1,)), "Grid.rows"),
        (lambda: dataclasses.replace(GRID, sizes=(3, 0)), "Grid.sizes"),
        (
            lambda: dataclasses.replace(GRID, fields=("vocab", "pairs"), train=((32, 4),) * 2, test=((16, 4),)),
            "vocabulary",
        ),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sums_count_whole_answers_and_groups():
    """Four tokens asked in two answers of two; against a loop over rows."""
    rng = np.random.default_rng(0)
    logits, cell = rng.normal(size=(40, 4, 3)), np.arange(40) % 4
    label = np.where(rng.random((40, 4)) < 0.7, logits.argmax(2), rng.integers(0, 3, (40, 4)))
    label[5, 2:] = -1  # not asked
    weight = (np.arange(40) != 7).astype(float)
    p = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    loss = asked = right = 0
    of_cell = dict.fromkeys(range(4), 0)
    for i, j in itertools.product(range(40), (0, 2)):
        if weight[i] and label[i, j] >= 0:
            loss -= np.log([p[i, k, label[i, k]] for k in (j, j + 1)]).sum()
            asked += 2
            hit = 2 * all(logits[i, k].argmax() == label[i, k] for k in (j, j + 1))
            right += hit
            of_cell[cell[i]] += hit
    batch = {"label": label, "cell": cell, "weight": np.float32(weight)}
    groups = {"some": Group((0, 2), 0.5), "last": Group((3,), 0.25)}
    sums = jax.jit(lambda x, y: recall_sums(x, y, answer=2, groups=groups))(np.float32(logits), batch)
    assert_close(sums.loss, loss, FORWARD["float32"])
    assert (sums.weight, sums.metrics["accuracy"]) == (asked, right)
    assert sums.metrics["accuracy/some"] == 2 * (of_cell[0] + of_cell[2])
    assert sums.metrics["accuracy/last"] == 4 * of_cell[3]


class Remember(nnx.Module):
    """A backbone whose output is a one-hot of its token."""

    width = 64

    def __call__(self, inputs, carry, ctx, train):
        assert ctx.valid is None
        return jax.nn.one_hot(inputs, 64), None, (), None


def test_logits_at_the_questions_are_those_of_every_token():
    model = SMALL.head(Remember(), rngs=nnx.Rngs(0))
    batch = {name: jnp.asarray(value) for name, value in next(SMALL.stream("test", batch_size=8)).items()}
    everywhere = np.asarray(model(batch["inputs"])[0], np.float64)
    asked, _ = model(batch["inputs"], position=batch["position"])
    at = np.take_along_axis(everywhere, np.asarray(batch["position"])[..., None], axis=1)
    assert everywhere.shape == (8, 32, 64)
    assert_close(asked, at, FORWARD["float32"])
    sums = jax.jit(lambda batch: SMALL.loss(model, batch, None))(batch)
    log_p = at - np.log(np.exp(at).sum(2, keepdims=True))
    label = np.asarray(batch["label"])[..., None]
    assert_close(sums.loss, -np.take_along_axis(log_p, label, axis=2).sum(), FORWARD["float32"])
    assert sums.weight == 8 * 5


class Oracle(nnx.Module):
    """Says what stands in a table at each position of the longest row: right at some settings, wrong at others."""

    def __call__(self, inputs, ctx, train, position):
        keys = jnp.take_along_axis(inputs, position, axis=1)
        pairs = inputs[:, : 2 * position.shape[1]].reshape(len(inputs), -1, 2)
        value = ((pairs[:, None, :, 0] == keys[..., None]) * pairs[:, None, :, 1]).max(2)
        return jax.nn.one_hot(jnp.where(inputs.shape[1] == 12, 0, value), 32), ()


def test_a_grid_reports_each_setting():
    """The look-up is right but at 12 tokens, where it answers 0: half of all answers are asked there."""
    total = None
    for batch in GRID.stream("test", batch_size=4):
        sums = jax.jit(lambda batch: GRID.loss(Oracle(), batch, None))(dict(batch))
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    result = {name: float(value / total.weight) for name, value in total.metrics.items()}
    assert total.weight == 5 * (1 + 3 + 2)
    expected = {"": 0.5, "/length=8,pairs=1": 1, "/length=12,pairs=3": 0, "/length=16,pairs=2": 1}
    assert result == pytest.approx({f"accuracy{name}": value for name, value in expected.items()})
    row = GRID.row({"test": result})
    assert (row["test"], row["length=12,pairs=3"]) == (0.5, 0)
    batch = next(GRID.stream("train", batch_size=4))
    sums = jax.eval_shape(lambda batch: GRID.loss(Oracle(), batch, jax.random.key(0)), dict(batch))
    assert set(sums.metrics) == {"accuracy"}


def test_a_backbone_that_changes_the_length_is_refused():
    class Halved(Remember):
        def __call__(self, inputs, carry, ctx, train):
            return jax.nn.one_hot(inputs[:, ::2], 64), None, (), None

    with pytest.raises(ValueError, match="16 steps of 32 tokens"):
        TokenClassifier(Halved(), classes=3, rngs=nnx.Rngs(0))(jnp.zeros((1, 32), jnp.int32))


def test_tied_logits_are_products_with_the_embeddings():
    task = dataclasses.replace(SMALL, tied=True)
    make = lambda encoder: models.Backbone(
        task.inputs, width=8, depth=1, mixers=(layers.LRU,), encoder=encoder, rngs=nnx.Rngs(0)
    )
    model = task.head(make(models.TokenEmbedding), rngs=nnx.Rngs(1))
    assert not hasattr(model.out, "kernel")
    ids, position = jnp.arange(24).reshape(2, 12), jnp.array([[3, 11], [0, 5]])
    y = np.asarray(model.backbone(ids, None, Context()).y, np.float64)
    table = np.asarray(model.backbone.encoder.embedding[...], np.float64)
    want = np.take_along_axis(y, np.asarray(position)[..., None], 1) @ table[: task.vocab].T
    assert_close(model(ids, position=position)[0], want, FORWARD["float32"])
    with pytest.raises(ValueError, match="tied: the backbone's encoder has no table"):
        task.head(make(models.OneHotEncoder), rngs=nnx.Rngs(1))
