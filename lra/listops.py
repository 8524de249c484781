"""ListOps of Long Range Arena: the value, 0 to 9, of a nested list of digits under MIN, MAX, MED and SM.

Shorter variants are named by their longest length, such as listops-128, and never called LRA. Every row of a
table carries look-up baselines of the very data it was scored on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from absl import logging

from longwave.lra.classification import SPLITS, Classification, of_tokens
from longwave.lra.listops_data import baselines
from longwave.lra.listops_data.builder import Generated, Official, prepare, read_split
from longwave.lra.listops_data.generator import Distribution
from longwave.lra.listops_data.grammar import EOS, PAD, SYMBOLS, VOCAB, Rows
from longwave.lra.protocol import Rules
from longwave.models import heads
from longwave.models.inputs import Tokens
from longwave.tasks.build import ByteRows

_LRA = Distribution()
_LRA_SIZES = (96_000, 2_000, 2_000)
_S4 = Rules(length=2048, reading="symbols, <eos>", validation="the validation file")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListOps(Classification):
    """The task. The defaults are Long Range Arena's: more than 500 and fewer than 2,000 tokens.

    source:     "generated", or the folder of the official basic_{train,val,test}.tsv. Longer rows of official files
                than `max_length` are cut, counted and reported.
    min_tokens, max_tokens, seed, sizes: of generated data. Lengths lie strictly between the first two; sizes are the
                rows of train, valid, test.
    processes:  that generate; None: one a core. Changes the time, not the data.
    """

    source: str = "generated"
    min_tokens: int = _LRA.min_tokens
    max_tokens: int = _LRA.max_tokens
    seed: int = 0
    sizes: tuple[int, int, int] = _LRA_SIZES
    processes: int | None = None

    base: ClassVar[str] = "listops"
    classes: ClassVar[int] = 10
    rules: ClassVar[Mapping[str, Rules]] = {
        "lra": Rules(length=2000, reading="symbols", validation="the validation file", pooling=heads.cls),
        "s4": _S4,
        "clean": _S4,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.sizes) != len(SPLITS):
            raise ValueError(f"ListOps.sizes = {self.sizes}: expected three numbers of rows: train, valid, test")
        of_generated = (self.min_tokens, self.max_tokens, self.seed, tuple(self.sizes))
        if self.source != "generated" and of_generated != (_LRA.min_tokens, _LRA.max_tokens, 0, _LRA_SIZES):
            raise ValueError(
                f"ListOps.source = {self.source!r}: min_tokens, max_tokens, seed, sizes are of generated data"
            )
        if self.source == "generated" and self.max_tokens > self.length:
            raise ValueError(f"ListOps.max_tokens = {self.max_tokens}: expected at most max_length = {self.length}")
        _ = self._source  # checks the other values

    @property
    def is_benchmark(self) -> bool:
        sizes = (self.min_tokens, self.max_tokens, tuple(self.sizes))
        return sizes == (_LRA.min_tokens, _LRA.max_tokens, _LRA_SIZES) and self.length >= _LRA.max_tokens

    @property
    def inputs(self) -> Tokens:
        return Tokens(vocab=VOCAB, length=self.length)

    @property
    def splits(self) -> Mapping[str, int]:
        if self.source == "generated":
            return dict(zip(SPLITS, self.sizes, strict=True))
        return {split: self._builder.info.splits[split].num_examples for split in SPLITS}

    def rows(self, split: str) -> Rows:
        return self._rows[split]

    def collate(self, rows: Sequence[tuple[np.ndarray, int]], *, length: int) -> dict[str, np.ndarray]:
        """Tokens, <eos> (not in the protocol lra), padding."""
        return of_tokens(rows, length, pad=PAD, eos=self._eos)

    def lengths(self, split: str) -> np.ndarray:
        return np.minimum(self.rows(split).lengths, self._room) + self.length - self._room

    def spell(self, ids: np.ndarray) -> str:
        """The symbols that ids stand for."""
        return " ".join(SYMBOLS[id] for id in ids.tolist())

    def data(self) -> Mapping[str, Any]:
        return {"name": self._builder.info.full_name, "digest": self._builder.facts["digest"]}

    @property
    def data_name(self) -> str:
        if self.source == "generated":
            return f"generated, seed {self.seed}"
        sizes = tuple(self.splits[split] for split in SPLITS)
        return "official files" if sizes == _LRA_SIZES else f"not the release: {sum(sizes):,} rows"

    def cut(self, split: str) -> int:
        """How many rows of a split are longer than fits and lose their end."""
        return sum(self._builder.facts["lengths"][split][self._room + 1 :])

    @property
    def baselines(self) -> Mapping[str, float]:
        return self._builder.facts["baselines"]["test"]

    def row(self, result: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        row = super().row(result)
        if "test" in result:
            row["note"] = baselines.note(result["test"]["accuracy"], self.baselines["root operator"])
        return {**row, "test rows cut": self.cut("test")}

    @property
    def _eos(self) -> int | None:
        return None if self.protocol == "lra" else EOS

    @property
    def _room(self) -> int:
        """How many tokens of a row fit."""
        return self.length - (self._eos is not None)

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
    def _builder(self) -> ByteRows:
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
                *(cut, total, split, self.task._room),
            )
        self[split] = read_split(self.task._builder, split)
        return self[split]
