"""Needle in a haystack, in the forms of RULER (Hsieh et al., 2024, "RULER: What's the Real Context Size of Your
Long-Context Language Models?"), over a vocabulary of ids in place of sentences.

    w w # dog = 7 1 4 w w w # cat = 2 9 0 w ... w   ? cat = 2 9        and the answer is 2 9 0, as a whole

    form           key, value       keys   values  queries  filler
    single 1       word, number     1      1       1        noise
    single 2       word, number     1      1       1        essay
    single 3       word, uuid       1      1       1        essay
    multi-key 1    word, number     4      1       1        essay
    multi-key 2    word, number     None   1       1        (needles fill the context)
    multi-key 3    uuid, uuid       None   1       1        (needles fill the context)
    multi-value    word, number     1      4       1        essay
    multi-query    word, number     4      1       4        essay

RULER takes the values of a key in any order; here they are asked for in the order of the text. It scores the share of
values that are found, and so does accuracy here.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from longwave.models.inputs import Tokens
from longwave.tasks.recall.batches import Arrays, distinct, int32
from longwave.tasks.recall.haystack import DEPTHS, Filler, around, depth_cells, essay, hide
from longwave.tasks.recall.recall import Fresh

NEEDLE, IS, ASK, SYMBOLS, WORDS = 0, 1, 2, 3, 19  # three signs, sixteen symbols, then words: of keys, and of filler


class Code(NamedTuple):
    """What a key or a value is: so many of the first `symbols` symbols; of 0 symbols, one word."""

    symbols: int
    tokens: int


def word() -> Code:
    return Code(0, 1)


def number(digits: int = 7) -> Code:
    return Code(10, digits)


def uuid(digits: int = 32) -> Code:
    return Code(16, digits)


WORD, NUMBER = word(), number()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle(Fresh):
    """The task; accuracy is that of whole values. With one query for one value, also by the depth of its needle.

    vocab:  ids: three signs, sixteen symbols; of the words behind them, the first half are keys, the others filler.
    length: tokens of a row, questions and answers included.
    key, value: `word()`, `number()` or `uuid()`.
    keys:   different keys in a row; None: as many as fit.      values: of each key.      queries: keys asked for.
    filler: what stands between needles.
    depths: as of Passkey.
    """

    vocab: int = 512
    length: int = 1024
    key: Code = WORD
    value: Code = NUMBER
    keys: int | None = 1
    values: int = 1
    queries: int = 1
    filler: Filler = essay
    depths: tuple[float, ...] = DEPTHS
    sizes: tuple[int, int] = (1_000, 1_000)

    kind: ClassVar[str] = "needle"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab < WORDS + 4:
            self.refuse("vocab", expected=f"at least {WORDS + 4}: signs, symbols, and words of both kinds")
        if min(self.values, self.queries) < 1 or self._room < 0 or not self.queries <= self._count:
            self.refuse("length", "keys", "values", "queries", expected="room for all needles and questions, and as "
                        "many keys as queries")  # fmt: skip
        if self._count > _choices(self.key, self._words):
            self.refuse("vocab", "keys", "key", expected=f"at least {self._count} different keys")
        if any(not 0 <= depth <= 1 for depth in self.depths):
            self.refuse("depths", expected="fractions from 0 to 1")

    @property
    def _words(self) -> int:
        """Words that may be keys."""
        return (self.vocab - WORDS) // 2

    @property
    def _width(self) -> int:
        return 2 + self.key.tokens + self.value.tokens

    @property
    def _context(self) -> int:
        return self.length + 1 - self.queries * (2 + self.key.tokens + self.values * self.value.tokens)

    @property
    def _count(self) -> int:
        """Keys of a row."""
        return max(self._context, 0) // (self._width * self.values) if self.keys is None else self.keys

    @property
    def _room(self) -> int:
        """Filler tokens of a row."""
        return self._context - self._count * self.values * self._width

    @property
    def _by_depth(self) -> bool:
        return self.queries == self.values == 1

    @property
    def name(self) -> str:
        count = "all" if self.keys is None else self.keys
        return f"{self.kind}-{self.length}-{count}k{self.values}v{self.queries}q"

    @property
    def inputs(self) -> Tokens:
        return Tokens(vocab=self.vocab, length=self.length)

    @property
    def questions(self) -> int:
        return self.queries * self.values * self.value.tokens

    @property
    def answer(self) -> int:
        return self.value.tokens

    @property
    def cells(self) -> tuple[str, ...]:
        return depth_cells(self.depths) if self._by_depth else ("",)

    def draw(self, rng: np.random.Generator, rows: int) -> Arrays:
        """The first keys are those asked for: where they stand is random."""
        count, values = self._count, self.values
        keys = self._codes(rng, rows, count, self.key)
        found = self._codes(rng, rows, count * values, self.value).reshape(rows, count, values, -1)
        depth = self._depths(rng, rows, count * values)
        order = np.argsort(depth.reshape(rows, count, values), axis=2, kind="stable")

        sign = lambda value, *shape: np.full((rows, *shape, 1), value)
        every = np.broadcast_to(keys[:, :, None], (rows, count, values, self.key.tokens))
        parts = [sign(NEEDLE, count, values), every, sign(IS, count, values), found]
        needles = np.concatenate(parts, axis=3).reshape(rows, count * values, self._width)
        filler = self.filler(rng, rows, self._room, WORDS + self._words, self.vocab)
        context, _ = hide(filler, needles, depth)

        q, tokens = self.queries, self.value.tokens * values
        label = np.take_along_axis(found, order[..., None], axis=2)[:, :q].reshape(rows, q, tokens)
        asked = np.concatenate([sign(ASK, q), keys[:, :q], sign(IS, q), label], axis=2)
        inputs = np.concatenate([context, asked.reshape(rows, -1)[:, :-1]], axis=1)
        ends = context.shape[1] + asked.shape[2] * (1 + np.arange(q))  # one behind the last token of each answer
        position = (ends[:, None] - 1 - np.arange(tokens, 0, -1)).reshape(1, -1)
        return int32(inputs=inputs, position=np.tile(position, (rows, 1)), label=label.reshape(rows, -1))

    def _depths(self, rng: np.random.Generator, rows: int, n: int) -> Float[np.ndarray, "rows n"]:
        depth = rng.random((rows, n))
        if self._by_depth:
            depth[:, 0] = around(rng, rows, self.depths)
        return depth

    def _codes(self, rng: np.random.Generator, rows: int, n: int, code: Code) -> Int[np.ndarray, "rows n tokens"]:
        """In each row n different ones, where there are so many; beyond 2^62, equal ones do not happen."""
        if not code.symbols:
            return WORDS + (distinct if n <= self._words else _any)(rng, rows, n, self._words)[..., None]
        if (choices := _choices(code, self._words)) >= 2**62:
            return SYMBOLS + rng.integers(code.symbols, size=(rows, n, code.tokens))
        drawn = (distinct if n <= choices else _any)(rng, rows, n, choices)
        return SYMBOLS + drawn[..., None] // code.symbols ** np.arange(code.tokens) % code.symbols

    def guesses(self, test: Arrays) -> dict[str, float]:
        """With one needle only, its value is what stands there: no guess."""
        needles = self._count * self.values
        return {"a value of the row": 1 / needles} if needles > 1 else {}


def _choices(code: Code, words: int) -> int:
    return code.symbols**code.tokens if code.symbols else words


def _any(rng: np.random.Generator, rows: int, n: int, below: int) -> Int[np.ndarray, "rows n"]:
    return rng.integers(below, size=(rows, n))
