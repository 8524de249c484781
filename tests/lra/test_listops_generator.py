"""The generator against an independent recursive one, and the promises on seeds, shards and processes."""

import numpy as np
import pytest

from longwave.lra.listops_data.generator import DRAWS, Distribution, generate, shard
from longwave.lra.listops_data.grammar import (
    CLOSE,
    DIGIT,
    MAX,
    MED,
    MIN,
    OPERATORS,
    SM,
    Rows,
    evaluate,
)

SHORT = Distribution(min_tokens=20, max_tokens=100)


def recursive_value(tokens, position=0):
    """(value, next position) of the expression at `position`, straight from the definition."""
    token = tokens[position]
    if token < MIN:
        return token - DIGIT, position + 1
    values, position = [], position + 1
    while tokens[position] != CLOSE:
        value, position = recursive_value(tokens, position)
        values.append(value)
    operate = {MIN: np.min, MAX: np.max, MED: lambda v: int(np.median(v)), SM: lambda v: np.sum(v) % 10}
    return int(operate[token](values)), position + 1


def recursive_tree(rng, depth=1):
    """(token length, root is an operator) of one draw, as in the definition of the benchmark."""
    if depth == 10 or rng.random() > 0.25:
        return 1
    return 2 + sum(recursive_tree(rng, depth + 1) for _ in range(rng.integers(2, 11)))


@pytest.fixture(scope="module")
def long_rows():
    return Rows.concatenate([shard(Distribution(), 0, i) for i in range(6)])


def test_every_label_is_the_value_of_its_expression(long_rows):
    for rows in (long_rows.slice(0, 300), shard(SHORT, 0, 0)):
        for i in range(len(rows)):
            tokens, label = rows[i]
            value, end = recursive_value(tokens.tolist())
            assert (value, end) == (label, len(tokens))
            assert evaluate(tokens.tolist()) == label


def test_lengths_are_strictly_between(long_rows):
    assert long_rows.lengths.min() > 500
    assert long_rows.lengths.max() < 2000
    tight = Rows.concatenate([shard(Distribution(min_tokens=3, max_tokens=6), 0, i) for i in range(3)])
    assert set(tight.lengths.tolist()) == {4, 5}


def test_statistics_of_the_benchmark(long_rows):
    """20,279 draws with the original rules: acceptance .083, mean 1039, median 960, labels 0 .170, 9 .167."""
    n = len(long_rows)
    sigma = lambda p, draws: np.sqrt(p * (1 - p) / draws)
    assert abs(n / (6 * DRAWS) - 0.083) < 4 * sigma(0.083, 6 * DRAWS)
    assert abs(long_rows.lengths.mean() - 1039) < 4 * 395 / np.sqrt(n)
    assert abs(np.mean(long_rows.lengths < 960) - 0.5) < 4 * sigma(0.5, n)
    labels = np.bincount(long_rows.labels, minlength=10) / n
    assert abs(labels[0] - 0.170) < 4 * sigma(0.170, n)
    assert abs(labels[9] - 0.167) < 4 * sigma(0.167, n)
    assert np.all(np.abs(labels[1:9] - 0.083) < 0.01 + 4 * sigma(0.083, n))
    roots = np.bincount(long_rows.tokens[long_rows.offsets[:-1]])[list(OPERATORS)] / n
    assert np.all(np.abs(roots - 0.25) < 4 * sigma(0.25, n))


def test_early_rejection_keeps_the_distribution():
    """Short lengths exactly, from recursive draws that reject only whole trees."""
    rng = np.random.default_rng(0)
    distribution = Distribution(min_tokens=3, max_tokens=12)
    expected = np.array([recursive_tree(rng) for _ in range(8_000)])
    expected = np.bincount(expected[(expected > 3) & (expected < 12)], minlength=12)[4:] / 8_000
    rows = Rows.concatenate([shard(distribution, 1, i) for i in range(5)])
    actual = np.bincount(rows.lengths, minlength=12)[4:] / (5 * DRAWS)
    sigma = np.sqrt(expected * (1 / 8_000 + 1 / (5 * DRAWS)))
    assert np.all(np.abs(actual - expected) < 4 * sigma)


