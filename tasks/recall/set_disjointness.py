"""Set disjointness (Arora et al., 2024, "Just read twice", Section 3): which id do two sets share?

    [1] a1 ... an [2] b1 ... bm [3]        and at the last token the answer is the one id of both

Ids of the sets come from two halves of the vocabulary; then one of the second set is made one of the first. Whoever
reads from left to right must hold the first set, so that its size decides, not that of the second. Several sizes are a
`grid.Grid` over ('first', 'second').
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from longwave.models.inputs import Tokens
from longwave.tasks.recall.batches import SPLITS, Arrays, distinct, int32
from longwave.tasks.recall.recall import Recall

SIGNS = 4  # ids 1, 2, 3 stand before, between and behind the sets; 0 nowhere


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetDisjointness(Recall):
    """The task. Sets are drawn once, from `seed`.

    vocab: ids, those of the signs included.     first, second: sizes of the two sets.
    sizes: rows of train, valid, test.
    """

    vocab: int = 2048
    first: int = 4
    second: int = 16
    sizes: tuple[int, int, int] = (20_000, 1_000, 1_000)

    kind: ClassVar[str] = "disjointness"
    fresh: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.first, self.second) < 1 or max(self.first, self.second) > self.half:
            self.refuse("vocab", "first", "second", expected=f"sets of 1 to {self.half} ids, half the vocabulary")

    @property
    def half(self) -> int:
        return (self.vocab - SIGNS) // 2

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.first}-{self.second}"

    @property
    def inputs(self) -> Tokens:
        return Tokens(vocab=self.vocab, length=self.first + self.second + 3)

    @property
    def splits(self) -> Mapping[str, int]:
        if len(self.sizes) != len(SPLITS):
            self.refuse("sizes", expected="rows of train, valid and test")
        return dict(zip(SPLITS, self.sizes, strict=True))

    @property
    def questions(self) -> int:
        return 1

    def draw(self, rng: np.random.Generator, rows: int) -> Arrays:
        first = SIGNS + distinct(rng, rows, self.first, self.half)
        second = SIGNS + self.half + distinct(rng, rows, self.second, self.half)
        label, row = first[:, 0].copy(), np.arange(rows)
        second[row, rng.integers(self.second, size=rows)] = label
        first = rng.permuted(first, axis=1)
        sign = lambda i: np.full((rows, 1), i)
        inputs = np.concatenate([sign(1), first, sign(2), second, sign(3)], axis=1)
        return int32(inputs=inputs, position=np.full((rows, 1), inputs.shape[1] - 1), label=label[:, None])

    def guesses(self, test: Arrays) -> dict[str, float]:
        return {"an id of the first set": 1 / self.first}
