"""ListOps of Long Range Arena: the value, 0 to 9, of a nested list of digits under MIN, MAX, MED and SM.

Shorter variants are named by their longest length, such as listops-128, and never called LRA. Every row of a
table carries look-up baselines of the very data it was scored on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from absl import logging
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from longwave.kernels.partition import Axes
from longwave.lra.listops_data import baselines
from longwave.lra.listops_data.builder import Generated, ListOpsBuilder, Official, prepare, read_split
from longwave.lra.listops_data.generator import Distribution
from longwave.lra.listops_data.grammar import EOS, PAD, VOCAB, Rows
from longwave.models import heads
from longwave.models.inputs import Tokens
from longwave.training.classification import classification_loss
from longwave.training.pipeline import evaluation_batches, train_batches
from longwave.training.task import Batch, Sums

_LRA = Distribution()
_LRA_SIZES = (96_000, 2_000, 2_000)
_SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListOps:
    """The task. The defaults are Long Range Arena's: more than 500 and fewer than 2,000 tokens.

    source:     "generated", or the folder of the official basic_{train,val,test}.tsv.
    max_length: the padded length, with <eos>. Longer rows of official files are cut, counted and reported.
    min_tokens, max_tokens, seed, sizes: of generated data. Lengths lie strictly between the first two; sizes are the
                rows of train, valid, test.
    data_dir:   where data is built and found again, on a local or shared file system; None: the variable
                LONGWAVE_DATA, else ~/.cache/longwave.
    processes:  that generate; None: one a core. Changes the time, not the data.
    pooling:    over time, before the classifier.
    """

    source: str = "generated"
    max_length: int = 2048
    min_tokens: int = _LRA.min_tokens
    max_tokens: int = _LRA.max_tokens
    seed: int = 0
    sizes: tuple[int, int, int] = _LRA_SIZES
    data_dir: str | None = None
    processes: int | None = None
    pooling: heads.Pooling = heads.mean

    metric: ClassVar[str] = "accuracy"
    larger_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if len(self.sizes) != len(_SPLITS):
            raise ValueError(f"ListOps.sizes = {self.sizes}: expected three numbers of rows: train, valid, test")
        if self.max_length < 2:
            raise ValueError(f"ListOps.max_length = {self.max_length}: expected at least 2, one token and <eos>")
        of_generated = (self.min_tokens, self.max_tokens, self.seed, tuple(self.sizes))
        if self.source != "generated" and of_generated != (_LRA.min_tokens, _LRA.max_tokens, 0, _LRA_SIZES):
            raise ValueError(
                f"ListOps.source = {self.source!r}: min_tokens, max_tokens, seed, sizes are of generated data"
            )
        if self.source == "generated" and self.max_tokens > self.max_length:
            raise ValueError(f"ListOps.max_tokens = {self.max_tokens}: expected at most max_length = {self.max_length}")
        _ = self._source  # checks the other values

    @property
    def name(self) -> str:
        is_lra = (self.min_tokens, self.max_tokens, tuple(self.sizes)) == (500, 2000, _LRA_SIZES)
        return "listops" if is_lra and self.max_length >= _LRA.max_tokens else f"listops-{self.max_length}"

    @property
    def advice(self) -> str:
        if self.name == "listops":
            return ""
        return (
            f"This was {self.name.replace('listops', 'ListOps')}, not Long Range Arena. The real one (2,048 tokens): "
            "uv run train.py configs/lra/listops.gin configs/models/s4d.gin"
        )

    @property
    def inputs(self) -> Tokens:
        return Tokens(vocab=VOCAB, length=self.max_length)

    @property
    def splits(self) -> Mapping[str, int]:
        if self.source == "generated":
            return dict(zip(_SPLITS, self.sizes, strict=True))
        return {split: self._builder.info.splits[split].num_examples for split in _SPLITS}

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        struct = jax.ShapeDtypeStruct
        return {
            "inputs": struct((batch_size, self.max_length), np.int32),
            "length": struct((batch_size,), np.int32),
            "label": struct((batch_size,), np.int32),
            "weight": struct((batch_size,), np.float32),
        }

    def stream(
        self, split: str, *, batch_size: int, seed: int = 0, step: int = 0, rows: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        if split not in _SPLITS:
            raise ValueError(f"split = {split!r}: ListOps has {', '.join(_SPLITS)}")
        source, collate = self._rows[split], functools.partial(_pad, max_length=self.max_length)
        if split == "train":
            return train_batches(source, collate, batch_size=batch_size, seed=seed, step=step, rows=rows)
        return evaluation_batches(source, collate, batch_size=batch_size, step=step, rows=rows)

    def head(self, backbone: nnx.Module, *, rngs: nnx.Rngs) -> nnx.Module:
        return heads.Classifier(backbone, classes=10, pooling=self.pooling, rngs=rngs)

    def loss(
        self, model: nnx.Module, batch: Mapping[str, Array], key: PRNGKeyArray | None, axes: Axes = Axes()
    ) -> Sums:
        return classification_loss(model, batch, key, axes)

    def fingerprint(self) -> dict[str, Any]:
        info = self._builder.info
        return {
            "name": info.full_name,
            "max_length": self.max_length,
            "splits": dict(self.splits),
            "digest": info.metadata["digest"],
        }

    def cut(self, split: str) -> int:
        """How many rows of a split are longer than max_length and lose their end."""
        return sum(self._builder.info.metadata["lengths"][split][self.max_length :])

    @property
    def baselines(self) -> Mapping[str, float]:
        return self._builder.info.metadata["baselines"]["test"]

    def row(self, result: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        data = f"generated, seed {self.seed}" if self.source == "generated" else "official files"
        row: dict[str, Any] = {"task": self.name, "data": data}
        row |= {split: result[split]["accuracy"] for split in ("valid", "test") if split in result}
        if "test" in result:
            row["note"] = baselines.note(result["test"]["accuracy"], self.baselines["root operator"])
        return {**row, **self.baselines, "test rows cut": self.cut("test")}

    @property
    def _source(self) -> Generated | Official:
        if self.source != "generated":
            return Official(self.source)
        distribution = Distribution(min_tokens=self.min_tokens, max_tokens=self.max_tokens)
        train, valid, test = self.sizes
        return Generated(
            distribution=distribution,
            seed=self.seed,
            train=train,
            valid=valid,
            test=test,
            processes=self.processes,
        )

    @functools.cached_property
    def _builder(self) -> ListOpsBuilder:
        return prepare(self._source, self.data_dir)

    @functools.cached_property
    def _rows(self) -> _Splits:
        return _Splits(self)


class _Splits(dict[str, Rows]):
    """Splits in memory (a byte a token), each read once when it is first asked for."""

    def __init__(self, task: ListOps):
        self.task = task

    def __missing__(self, split: str) -> Rows:
        if cut := self.task.cut(split):
            total = self.task.splits[split]
            logging.warning(
                "ListOps: %d of %d rows of %s are longer than %d tokens and lose their end: "
                "their labels need not follow from their inputs",
                *(cut, total, split, self.task.max_length - 1),
            )
        self[split] = read_split(self.task._builder, split)
        return self[split]


def _pad(rows: Sequence[tuple[np.ndarray, int]], max_length: int) -> dict[str, np.ndarray]:
    """Rows as arrays of static shape: tokens, <eos>, padding."""
    tokens, labels = zip(*rows, strict=True)
    tokens = [row[: max_length - 1] for row in tokens]
    length = np.array([len(row) for row in tokens], np.int32)
    inputs = np.full((len(rows), max_length), PAD, np.int32)
    inputs[np.arange(max_length)[None, :] < length[:, None]] = np.concatenate(tokens)
    inputs[np.arange(len(rows)), length] = EOS
    return {"inputs": inputs, "length": length + 1, "label": np.array(labels, np.int32)}
