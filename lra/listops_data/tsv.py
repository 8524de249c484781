"""The official files: `basic_train.tsv`, `basic_val.tsv`, `basic_test.tsv`.

A header `Source<TAB>Target`, then one expression and its value a line. Expressions are left-nested pairs in
parentheses: [MAX 4 7 ] is written

    ( ( ( [MAX 4 ) 7 ) ] )

The reader deletes the parentheses and takes `]` and `X` for the same symbol, as Long Range Arena's does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from longwave.lra.listops_data.grammar import CLOSE, IDS, MIN, SYMBOLS, Rows, evaluate

HEADER = "Source\tTarget"
_NO_PARENTHESES = str.maketrans("()", "  ")


class CorruptRow(ValueError):
    """A line that is not what the format says; the message begins with file and line."""


def read(path: str | os.PathLike[str]) -> Rows:
    """Every row of one official file, each evaluated and compared with its target. Raises CorruptRow."""
    tokens, lengths, labels = bytearray(), [0], bytearray()
    for row, label in read_rows(path):
        tokens += row
        lengths.append(len(row))
        labels.append(label)
    if not labels:
        raise CorruptRow(f"{path}:2: there is no row after the header")
    return Rows(np.frombuffer(tokens, np.uint8), np.cumsum(lengths), np.frombuffer(labels, np.uint8))


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[bytes, int]]:
    """(token ids, label) of each row, one line at a time: rows may be of any width, files of any size."""
    with Path(path).open(encoding="utf-8", errors="replace") as lines:
        if (header := next(lines, "").rstrip("\n")) != HEADER:
            raise CorruptRow(f"{path}:1: header {header[:60]!r}, expected {HEADER!r}")
        for number, line in enumerate(lines, start=2):
            try:
                yield _parse(line.rstrip("\n"))
            except ValueError as error:
                raise CorruptRow(f"{path}:{number}: {error}") from None


def _parse(line: str) -> tuple[bytes, int]:
    columns = line.split("\t")
    if len(columns) != 2:
        raise ValueError(f"{len(columns)} columns, expected 2 (Source, Target)")
    source, target = columns
    if target not in tuple("0123456789"):
        raise ValueError(f"label {target[:20]!r}, expected a digit 0 to 9")
    if source.count("(") != source.count(")"):
        raise ValueError(f"unbalanced: {source.count('(')} '(' and {source.count(')')} ')'")
    try:
        tokens = bytes(map(IDS.__getitem__, source.translate(_NO_PARENTHESES).split()))
    except KeyError as error:
        raise ValueError(f"unknown token {error.args[0][:20]!r}, expected one of {' '.join(IDS)}") from None
    value = evaluate(tokens)
    if value != int(target):
        raise ValueError(f"the expression evaluates to {value}, but its label is {target}")
    return tokens, value


def write(path: str | os.PathLike[str], rows: Rows) -> None:
    """Writes rows as an official file; `read` gives them back."""
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        file.write(f"{HEADER}\n")
        for i, label in enumerate(rows.labels.tolist()):
            file.write(f"{_nested(rows.row(i).tobytes())}\t{label}\n")


def _nested(tokens: bytes) -> str:
    """The left-nested string of one expression."""
    opening, pieces = [], []  # where each open operator's parentheses go, once its arguments are counted
    for token in tokens:
        if MIN <= token < CLOSE:
            opening.append(len(pieces))
            pieces.append(SYMBOLS[token])
            continue
        pieces.append(f"{SYMBOLS[token]} )" if token == CLOSE else SYMBOLS[token])
        if token == CLOSE:
            start = opening.pop()
            pieces[start] = "( " + pieces[start]
        if opening:  # a digit or a whole expression is one more argument of the operator around it
            pieces[opening[-1]] = "( " + pieces[opening[-1]]
            pieces[-1] += " )"
    return " ".join(pieces)
