"""Builds ListOps once as array_record files, without TensorFlow, and finds it again.

A data set is built beside its final place, read back, proved row by row, and moved there by one rename: it exists whole
and true or not at all, and of two processes that build at once the first to finish wins. Seed, digest, baselines and
lengths are kept with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longwave.lra.listops_data import tsv
from longwave.lra.listops_data.baselines import baselines
from longwave.lra.listops_data.generator import Distribution, generate
from longwave.lra.listops_data.grammar import Rows, evaluate

OFFICIAL_FILES = {"train": "basic_train.tsv", "valid": "basic_val.tsv", "test": "basic_test.tsv"}
_BLOCK = 4096  # rows read together
_DRAFT = ".building-"  # how folders of unfinished data begin
_ABANDONED = 24 * 3600  # seconds after which nobody builds in a draft any more: a build takes minutes


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


@dataclasses.dataclass(eq=False)
class ListOpsConfig(tfds.core.BuilderConfig):
    """TFDS's name for where the data comes from."""

    source: Generated | Official = dataclasses.field(default_factory=Generated)


class ListOpsBuilder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of either source. Rows keep their order: {"tokens": ids, no <eos>, "label": 0 to 9}."""

    name = "listops"
    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # where TFDS would look for download checksums; it cannot search a namespace package

    @classmethod
    def of(cls, source: Generated | Official, data_dir: str | os.PathLike[str]) -> ListOpsBuilder:
        config = ListOpsConfig(name=source.name, source=source)
        with _quiet():
            return cls(config=config, data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes")
        return tfds.core.DatasetInfo(
            builder=self,
            description="ListOps of Long Range Arena: nested lists of digits and their value.",
            features=tfds.features.FeaturesDict({"tokens": tokens, "label": tfds.features.Scalar(np.uint8)}),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        with _progress() as bar:
            splits = self.builder_config.source.rows(bar)
        self.info.metadata.update(
            digest=_digest(splits),
            baselines={split: baselines(splits["train"], splits[split]) for split in ("valid", "test")},
            lengths={split: np.bincount(rows.lengths).tolist() for split, rows in splits.items()},
        )
        return {split: self._generate_examples(split, rows) for split, rows in splits.items()}

    def _generate_examples(self, split: str, rows: Rows) -> Iterator[tuple[int, Mapping[str, np.ndarray]]]:
        with _progress() as bar:
            for i in bar.track(range(len(rows)), description=f"writing {split}"):
                yield i, {"tokens": rows.row(i), "label": rows.labels[i]}


def prepare(source: Generated | Official, data_dir: str | os.PathLike[str] | None = None) -> ListOpsBuilder:
    """The built data set, found or made. OSError if it cannot be written; then nothing is left behind."""
    folder = os.fspath(data_dir or os.environ.get("LONGWAVE_DATA") or "~/.cache/longwave")
    if "://" in folder:
        raise ValueError(
            f"data_dir = {folder!r}: expected a folder of a local or shared file system (data_dir or LONGWAVE_DATA "
            "names it); only run folders may lie in a bucket"
        )
    root = Path(folder).expanduser()
    _remove_abandoned(root)
    final = root / ListOpsBuilder.name / source.name / str(ListOpsBuilder.VERSION)
    if _is_complete(final):
        return ListOpsBuilder.of(source, root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=_DRAFT, dir=root) as folder:
            draft = ListOpsBuilder.of(source, folder)
            with _quiet():
                draft.download_and_prepare()
            _prove(draft)
            _move(Path(draft.data_dir), final)
    except (OSError, RuntimeError) as error:  # array_record reports a full disk as a RuntimeError
        existing = next(path for path in (root, *root.parents) if path.exists())
        free = f"{shutil.disk_usage(existing).free / 1e6:,.0f} MB are free there"
        advice = "data_dir or LONGWAVE_DATA names another folder"
        raise OSError(f"ListOps could not be built in {root}: {error}; {free}; {advice}") from error
    return ListOpsBuilder.of(source, root)


def read_split(builder: ListOpsBuilder, split: str) -> Rows:
    """A whole split: reading in blocks costs a tenth of reading row by row."""
    source, parts = builder.as_data_source(split), []
    for start in range(0, len(source), _BLOCK):
        rows = source.__getitems__(range(start, min(start + _BLOCK, len(source))))
        tokens = [row["tokens"] for row in rows]
        offsets = np.cumsum([0, *map(len, tokens)])
        parts.append(Rows(np.concatenate(tokens), offsets, np.array([row["label"] for row in rows], np.uint8)))
    return Rows.concatenate(parts)


def _move(draft: Path, final: Path) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        draft.rename(final)
    except OSError:
        if not _is_complete(final):  # another process was faster: its data is the same
            raise


def _is_complete(folder: Path) -> bool:
    return (folder / "dataset_info.json").is_file()


def _remove_abandoned(root: Path) -> None:
    """Removes the drafts of builds that were killed."""
    with contextlib.suppress(OSError):
        for draft in root.glob(f"{_DRAFT}*"):
            if time.time() - draft.stat().st_mtime > _ABANDONED:
                shutil.rmtree(draft, ignore_errors=True)


def _prove(draft: ListOpsBuilder) -> None:
    """Reads what is stored, and evaluates every row and compares with its label.

    Raises OSError where it is not what was written, ValueError where that was wrong.
    """
    splits = {split: read_split(draft, split) for split in OFFICIAL_FILES}
    if _digest(splits) != draft.info.metadata["digest"]:
        raise OSError("what was read back is not what was written")
    with _progress() as bar:
        for split, rows in splits.items():
            labels = rows.labels.tolist()
            for i in bar.track(range(len(rows)), description=f"proving {split}"):
                if (value := evaluate(rows.row(i).tobytes())) != labels[i]:
                    raise ValueError(f"{split} row {i} evaluates to {value}, but its label is {labels[i]}")


def _digest(splits: Mapping[str, Rows]) -> str:
    digest = hashlib.sha256()
    for rows in splits.values():
        for array in (rows.tokens, rows.offsets, rows.labels):
            digest.update(array.tobytes())
    return digest.hexdigest()


def _progress() -> Progress:
    columns = (
        TextColumn("ListOps: {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
    """Without TFDS's bars, its talk of downloads, its warning of configurations not its own."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)
        logging.set_verbosity(verbosity)
