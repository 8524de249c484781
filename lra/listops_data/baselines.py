"""What a model that reads almost nothing reaches on ListOps, computed from the data itself.

Each look-up answers with the label that is most frequent in train given

majority:                                nothing;
root operator:                           the first token;
root operator and its own digits:        the first token and the digits among its arguments, in any order;
root operator applied to its own digits: the first token and the value that those digits alone would give. It
                                         generalises where the line above memorises.

What was never seen in train is answered by the root operator. A model that has learned to read the first
token alone scores like the second line.
"""

from __future__ import annotations

import numpy as np

from longwave.lra.listops_data.grammar import CLOSE, DIGIT, MAX, MED, MIN, SM, Rows

NAMES = (
    "majority",
    "root operator",
    "root operator and its own digits",
    "root operator applied to its own digits",
)
ROOT_ONLY = 0.02  # an accuracy this close to the root operator's shows no more than that was learned
_CHUNK = 8192  # rows looked at together


def baselines(train: Rows, test: Rows) -> dict[str, float]:
    """Accuracy on `test` of each look-up in NAMES, fitted on `train`."""
    keys, test_keys = _keys(train), _keys(test)
    scores, guess = {}, np.zeros(len(test), np.int64)
    for name in NAMES:
        answer = _look_up(keys[name], train.labels, test_keys[name], guess)
        scores[name] = float(np.mean(answer == test.labels))
        if name == "root operator":
            guess = answer
    return scores


def note(accuracy: float, root_operator: float) -> str:
    """What a table says beside an accuracy."""
    if abs(accuracy - root_operator) <= ROOT_ONLY:
        return "root operator only"
    return "below the root operator" if accuracy < root_operator else ""


def _look_up(keys: np.ndarray, labels: np.ndarray, test_keys: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """The label seen most often with each test key; `guess` where the key was never seen."""
    known, index = np.unique(keys, return_inverse=True)
    counts = np.zeros((len(known), 10), np.int64)
    np.add.at(counts, (index, labels), 1)
    place = np.minimum(np.searchsorted(known, test_keys), len(known) - 1)
    return np.where(known[place] == test_keys, counts[place].argmax(axis=1), guess)


def _keys(rows: Rows) -> dict[str, np.ndarray]:
    """One integer a row for each look-up, equal where the look-up sees the same."""
    chunks = [rows.slice(i, min(i + _CHUNK, len(rows))) for i in range(0, len(rows), _CHUNK)]
    digits, value = (np.concatenate(parts) for parts in zip(*map(_own_digits, chunks), strict=True))
    root = rows.tokens[rows.offsets[:-1]].astype(np.int64)
    return dict(zip(NAMES, (np.zeros_like(root), root, root << 50 | digits, root << 50 | value), strict=True))


def _own_digits(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """The root's own digits as one number, and the value they alone would give (10 where there are none)."""
    delta = (rows.tokens >= MIN).astype(np.int16)
    delta[rows.tokens == CLOSE] = -1
    depth = np.cumsum(delta, dtype=np.int16)  # every row closes what it opens, so that each starts at 0
    mine = (rows.tokens < MIN) & (depth == 1)
    row = np.repeat(np.arange(len(rows)), rows.lengths)[mine]
    digit = rows.tokens[mine].astype(np.int64) - DIGIT
    counts = np.bincount(row * 10 + digit, minlength=len(rows) * 10).reshape(-1, 10)
    digits = np.minimum(counts, 31) @ (32 ** np.arange(10))  # how often each digit occurs, five bits for each

    upto, args = np.cumsum(counts, axis=1), counts.sum(axis=1)
    nth = lambda n: (upto <= n[:, None]).sum(axis=1)  # the n-th smallest of each row's own digits, from 0
    median = (nth((args - 1) // 2) + nth(args // 2)) // 2
    root = rows.tokens[rows.offsets[:-1]]
    of_root = {
        MIN: nth(np.zeros_like(args)),
        MAX: nth(args - 1),
        MED: median,
        SM: counts @ np.arange(10) % 10,
    }
    value = np.select([root == name for name in of_root], list(of_root.values()), 10)
    return digits, np.where(args > 0, value, 10)
