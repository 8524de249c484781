"""Rows of the recall tasks: fixed sets, fresh batches, draws without replacement."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Int

from longwave.training.task import Batch

SPLITS = ("train", "valid", "test")
Arrays = dict[str, np.ndarray]


def batch_spec(batch_size: int, length: int, questions: int) -> dict[str, jax.ShapeDtypeStruct]:
    struct = jax.ShapeDtypeStruct
    return {
        "inputs": struct((batch_size, length), np.int32),
        "position": struct((batch_size, questions), np.int32),
        "label": struct((batch_size, questions), np.int32),
        "cell": struct((batch_size,), np.int32),
        "weight": struct((batch_size,), np.float32),
    }


def int32(**arrays: np.ndarray) -> Arrays:
    return {name: np.ascontiguousarray(array, np.int32) for name, array in arrays.items()}


class Rows:
    """The rows of a fixed set, for the pipeline."""

    def __init__(self, arrays: Arrays):
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays["inputs"])

    def __getitem__(self, index: int) -> Arrays:
        return {name: array[index] for name, array in self.arrays.items()}


def fresh_batches(
    draw: Callable[[np.random.Generator, int], Arrays],
    *,
    batch_size: int,
    entropy: Sequence[int],
    step: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Endless batches of new examples. Batch k is drawn whole from (entropy, k), whichever rows a process holds."""
    for k in itertools.count(step):
        yield whole_batch(draw(np.random.default_rng((*entropy, k)), batch_size), rows)


def whole_batch(arrays: Arrays, rows: Sequence[int] | None) -> Batch:
    """Those rows of a batch without padding that a process holds."""
    batch = arrays | {"weight": np.ones(len(arrays["inputs"]), np.float32)}
    return batch if rows is None else {name: array[list(rows)] for name, array in batch.items()}


def generator(split: str, *entropy: int) -> np.random.Generator:
    """The generator of a fixed set: no split's numbers are another's."""
    return np.random.default_rng((SPLITS.index(split), *entropy))


def digest(*sets: Arrays) -> str:
    sha = hashlib.sha256()
    for arrays in sets:
        for name in sorted(arrays):
            sha.update(arrays[name].tobytes())
    return sha.hexdigest()


def distinct(rng: np.random.Generator, rows: int, n: int, below: int) -> Int[np.ndarray, "rows n"]:
    """In each row n distinct numbers below `below`, in uniformly random order.

    Floyd's algorithm, for all rows at once: O(n^2) a row, where shuffling all numbers would take O(below).
    """
    chosen = np.empty((rows, n), np.int64)
    for i in range(n):
        top = below - n + i
        new = rng.integers(top + 1, size=rows)
        taken = (chosen[:, :i] == new[:, None]).any(1)
        chosen[:, i] = np.where(taken, top, new)
    return rng.permuted(chosen, axis=1)
