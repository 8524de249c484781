"""Where Pathfinder comes from, generated or the official files, how it is stored, and which rows are for what.

Rows are stored in the order of the files, images as the PNG files they are; the protocols divide them differently.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float, Int, UInt8
from rich.progress import Progress

from longwave.lra.pathfinder_data import layout, official
from longwave.lra.pathfinder_data.parameters import FOLDERS, lra
from longwave.tasks import build
from longwave.tasks.images_data.split import permutation
from longwave.training.files import missing

SPLITS = ("train", "valid", "test")
ROWS = "images"  # the one split that is stored
IMAGES = 200_000  # of each size and difficulty in the release
DIFFICULTIES = {6: "easy", 9: "intermediate", 14: "hard"}  # as Long Range Arena's builder calls the folders


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """Images to be generated, into the official layout under `root`; they stay there, for other readers too."""

    size: int
    contour_length: int
    images: int
    seed: int
    root: Path
    processes: int | None = None  # changes the time, not the data

    @property
    def name(self) -> str:
        return f"generated_{DIFFICULTIES[self.contour_length]}_images{self.images}_seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Of metadata and images."""
        return self._files / FOLDERS[self.contour_length]

    def generate(self) -> None:
        """Makes the files, or what is missing of them."""
        with build.progress(f"pathfinder{self.size}") as bar:
            task = bar.add_task("generating", total=self.images)
            layout.generate(
                self._files,
                lra(self.size, self.contour_length),
                images=self.images,
                seed=self.seed,
                processes=self.processes,
                progress=lambda done: bar.update(task, completed=done),
            )

    @property
    def _files(self) -> Path:
        return self.root / f"pathfinder_images{self.images}_seed{self.seed}" / f"pathfinder{self.size}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Official:
    """The released files: `path` is pathfinder32 (or 64, 128, 256), or holds it, at once or in its lra_release."""

    size: int
    contour_length: int
    path: Path

    @functools.cached_property
    def name(self) -> str:
        """Tells apart what metadata and the first image tell apart."""
        files, digest = official.metadata_files(self.folder), hashlib.sha256()
        for file in files:
            digest.update(file.read_bytes())
        for line in official.lines(files[0], files[0].read_bytes())[:1]:
            image = self.folder / line.image
            digest.update(image.read_bytes() if image.is_file() else b"")
        return f"official_{DIFFICULTIES[self.contour_length]}_{digest.hexdigest()[:12]}"

    @functools.cached_property
    def folder(self) -> Path:
        """Of metadata and images. FileNotFoundError that names what is missing."""
        own, difficulty = f"pathfinder{self.size}", FOLDERS[self.contour_length]
        for place in (".", own, f"lra_release/{own}", f"lra_release/lra_release/{own}"):
            if (folder := self.path / place / difficulty).is_dir():
                return folder
        expected = f"{own}/{difficulty} (also in its folder lra_release)"
        raise missing("Pathfinder", self.path, expected, "the archive lra_release of Long Range Arena")


class _Rows:
    """The rows of a folder, read once, and what is learned on the way."""

    def __init__(self, folder: Path, size: int, difficulty: str):
        self.folder, self.size, self.difficulty = folder, size, difficulty
        self.lines = [x for f in official.metadata_files(folder) for x in official.lines(f, f.read_bytes())]
        if len(self.lines) < 10:
            raise ValueError(f"{folder / 'metadata'}: {len(self.lines)} images, expected at least 10")
        self.brightness = np.full(len(self.lines), np.nan)  # stays where an image is empty

    def __len__(self) -> int:
        return len(self.lines)

    def __iter__(self) -> Iterator[build.Example]:
        images = official.images(self.folder, self.lines, self.size)
        for i, (line, image) in enumerate(zip(self.lines, images, strict=True)):
            if image is not None:
                png, pixels = image
                self.brightness[i] = pixels.mean()
                yield {"png": png, "label": line.label}

    def facts(self) -> Mapping[str, Any]:
        there = ~np.isnan(self.brightness)
        empty = np.flatnonzero(~there)
        parts = by_hash([line.key for line in self.lines], self.difficulty)[there]
        labels, brightness = np.array([line.label for line in self.lines])[there], self.brightness[there]
        rules = {"lra": _members(parts), "s4": shuffled(len(labels))}
        return {
            "rows": len(labels),
            "skipped": len(empty),
            "first skipped": self.lines[empty[0]].image if len(empty) else "",
            "lra": "".join(map(str, parts)),
            "baselines": {rule: baselines(labels, brightness, split) for rule, split in rules.items()},
        }


