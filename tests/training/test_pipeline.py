"""Batch k is a pure function of (seed, k), whatever part of it is asked for and wherever the stream begins."""

import functools
import itertools

import numpy as np
import pytest

from longwave.training.pipeline import evaluation_batches, stack, train_batches

ROWS = [{"id": np.int32(i), "x": np.full(3, i, np.float32)} for i in range(23)]


def take(batches, count):
    return [batch["id"].tolist() for batch in itertools.islice(batches, count)]


# What processes may hold of a batch of 8.
PARTS = {
    "halves": [range(4), range(4, 8)],
    "quarters": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "copies": [range(8), range(8)],  # the batch is replicated over the processes
    "overlapping": [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]],
    "permuted": [[6, 7, 0, 1], np.array([5, 4, 3, 2])],  # blocks in the order of devices on a torus
}


@pytest.mark.parametrize("name", PARTS)
def test_any_rows_are_those_of_the_one_global_batch(name):
    def same(make, count):
        whole = list(itertools.islice(make(), 7))
        assert len(whole) == count
        for rows in PARTS[name]:
            part = list(itertools.islice(make(rows=rows), 7))
            assert len(part) == count
            for mine, batch in zip(part, whole, strict=True):
                for key, value in batch.items():
                    np.testing.assert_array_equal(mine[key], value[list(rows)])

    same(functools.partial(train_batches, ROWS, batch_size=8, seed=3), 7)
    same(functools.partial(evaluation_batches, ROWS, batch_size=8), 3)


def test_a_process_whose_rows_all_fill_up_still_gets_the_last_batch():
    batches = list(evaluation_batches(ROWS[:17], batch_size=8, rows=[6, 7]))
    assert [batch["weight"].tolist() for batch in batches] == [[1, 1], [1, 1], [0, 0]]


def test_every_epoch_is_another_permutation():
    ids = list(itertools.chain(*take(train_batches(ROWS, batch_size=4, seed=0), 3 * 23)))
    epochs = [ids[i * 23 : (i + 1) * 23] for i in range(12)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 12


def test_seeds_differ_and_repeat():
    streams = {seed: take(train_batches(ROWS, batch_size=4, seed=seed), 30) for seed in range(4)}
    assert len({str(stream) for stream in streams.values()}) == 4
    assert take(train_batches(ROWS, batch_size=4, seed=2), 30) == streams[2]


@pytest.mark.parametrize("step", [1, 5, 6, 40])
def test_a_stream_begins_anywhere(step):
    whole = take(train_batches(ROWS, batch_size=4, seed=1), step + 4)
    assert take(train_batches(ROWS, batch_size=4, seed=1, step=step), 4) == whole[step:]
    assert take(evaluation_batches(ROWS, batch_size=4, step=min(step, 6)), 9) == [
        batch["id"].tolist() for batch in list(evaluation_batches(ROWS, batch_size=4))[step:]
    ]


@pytest.mark.parametrize("batch_size", [1, 4, 23, 64])
def test_evaluation_sees_every_row_once_in_order(batch_size):
    batches = list(evaluation_batches(ROWS, batch_size=batch_size))
    assert {len(batch["id"]) for batch in batches} == {batch_size}
    seen = np.concatenate([batch["id"][batch["weight"] > 0] for batch in batches])
    np.testing.assert_array_equal(seen, np.arange(23))
    assert sum(batch["weight"].sum() for batch in batches) == 23


def test_training_rows_all_count():
    batch = next(train_batches(ROWS, batch_size=64, seed=0))
    assert batch["weight"].dtype == np.float32
    assert batch["weight"].sum() == 64
    np.testing.assert_array_equal(batch["x"][:, 0], batch["id"])


def test_augmentation_fits_the_row_in_any_part():
    def crop(row, rng):
        return {"id": row["id"], "noise": rng.random()}

    make = lambda **part: train_batches(ROWS, batch_size=8, seed=3, augment=crop, **part)
    alone = [batch["noise"] for batch in itertools.islice(make(), 8)]
    parts = [[b["noise"] for b in itertools.islice(make(rows=rows), 8)] for rows in (range(4), range(4, 8))]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), alone)
    assert len(set(np.concatenate(alone).tolist())) == 64  # no number twice, neither in parts nor in epochs
    resumed = [batch["noise"] for batch in itertools.islice(make(step=5), 3)]
    np.testing.assert_array_equal(resumed, alone[5:])


def test_own_collate():
    def pad(rows):
        return {"total": np.array([row["x"].sum() for row in rows])}

    batch = next(evaluation_batches(ROWS, pad, batch_size=4))
    np.testing.assert_array_equal(batch["total"], [0, 3, 6, 9])
    assert set(stack(ROWS[:2])) == {"id", "x"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0: expected at least 1"),
        ({"batch_size": 4, "rows": [0, 4]}, "rows has 4: expected positions from 0 to batch_size - 1 = 3"),
        ({"batch_size": 4, "rows": [-1]}, "rows has -1"),
        ({"batch_size": 4, "rows": []}, "rows is empty"),
    ],
)
def test_bad_settings(bad, message):
    for make in (evaluation_batches, functools.partial(train_batches, seed=0)):
        with pytest.raises(ValueError, match=message):
            make(ROWS, **bad)
        with pytest.raises(ValueError, match="the data source is empty"):
            make([], batch_size=4)
