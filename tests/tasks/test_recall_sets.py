"""Set disjointness and reading twice, row by row."""

import dataclasses

import numpy as np
import pytest

from longwave.tasks.recall.mqar import MQAR
from longwave.tasks.recall.read_twice import ReadTwice, read_twice
from longwave.tasks.recall.set_disjointness import SetDisjointness

SMALL = SetDisjointness(vocab=24, first=3, second=5, sizes=(40, 8, 8))


def test_rows_of_set_disjointness():
    arrays = SMALL.draw(np.random.default_rng(0), 300)
    places, seen = set(), set()
    for row, position, label in zip(*(arrays[n].tolist() for n in ("inputs", "position", "label")), strict=True):
        first, second = row[1:4], row[5:10]
        assert (row[0], row[4], row[10]) == (1, 2, 3)
        assert position == [10]
        assert set(first) & set(second) == set(label)
        assert len(set(first)) == 3
        assert len(set(second)) == 5
        assert set(first) <= set(range(4, 14))
        assert set(second) - set(label) <= set(range(14, 24))
        places.add((first.index(label[0]), second.index(label[0])))
        seen.update(row)
    assert len(places) == 15
    assert seen == set(range(1, 24))
    assert SMALL.baselines["an id of the first set"] == 1 / 3


def test_a_context_is_read_twice():
    rows = MQAR(vocab=16, length=16, pairs=2).draw(np.random.default_rng(0), 50)
    twice = read_twice(rows, 4)
    for row, again, position, asked, label in zip(
        rows["inputs"], twice["inputs"], rows["position"], twice["position"], twice["label"], strict=True
    ):
        assert again.tolist() == [*row[:4], *row]
        assert again[asked].tolist() == row[position].tolist()
        assert [row[row[:4].tolist().index(row[p]) + 1] for p in position] == label.tolist()
    with pytest.raises(ValueError, match="a question stands at 4"):
        read_twice(rows | {"position": np.full_like(rows["position"], 4)}, 5)


def test_the_task_that_is_read_twice_is_the_task():
    """Its sets are those of the task, twice; it reports under its own name."""
    task = ReadTwice(task=SMALL, context=10)
    assert (task.name, task.inputs.length, task.fresh, task.questions) == ("disjointness-3-5-twice", 21, False, 1)
    batch, plain = (next(t.stream("test", batch_size=8)) for t in (task, SMALL))
    assert batch["inputs"][:, 10:].tolist() == plain["inputs"].tolist()
    assert batch["label"].tolist() == plain["label"].tolist()
    assert task.fingerprint() != SMALL.fingerprint()
    assert dataclasses.replace(task, seed=1).fingerprint() != task.fingerprint()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SetDisjointness(vocab=24, first=11), "first = 11"),
        (lambda: SetDisjointness(second=0), "second = 0"),
        (lambda: SetDisjointness(sizes=(1, 1)), "sizes"),
        (lambda: ReadTwice(task=SMALL, context=12), "context = 12"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
