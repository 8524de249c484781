"""Where ListOps comes from, generated or the official files, and how it is stored: rows in order, proved when built."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from longwave.lra.listops_data import tsv
from longwave.lra.listops_data.baselines import baselines
from longwave.lra.listops_data.generator import Distribution, generate
from longwave.lra.listops_data.grammar import Rows, evaluate
from longwave.tasks import build
from longwave.training.files import data_root

OFFICIAL_FILES = {"train": "basic_train.tsv", "valid": "basic_val.tsv", "test": "basic_test.tsv"}
_BLOCK = 4096  # rows read together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """Data to be generated: the first `train` rows, then `valid`, then `test`, in the order of drawing."""

    distribution: Distribution = dataclasses.field(default_factory=Distribution)
    seed: int = 0
    train: int = 96_000
    valid: int = 2_000
    test: int = 2_000
    processes: int | None = dataclasses.field(default=None, compare=False)  # changes the time, not the data

    def __post_init__(self) -> None:
        if min(self.train, self.valid, self.test) < 1 or self.seed < 0:
            raise ValueError(
                f"train = {self.train}, valid = {self.valid}, test = {self.test}, seed = {self.seed}: "
                "expected at least one row a split and a seed that is not negative"
            )

    @property
    def name(self) -> str:
        d = self.distribution
        shape = f"{d.min_tokens}_{d.max_tokens}_depth{d.max_depth}_args{d.max_args}"
        return f"generated_{shape}_rows{self.train}_{self.valid}_{self.test}_seed{self.seed}"

    def rows(self, progress: Progress) -> dict[str, Rows]:
        sizes = {"train": self.train, "valid": self.valid, "test": self.test}
        total = sum(sizes.values())
        bar = progress.add_task("generating", total=total)
        rows = generate(
            self.distribution,
            total,
            seed=self.seed,
            processes=self.processes,
            progress=lambda done: progress.update(bar, completed=done),
        )
        ends = np.cumsum(list(sizes.values())).tolist()
        return {split: rows.slice(end - size, end) for end, (split, size) in zip(ends, sizes.items(), strict=True)}


@dataclasses.dataclass(frozen=True)
class Official:
    """The released files, in `folder` (or in `folder`/listops-1000)."""

    folder: str | os.PathLike[str]

    def __post_init__(self) -> None:
        self.paths()

    def paths(self) -> dict[str, Path]:
        """split -> file. Raises FileNotFoundError that names what is missing."""
        folder = Path(self.folder).expanduser()
        for candidate in (folder, folder / "listops-1000"):
            paths = {split: candidate / name for split, name in OFFICIAL_FILES.items()}
            if all(path.is_file() for path in paths.values()):
                return paths
        missing = [name for name in OFFICIAL_FILES.values() if not (folder / name).is_file()]
        raise FileNotFoundError(f"ListOps source {folder} lacks {', '.join(missing)} (also in its folder listops-1000)")

    @property
    def name(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths().values():
            with path.open("rb") as file:
                digest.update(f"{path.stat().st_size} ".encode() + file.read(1 << 16))
        return f"official_{digest.hexdigest()[:12]}"

    def rows(self, progress: Progress) -> dict[str, Rows]:
        bar = progress.add_task("reading", total=len(OFFICIAL_FILES))
        rows = {}
        for split, path in self.paths().items():
            rows[split] = tsv.read(path)
            progress.advance(bar)
        return rows


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Rows as they are stored: the tokens as bytes, without <eos>."""

    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[build.Example]:
        for i, label in enumerate(self.rows.labels.tolist()):
            yield {"tokens": self.rows.row(i).tobytes(), "label": label}


class _Recipe:
    dataset, version = "listops", "1.1.0"
    fields: tuple[str, ...] = ("tokens",)

    def __init__(self, source: Generated | Official):
        self.source, self.name = source, source.name

    def splits(self, progress: Progress) -> Mapping[str, _Stored]:
        self._rows = self.source.rows(progress)
        return {split: _Stored(rows) for split, rows in self._rows.items()}

    def facts(self) -> Mapping[str, Any]:
        rows = self._rows
        return {
            "baselines": {split: baselines(rows["train"], rows[split]) for split in ("valid", "test")},
            "lengths": {split: np.bincount(rows[split].lengths).tolist() for split in rows},
        }


def _check(split: str, index: int, row: build.Example) -> None:
    if (value := evaluate(row["tokens"])) != row["label"]:
        raise ValueError(f"{split} row {index} evaluates to {value}, but its label is {row['label']}")


def prepare(source: Generated | Official, data_dir: str | None = None) -> build.ByteRows:
    """The built data set, found or made. OSError if it cannot be written; then nothing is left behind."""
    return build.build(_Recipe(source), data_root(data_dir), _check)


def read_split(builder: build.ByteRows, split: str) -> Rows:
    """A whole split: reading in blocks costs a tenth of reading row by row."""
    source, parts = builder.as_data_source(split), []
    for start in range(0, len(source), _BLOCK):
        rows = source.__getitems__(range(start, min(start + _BLOCK, len(source))))
        tokens = [row["tokens"] for row in rows]
        offsets = np.cumsum([0, *map(len, tokens)])
        parts.append(Rows(np.concatenate(tokens), offsets, np.array([row["label"] for row in rows], np.uint8)))
    return Rows.concatenate(parts)
