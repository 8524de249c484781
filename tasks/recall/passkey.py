"""Passkey (Mohtashami and Jaggi, 2023, "Landmark Attention"; the grid of depths and lengths of DeciMamba, Ben-Kish et
al., 2024): a number hidden in filler.

    w w w w # 7 1 4 3 2 w w w ... w w ? 7 1 4 3        and the answer is 7 1 4 3 2, as a whole

The published tasks hide the number in sentences of WikiText-2; here filler is drawn, as `filler` says.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from longwave.models.inputs import Tokens
from longwave.tasks.recall.batches import Arrays, int32
from longwave.tasks.recall.haystack import DEPTHS, Filler, around, depth_cells, essay, hide
from longwave.tasks.recall.recall import Fresh

MARK, ASK, WORDS = 10, 11, 12  # ids: ten digits, the two signs, words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passkey(Fresh):
    """The task; accuracy is that of whole numbers, also by depth.

    vocab:  ids: ten digits, two signs, and words.      length: tokens of a row, question and answer included.
    digits: of the number.      filler: what stands around it.
    depths: where in the filler it stands, as fractions, each moved by at most 0.1 for every row.
    """

    vocab: int = 256
    length: int = 2048
    digits: int = 5
    filler: Filler = essay
    depths: tuple[float, ...] = DEPTHS
    sizes: tuple[int, int] = (1_000, 1_000)

    kind: ClassVar[str] = "passkey"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab <= WORDS:
            self.refuse("vocab", expected=f"more than the {WORDS} ids of digits and signs")
        if self.digits < 1 or self.length < 2 * self.digits + 1:
            self.refuse("length", "digits", expected="a digit, and room for the number, its question and its answer")
        if any(not 0 <= depth <= 1 for depth in self.depths):
            self.refuse("depths", expected="fractions from 0 to 1")

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.length}"

    @property
    def inputs(self) -> Tokens:
        return Tokens(vocab=self.vocab, length=self.length)

    @property
    def questions(self) -> int:
        return self.digits

    @property
    def answer(self) -> int:
        return self.digits

    @property
    def cells(self) -> tuple[str, ...]:
        return depth_cells(self.depths)

    def draw(self, rng: np.random.Generator, rows: int) -> Arrays:
        label = rng.integers(10, size=(rows, self.digits))
        number = np.concatenate([np.full((rows, 1), MARK), label], axis=1)
        filler = self.filler(rng, rows, self.length - 2 * self.digits - 1, WORDS, self.vocab)
        context, _ = hide(filler, number[:, None], around(rng, rows, self.depths)[:, None])
        inputs = np.concatenate([context, np.full((rows, 1), ASK), label[:, :-1]], axis=1)
        position = np.tile(np.arange(self.length - self.digits, self.length), (rows, 1))
        return int32(inputs=inputs, position=position, label=label)

    def guesses(self, test: Arrays) -> dict[str, float]:
        return {"a random number": 10.0**-self.digits}
