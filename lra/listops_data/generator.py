"""A seeded generator of ListOps with the exact distribution of Long Range Arena, vectorised over trees.

The distribution: a node above `max_depth` is an operator with probability 1/4, else a digit; at `max_depth`
it is a digit. Digits are uniform. An operator is uniform over MIN, MAX, MED, SM and has 2 to `max_args`
arguments, uniformly. An expression is kept if min_tokens < tokens < max_tokens, strictly, and if it is new.

Trees are grown level by level, many at once. One 64-bit word of the bit stream makes one node, so that the
result depends on nothing but the bit generator (whose stream NumPy keeps stable). A tree that is already
too long at some level is dropped there: trees are independent, so that the kept ones keep their
distribution.

Shard i is a pure function of (distribution, seed, i). Processes make different shards; the parent takes
them in order, so that their number changes nothing. A process is a fresh interpreter that runs this file:
no fork beside JAX's threads, and no second import of the caller's main module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from typing import IO

import numpy as np

from longwave.lra.listops_data.grammar import CLOSE, DIGIT, MIN, Rows

DRAWS = 4096  # trees drawn for one shard; about 330 of them are kept
BARREN = 100  # shards in a row without a new expression after which the search is given up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distribution:
    """What expressions are drawn. The defaults are Long Range Arena's."""

    min_tokens: int = 500
    max_tokens: int = 2000
    max_depth: int = 10
    max_args: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.min_tokens < self.max_tokens - 1:
            raise ValueError(f"min_tokens = {self.min_tokens}, max_tokens = {self.max_tokens}: no length lies between")
        if self.max_depth < 1 or self.max_args < 2:
            raise ValueError(f"max_depth = {self.max_depth}, max_args = {self.max_args}: expected at least 1 and 2")


@dataclasses.dataclass
class _Level:
    """The nodes of one depth, grouped by parent: tree and symbol of each, `args` of the operators."""

    tree: np.ndarray
    symbol: np.ndarray
    args: np.ndarray

    @property
    def operator(self) -> np.ndarray:
        return self.symbol >= MIN

    def keep(self, kept: np.ndarray) -> _Level:
        nodes = kept[self.tree]
        return _Level(self.tree[nodes], self.symbol[nodes], self.args[nodes[self.operator]])


