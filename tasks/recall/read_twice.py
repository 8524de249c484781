"""Reading twice (Arora et al., 2024, "Just read twice"): the context of a row stands there two times.

A recurrence with a small state must choose what it keeps before it has seen what will be asked. Read again, it knows.
No model changes for it: any recall task with its context first, then its questions, is one more task.

    train.task = @read_twice.ReadTwice()
    read_twice.ReadTwice.task = @set_disjointness.SetDisjointness()
    read_twice.ReadTwice.context = 22
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from longwave.models.inputs import Tokens
from longwave.tasks.recall.batches import Arrays, int32
from longwave.tasks.recall.recall import Recall


def read_twice(rows: Arrays, context: int) -> Arrays:
    """The rows, their first `context` tokens ahead of them once more."""
    inputs, position = rows["inputs"], rows["position"]
    if position.min() < context:
        raise ValueError(f"context = {context}: a question stands at {position.min()}, inside of what is read twice")
    twice = np.concatenate([inputs[:, :context], inputs], axis=1)
    return rows | int32(inputs=twice, position=position + context)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadTwice(Recall):
    """Another recall task whose rows are read twice up to their questions.

    task:    it; its own `seed` and `chunk` do not count, those given here do.
    context: how many of a row's first tokens stand there two times; no question is among them.
    """

    task: Recall
    context: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "fresh", self.task.fresh)  # of the class for every other task
        super().__post_init__()
        if not 1 <= self.context <= self.task.inputs.length:
            self.refuse("context", expected=f"1 to the {self.task.inputs.length} tokens of a row")

    @property
    def name(self) -> str:
        return f"{self.task.name}-twice"

    @property
    def inputs(self) -> Tokens:
        return dataclasses.replace(self.task.inputs, length=self.context + self.task.inputs.length)

    @property
    def splits(self) -> Mapping[str, int]:
        return self.task.splits

    @property
    def questions(self) -> int:
        return self.task.questions

    @property
    def answer(self) -> int:
        return self.task.answer

    @property
    def cells(self) -> tuple[str, ...]:
        return self.task.cells

    def draw(self, rng: np.random.Generator, rows: int) -> Arrays:
        return read_twice(self.task.draw(rng, rows), self.context)

    def guesses(self, test: Arrays) -> dict[str, float]:
        return {}
