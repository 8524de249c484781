"""What a token costs by how much text stands before it, and perplexity at exact lengths as PG-19 is scored.

by_position   all of a split once, in the task's own rows: costs by the number of tokens of the document that the
              model has read in the row
windows       of every document that is long enough, about ten windows of exactly L tokens, evenly spread; the last
              100 tokens of each are scored, by the L - 100 to L - 1 before them (DeciMamba, arXiv:2406.14528;
              MemMamba, arXiv:2510.03279, scores 50). Perplexity: exp(mean over windows of the mean cost)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longwave.layers.mixer import Context
from longwave.models.language_model import LanguageModel
from longwave.training.task import Batch

WINDOWS = 10  # of a document, about
LEAST_STRIDE = 10  # tokens from a window's start to the next one's, at least
_TOGETHER = 2**16  # tokens of windows in one batch


class Part(NamedTuple):
    """Tokens that had `first` to `last` tokens of their document before them: how many, and their mean cost in nats."""

    first: int
    last: int
    tokens: int
    nll: float


class Length(NamedTuple):
    """Windows of `length` tokens: how many documents and windows there are, and the mean cost in nats."""

    length: int
    documents: int
    windows: int
    nll: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 700.0))


def by_position(model: LanguageModel, batches: Iterable[Batch]) -> list[Part]:
    """Parts 1, 2, 3 to 4, 5 to 8, ...: how many tokens were read when the token had to be predicted."""

    @jax.jit
    def costs(model: LanguageModel, inputs: Array, target: Array, reset: Array | None) -> Array:
        return model.costs(inputs, target, None, Context(reset=reset)).nll

    total, count = np.zeros(64), np.zeros(64, np.int64)
    for batch in batches:
        nll = np.asarray(costs(model, batch["inputs"], batch["target"], batch.get("reset")), np.float64)
        asked = (batch["target"] >= 0) & (batch["weight"] > 0)[:, None]
        part = np.ceil(np.log2(read_before(batch))).astype(int)  # exact: a power of two has an exact logarithm
        np.add.at(total, part[asked], nll[asked])
        np.add.at(count, part[asked], 1)
    return [Part(2**i // 2 + 1, 2**i, int(n), float(total[i] / n)) for i, n in enumerate(count) if n]


def read_before(batch: Batch) -> Int[np.ndarray, "b t"]:
    """How many tokens of its document were read in this row, the one at hand included."""
    place = np.broadcast_to(np.arange(batch["inputs"].shape[1])[None], batch["inputs"].shape)
    if "reset" not in batch:
        return place + 1
    return place - np.maximum.accumulate(np.where(batch["reset"], place, 0), axis=1) + 1


def window_starts(tokens: int, length: int) -> range:
    """Where the windows of a document of so many tokens begin; none where it is shorter than one."""
    if tokens < length:
        return range(0)
    return range(0, max(tokens - length, 1), max(LEAST_STRIDE, (tokens - length) // WINDOWS))


def windows(
    model: LanguageModel, documents: Sequence[Int[np.ndarray, "n"]], lengths: Sequence[int], *, last: int = 100
) -> Iterator[Length]:
    """One line a length, as it is done. documents: their ids. last: how many tokens of a window are scored."""
    if not lengths or min(lengths) <= last or last < 1:
        raise ValueError(f"lengths = {tuple(lengths)}, last = {last}: expected lengths greater than the tokens scored")
    for length in lengths:
        found = [(i, at) for i, ids in enumerate(documents) for at in window_starts(len(ids), length)]
        costs = _window_costs(model, [documents[i][at : at + length] for i, at in found], last)
        mean = float(np.mean(costs)) if found else math.nan
        yield Length(length, len({i for i, _ in found}), len(found), mean)


def _window_costs(model: LanguageModel, found: list[np.ndarray], last: int) -> Float[np.ndarray, "windows"]:
    """The mean cost of the last tokens of each window."""
    if not found:
        return np.zeros(0)
    together = max(1, min(_TOGETHER // len(found[0]), len(found)))

    @jax.jit
    def costs(model: LanguageModel, ids: Array) -> Array:
        return model.costs(ids[:, :-1], ids[:, -last:]).nll.mean(1)

    means = []
    for i in range(0, len(found), together):
        ids = np.stack([found[min(j, len(found) - 1)] for j in range(i, i + together)])
        means.append(np.asarray(costs(model, jnp.asarray(ids)), np.float64))
    return np.concatenate(means)[: len(found)]


def split_at(ids: Int[np.ndarray, "n"], separator: int) -> list[Int[np.ndarray, "n"]]:
    """The documents of a stream, each with the separator before it."""
    return np.split(ids, np.flatnonzero(ids == separator)[1:])
