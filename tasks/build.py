"""Builds a data set once as array_record files, without TensorFlow, and finds it again.

A data set is built beside its final place, read back, compared with what was meant to be written, and moved there by
one rename: it exists whole and true or not at all, and of two processes that build at once the first to finish wins.
Rows keep their order; which of them a protocol trains on is decided later, so that one build serves all protocols.
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
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

DRAFT = ".building-"  # how folders of unfinished data begin
BLOCK = 1024  # rows read back together
_ABANDONED = 24 * 3600  # seconds after which nobody builds in a draft any more
_FACTS = "longwave"  # the key of our metadata

Example = Mapping[str, Any]  # the fields, each bytes, and "label", an int


class Recipe(Protocol):
    """What a data set is made of.

    dataset: its name, the folder under the data root.      name: where the rows come from; names the folder in it.
    version: of the format, "1.0.0".                        fields: the names of a row's byte strings.
    splits:  split -> rows, each {field: bytes, ..., "label": 0 to 255}; read once, in order, one at a time.
    facts:   what JSON can hold and the task wants to know (counts, what was skipped, vocabulary); asked for when the
             last row was read.
    """

    dataset: str
    name: str
    version: str
    fields: tuple[str, ...]

    def splits(self, progress: Progress) -> Mapping[str, Iterable[Example]]: ...

    def facts(self) -> Mapping[str, Any]: ...


@dataclasses.dataclass(eq=False)
class _Config(tfds.core.BuilderConfig):
    recipe: Recipe | None = None


class ByteRows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS builder of a recipe: rows of byte strings and a label."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # where TFDS would look for download checksums; it cannot search a namespace package

    @classmethod
    def of(cls, recipe: Recipe, folder: str | os.PathLike[str]) -> ByteRows:
        # TFDS keeps name and version on the class.
        made = type(cls.__name__, (cls,), {"VERSION": tfds.core.Version(recipe.version)}, skip_registration=True)
        made.name = recipe.dataset
        with quiet():
            return made(config=_Config(name=recipe.name, recipe=recipe), data_dir=folder, file_format="array_record")

    @property
    def facts(self) -> Mapping[str, Any]:
        """The recipe's facts, and "digest", of all rows in order."""
        return self.info.metadata[_FACTS]

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes")
        fields = dict.fromkeys(self.builder_config.recipe.fields, text)
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Rows of {self.name}.",
            features=tfds.features.FeaturesDict({**fields, "label": tfds.features.Scalar(np.uint8)}),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        recipe, self._digest = self.builder_config.recipe, hashlib.sha256()
        with progress(self.name) as bar:
            splits = dict(recipe.splits(bar))
        self._unread = set(splits)
        return {split: self._generate_examples(split, rows) for split, rows in splits.items()}

    def _generate_examples(self, split: str, rows: Iterable[Example]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        recipe = self.builder_config.recipe
        self._digest.update(split.encode())
        with progress(self.name) as bar:
            total = len(rows) if isinstance(rows, Sized) else None
            for i, row in enumerate(bar.track(rows, total=total, description=f"writing {split}")):
                _add(self._digest, recipe.fields, row)
                texts = {field: np.frombuffer(row[field], np.uint8) for field in recipe.fields}
                yield i, {**texts, "label": np.uint8(row["label"])}
        self._unread.discard(split)
        if not self._unread:
            self.info.metadata[_FACTS] = {**recipe.facts(), "digest": self._digest.hexdigest()}


Check = Callable[[str, int, Example], None]


def build(recipe: Recipe, root: Path, check: Check | None = None) -> ByteRows:
    """The built data set of a recipe under `root`, found or made.

    check: called with (split, index, row) of every row that was read back; raises where it cannot be right by itself.
    OSError if it cannot be written; whatever goes wrong, nothing is left behind.
    """
    builder = ByteRows.of(recipe, root)
    if is_complete(Path(builder.data_dir)):
        return builder
    _remove_abandoned(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=DRAFT, dir=root) as folder:
            draft = ByteRows.of(recipe, folder)
            with quiet():
                draft.download_and_prepare()
            _prove(draft, check)
            _move(Path(draft.data_dir), Path(builder.data_dir))
    except (OSError, RuntimeError) as error:  # array_record reports a full disk as a RuntimeError
        existing = next(path for path in (root, *root.parents) if path.exists())
        free = f"{shutil.disk_usage(existing).free / 1e6:,.0f} MB are free there"
        advice = "data_dir or LONGWAVE_DATA names another folder"
        raise OSError(f"{builder.name} could not be built in {root}: {error}; {free}; {advice}") from error
    return ByteRows.of(recipe, root)


def is_complete(folder: Path) -> bool:
    return (folder / "dataset_info.json").is_file()


def progress(title: str) -> Progress:
    """A bar on standard error: what is done, of how much, and the time left."""
    columns = (TextColumn(f"{title}: {{task.description}}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


@contextlib.contextmanager
def quiet() -> Generator[None, None, None]:
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


def _add(digest: Any, fields: Iterable[str], row: Mapping[str, Any]) -> None:
    for field in fields:
        content = bytes(row[field])
        digest.update(len(content).to_bytes(8, "little") + content)
    digest.update(bytes([row["label"]]))


def _prove(draft: ByteRows, check: Check | None) -> None:
    """Raises OSError where what is stored is not what the recipe gave, and what `check` raises."""
    digest, fields = hashlib.sha256(), draft.builder_config.recipe.fields
    with progress(draft.name) as bar:
        for split in draft.info.splits:
            digest.update(split.encode())
            source = draft.as_data_source(split)
            for start in bar.track(range(0, len(source), BLOCK), description=f"reading back {split}"):
                stop = min(start + BLOCK, len(source))
                for i, stored in enumerate(source.__getitems__(range(start, stop)), start):
                    row = {field: stored[field].tobytes() for field in fields} | {"label": stored["label"]}
                    _add(digest, fields, row)
                    if check is not None:
                        check(split, i, row)
    if digest.hexdigest() != draft.facts["digest"]:
        raise OSError("what was read back is not what was written")


def _move(draft: Path, final: Path) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        draft.rename(final)
    except OSError:
        if not is_complete(final):  # another process was faster: its data is the same
            raise


def _remove_abandoned(root: Path) -> None:
    """Removes the drafts of builds that were killed."""
    with contextlib.suppress(OSError):
        for draft in root.glob(f"{DRAFT}*"):
            if time.time() - draft.stat().st_mtime > _ABANDONED:
                shutil.rmtree(draft, ignore_errors=True)
