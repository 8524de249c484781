"""Rows of similar lengths together: the same promises as plain batches, less padding, the same result."""

import collections
import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from longwave import models
from longwave.kernels.partition import Axes
from longwave.layers.attention import Attention
from longwave.layers.norms import BatchNorm
from longwave.layers.s4 import S4
from longwave.layers.s4d import S4D
from longwave.training import sharding
from longwave.training.optimizer import AdamW
from longwave.training.pipeline import WINDOW, Buckets, evaluation_batches, train_batches
from longwave.training.program import build
from longwave.training.run import Run
from longwave.training.state import paths
from longwave.training.step import make_gradients
from tests.models.decay import Decay
from tests.tolerances import FORWARD, GRADIENT, assert_close
from tests.training.words import Curves, Words

LENGTHS = np.random.default_rng(0).integers(1, 100, 701)
BUCKETS = Buckets((20, 50, 70, 100), LENGTHS)


def collate(rows, *, length):
    """Rows are their own numbers."""
    return {"id": np.array(rows), "inputs": np.zeros((len(rows), length))}


train = functools.partial(train_batches, range(701), collate, batch_size=8, buckets=BUCKETS)
evaluation = functools.partial(evaluation_batches, range(701), collate, batch_size=8, buckets=BUCKETS)


def take(batches, count):
    return [(b["id"].tolist(), b["inputs"].shape[1], b["weight"].tolist()) for b in itertools.islice(batches, count)]


def test_a_batch_is_as_long_as_its_longest_row_needs():
    for batches in (train(seed=0), evaluation()):
        for ids, length, _ in take(batches, 88):
            assert length == min(size for size in BUCKETS.sizes if size >= max(LENGTHS[ids]))


def test_each_window_holds_the_rows_of_plain_batches():
    plain = train_batches(range(701), lambda rows: {"id": np.array(rows)}, batch_size=8, seed=4)
    for _ in range(4):  # windows run across ends of epochs: 512 rows of 701
        expected = np.concatenate([next(plain)["id"] for _ in range(WINDOW)])
        batches = take(train(seed=4, step=_ * WINDOW), WINDOW)
        assert sorted(itertools.chain(*(ids for ids, _, _ in batches))) == sorted(expected.tolist())
        longest = [max(LENGTHS[ids]) for ids, _, _ in batches]
        assert longest != sorted(longest)  # their order inside a window is random
        between = sorted(longest)
        assert all(min(LENGTHS[ids]) >= ([0, *between][between.index(max(LENGTHS[ids]))]) for ids, _, _ in batches)


def test_every_row_once_an_epoch():
    buckets = Buckets((50, 100), LENGTHS[:100])  # 12 batches of 8 a window; 25 windows are 24 epochs
    batches = train_batches(range(100), collate, batch_size=8, seed=1, buckets=buckets)
    ids = np.concatenate([next(batches)["id"] for _ in range(25 * 12)])
    assert collections.Counter(ids.tolist()) == dict.fromkeys(range(100), 24)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [6, 7, 0, 1], [5, 4]])
def test_any_rows_are_those_of_the_one_global_batch(rows):
    """Their length too, which the longest row decides, whoever holds it."""
    for make, count in ((functools.partial(train, seed=3), 70), (evaluation, 88)):
        whole, part = take(make(), count), take(make(rows=rows), count)
        assert len(whole) == len(part) == count
        for (ids, length, weight), (own, own_length, own_weight) in zip(whole, part, strict=True):
            assert own == [ids[row] for row in rows]
            assert own_weight == [weight[row] for row in rows]
            assert own_length == length


def test_a_stream_begins_anywhere_and_repeats():
    whole = take(train(seed=2), 140)
    assert take(train(seed=2), 140) == whole
    for step in (1, 63, 64, 129):
        assert take(train(seed=2, step=step), 4) == whole[step : step + 4]
    assert take(train(seed=5), 140) != whole
    assert take(evaluation(step=85), 9) == take(evaluation(), 99)[85:]


def test_evaluation_sees_every_row_once():
    batches = take(evaluation(), 99)
    assert len(batches) == 88
    seen = [i for ids, _, weight in batches for i, w in zip(ids, weight, strict=True) if w]
    assert sorted(seen) == list(range(701))
    assert [w for _, _, weight in batches for w in weight] == [1.0] * 701 + [0.0] * 3


def test_fewer_rows_than_a_batch():
    """No window is longer than an epoch, else a batch would be full of one row."""
    small = Buckets((4, 9), np.arange(1, 7))
    batches = list(itertools.islice(train_batches(range(6), collate, batch_size=4, seed=0, buckets=small), 9))
    assert all(len(set(batch["id"].tolist())) == 4 for batch in batches[::3])
    assert collections.Counter(np.concatenate([b["id"] for b in batches]).tolist()) == dict.fromkeys(range(6), 6)


