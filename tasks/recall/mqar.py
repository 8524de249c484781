"""Multi-query associative recall (Arora et al., 2023, "Zoology: Measuring and Improving Recall in Efficient Language
Models"): which value stood behind this key?

    k1 v1 k2 v2 ... kn vn  . . k2 . . . . k1 . . ...        at every second k_i the answer is v_i

Keys are distinct ids below half the vocabulary, without 0; values distinct ids of the other half. Behind the pairs come
slots of two tokens. Every key is asked for once, in a slot drawn without replacement with probability proportional to
(1 + slot)^(power - 1): near ones are likelier. What is left is filler: ids drawn from the whole vocabulary, or 0.

Mixed sets and curricula of several lengths and numbers of pairs are a `grid.Grid` of this task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from longwave.models.inputs import Tokens
from longwave.tasks.recall.batches import SPLITS, Arrays, distinct, int32
from longwave.tasks.recall.recall import Recall


@dataclasses.dataclass(frozen=True, kw_only=True)
class MQAR(Recall):
    """The task; loss and accuracy at the questions alone. Sets are drawn once, from `seed`.

    vocab:  ids; keys from 1 to vocab / 2 - 1, values from vocab / 2 on.
    length: tokens of a row, even.     pairs: keys and values, at most length / 4.
    power:  a of the law of slots, p(slot) ~ a (1 + slot)^(a - 1).
    random_non_queries: filler is drawn from the whole vocabulary, so that it may look like a key; False: it is 0.
    sizes:  rows of train, valid, test.
    """

    vocab: int = 8192
    length: int = 64
    pairs: int = 4
    power: float = 0.01
    random_non_queries: bool = True
    sizes: tuple[int, int, int] = (100_000, 3_000, 3_000)

    kind: ClassVar[str] = "mqar"
    fresh: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab % 2 or self.vocab // 2 <= self.pairs:
            self.refuse("vocab", expected=f"an even number above 2 * pairs = {2 * self.pairs}")
        if self.length % 2 or self.pairs < 1 or 4 * self.pairs > self.length:
            self.refuse("length", "pairs", expected="an even length of at least 4 * pairs, and a pair")
        if self.power <= 0:
            self.refuse("power", expected="more than 0")

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.length}-{self.pairs}" + ("" if self.vocab == 8192 else f"-vocab{self.vocab}")

    @property
    def inputs(self) -> Tokens:
        return Tokens(vocab=self.vocab, length=self.length)

    @property
    def splits(self) -> Mapping[str, int]:
        if len(self.sizes) != len(SPLITS):
            self.refuse("sizes", expected="rows of train, valid and test")
        return dict(zip(SPLITS, self.sizes, strict=True))

    @property
    def questions(self) -> int:
        return self.pairs

    def draw(self, rng: np.random.Generator, rows: int) -> Arrays:
        half, slots = self.vocab // 2, self.length // 2 - self.pairs
        keys = 1 + distinct(rng, rows, self.pairs, half - 1)
        values = half + distinct(rng, rows, self.pairs, half)
        # The largest of log p + Gumbel noise, in falling order, are a draw without replacement with probabilities p.
        log_p = (self.power - 1) * np.log(np.arange(1, slots + 1))
        slot = np.argsort(-(log_p[None] + rng.gumbel(size=(rows, slots))), axis=1)[:, : self.pairs]
        position = 2 * self.pairs + 2 * slot
        if self.random_non_queries:
            inputs = rng.integers(self.vocab, size=(rows, self.length))
        else:
            inputs = np.zeros((rows, self.length), np.int64)
        inputs[:, 0 : 2 * self.pairs : 2], inputs[:, 1 : 2 * self.pairs : 2] = keys, values
        np.put_along_axis(inputs, position, keys, axis=1)
        return int32(inputs=inputs, position=position, label=values)

    def guesses(self, test: Arrays) -> dict[str, float]:
        return {"a value of the row": 1 / self.pairs}
