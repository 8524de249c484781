"""The official pairs of papers: tsv_data/new_aan_pairs.{train,eval,test}.tsv, of the ACL Anthology Network.

No header; five columns: label, two IDs, two texts. The label is written as a float, 1.0 where one paper cites the
other. Quotation marks are text like any other. Of each text the first 10,000 characters are kept, Google's first cut.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from rich.progress import Progress

from longwave.lra.text_data.alphabet import Census, codes, is_utf8, shortest_prefix
from longwave.lra.text_data.baselines import look_up
from longwave.tasks import build
from longwave.training.files import data_root, missing

FILES = {
    split: f"new_aan_pairs.{name}.tsv" for split, name in (("train", "train"), ("valid", "eval"), ("test", "test"))
}
PAIRS = {"train": 147_086, "valid": 18_090, "test": 17_437}  # in the release
PLACES = ("lra_release/lra_release/tsv_data", "lra_release/tsv_data")  # under the data root
URL = "https://storage.googleapis.com/long-range-arena/lra_release.gz (unpacked)"
KEPT = 10_000  # characters of a text
READ = 3999  # characters, whose alphabet is counted: as many as the S4 lineage reads
LINE = 1 << 28  # bytes of a line beyond which a file cannot be what it should

_LABELS = {b"0.0": 0, b"0": 0, b"1.0": 1, b"1": 1}


class CorruptRow(ValueError):
    """A line that is not what the format says; the message begins with file and line."""


def read(path: Path) -> Iterator[tuple[int, bytes, bytes]]:
    """(label, first text, second text) of each row, one line at a time. Raises CorruptRow."""
    number = 0
    with path.open("rb") as file:
        while line := file.readline(LINE):
            number += 1
            try:
                row = _parse(line)
            except ValueError as error:
                raise CorruptRow(f"{path}:{number}: {error}") from None
            yield row
    if not number:
        raise CorruptRow(f"{path}:1: the file is empty")


def _parse(line: bytes) -> tuple[int, bytes, bytes]:
    if len(line) == LINE:
        raise ValueError(f"the line is longer than {LINE:,} bytes")
    columns = line.removesuffix(b"\n").removesuffix(b"\r").split(b"\t")
    if len(columns) != 5:
        raise ValueError(f"{len(columns)} columns, expected 5 (label, id, id, text, text)")
    label, _, _, first, second = columns
    if label not in _LABELS:
        raise ValueError(f"label {label[:20].decode(errors='replace')!r}, expected 0.0 or 1.0")
    return _LABELS[label], first, second


class Pairs:
    """The rows of one file as they are stored, and what is counted on the way.

    Lengths are those of whole texts, up to 10,001, which stands for all that are longer than what is kept.
    """

    def __init__(self, path: Path, census: Census | None):
        self.path, self._census = path, census
        self.empty, self.not_utf8 = 0, list[str]()
        self.lengths: dict[str, list[int]] = {"bytes": [], "characters": []}  # of the longer text of each pair
        self.labels, self.texts = bytearray(), [bytearray(), bytearray()]  # of each pair, and eight bytes that tell it

    def __iter__(self) -> Iterator[build.Example]:
        for label, *texts in read(self.path):
            self.labels.append(label)
            kept = [shortest_prefix(text, KEPT) for text in texts]
            for text, keys in zip(kept, self.texts, strict=True):
                self._see(text)
                keys += hashlib.blake2b(text, digest_size=8).digest()
            characters = [len(codes(a)) + (len(a) < len(b)) for a, b in zip(kept, texts, strict=True)]
            for unit, lengths in (("bytes", map(len, texts)), ("characters", characters)):
                self.lengths[unit].append(min(max(lengths), KEPT + 1))
            yield {"first": kept[0], "second": kept[1], "label": label}

    def _see(self, text: bytes) -> None:
        self.empty += not text
        if not is_utf8(text):
            self.not_utf8.append(f"{self.path}:{len(self.labels)}")
        if self._census is not None:
            self._census.add(text)


class AAN:
    """The recipe of the data set: pairs of texts, each cut at 10,000 characters."""

    dataset, version = "aan", "1.0.0"
    fields: tuple[str, ...] = ("first", "second")

    def __init__(self, source: str | None, root: Path):
        """source: the folder of the files; None: in their place under `root`, needed only until they are built."""
        self._given, self._root = None if source is None else Path(source).expanduser(), root
        self.name = "official" if source is None else f"official_{self._sample()}"

    def paths(self) -> dict[str, Path]:
        """split -> file. Raises FileNotFoundError that says what to put where."""
        given = self._given
        folders = [self._root / p for p in PLACES] if given is None else [given, given / "tsv_data"]
        for folder in folders:
            paths = {split: folder / name for split, name in FILES.items()}
            if all(path.is_file() for path in paths.values()):
                return paths
        raise missing("Retrieval", folders[0], ", ".join(FILES.values()), URL)

    def splits(self, progress: Progress) -> Mapping[str, Pairs]:
        self._census = Census(READ)
        paths = self.paths()
        self._pairs = {s: Pairs(paths[s], self._census if s == "train" else None) for s in FILES}
        return self._pairs

    def facts(self) -> Mapping[str, Any]:
        pairs = self._pairs
        return {
            "notes": list(self._notes()),
            "lengths": {split: rows.lengths for split, rows in pairs.items()},
            "empty": {split: rows.empty for split, rows in pairs.items()},
            "not UTF-8": {split: len(rows.not_utf8) for split, rows in pairs.items()},
            "alphabet": self._census.alphabet(1),
            "baselines": _baselines(pairs["train"], pairs["test"]),
        }

    def _notes(self) -> Iterator[str]:
        for split, rows in self._pairs.items():
            pairs, bad = len(rows.labels), rows.not_utf8
            if pairs != PAIRS[split]:
                yield f"Retrieval: {rows.path} has {pairs:,} pairs: the release has {PAIRS[split]:,}"
            if not _ends_a_line(rows.path):
                yield f"Retrieval: {rows.path}:{pairs} has no line end: the file may be cut off there"
            if rows.empty:
                yield f"Retrieval: {rows.path} has {rows.empty:,} empty texts"
            if bad:
                yield f"Retrieval: {len(bad):,} texts are no UTF-8, which reads as U+FFFD; the first is in {bad[0]}"

    def _sample(self) -> str:
        """What tells sources apart, without reading them whole."""
        digest = hashlib.sha256()
        for path in self.paths().values():
            with path.open("rb") as file:
                digest.update(f"{path.stat().st_size} ".encode() + file.read(1 << 16))
        return digest.hexdigest()[:12]


def prepare(source: str | None, data_dir: str | None) -> build.ByteRows:
    """The built data set, found or made; see `tasks/build.py` and `read` for errors."""
    root = data_root(data_dir)
    recipe = AAN(source, root)
    if build.is_complete(root / recipe.dataset / recipe.name / recipe.version):
        return build.build(recipe, root)
    recipe.paths()  # what is missing would else be reported as what cannot be written
    built = build.build(recipe, root)
    for note in built.facts["notes"]:
        logging.warning("%s", note)
    return built


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _baselines(train: Pairs, test: Pairs) -> dict[str, float]:
    labels, expected = (np.frombuffer(rows.labels, np.uint8) for rows in (train, test))
    keys = [[np.frombuffer(texts, np.uint64) for texts in rows.texts] for rows in (train, test)]
    nothing = np.zeros(len(labels)), np.zeros(len(expected))
    by = {"majority": nothing, "first text": (keys[0][0], keys[1][0]), "second text": (keys[0][1], keys[1][1])}
    return {name: look_up(known, labels, asked, expected) for name, (known, asked) in by.items()}
