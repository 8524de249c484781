"""Batches: a data source, a collate function, and the promise that batch k is a pure function of (seed, k).

Which rows of a global batch a process needs depends on the mesh; it names their positions and gets these alone, and
every process gets equally many batches. The global batches are the same however they are divided, and what is drawn for
a row fits the row everywhere. The position in the stream is the number of the next batch, so that a checkpoint stores
nothing but its step. Reading and collation run in threads ahead of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

Row = Any
Collate = Callable[[Sequence[Row]], dict[str, np.ndarray]]

# Two threads hide the latency of a read; more only contend for the interpreter's lock with the loop itself.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


class Source(Protocol):
    """A random-access data set: TFDS's `as_data_source`, a list of rows, any object with these methods."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


def stack(rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The collate function of rows that are dicts of arrays of equal shapes."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def train_batches(
    source: Source,
    collate: Collate = stack,
    *,
    batch_size: int,
    seed: int,
    step: int = 0,
    rows: Sequence[int] | None = None,
    augment: Callable[[Row, np.random.Generator], Row] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches from batch `step` on, shuffled anew in every epoch; batches run across ends of epochs.

    rows: the positions in the global batch of what is yielded, in this order; None: all.
    augment: a random change of one row; its generator depends on seed and position in the stream only.
    """
    stream = _dataset(source).seed(seed).shuffle().repeat()
    if augment is not None:
        stream = stream.random_map(augment)  # of the whole stream: after `rows`, all parts would draw the same numbers
    return _iterate(_Batches(stream, collate, batch_size, rows), step)


def evaluation_batches(
    source: Source,
    collate: Collate = stack,
    *,
    batch_size: int,
    step: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every row once, in order; the last batch is filled up with rows of weight 0. `rows` as in `train_batches`."""
    return _iterate(_Batches(_dataset(source), collate, batch_size, rows), step)


def _dataset(source: Source) -> grain.MapDataset:
    if not len(source):
        raise ValueError("the data source is empty")
    return grain.MapDataset.source(source)


class _Batches(grain.MapDataset):
    """Element k is the given rows of global batch k, with "weight" 0 for what only fills it up."""

    def __init__(self, stream: grain.MapDataset, collate: Collate, batch_size: int, rows: Sequence[int] | None):
        super().__init__(stream)
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: expected at least 1")
        rows = range(batch_size) if rows is None else tuple(rows)
        if not rows:
            raise ValueError("rows is empty: expected at least one position in the batch, or None for all")
        if wrong := [row for row in rows if not 0 <= row < batch_size]:
            raise ValueError(f"rows has {wrong[0]}: expected positions from 0 to batch_size - 1 = {batch_size - 1}")
        self._collate, self._batch_size, self._rows = collate, batch_size, rows

    def __len__(self) -> int:
        return -(-len(self._parent) // self._batch_size)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        positions, end = [index * self._batch_size + row for row in self._rows], len(self._parent)
        batch = self._collate([self._parent[min(position, end - 1)] for position in positions])
        return {**batch, "weight": np.array([position < end for position in positions], np.float32)}


def _iterate(batches: grain.MapDataset, step: int) -> Iterator[dict[str, np.ndarray]]:
    iterator = iter(batches.to_iter_dataset(_READ))
    iterator.set_state({"next_index": step})
    return iterator
