"""Document retrieval, after DeciMamba (Ben-Kish et al., 2024): in which document does the answer stand?

    ? q q q q @ 417 w w w w ...   ? q q q q @ 33 w w q q q q w ...   ? q q q q @ 801 w w ...   =      the answer is 33

The query stands before every document, as there. They take questions and paragraphs of SQuAD; here the golden document
is the one whose text holds the words of the query, in a row, and the others are drawn words.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from longwave.models.inputs import Tokens
from longwave.tasks.recall.batches import Arrays, distinct, int32
from longwave.tasks.recall.haystack import essay
from longwave.tasks.recall.recall import Fresh

QUERY, DOCUMENT, ANSWER, IDS = range(4)  # three signs, then the documents' ids, then words


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentRetrieval(Fresh):
    """The task; accuracy also by which fifth of the documents the golden one is among.

    vocab: ids: three signs, the documents' ids, words.      ids: of documents, drawn without replacement.
    noise: documents beside the golden one.      words: of a document's text.      query: words of the query.
    """

    vocab: int = 2048
    ids: int = 1000
    noise: int = 11
    words: int = 64
    query: int = 4
    sizes: tuple[int, int] = (1_000, 1_000)

    kind: ClassVar[str] = "documents"
    questions: ClassVar[int] = 1
    cells: ClassVar[tuple[str, ...]] = tuple(f"fifth={i + 1}" for i in range(5))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.noise < self.ids:
            self.refuse("noise", "ids", expected="more ids than documents of noise")
        if not 1 <= self.query <= min(self.words, self.vocab - IDS - self.ids):
            self.refuse("vocab", "words", "query", expected="a query that fits into a text, of distinct words")

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.noise}"

    @property
    def inputs(self) -> Tokens:
        return Tokens(vocab=self.vocab, length=(self.noise + 1) * (self.query + self.words + 3) + 1)

    def draw(self, rng: np.random.Generator, rows: int) -> Arrays:
        count, low = self.noise + 1, IDS + self.ids
        ids = IDS + distinct(rng, rows, count, self.ids)
        query = low + distinct(rng, rows, self.query, self.vocab - low)
        text = essay(rng, rows, count * self.words, low, self.vocab).reshape(rows, count, self.words)
        fifth = np.arange(rows) % len(self.cells)
        golden = ((fifth + rng.random(rows)) / len(self.cells) * count).astype(np.int64)[:, None]
        at = rng.integers(self.words - self.query + 1, size=(rows, 1)) + np.arange(self.query)
        text[np.arange(rows)[:, None], golden, at] = query
        sign = lambda value: np.full((rows, count, 1), value)
        queries = np.broadcast_to(query[:, None], (rows, count, self.query))
        documents = np.concatenate([sign(QUERY), queries, sign(DOCUMENT), ids[..., None], text], axis=2)
        inputs = np.concatenate([documents.reshape(rows, -1), np.full((rows, 1), ANSWER)], axis=1)
        position = np.full((rows, 1), inputs.shape[1] - 1)
        return int32(inputs=inputs, position=position, label=np.take_along_axis(ids, golden, axis=1))

    def guesses(self, test: Arrays) -> dict[str, float]:
        return {"a document of the row": 1 / (self.noise + 1)}