def test_padding():
    plain, bucketed = BUCKETS.padding
    assert plain == pytest.approx(1 - LENGTHS.sum() / (701 * 100))
    own = sum(min(size for size in BUCKETS.sizes if size >= n) for n in LENGTHS)
    assert bucketed == pytest.approx(1 - LENGTHS.sum() / own)
    real = positions = 0
    for ids, length, _ in take(train(seed=0), 700):
        real, positions = real + LENGTHS[ids].sum(), positions + 8 * length
    assert bucketed < 1 - real / positions < bucketed + 0.03 < plain  # in batches, little is lost


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"sizes": ()}, r"buckets = \(\): expected positive lengths"),
        ({"sizes": (50, 20, 100)}, "each greater than the one before"),
        ({"sizes": (0, 100)}, "expected positive lengths"),
        ({"sizes": (20, 50)}, "a row has 99 positions, more than the last"),
    ],
)
def test_bad_buckets(bad, message):
    with pytest.raises(ValueError, match=message):
        Buckets(**{"lengths": LENGTHS, **bad})


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match="lengths of 701 rows, the source 700"):
        train_batches(range(700), collate, batch_size=4, seed=0, buckets=BUCKETS)
    with pytest.raises(ValueError, match="cannot be changed"):
        train(seed=0, augment=lambda row, rng: row)
    with pytest.raises(ValueError, match="batch_size = 0"):
        train_batches(range(701), collate, batch_size=0, seed=0, buckets=BUCKETS)


def test_tasks():
    task = Words(buckets=(16, 40))
    assert {batch["inputs"].shape for batch in task.stream("test", batch_size=4)} == {(4, 16), (4, 40)}
    plain = {shape.shape for shape in task.batch_spec(4).values()}
    assert plain == {shape.shape for shape in Words().batch_spec(4).values()}
    record = task.fingerprint()
    lengths = task.lengths("train")
    own = np.where(lengths <= 16, 16, 40)
    assert record.pop("padding") == f"{1 - lengths.mean() / 40:.3f} -> {1 - lengths.sum() / own.sum():.3f}"
    assert record == Words().fingerprint()
    with pytest.raises(ValueError, match=r"Words.buckets = \(16, 30\): expected the task's length at the end, 40"):
        Words(buckets=(16, 30))
    with pytest.raises(ValueError, match=r"Words.buckets = \(16, 16, 40\): expected positive"):
        Words(buckets=(16, 16, 40))
    with pytest.raises(ValueError, match="its rows are of one length"):
        Curves(buckets=(16, 40)).stream("train", batch_size=4)


def make_run(mixer, **changes):
    def backbone(inputs, *, rngs):
        options = {"width": 4, "depth": 2, "mixers": (mixer,), "norm": BatchNorm, "prenorm": False, "scan": True}
        return models.Backbone(inputs, **options, rngs=rngs)

    settings = {"task": Words(), "optimizer": AdamW(lr=0.01), "steps": 10, "batch_size": 8, "mesh": {"data": 1}}
    return Run(**settings | {"backbone": backbone} | changes)


MIXERS = {
    "S4D": functools.partial(S4D, N=4, bidirectional=True),
    "S4": functools.partial(S4, N=4, l_max=40, bidirectional=True),
    "Attention": functools.partial(Attention, heads=2, causal=False),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] * (n != "Attention")) for n in MIXERS])
def test_shorter_padding_changes_nothing(name):
    """Loss, gradient and the statistics of BatchNorm of the same rows, padded to 40 and to 24."""
    run = make_run(MIXERS[name])
    program = build(run, jax.devices()[:1])
    rows = [row for row in run.task.rows("train") if len(row[0]) <= 24][:8]
    weight = np.ones(8, np.float32)
    gradients = jax.jit(make_gradients(program.model, run.task, run, Axes()))
    with jax.set_mesh(program.mesh):
        state, key = program.init(program.key()), program.key()
        short, long = (gradients(state, {**run.task.collate(rows, length=t), "weight": weight}, key) for t in (24, 40))
    assert_close(short[0].loss, long[0].loss, FORWARD["float32"])
    for part, tolerance in ((1, GRADIENT["float32"]), (2, FORWARD["float32"])):
        assert paths(short[part]) == paths(long[part]) != []
        leaves = zip(paths(long[part]), *map(jax.tree.leaves, (short[part], long[part])), strict=True)
        for path, actual, expected in leaves:
            assert_close(actual, expected, tolerance, path)


def test_one_compilation_a_bucket():
    run = make_run(Decay, task=Words(buckets=(16, 40)))
    program = build(run, jax.devices()[:1])
    with jax.set_mesh(program.mesh):
        key, seen = program.key(), set()
        state = program.init(key)
        for batch in itertools.islice(program.stream("train"), 30):
            seen.add(batch["inputs"].shape)
            state, metrics = program.train_step(state, program.global_batch(batch), key)
        assert seen == {(8, 16), (8, 40)}
        assert program.train_step._cache_size() == 2
        assert np.isfinite(metrics["loss"])
        assert metrics["skipped"] == 0
        scores = program.evaluate(state, "test")
        plain = dataclasses.replace(program, run=dataclasses.replace(run, task=Words())).evaluate(state, "test")
    assert scores["accuracy"] == plain["accuracy"]
    assert_close(scores["loss"], plain["loss"], FORWARD["float32"])


def test_a_process_places_its_rows_of_a_short_batch():
    mesh = sharding.make_mesh({"data": 4}, jax.devices()[:4])
    spec = {"inputs": jax.ShapeDtypeStruct((8, 40), np.int32, sharding=sharding.batch_sharding(mesh))}
    rows = np.arange(8 * 16).reshape(8, 16)
    array = sharding.to_global({"inputs": rows}, spec, [range(8)])["inputs"]
    assert array.sharding == spec["inputs"].sharding
    np.testing.assert_array_equal(array, rows)
