"""Batches: a data source, a collate function, and the promise that batch k is a pure function of (seed, k).

Host h of n holds rows h * B / n to (h + 1) * B / n of every global batch, in the order that one host alone
would have: the same global batches on any number of hosts, and what is drawn for a row fits the row
everywhere. The position in the stream is the number of the next batch, so that a checkpoint stores nothing
but its step. Reading and collation run in threads ahead of the loop.
"""

from __future__ import annotations

import sys
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
    host: int = 0,
    hosts: int = 1,
    augment: Callable[[Row, np.random.Generator], Row] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches from batch `step` on, shuffled anew in every epoch; batches run across ends of epochs.

    augment: a random change of one row; its generator depends on seed and position in the stream only.
    """
    rows = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if augment is not None:
        rows = rows.random_map(augment)  # before the hosts part: after it, all would draw the same numbers
    return _iterate(_Batches(rows, len(source), None, collate, batch_size, host, hosts), step)


def evaluation_batches(
    source: Source,
    collate: Collate = stack,
    *,
    batch_size: int,
    step: int = 0,
    host: int = 0,
    hosts: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Every row once, in order. The last batch is filled up with rows of weight 0; hosts get equally many."""
    rows = grain.MapDataset.source(source)
    return _iterate(_Batches(rows, len(source), len(source), collate, batch_size, host, hosts), step)


class _Batches(grain.MapDataset):
    """Element k is this host's part of global batch k, with "weight" 0 for what only fills it up."""

    def __init__(
        self,
        rows: grain.MapDataset,
        size: int,
        end: int | None,
        collate: Collate,
        batch_size: int,
        host: int,
        hosts: int,
    ):
        super().__init__(rows)
        if size < 1:
            raise ValueError("the data source is empty")
        if batch_size < 1 or hosts < 1 or batch_size % hosts:
            raise ValueError(f"batch_size = {batch_size}: expected a positive multiple of hosts = {hosts}")
        if not 0 <= host < hosts:
            raise ValueError(f"host = {host}: expected 0 to {hosts - 1}")
        self._end, self._collate, self._batch_size = end, collate, batch_size
        self._local, self._first = batch_size // hosts, host * (batch_size // hosts)

    def __len__(self) -> int:
        return sys.maxsize if self._end is None else -(-self._end // self._batch_size)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        start = index * self._batch_size + self._first
        end = start + self._local if self._end is None else self._end
        positions = range(start, start + self._local)
        rows = [self._parent[min(position, end - 1)] for position in positions]
        weight = np.array([position < end for position in positions], np.float32)
        return {**self._collate(rows), "weight": weight}


def _iterate(batches: grain.MapDataset, step: int) -> Iterator[dict[str, np.ndarray]]:
    iterator = iter(batches.to_iter_dataset(_READ))
    iterator.set_state({"next_index": step})
    return iterator