class _Recipe:
    version: str = "1.0.0"
    fields: tuple[str, ...] = ("png",)

    def __init__(self, source: Generated | Official):
        self.source, self.dataset, self.name = source, f"pathfinder{source.size}", source.name

    def splits(self, progress: Progress) -> Mapping[str, _Rows]:
        source = self.source
        self._rows = _Rows(source.folder, source.size, DIFFICULTIES[source.contour_length])
        return {ROWS: self._rows}

    def facts(self) -> Mapping[str, Any]:
        return self._rows.facts()


def prepare(source: Generated | Official, root: Path) -> build.ByteRows:
    """The built data set, found or made. Facts: rows, skipped, first skipped, lra (the part of each row), baselines.

    ValueError that names what is damaged; OSError if it cannot be written; either way nothing half made is left, but
    generated images, from which the next attempt goes on.
    """
    recipe = _Recipe(source)
    if isinstance(source, Generated) and not build.is_complete(Path(build.ByteRows.of(recipe, root).data_dir)):
        source.generate()  # not inside `build`: what it drafts may be a day old, this may take longer
    builder = build.build(recipe, root)
    if skipped := builder.facts["skipped"]:
        total = skipped + builder.facts["rows"]
        first = builder.facts["first skipped"]
        logging.warning("Pathfinder: %d of %d images are empty and left out, the first %s", skipped, total, first)
    return builder


def split(builder: build.ByteRows, protocol: str) -> Mapping[str, Int[np.ndarray, "rows"]]:
    """split -> its rows."""
    if protocol != "lra":
        return shuffled(builder.facts["rows"])
    return _members(np.frombuffer(builder.facts["lra"].encode(), np.uint8) - ord("0"))


def shuffled(rows: int) -> Mapping[str, Int[np.ndarray, "rows"]]:
    """80 %, 10 % and 10 % of a permutation drawn with seed 42: the rows of the S4 and S5 code."""
    order, tenth = permutation(rows), int(rows * 0.1)
    ends = (rows - 2 * tenth, rows - tenth)
    return dict(zip(SPLITS, np.split(order, ends), strict=True))


def by_hash(keys: list[str], difficulty: str) -> UInt8[np.ndarray, "rows"]:
    """Which part, 0 to 2, of Long Range Arena's [:80%], [80%:90%], [90%:] each row is in.

    They are parts of what TFDS wrote, and it stores rows by the MD5 sum of the split's name (here the difficulty) and
    the row's key.
    """
    digests = [hashlib.md5(f"{difficulty}{key}".encode()).digest() for key in keys]
    order = sorted(range(len(keys)), key=digests.__getitem__)
    parts = np.empty(len(keys), np.uint8)
    for part, rows in enumerate(np.split(np.array(order), [round(0.8 * len(keys)), round(0.9 * len(keys))])):
        parts[rows] = part
    return parts


def baselines(
    labels: Int[np.ndarray, "rows"], brightness: Float[np.ndarray, "rows"], rows: Mapping[str, np.ndarray]
) -> Mapping[str, float]:
    """Accuracy on test of the more frequent class of train, and of the class whose mean brightness is nearer."""
    (x, y), (at, truth) = ((brightness[rows[s]], labels[rows[s]]) for s in ("train", "test"))
    means = [x[y == label].mean() if np.any(y == label) else np.inf for label in (0, 1)]
    nearer = np.abs(at - means[1]) < np.abs(at - means[0])
    accuracy = lambda answer: float(np.mean(answer == truth)) if len(truth) else 0.0
    return {"majority": accuracy(int(2 * y.sum() > len(y))), "nearer class brightness": accuracy(nearer)}


def _members(parts: UInt8[np.ndarray, "rows"]) -> Mapping[str, Int[np.ndarray, "rows"]]:
    return {name: np.flatnonzero(parts == part) for part, name in enumerate(SPLITS)}
