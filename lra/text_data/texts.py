"""Rows of encoded texts in memory, and parts of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int, UInt8, UInt16

from longwave.lra.text_data.alphabet import Bytes, Characters
from longwave.tasks import build


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts one after the other; row i is (ids[offsets[i] : offsets[i + 1]], label)."""

    ids: UInt8[np.ndarray, "total"] | UInt16[np.ndarray, "total"]
    offsets: Int[np.ndarray, "rows+1"]
    labels: UInt8[np.ndarray, "rows"]
    cut: Bool[np.ndarray, "rows"]  # whether the text lost its end

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.ids[self.offsets[index] : self.offsets[index + 1]], int(self.labels[index])

    def take(self, rows: Int[np.ndarray, "part"]) -> Texts:
        """The rows named, in this order."""
        return _joined([self[row][0] for row in rows], self.labels[rows], self.cut[rows])


def load(builder: build.ByteRows, split: str, reading: Bytes | Characters, room: int) -> Texts:
    """The first `room` ids of every text of a split."""
    ids, labels, cut = [], [], []
    for row in _rows(builder, split):
        encoded = reading.encode(row["text"].tobytes())
        cut.append(len(encoded) > room)
        ids.append(encoded[:room])
        labels.append(row["label"])
    return _joined(ids, np.array(labels, np.uint8), np.array(cut))


def _rows(builder: build.ByteRows, split: str) -> Iterator[dict[str, np.ndarray]]:
    """In blocks, which costs a tenth of reading row by row."""
    source = builder.as_data_source(split)
    for start in range(0, len(source), build.BLOCK):
        yield from source.__getitems__(range(start, min(start + build.BLOCK, len(source))))


def _joined(ids: list[np.ndarray], labels: np.ndarray, cut: np.ndarray) -> Texts:
    return Texts(np.concatenate(ids), np.cumsum([0, *map(len, ids)]), labels, cut)
