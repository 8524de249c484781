"""The language of ListOps: fifteen symbols, a stack machine that evaluates them, and arrays of expressions.

An expression is a digit, or an operator, two to ten expressions, and a closing bracket:

    [MAX 2 9 [MIN 4 7 ] 0 ]   =  9

MIN, MAX and SM (sum modulo 10) are what they say; MED is the median with the half cut off, int(numpy.median).
Long Range Arena counts operators, digits and brackets as tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

PAD, UNKNOWN, EOS = 0, 1, 2
DIGIT = 3  # the id of digit 0; a digit's value is id - DIGIT
MIN, MAX, MED, SM = OPERATORS = (13, 14, 15, 16)
CLOSE = 17
SYMBOLS = ("<pad>", "<unk>", "<eos>", *map(str, range(10)), "[MIN", "[MAX", "[MED", "[SM", "]")
VOCAB = len(SYMBOLS)  # 18: fifteen symbols and three specials
IDS = {symbol: i for i, symbol in enumerate(SYMBOLS) if i >= DIGIT} | {"X": CLOSE}  # X: the bracket's other name


def evaluate(tokens: Iterable[int]) -> int:
    """The value of one expression, read from left to right by a stack machine.

    Raises ValueError with the position where the tokens stop being one well-formed expression.
    """
    frames: list[list[int]] = []
    frame: list[int] = []  # [operator, value, value, ...]; the outermost frame has no operator
    for position, token in enumerate(tokens):
        if DIGIT <= token < MIN:
            frame.append(token - DIGIT)
        elif MIN <= token <= SM:
            frames.append(frame)
            frame = [token]
        elif token == CLOSE and frames and len(frame) > 1:
            value = _apply(frame)
            frame = frames.pop()
            frame.append(value)
        else:
            raise ValueError(f"token {position} ({_name(token)}) cannot stand there")
        if not frames and len(frame) > 1:
            raise ValueError(f"token {position} ({_name(token)}) comes after the end of the expression")
    if frames or not frame:
        raise ValueError(f"unbalanced: {len(frames)} operators are not closed" if frames else "no tokens")
    return frame[0]


def _apply(frame: list[int]) -> int:
    operator, *values = frame
    if operator == MIN:
        return min(values)
    if operator == MAX:
        return max(values)
    if operator == SM:
        return sum(values) % 10
    values.sort()
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) // 2


def _name(token: int) -> str:
    return SYMBOLS[token] if 0 <= token < VOCAB else str(token)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Expressions of many lengths, end to end in one array: row i is tokens[offsets[i]:offsets[i + 1]]."""

    tokens: np.ndarray  # uint8
    offsets: np.ndarray  # int64, one more than there are rows
    labels: np.ndarray  # uint8

    @classmethod
    def concatenate(cls, parts: Sequence[Rows]) -> Rows:
        lengths = np.concatenate([np.zeros(1, np.int64), *(part.lengths for part in parts)])
        tokens = np.concatenate([np.zeros(0, np.uint8), *(part.tokens for part in parts)])
        labels = np.concatenate([np.zeros(0, np.uint8), *(part.labels for part in parts)])
        return cls(tokens, np.cumsum(lengths), labels)

    def __len__(self) -> int:
        return len(self.labels)

    def row(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """(tokens, label) of a row."""
        return self.row(index), int(self.labels[index])

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def slice(self, start: int, stop: int) -> Rows:
        first, last = self.offsets[start], self.offsets[stop]
        return Rows(self.tokens[first:last], self.offsets[start : stop + 1] - first, self.labels[start:stop])

    def take(self, keep: np.ndarray) -> Rows:
        """The rows where the boolean mask `keep` is true."""
        lengths = self.lengths
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[keep])])
        return Rows(self.tokens[np.repeat(keep, lengths)], offsets, self.labels[keep])