def test_nodes_are_drawn_uniformly():
    """Depth 2 and no bound on the length: roots alone, 1/4 operators with 2 to 10 digits each."""
    flat = Distribution(min_tokens=0, max_tokens=100, max_depth=2)
    rows = Rows.concatenate([shard(flat, 2, i) for i in range(4)])
    assert len(rows) == 4 * DRAWS
    root, lengths = rows.tokens[rows.offsets[:-1]], rows.lengths
    names = [np.sum(root == operator) for operator in OPERATORS]
    args = np.bincount(lengths[lengths > 1] - 2, minlength=11)[2:]
    digits = np.bincount(rows.tokens[rows.tokens < MIN] - DIGIT, minlength=10)
    for counts, p, draws in (
        (names, 1 / 16, len(rows)),
        (args, 1 / 9, sum(names)),
        (digits, 0.1, sum(digits)),
    ):
        assert np.sum(counts) <= draws
        assert np.all(np.abs(np.array(counts) / draws - p) < 4 * np.sqrt(p * (1 - p) / draws))


def test_the_number_of_processes_changes_nothing():
    alone = generate(SHORT, 700, seed=5, processes=1)
    shared = generate(SHORT, 700, seed=5, processes=3)
    for name in ("tokens", "offsets", "labels"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(shared, name))
    assert len(alone) == 700
    longer = generate(SHORT, 800, seed=5, processes=1)
    np.testing.assert_array_equal(longer.slice(0, 700).tokens, alone.tokens)
    other = generate(SHORT, 700, seed=6, processes=1)
    assert {alone.row(i).tobytes() for i in range(700)} != {other.row(i).tobytes() for i in range(700)}


FIRST_ROW = [
    13, 14, 12, 10, 17, 16, 6, 4, 13, 9, 6, 11, 4, 11, 16, 3, 12, 17, 17, 17, 15, 7, 11, 5, 3, 6, 12, 6, 9,
    12, 4, 17, 13, 4, 11, 7, 17, 6, 7, 11, 10, 17,
]  # fmt: skip
ROWS = 94


def test_the_stream_of_a_seed_is_fixed():
    """Data of a seed must never change: published numbers stand on it."""
    rows = shard(SHORT, 0, 0)
    assert rows.row(0).tolist() == FIRST_ROW
    assert len(rows) == ROWS


def test_rows_are_distinct_and_the_search_ends():
    tiny = Distribution(min_tokens=3, max_tokens=5)  # [OP a b ]: 4 operators, 100 pairs of digits
    rows = generate(tiny, 400, processes=1)
    assert len({rows.row(i).tobytes() for i in range(400)}) == 400
    with pytest.raises(ValueError, match=r"nothing new after 400 rows.*max_tokens=5"):
        generate(tiny, 401, processes=1)


def test_a_dead_process_is_reported(monkeypatch):
    monkeypatch.setattr("sys.path", ["/nowhere"])
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    with pytest.raises(RuntimeError, match=r"a generating process ended with code \d"):
        generate(SHORT, 10, processes=2)


@pytest.mark.parametrize("bad", [{"min_tokens": 9, "max_tokens": 10}, {"max_depth": 0}, {"max_args": 1}])
def test_impossible_distributions(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Distribution(**bad)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "no tokens"),
        ([MIN, 4], "1 operators are not closed"),
        ([4, 5], "token 1 .* after the end"),
        ([CLOSE], r"token 0 \(\]\) cannot stand there"),
        ([MIN, CLOSE], r"token 1 \(\]\) cannot stand there"),
        ([MIN, 4, CLOSE, 4], "token 3 .* after the end"),
        ([MIN, 2, CLOSE], "token 1 .<eos>. cannot stand there"),
        ([99], r"token 0 \(99\)"),
    ],
)
def test_malformed_expressions(tokens, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tokens)
