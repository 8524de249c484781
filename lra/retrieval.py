"""Retrieval of Long Range Arena: does one of two papers of the ACL Anthology cite the other?

Each text is encoded by itself, by the same model, and the two vectors are compared: no token sees the other text.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from absl import logging
from flax import nnx

from longwave.lra.classification import SPLITS, Classification, padded
from longwave.lra.protocol import Rules
from longwave.lra.text_data import aan
from longwave.lra.text_data.alphabet import PAD, Bytes, Characters
from longwave.models import heads
from longwave.models.inputs import Tokens
from longwave.tasks.build import ByteRows
from longwave.training.pipeline import Source

VOCAB = 98  # of characters: the 95 of ASCII that print, and the specials
_S4 = Rules(length=4000, reading="characters, <eos>", validation="the eval file")

Pair = tuple[tuple[np.ndarray, np.ndarray], int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval(Classification):
    """The task. Batches have inputs (b, 2, t) and length (b, 2).

    source: the folder of new_aan_pairs.{train,eval,test}.tsv; None: lra_release/lra_release/tsv_data or
            lra_release/tsv_data in the folder of `data_dir`, needed until the data set is built. Texts longer than
            `max_length` (with <eos>, where the protocol has one) lose their end; they are counted and reported.
    """

    source: str | None = None
    classifier: Callable[..., nnx.Module] = heads.PairClassifier

    base: ClassVar[str] = "retrieval"
    classes: ClassVar[int] = 2
    rules: ClassVar[Mapping[str, Rules]] = {
        "lra": Rules(length=4000, reading="bytes + 1", validation="the eval file", pooling=heads.first),
        "s4": _S4,
        "clean": _S4,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length > self.rule.length:
            raise ValueError(
                f"Retrieval.max_length = {self.length}: the protocol {self.protocol!r} reads {self.rule.length}"
            )

    @property
    def inputs(self) -> Tokens:
        return Tokens(vocab=Bytes.vocab if self.protocol == "lra" else VOCAB, length=self.length)

    @property
    def splits(self) -> Mapping[str, int]:
        return {split: self._builder.info.splits[split].num_examples for split in SPLITS}

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        pairs = {"inputs": (batch_size, 2, self.length), "length": (batch_size, 2)}
        return super().batch_spec(batch_size) | {
            name: jax.ShapeDtypeStruct(shape, np.int32) for name, shape in pairs.items()
        }

    def rows(self, split: str) -> Source:
        return self._rows[split]

    def collate(self, rows: Sequence[Pair], *, length: int) -> dict[str, np.ndarray]:
        pairs, labels = zip(*rows, strict=True)
        inputs, lengths = padded([ids for pair in pairs for ids in pair], length, pad=PAD, eos=self._reading.eos)
        label = np.array(labels, np.int32)
        return {"inputs": inputs.reshape(-1, 2, length), "length": lengths.reshape(-1, 2), "label": label}

    def spell(self, ids: np.ndarray) -> str:
        """The text that ids stand for."""
        return self._reading.decode(ids)

    def data(self) -> Mapping[str, Any]:
        return {"name": self._builder.name, "digest": self._builder.facts["digest"]}

    @property
    def data_name(self) -> str:
        pairs = sum(self.splits.values())
        return "official files" if dict(self.splits) == aan.PAIRS else f"not the release: {pairs:,} pairs"

    def lengths(self, split: str) -> np.ndarray:
        return np.minimum(self._whole_lengths(split), self._room) + (self.length - self._room)

    def cut(self, split: str) -> int:
        """Of how many pairs of a split a text is longer than max_length and loses its end."""
        return int((self._whole_lengths(split) > self._room).sum())

    @property
    def baselines(self) -> Mapping[str, float]:
        return self._builder.facts["baselines"]

    def row(self, result: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        return {**super().row(result), "test rows cut": self.cut("test")}

    @functools.cached_property
    def _builder(self) -> ByteRows:
        return aan.prepare(self.source, self.data_dir)

    @functools.cached_property
    def _reading(self) -> Bytes | Characters:
        return Bytes() if self.protocol == "lra" else Characters(self._builder.facts["alphabet"], vocab=VOCAB)

    @functools.cached_property
    def _rows(self) -> _Splits:
        return _Splits(self)

    @property
    def _room(self) -> int:
        """For a text, without its <eos>."""
        return self.length - (self.protocol != "lra")

    def _whole_lengths(self, split: str) -> np.ndarray:
        return np.array(self._builder.facts["lengths"][split]["bytes" if self.protocol == "lra" else "characters"])


class _Splits(dict[str, Source]):
    """Splits by name, each opened, and what is cut in it reported, when it is first asked for."""

    def __init__(self, task: Retrieval):
        self.task = task

    def __missing__(self, split: str) -> Source:
        task, room = self.task, self.task._room
        if cut := task.cut(split):
            total = task.splits[split]
            logging.warning("%s: %d of %d pairs of %s lose what follows %d", task.name, cut, total, split, room)
        self[split] = _OnDemand(task._builder.as_data_source(split), task._reading, room)
        return self[split]


@dataclasses.dataclass(frozen=True)
class _OnDemand:
    """Pairs read and encoded when they are asked for: whole splits of 147,086 pairs would fill the memory."""

    stored: Source
    reading: Bytes | Characters
    room: int

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int) -> Pair:
        row = self.stored[index]
        first, second = (self.reading.encode(row[field].tobytes())[: self.room] for field in aan.AAN.fields)
        return (first, second), int(row["label"])
