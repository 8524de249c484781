"""Selective copying (Gu and Dao, 2023, "Mamba", Section 4.1.1): what was read among noise, in order?

    . . 5 . 9 . . . 2 . . . | * * *        and the answers are 5 9 2

Tokens to remember stand at random places among `length` + `tokens`; behind them come as many markers, and each asks for
the next token. That their distances differ is what a convolution cannot follow.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from longwave.models.inputs import Tokens
from longwave.tasks.recall.batches import Arrays, distinct, int32
from longwave.tasks.recall.induction_heads import most_frequent
from longwave.tasks.recall.recall import Fresh


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Fresh):
    """The task.

    vocab:  ids: 0 is noise, the last the marker.      length: noise tokens.      tokens: to be remembered.
    """

    vocab: int = 16
    length: int = 4096
    tokens: int = 16

    kind: ClassVar[str] = "selective-copying"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab < 4 or self.length < 1 or self.tokens < 1:
            self.refuse("vocab", "length", "tokens", expected="at least 4 ids, a noise token and one to remember")

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.length}-{self.tokens}"

    @property
    def inputs(self) -> Tokens:
        return Tokens(vocab=self.vocab, length=self.length + 2 * self.tokens)

    @property
    def questions(self) -> int:
        return self.tokens

    def draw(self, rng: np.random.Generator, rows: int) -> Arrays:
        context, end = self.length + self.tokens, self.inputs.length
        label = rng.integers(1, self.vocab - 1, size=(rows, self.tokens))
        inputs = np.zeros((rows, end), np.int32)
        np.put_along_axis(inputs, np.sort(distinct(rng, rows, self.tokens, context)), label, axis=1)
        inputs[:, context:] = self.vocab - 1
        return int32(inputs=inputs, position=np.tile(np.arange(context, end), (rows, 1)), label=label)

    def guesses(self, test: Arrays) -> dict[str, float]:
        return {"most frequent in the row": most_frequent(test, range(1, self.vocab - 1))}
