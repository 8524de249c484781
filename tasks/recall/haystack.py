"""What things are hidden in, and hiding them: shared by passkey and needle tasks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

# filler(rng, rows, length, low, high) -> ids (rows, length) from low to high - 1
Filler = Callable[[np.random.Generator, int, int, int, int], np.ndarray]

SENTENCE = 25  # tokens of the noise that repeats
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
JITTER = 0.1


def noise(rng: np.random.Generator, rows: int, length: int, low: int, high: int) -> Int[np.ndarray, "rows length"]:
    """The same words again and again."""
    return np.broadcast_to(low + np.arange(length) % min(SENTENCE, high - low), (rows, length))


def essay(rng: np.random.Generator, rows: int, length: int, low: int, high: int) -> Int[np.ndarray, "rows length"]:
    """Words as frequent as those of a text: the r-th of them with probability ~ 1 / r, each on its own."""
    share = np.cumsum(1 / np.arange(1, high - low + 1))
    return low + np.minimum(np.searchsorted(share, rng.random((rows, length)) * share[-1]), high - low - 1)


def depth_cells(depths: tuple[float, ...]) -> tuple[str, ...]:
    return tuple(f"depth={depth:g}" for depth in depths)


def around(rng: np.random.Generator, rows: int, depths: tuple[float, ...]) -> Float[np.ndarray, "rows"]:
    """A depth for each row: row i's is depths[i % len(depths)], moved by at most a tenth of the context."""
    depth = np.resize(np.asarray(depths, float), rows)
    return np.clip(depth + rng.uniform(-JITTER, JITTER, rows), 0, 1)


def hide(
    filler: Int[np.ndarray, "rows length"], pieces: Int[np.ndarray, "rows n w"], depth: Float[np.ndarray, "rows n"]
) -> tuple[Int[np.ndarray, "rows all"], Int[np.ndarray, "rows n"]]:
    """Filler with the pieces put in between, each behind the fraction `depth` of it; and where each of them starts."""
    (rows, n, width), length = pieces.shape, filler.shape[1]
    rank = np.argsort(np.argsort(depth, axis=1, kind="stable"), axis=1)
    start = np.rint(depth * length).astype(np.int64) + width * rank
    place = (start[..., None] + np.arange(width)).reshape(rows, n * width)
    context = np.empty((rows, length + n * width), np.int64)
    taken = np.zeros(context.shape, bool)
    np.put_along_axis(taken, place, True, axis=1)
    np.put_along_axis(context, place, pieces.reshape(rows, n * width), axis=1)
    context[~taken] = filler.ravel()  # every row has as many free places
    return context, start