def shard(distribution: Distribution, seed: int, index: int) -> Rows:
    """The accepted expressions among the DRAWS trees of shard `index`, in the order of drawing."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, index]))
    return _serialise(_grow(distribution, bits))


def _grow(distribution: Distribution, bits: np.random.PCG64) -> list[_Level]:
    """The levels of the accepted trees, from the root down."""
    levels: list[_Level] = []
    tokens = np.zeros(DRAWS, np.int64)  # of each tree so far: an operator counts twice, for its bracket
    tree = np.arange(DRAWS, dtype=np.int32)
    for depth in range(1, distribution.max_depth + 1):
        words = bits.random_raw(len(tree))
        fraction = words & 0xFFFFFFFF  # the low half makes the digit or the number of arguments
        operator = (words >> 62 == 0) & (depth < distribution.max_depth)
        name = MIN + (words >> 60 & 3)
        symbol = np.where(operator, name, DIGIT + (fraction * 10 >> 32)).astype(np.uint8)
        args = 2 + (fraction[operator] * (distribution.max_args - 1) >> 32).astype(np.int64)
        level = _Level(tree, symbol, args)
        levels.append(level)
        tokens += np.bincount(tree, 1 + operator, DRAWS).astype(np.int64)
        tree = np.repeat(tree[operator], args)
        at_least = tokens + np.bincount(tree, minlength=DRAWS)
        tree, too_long = tree[at_least[tree] < distribution.max_tokens], at_least >= distribution.max_tokens
        tokens[too_long] = distribution.max_tokens
        if not len(tree):
            break
    accepted = (tokens > distribution.min_tokens) & (tokens < distribution.max_tokens)
    return [level.keep(accepted) for level in levels]


def _serialise(levels: list[_Level]) -> Rows:
    """Values and lengths from the leaves up, positions from the roots down, tokens in prefix order."""
    values, sizes = [], []
    for level in reversed(levels):
        value = level.symbol.astype(np.int64) - DIGIT
        size = np.ones(len(value), np.int64)
        if len(level.args):
            operator, first = level.operator, np.cumsum(level.args) - level.args
            value[operator] = _reduce(level.symbol[operator], values[-1], level.args)
            size[operator] = 2 + np.add.reduceat(sizes[-1], first)
        values.append(value)
        sizes.append(size)
    values.reverse()
    sizes.reverse()
    start = np.cumsum(sizes[0]) - sizes[0]
    tokens = np.empty(sizes[0].sum(), np.uint8)
    offsets = np.concatenate([start, [len(tokens)]]).astype(np.int64)
    for depth, (level, size) in enumerate(zip(levels, sizes, strict=True)):
        operator = level.operator
        tokens[start] = level.symbol
        tokens[start[operator] + size[operator] - 1] = CLOSE
        if not len(level.args):
            break
        before = np.cumsum(sizes[depth + 1]) - sizes[depth + 1]  # tokens of the level before each child
        first = np.cumsum(level.args) - level.args
        start = before + np.repeat(start[operator] + 1 - before[first], level.args)
    return Rows(tokens, offsets, values[0].astype(np.uint8))


def _reduce(operator: np.ndarray, values: np.ndarray, args: np.ndarray) -> np.ndarray:
    """The value of each operator; its `args` arguments are consecutive in `values`."""
    column, row = np.arange(args.max()), np.arange(len(args))
    ordered = np.full((len(args), len(column)), 127, np.int8)
    ordered[column[None, :] < args[:, None]] = values
    ordered.sort(axis=1)
    median = (ordered[row, (args - 1) // 2] + ordered[row, args // 2]) // 2
    total = np.add.reduceat(values, np.cumsum(args) - args) % 10
    return np.choose(operator - MIN, [ordered[:, 0], ordered[row, args - 1], median, total])


def generate(
    distribution: Distribution,
    rows: int,
    *,
    seed: int = 0,
    processes: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Rows:
    """The first `rows` distinct expressions of the shards 0, 1, 2, ...

    processes: None uses every core; their number does not change the result. progress: called with the
    number of rows so far. Raises ValueError where the distribution does not hold that many expressions.
    """
    parts, seen, total, barren = [], set(), 0, 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.closing(_shards(distribution, seed, cores if processes is None else processes)) as shards:
        while total < rows:
            part = next(shards)
            part = part.take(_unseen(part, seen))
            total += len(part)
            barren = 0 if len(part) else barren + 1
            if barren == BARREN:
                raise ValueError(f"{BARREN * DRAWS} trees in a row gave nothing new after {total} rows: {distribution}")
            parts.append(part)
            progress(min(total, rows))
    return Rows.concatenate(parts).slice(0, rows)


def _unseen(rows: Rows, seen: set[bytes]) -> np.ndarray:
    """Which rows are not in `seen`, into which they go, as digests of 128 bits: none agree by chance."""
    fresh = np.zeros(len(rows), bool)
    for i in range(len(rows)):
        digest = hashlib.blake2b(rows.row(i).tobytes(), digest_size=16).digest()
        fresh[i] = digest not in seen
        seen.add(digest)
    return fresh


def _shards(distribution: Distribution, seed: int, processes: int) -> Generator[Rows, None, None]:
    """All shards in order, made by that many processes (1: this one). Worker w makes w, w + processes, ..."""
    if processes <= 1:
        yield from (shard(distribution, seed, i) for i in itertools.count())
    with contextlib.ExitStack() as stack:
        errors = stack.enter_context(tempfile.TemporaryFile())
        workers = []
        for first in range(processes):
            settings = json.dumps([dataclasses.asdict(distribution), seed, first, processes])
            worker = subprocess.Popen(
                [sys.executable, "-m", __name__, settings],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            stack.enter_context(worker)
            stack.callback(worker.kill)
            workers.append(worker)
        for worker in itertools.cycle(workers):
            assert worker.stdout is not None
            try:
                yield _read(worker.stdout)
            except EOFError:
                errors.seek(0)
                text = errors.read().decode(errors="replace").strip()
                raise RuntimeError(f"a generating process ended with code {worker.wait()}: {text[-2000:]}") from None


def _write(rows: Rows, stream: IO[bytes]) -> None:
    stream.write(np.array([len(rows), len(rows.tokens)], np.int64).tobytes())
    for array in (rows.offsets, rows.labels, rows.tokens):
        stream.write(array.tobytes())
    stream.flush()


def _read(stream: IO[bytes]) -> Rows:
    def take(count: int, dtype: type) -> np.ndarray:
        size = count * np.dtype(dtype).itemsize
        data = stream.read(size)
        if len(data) < size:
            raise EOFError
        return np.frombuffer(data, dtype)

    rows, tokens = take(2, np.int64).tolist()
    offsets, labels = take(rows + 1, np.int64), take(rows, np.uint8)
    return Rows(take(tokens, np.uint8), offsets, labels)


def _work(settings: str) -> None:
    """The main of a generating process: writes shard after shard until nobody reads."""
    distribution, seed, first, stride = json.loads(settings)
    with contextlib.suppress(BrokenPipeError):
        for index in itertools.count(first, stride):
            _write(shard(Distribution(**distribution), seed, index), sys.stdout.buffer)


if __name__ == "__main__":
    _work(sys.argv[1])
