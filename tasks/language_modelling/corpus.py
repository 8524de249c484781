"""A corpus as one stream of ids a split, built once as array_record and read at any place.

    separator, ids of document 1, separator, ids of document 2, ...

It is stored in blocks of `BLOCK` ids, so that a row of any length is read without the rest, whatever the corpus' size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from rich.progress import Progress

from longwave.tasks import build
from longwave.tasks.language_modelling.documents import SPLITS, Document, documents, identity
from longwave.tasks.language_modelling.tokeniser import Tokeniser
from longwave.training.files import data_root

BLOCK = 4096  # ids stored together
_HELD = 4096  # blocks kept in memory once read: all of a small corpus


class Corpus:
    """The recipe of the stored streams. facts: of every split the numbers of ids, bytes and documents."""

    dataset, version = "corpus", "1.0.0"
    fields: tuple[str, ...] = ("ids",)

    def __init__(self, source: Path | None, tokeniser: Tokeniser, held_out: float):
        self._source, self._tokeniser, self._held_out = source, tokeniser, held_out
        self.name = f"{identity(source)}-{tokeniser.name}-{held_out:g}"
        self._facts: dict[str, dict[str, int]] = {}

    def splits(self, progress: Progress) -> Mapping[str, Iterator[build.Example]]:
        found = documents(self._source, self._held_out)
        return {split: self._blocks(split, found[split]) for split in SPLITS}

    def facts(self) -> Mapping[str, Any]:
        return self._facts

    def _blocks(self, split: str, found: Sequence[Document]) -> Iterator[build.Example]:
        counts = self._facts[split] = {"ids": 0, "bytes": 0, "documents": len(found)}
        dtype, rest = stored_dtype(self._tokeniser.vocab), np.zeros(0, np.int32)
        for document in found:
            text = document()
            ids = self._tokeniser.encode(text)
            counts["ids"] += 1 + len(ids)
            counts["bytes"] += len(text)
            rest = np.concatenate([rest, [self._tokeniser.separator], ids])
            whole = len(rest) // BLOCK * BLOCK
            yield from ({"ids": part.tobytes(), "label": 0} for part in rest[:whole].astype(dtype).reshape(-1, BLOCK))
            rest = rest[whole:]
        if len(rest):
            yield {"ids": rest.astype(dtype).tobytes(), "label": 0}


def stored_dtype(vocab: int) -> np.dtype:
    """Little-endian, as small as holds the ids."""
    return np.dtype("<u2" if vocab <= 2**16 else "<u4")


class Stream:
    """The ids of a split, read where they are asked for."""

    def __init__(self, builder: build.ByteRows, split: str, vocab: int):
        self._source, self._dtype = builder.as_data_source(split), stored_dtype(vocab)
        self.counts: Mapping[str, int] = builder.facts[split]
        self._block = functools.lru_cache(maxsize=_HELD)(self._read)

    def __len__(self) -> int:
        return self.counts["ids"]

    def read(self, start: int, stop: int) -> Int[np.ndarray, "n"]:
        """The ids from `start` to `stop`, or to the end."""
        first, last = start // BLOCK, -(-min(stop, len(self)) // BLOCK)
        ids = np.concatenate([self._block(i) for i in range(first, max(last, first + 1))])
        return ids[start - first * BLOCK : stop - first * BLOCK].astype(np.int32)

    def _read(self, block: int) -> np.ndarray:
        return np.frombuffer(self._source[block]["ids"].tobytes(), self._dtype)


def prepare(source: str | None, tokeniser: Tokeniser, held_out: float, data_dir: str | None) -> build.ByteRows:
    """The built corpus, found or made; see `documents` and `tasks/build.py` for errors."""
    place = None if source is None else Path(source).expanduser()
    if place is not None and not place.exists():
        raise FileNotFoundError(f"source = {source!r} is not there: expected a text file or a folder of texts")
    return build.build(Corpus(place, tokeniser, held_out), data_root(data_dir))
