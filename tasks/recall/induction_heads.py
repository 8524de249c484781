"""Induction heads (Olsson et al., 2022, as posed by Gu and Dao, 2023, "Mamba"): what followed the special token?

    a c b * d a ... c b *        and the answer is d

Random regular ids, the special id at a random place, and once more at the end, where the token behind its first
occurrence is asked for: nothing else is. Examples for training are fresh at every step; what is learned at one length
is asked at others by `grid.Grid`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from longwave.models.inputs import Tokens
from longwave.tasks.recall.batches import Arrays, int32
from longwave.tasks.recall.recall import Fresh


@dataclasses.dataclass(frozen=True, kw_only=True)
class InductionHeads(Fresh):
    """The task.

    vocab:  ids; the last is the special one.      length: tokens of a row, the asking one included.
    """

    vocab: int = 16
    length: int = 256

    kind: ClassVar[str] = "induction-heads"
    questions: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab < 3 or self.length < 4:
            self.refuse("vocab", "length", expected="at least 3 ids and 4 tokens")

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.length}"

    @property
    def inputs(self) -> Tokens:
        return Tokens(vocab=self.vocab, length=self.length)

    def draw(self, rng: np.random.Generator, rows: int) -> Arrays:
        """The first special token stands at 0 to length - 4, as in H3's generator."""
        inputs = rng.integers(self.vocab - 1, size=(rows, self.length), dtype=np.int32)
        place = rng.integers(self.length - 3, size=(rows, 1))
        label = np.take_along_axis(inputs, place + 1, axis=1)
        np.put_along_axis(inputs, place, self.vocab - 1, axis=1)
        inputs[:, -1] = self.vocab - 1
        return int32(inputs=inputs, position=np.full((rows, 1), self.length - 1), label=label)

    def guesses(self, test: Arrays) -> dict[str, float]:
        return {"most frequent in the row": most_frequent(test, range(self.vocab - 1))}


def most_frequent(test: Arrays, ids: range) -> float:
    """Accuracy of answering each row by the id of this range that it holds most often."""
    count = np.stack([np.bincount(row, minlength=ids.stop)[ids.start : ids.stop] for row in test["inputs"]])
    return float(np.mean(test["label"] == ids.start + count.argmax(1)[:, None]))
