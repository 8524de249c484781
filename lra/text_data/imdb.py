"""The official reviews of IMDB (Maas et al., 2011): aclImdb/{train,test}/{neg,pos}/ID_RATING.txt, unpacked or packed.

Rows are stored as bytes in the order of split, label (neg 0, pos 1) and ID, so that a folder and an archive give the
same data set. aclImdb/train/unsup has no labels: it is skipped and counted.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import gzip
import hashlib
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from rich.progress import Progress

from longwave.lra.text_data.alphabet import Census, is_utf8
from longwave.tasks import build
from longwave.training.files import data_root, missing

SPLITS = ("train", "test")
LABELS = ("neg", "pos")
REVIEWS = 12_500  # in each of the four folders of the release
PLACES = ("aclImdb", "aclImdb_v1.tar.gz", "aclImdb.tar.gz")  # where the release is looked for, in this order
URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
READ = 4095  # characters, whose alphabet is counted: as many as the S4 lineage reads
MIN_FREQ = 15  # of a character in the training reviews, to have an id of its own

_NAME = re.compile(r"(\d+)_(\d+)\.txt")
_RATINGS = {"neg": range(1, 5), "pos": range(7, 11)}  # what the two labels mean
_BLOCK = 1 << 20

Place = tuple[str, str]  # split, label


class Damaged(ValueError):
    """A file that is not what the release holds; the message begins with its name."""


@dataclasses.dataclass(frozen=True)
class Reviews:
    """What was found: the reviews of each folder by their ID, in any order; how many files of which kind were skipped;
    and the names of reviews that are no UTF-8."""

    texts: dict[Place, dict[int, bytes]]
    skipped: collections.Counter[str]
    not_utf8: list[str]

    def rows(self, split: str) -> list[build.Example]:
        folders = [(label, self.texts[split, name]) for label, name in enumerate(LABELS)]
        return [{"text": folder[i], "label": label} for label, folder in folders for i in sorted(folder)]


def read(path: Path) -> Reviews:
    """Every review of a folder or archive. Raises Damaged, which names the file."""
    reviews = Reviews({(split, label): {} for split in SPLITS for label in LABELS}, collections.Counter(), [])
    for name, text in _archived(path, reviews.skipped) if path.is_file() else _unpacked(path, reviews.skipped):
        split, label, file = name.split("/")[-3:]
        matched = _NAME.fullmatch(file)
        if matched is None or int(matched[2]) not in _RATINGS[label]:
            stars = _RATINGS[label]
            raise Damaged(f"{name}: expected the name ID_RATING.txt, with a rating {stars[0]} to {stars[-1]}")
        if not text:
            raise Damaged(f"{name} is empty")
        if int(matched[1]) in reviews.texts[split, label]:
            raise Damaged(f"{name}: there is another review with this ID")
        if not is_utf8(text):
            reviews.not_utf8.append(name)
        reviews.texts[split, label][int(matched[1])] = text
    for (split, label), folder in reviews.texts.items():
        if not folder:
            raise Damaged(f"{path} has no review in {split}/{label}")
    return reviews


def _unpacked(path: Path, skipped: collections.Counter[str]) -> Iterator[tuple[str, bytes]]:
    for split in SPLITS:
        for label in LABELS:
            if not (path / split / label).is_dir():
                raise Damaged(f"{path} has no folder {split}/{label}")
            for file in os.scandir(path / split / label):
                if file.is_file():
                    yield file.path, Path(file.path).read_bytes()
    skipped["unsup"] = sum(1 for _ in (path / "train" / "unsup").glob("*.txt"))


def _archived(path: Path, skipped: collections.Counter[str]) -> Iterator[tuple[str, bytes]]:
    """In one pass, to the very end: only there does gzip know that nothing is missing."""
    try:
        with gzip.open(path) as file:
            with tarfile.open(fileobj=file, mode="r|") as archive:
                for member in archive:
                    parts = member.name.split("/")
                    if not member.isfile():
                        continue
                    if len(parts) >= 3 and parts[-3] in SPLITS and parts[-2] in LABELS:
                        yield f"{path}:{member.name}", archive.extractfile(member).read()
                    else:
                        skipped["unsup" if parts[-2:-1] == ["unsup"] else "other files"] += 1
            while file.read(_BLOCK):
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise Damaged(f"{path} is damaged: {error}") from error


class IMDB:
    """The recipe of the data set: all labelled reviews, whole."""

    dataset, version = "imdb", "1.0.0"
    fields: tuple[str, ...] = ("text",)

    def __init__(self, source: str | None, root: Path):
        """source: folder or archive; None: in its place under `root`, where it is needed only until it is built."""
        self._given, self._root = None if source is None else Path(source).expanduser(), root

    @functools.cached_property
    def name(self) -> str:
        return "official" if self._given is None else f"official_{_sample(self.source)}"

    @functools.cached_property
    def source(self) -> Path:
        """Raises FileNotFoundError that says what to put where."""
        if self._given is None:
            for name in PLACES:
                if (self._root / name).exists():
                    return self._root / name
            raise missing("IMDB", self._root, " or ".join(PLACES), URL)
        if not self._given.exists():
            raise missing("IMDB", self._given.parent, self._given.name, URL)
        folder = self._given / "aclImdb"
        return folder if folder.is_dir() else self._given

    def splits(self, progress: Progress) -> Mapping[str, list[build.Example]]:
        progress.add_task(f"reading {self.source}", total=None)
        reviews = read(self.source)
        texts = {split: [t for name in LABELS for t in reviews.texts[split, name].values()] for split in SPLITS}
        census = Census(READ)
        for text in texts["train"]:
            census.add(text)
        counts = {f"{split}/{label}": len(folder) for (split, label), folder in reviews.texts.items()}
        self._facts = {
            "notes": list(self._notes(counts, reviews.not_utf8)),
            "reviews": counts,
            "skipped": dict(reviews.skipped),
            "not UTF-8": len(reviews.not_utf8),
            "bytes": {split: _spread(map(len, texts[split])) for split in SPLITS},
            "alphabet": census.alphabet(MIN_FREQ),
        }
        return {split: reviews.rows(split) for split in SPLITS}

    def facts(self) -> Mapping[str, Any]:
        return self._facts

    def _notes(self, counts: Mapping[str, int], not_utf8: list[str]) -> Iterator[str]:
        if set(counts.values()) != {REVIEWS}:
            found = ", ".join(f"{count:,} in {place}" for place, count in counts.items())
            yield f"IMDB: {self.source} has {found}: the release has {REVIEWS:,} in each"
        if not_utf8:
            yield f"IMDB: {len(not_utf8):,} reviews are no UTF-8, which reads as U+FFFD; the first is {not_utf8[0]}"


def prepare(source: str | None, data_dir: str | None) -> build.ByteRows:
    """The built data set, found or made; see `tasks/build.py` and `read` for errors."""
    root = data_root(data_dir)
    recipe = IMDB(source, root)
    if build.is_complete(root / recipe.dataset / recipe.name / recipe.version):
        return build.build(recipe, root)
    _ = recipe.source  # what is missing would else be reported as what cannot be written
    built = build.build(recipe, root)
    for note in built.facts["notes"]:
        logging.warning("%s", note)
    return built


def _sample(path: Path) -> str:
    """What tells sources apart, without reading them whole."""
    if path.is_file():
        with path.open("rb") as file:
            content = f"{path.stat().st_size} ".encode() + file.read(1 << 16)
        return hashlib.sha256(content).hexdigest()[:12]
    folders = [path / split / label for split in SPLITS for label in LABELS]
    files = sorted(f"{file.name} {file.stat().st_size}" for folder in folders for file in folder.glob("*"))
    return hashlib.sha256("\n".join(files).encode()).hexdigest()[:12]


def _spread(lengths: Iterable[int]) -> dict[str, float]:
    lengths = np.fromiter(lengths, np.int64)
    return {
        "min": int(lengths.min()),
        "mean": float(lengths.mean()),
        "median": float(np.median(lengths)),
        "max": int(lengths.max()),
    }
