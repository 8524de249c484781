"""Batch k is a pure function of (seed, k), whatever the hosts and wherever the stream begins."""

import itertools

import numpy as np
import pytest

from longwave.training.pipeline import evaluation_batches, stack, train_batches

ROWS = [{"id": np.int32(i), "x": np.full(3, i, np.float32)} for i in range(23)]


def take(batches, count):
    return [batch["id"].tolist() for batch in itertools.islice(batches, count)]


@pytest.mark.parametrize("hosts", [2, 4])
def test_same_global_batches_on_any_number_of_hosts(hosts):
    alone = take(train_batches(ROWS, batch_size=8, seed=3), 7)
    parts = [take(train_batches(ROWS, batch_size=8, seed=3, host=h, hosts=hosts), 7) for h in range(hosts)]
    assert [list(itertools.chain(*step)) for step in zip(*parts, strict=True)] == alone
    alone = list(evaluation_batches(ROWS, batch_size=8))
    parts = [list(evaluation_batches(ROWS, batch_size=8, host=h, hosts=hosts)) for h in range(hosts)]
    assert {len(part) for part in parts} == {3}
    for k, batch in enumerate(alone):
        for name, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[k][name] for part in parts]), value)


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


def test_augmentation_fits_the_row_on_any_host():
    def crop(row, rng):
        return {"id": row["id"], "noise": rng.random()}

    make = lambda **part: train_batches(ROWS, batch_size=8, seed=3, augment=crop, **part)
    alone = [batch["noise"] for batch in itertools.islice(make(), 8)]
    parts = [[b["noise"] for b in itertools.islice(make(host=h, hosts=2), 8)] for h in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), alone)
    assert len(set(np.concatenate(alone).tolist())) == 64  # no number twice, neither on hosts nor in epochs
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
        ({"batch_size": 6, "hosts": 4}, "batch_size = 6: expected a positive multiple of hosts = 4"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"batch_size": 4, "host": 2, "hosts": 2}, "host = 2: expected 0 to 1"),
    ],
)
def test_bad_settings(bad, message):
    for make in (evaluation_batches, lambda rows, **kw: train_batches(rows, seed=0, **kw)):
        with pytest.raises(ValueError, match=message):
            make(ROWS, **bad)
    with pytest.raises(ValueError, match="empty"):
        evaluation_batches([], batch_size=4)
