"""Text of Long Range Arena: is a review of a film, read byte by byte or character by character, good or bad?

Shorter forms are named by their length, such as text-1k, and never called LRA.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from absl import logging

from longwave.lra.classification import Classification, of_tokens
from longwave.lra.protocol import Rules
from longwave.lra.text_data import baselines, imdb
from longwave.lra.text_data.alphabet import PAD, Bytes, Characters
from longwave.lra.text_data.texts import Texts, load
from longwave.models import heads
from longwave.models.inputs import Tokens
from longwave.tasks.build import ByteRows
from longwave.tasks.images_data.split import hold_out

VOCAB = 135  # of characters: of the S4 lineage's configs
ON_TEST = "the test split"  # what two protocols call validation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(Classification):
    """The task.

    source: the official aclImdb, a folder or the archive; None: aclImdb, aclImdb_v1.tar.gz or aclImdb.tar.gz in the
            folder of `data_dir`, needed until the data set is built. Texts longer than `max_length` (with <eos>, where
            the protocol has one) lose their end; they are counted and reported.
    """

    source: str | None = None

    base: ClassVar[str] = "text"
    classes: ClassVar[int] = 2
    rules: ClassVar[Mapping[str, Rules]] = {
        "lra": Rules(length=4000, reading="bytes + 1", validation=ON_TEST, pooling=heads.cls),
        "s4": Rules(length=4096, reading="characters, <eos>", validation=ON_TEST),
        "clean": Rules(length=4096, reading="characters, <eos>", validation="a tenth of train, seed 42"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length > self.rule.length:
            raise ValueError(
                f"Text.max_length = {self.length}: the protocol {self.protocol!r} reads {self.rule.length}; with "
                f"configs/lra/text.gin that is LENGTH={self.rule.length}"
            )

    @property
    def inputs(self) -> Tokens:
        return Tokens(vocab=Bytes.vocab if self.protocol == "lra" else VOCAB, length=self.length)

    @functools.cached_property
    def splits(self) -> Mapping[str, int]:
        train, test = (self._builder.info.splits[split].num_examples for split in imdb.SPLITS)
        valid = test if self._validates_on_test else len(hold_out(train)[1])
        return {"train": train if self._validates_on_test else train - valid, "valid": valid, "test": test}

    def rows(self, split: str) -> Texts:
        return self._rows[split]

    def collate(self, rows: Sequence[tuple[np.ndarray, int]], *, length: int) -> dict[str, np.ndarray]:
        return of_tokens(rows, length, pad=PAD, eos=self._reading.eos)

    def lengths(self, split: str) -> np.ndarray:
        return np.diff(self.rows(split).offsets) + (self._reading.eos is not None)

    def spell(self, ids: np.ndarray) -> str:
        """The text that ids stand for."""
        return self._reading.decode(ids)

    def data(self) -> Mapping[str, Any]:
        facts = self._builder.facts
        return {"name": self._builder.name, "reviews": dict(facts["reviews"]), "digest": facts["digest"]}

    @property
    def data_name(self) -> str:
        counts = self._builder.facts["reviews"]
        if set(counts.values()) == {imdb.REVIEWS}:
            return "official files"
        return f"not the release: {sum(counts.values()):,} reviews"

    @functools.cached_property
    def baselines(self) -> Mapping[str, float]:
        return baselines.of_texts(self.rows("train"), self.rows("test"))

    def row(self, result: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        note = {"note": "validated on test"} if self._validates_on_test else {}
        return {**super().row(result), **note, "test rows cut": int(self.rows("test").cut.sum())}

    @property
    def _validates_on_test(self) -> bool:
        return self.rule.validation == ON_TEST

    @functools.cached_property
    def _builder(self) -> ByteRows:
        return imdb.prepare(self.source, self.data_dir)

    @functools.cached_property
    def _reading(self) -> Bytes | Characters:
        return Bytes() if self.protocol == "lra" else Characters(self._builder.facts["alphabet"], vocab=VOCAB)

    @functools.cached_property
    def _rows(self) -> _Splits:
        return _Splits(self)


class _Splits(dict[str, Texts]):
    """Splits in memory, one or two bytes a position, each read when it is first asked for."""

    def __init__(self, task: Text):
        self.task = task

    def __missing__(self, split: str) -> Texts:
        task = self.task
        if split == "test":
            self[split] = self._load(split)
        elif task._validates_on_test:
            self[split] = self["test"] if split == "valid" else self._load(split)
        else:
            texts = self._load("train")
            for name, rows in zip(("train", "valid"), hold_out(len(texts)), strict=True):
                self[name] = texts.take(rows)
        return self[split]

    def _load(self, split: str) -> Texts:
        task = self.task
        room = task.length - (task._reading.eos is not None)
        texts = load(task._builder, split, task._reading, room)
        if cut := texts.cut.sum():
            unit = "bytes" if task.protocol == "lra" else "characters"
            logging.warning("%s: %d of %d texts of %s end after %d %s", task.name, cut, len(texts), split, room, unit)
        return texts
