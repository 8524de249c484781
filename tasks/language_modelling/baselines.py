"""What the counts of short contexts predict: bits per byte of test, learned from train.

Witten and Bell's interpolation (1991; Chen and Goodman, 1998): with N(c, x) how often x followed the context c,
N(c) = sum_x N(c, x) and T(c) how many different x did,

    p(x | c) = (N(c, x) + T(c) p(x | c')) / (N(c) + T(c))           c': c without its oldest id; at last p = 1 / vocab
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from longwave.tasks.language_modelling.corpus import Stream

NAMES = ("unigram", "bigram", "trigram")
_TRAIN, _TEST = 2**24, 2**22  # ids that are counted and predicted, at most


def bits_per_byte(train: Stream, test: Stream, vocab: int) -> dict[str, float]:
    """Of the first 16 million ids of train, on the first 4 million of test."""
    asked = test.read(0, _TEST)
    nats = interpolated(train.read(0, _TRAIN), asked, vocab)
    ids_per_byte = (len(test) - 1) / max(test.counts["bytes"], 1)
    return {name: float(-log_p.mean() / np.log(2) * ids_per_byte) for name, log_p in zip(NAMES, nats, strict=True)}


def interpolated(
    train: Int[np.ndarray, "n"], test: Int[np.ndarray, "m"], vocab: int
) -> list[Float[np.ndarray, "asked"]]:
    """ln p of every id of test but the first, by contexts of 0, 1 and 2 ids; where the past is shorter, by what there
    is."""
    p = np.full(len(test) - 1, 1 / vocab)
    found = []
    for order in range(len(NAMES)):
        joint, before = _windows(train, order + 1, vocab), _windows(train, order + 1, vocab, less=1)
        pairs, counts = np.unique(joint, return_counts=True)
        contexts, total = np.unique(before, return_counts=True)
        kinds = np.diff(np.searchsorted(pairs // vocab, contexts), append=len(pairs))
        asked = np.arange(max(order, 1), len(test))
        key = _windows(test, order + 1, vocab)[asked - order]
        N = _counted(pairs, counts, key)
        total, kinds = _counted(contexts, total, key // vocab), _counted(contexts, kinds, key // vocab)
        seen = total > 0
        new = p.copy()
        with np.errstate(invalid="ignore"):
            mixed = (N + kinds * p[asked - 1]) / (total + kinds)
        new[asked - 1] = np.where(seen, mixed, p[asked - 1])
        found.append(np.log(p := new))
    return found


def _windows(ids: np.ndarray, size: int, vocab: int, less: int = 0) -> Int[np.ndarray, "n"]:
    """Every window of `size` ids as one number; less: without so many of its last ids."""
    count = len(ids) - size + 1
    key = np.zeros(count, np.int64)
    for i in range(size - less):
        key = key * vocab + ids[i : i + count]
    return key


def _counted(keys: np.ndarray, counts: np.ndarray, asked: np.ndarray) -> Int[np.ndarray, "m"]:
    """The count of every key that is asked for; 0 where it never was."""
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[place] == asked, counts[place], 0)
