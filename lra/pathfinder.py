"""Pathfinder of Long Range Arena, at 32 x 32 pixels, at 128 x 128 (Path-X) and at 256 x 256: do the two discs lie on
the ends of one dashed curve?

Pixels are read row by row from the top left; every image fills the sequence, and none is padded. The protocols differ
in what a pixel is (a token or a number) and in which images are for what.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from longwave.lra.classification import Classification
from longwave.lra.pathfinder_data import builder
from longwave.lra.pathfinder_data.official import decode
from longwave.lra.protocol import Rules
from longwave.models.inputs import Features, Tokens
from longwave.tasks.build import ByteRows
from longwave.training.files import data_root

_NAMES = {32: "pathfinder", 64: "pathfinder64", 128: "pathx", 256: "path256"}
_VALUES = 256
_S4 = Rules(
    length=32 * 32,
    reading="grey values, unit",
    validation="a tenth of all images; 80 % / 10 % / 10 % drawn with seed 42",
)


def unit(pixels: UInt8[np.ndarray, "b t"]) -> Float[np.ndarray, "b t"]:
    """Grey values in [0, 1]: the fourth generation of S4's configs."""
    return pixels.astype(np.float32) / np.float32(255)


def centred(pixels: UInt8[np.ndarray, "b t"]) -> Float[np.ndarray, "b t"]:
    """Grey values in [-1, 1]: earlier generations, S5, LongConv."""
    return (unit(pixels) - np.float32(0.5)) / np.float32(0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pathfinder(Classification):
    """The task. Data is generated with the published parameters, unless there are official files.

    size:           32, 128 (Path-X) or 256 pixels a side; 64 is no task of the benchmark.
    contour_length: paddles of a long curve: 14 is the benchmark's (hard), 9 intermediate, 6 easy.
    source:         "generated"; "official": the release, as the folder lra_release under data_dir; or another folder
                    that holds pathfinder32, ... or is it.
    images, seed:   of generated data.
    processes:      that generate; None: one a core. Changes the time, not the data.
    scale:          from grey values to what a model reads, `unit` or `centred`; tokens (the protocol lra) have none.
    """

    size: int = 32
    contour_length: int = 14
    source: str = "generated"
    images: int = builder.IMAGES
    seed: int = 0
    processes: int | None = None
    scale: Callable[[UInt8[np.ndarray, "b t"]], Float[np.ndarray, "b t"]] = unit

    base: ClassVar[str] = "pathfinder"  # of 32 x 32; see `name`
    classes: ClassVar[int] = 2
    rules: ClassVar[Mapping[str, Rules]] = {  # of 32 x 32
        "lra": Rules(
            length=32 * 32,
            reading="grey values as tokens",
            validation="a tenth of all images; 80 % / 10 % / 10 % in the order of tensorflow_datasets",
        ),
        "s4": _S4,
        "clean": _S4,
    }

    def __post_init__(self) -> None:
        if self.size not in _NAMES:
            raise ValueError(f"Pathfinder.size = {self.size}: expected one of {', '.join(map(str, _NAMES))}")
        super().__post_init__()
        if self.length != self.size**2:
            raise ValueError(
                f"Pathfinder.max_length = {self.max_length}: expected {self.size**2}, the pixels of an image of size "
                f"{self.size}"
            )
        if self.contour_length not in builder.DIFFICULTIES:
            allowed = ", ".join(map(str, builder.DIFFICULTIES))
            raise ValueError(f"Pathfinder.contour_length = {self.contour_length}: expected one of {allowed}")
        if self.images < 10 or self.seed < 0:
            raise ValueError(
                f"Pathfinder.images = {self.images}, seed = {self.seed}: expected at least 10 images, to test on one, "
                "and a seed that is not negative"
            )
        if self.source != "generated" and (self.images, self.seed) != (builder.IMAGES, 0):
            raise ValueError(f"Pathfinder.source = {self.source!r}: images, seed are of generated data")

    @property
    def name(self) -> str:
        difficulty = builder.DIFFICULTIES[self.contour_length]
        parts = [_NAMES[self.size], *([difficulty] if difficulty != "hard" else [])]
        return "-".join(parts if self.images == builder.IMAGES else [*parts, _count(self.images)])

    @property
    def is_benchmark(self) -> bool:
        return self.size != 64 and self.contour_length == 14 and self.images == builder.IMAGES

    @property
    def advice(self) -> str:
        if self.size == 64:
            return ""  # no short form of anything
        return super().advice.replace(f"configs/lra/{self.base}", f"configs/lra/{_NAMES[self.size]}")

    @property
    def rule(self) -> Rules:
        """With the length, the scale and the pooling that are used."""
        rule = self.rules[self.protocol]
        scale = getattr(self.scale, "__name__", repr(self.scale))
        reading = rule.reading if self.protocol == "lra" else f"grey values, {scale}"
        return dataclasses.replace(rule, length=self.size**2, reading=reading, pooling=self.pooling or rule.pooling)

    @property
    def inputs(self) -> Tokens | Features:
        if self.protocol == "lra":
            return Tokens(vocab=_VALUES, length=self.length)
        return Features(channels=1, length=self.length)

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        spec = super().batch_spec(batch_size)
        spec.pop("length", None)  # no image is padded: black is a value, not the absence of one
        return spec

    def rows(self, split: str) -> _Images:
        return _Images(self._builder.as_data_source(builder.ROWS), self._split[split], self.size)

    def collate(self, rows: Sequence[tuple[np.ndarray, int]], *, length: int) -> dict[str, np.ndarray]:
        images, labels = zip(*rows, strict=True)
        pixels, label = np.stack(images), np.array(labels, np.int32)
        if self.protocol == "lra":
            return {"inputs": pixels.astype(np.int32), "label": label}
        return {"inputs": self.scale(pixels)[..., None], "label": label}

    @property
    def splits(self) -> Mapping[str, int]:
        return {split: len(rows) for split, rows in self._split.items()}

    @property
    def baselines(self) -> Mapping[str, float]:
        return self._builder.facts["baselines"]["lra" if self.protocol == "lra" else "s4"]

    def data(self) -> Mapping[str, Any]:
        return {"name": self._builder.info.full_name, "digest": self._builder.facts["digest"]}

    @property
    def data_name(self) -> str:
        if self.source == "generated":
            return f"generated, seed {self.seed}"
        images = self._builder.facts["rows"] + self._builder.facts["skipped"]
        return "official files" if images == builder.IMAGES else f"not the release: {images:,} images"

    @functools.cached_property
    def _builder(self) -> ByteRows:
        what, root = {"size": self.size, "contour_length": self.contour_length}, data_root(self.data_dir)
        if self.source == "generated":
            made = {"images": self.images, "seed": self.seed, "processes": self.processes}
            return builder.prepare(builder.Generated(**what, **made, root=root), root)
        path = root if self.source == "official" else Path(self.source).expanduser()
        return builder.prepare(builder.Official(**what, path=path), root)

    @functools.cached_property
    def _split(self) -> Mapping[str, Int[np.ndarray, "rows"]]:
        return builder.split(self._builder, self.protocol)


@dataclasses.dataclass(frozen=True)
class _Images:
    """Some rows of the stored ones, each read and decoded when it is asked for."""

    stored: Any  # TFDS's data source
    rows: Int[np.ndarray, "rows"]
    size: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "t"], int]:
        row = self.stored[int(self.rows[index])]
        return decode(row["png"].tobytes(), self.size), row["label"]


def _count(images: int) -> str:
    return f"{images // 1000}k" if images % 1000 == 0 else str(images)
