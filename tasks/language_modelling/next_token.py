"""Language modelling: every token of a text from those before it.

A split is one stream of ids, a separator before every document (see `corpus`). Row i of `length` tokens reads the ids
from i * length on, and is asked for the ids one place further, so that every id but the stream's first is asked for
exactly once; the last row of validation and test is filled up, that of training left out. Rows stand alone, without a
carry from the row before: the rest of a long document begins without its past. Where a document begins inside a row,
`reset` is true: nothing of the document before is seen.

    loss            nats a token, the end of every document included
    bits_per_byte   the same cost over the bytes of the texts: bits_per_byte = loss / ln 2 * ids / bytes of the split,
                    which is exact over a whole split, whatever the tokeniser
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from longwave.kernels.partition import Axes
from longwave.layers.mixer import Context
from longwave.models.inputs import Tokens
from longwave.models.language_model import LanguageModel
from longwave.tasks.build import ByteRows
from longwave.tasks.language_modelling import baselines, corpus
from longwave.tasks.language_modelling.documents import SPLITS
from longwave.tasks.language_modelling.tokeniser import Tokeniser, tokeniser
from longwave.training.pipeline import evaluation_batches, stack, train_batches
from longwave.training.task import Batch, Sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken:
    """The task.

    length:    tokens of a row.
    source:    a text file, a folder of .txt files, or one in PG-19's layout; None: a sample of Shakespeare.
    tokenizer: a tokenizer.json; None: bytes.       separator: the token between documents of a tokenizer.json.
    vocab:     ids of the model, where it has more than its tokeniser; None: as many.
    tied:      one table for embeddings and logits.
    resets:    False: a row's documents are read as one text, for mixers that cannot forget on demand.
    held_out:  the share of validation, and that of test, where the source has no splits of its own.
    data_dir:  where the corpus is built and found again; None: the variable LONGWAVE_DATA, else ~/.cache/longwave.
    """

    length: int = 1024
    source: str | None = None
    tokenizer: str | None = None
    separator: str = "<|endoftext|>"
    vocab: int | None = None
    tied: bool = True
    resets: bool = True
    held_out: float = 0.05
    data_dir: str | None = None

    metric: ClassVar[str] = "bits_per_byte"
    larger_is_better: ClassVar[bool] = False
    advice: ClassVar[str] = "Text of this model: longwave generate RUN_DIR --prompt '...'"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"NextToken.length = {self.length}: expected at least 1")
        if not 0 < self.held_out < 0.5:
            raise ValueError(f"NextToken.held_out = {self.held_out}: expected a share above 0, below a half")
        if self.vocab is not None and self.vocab < 1:
            raise ValueError(f"NextToken.vocab = {self.vocab}: expected at least 1, or None")

    @property
    def name(self) -> str:
        source = "shakespeare" if self.source is None else self.source.rstrip("/").split("/")[-1].removesuffix(".txt")
        return f"{source}-{'bytes' if self.tokenizer is None else 'tokens'}-{self.length}"

    @functools.cached_property
    def tokeniser(self) -> Tokeniser:
        found = tokeniser(self.tokenizer, self.separator)
        if self.vocab is not None and self.vocab < found.vocab:
            raise ValueError(f"NextToken.vocab = {self.vocab}: the tokeniser has {found.vocab} ids; expected no fewer")
        return found

    @property
    def inputs(self) -> Tokens:
        return Tokens(vocab=self.vocab or self.tokeniser.vocab, length=self.length)

    @property
    def splits(self) -> Mapping[str, int]:
        return {split: len(self.rows(split)) for split in SPLITS}

    def rows(self, split: str) -> Rows:
        """Random access to the rows of a split."""
        return self._rows[split]

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        struct, shape = jax.ShapeDtypeStruct, (batch_size, self.length)
        spec = {"inputs": struct(shape, np.int32), "target": struct(shape, np.int32)}
        if self.resets:
            spec["reset"] = struct(shape, np.bool_)
        each = struct((batch_size,), np.float32)
        return {**spec, "ids_per_byte": each, "weight": each}

    def stream(
        self, split: str, *, batch_size: int, seed: int = 0, step: int = 0, rows: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        if split not in SPLITS:
            raise ValueError(f"split = {split!r}: expected one of {', '.join(SPLITS)}")
        source = self.rows(split)
        if split == "train":
            return train_batches(source, stack, batch_size=batch_size, seed=seed, step=step, rows=rows)
        return evaluation_batches(source, stack, batch_size=batch_size, step=step, rows=rows)

    def head(self, backbone: nnx.Module, *, rngs: nnx.Rngs) -> nnx.Module:
        return LanguageModel(backbone, vocab=self.inputs.vocab, tied=self.tied, rngs=rngs)

    def loss(
        self, model: LanguageModel, batch: Mapping[str, Array], key: PRNGKeyArray | None, axes: Axes = Axes()
    ) -> Sums:
        ctx = Context(reset=batch.get("reset"), key=key, axes=axes)
        costs = model.costs(batch["inputs"], batch["target"], None, ctx, train=key is not None)
        nll = (costs.nll * batch["weight"][:, None]).sum(1)
        count = ((batch["target"] >= 0) * batch["weight"][:, None]).sum()
        metrics = {"bits_per_byte": (nll * batch["ids_per_byte"]).sum() / math.log(2)}
        return Sums(nll.sum(), count, metrics, costs.aux)

    def fingerprint(self) -> dict[str, Any]:
        facts = self._builder.facts
        counts = {split: dict(facts[split]) for split in SPLITS}
        return {"name": self.name, "tokeniser": self.tokeniser.name, **counts, "digest": facts["digest"]}

    @functools.cached_property
    def baselines(self) -> Mapping[str, float]:
        return baselines.bits_per_byte(self.rows("train").stream, self.rows("test").stream, self.tokeniser.vocab)

    def row(self, result: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        row: dict[str, Any] = {"task": self.name}
        for split in ("valid", "test"):
            if split in result:
                row[f"{split} bits per byte"] = result[split]["bits_per_byte"]
                row[f"{split} perplexity"] = math.exp(result[split]["loss"])
        return {**row, **self.baselines}

    def spell(self, ids: np.ndarray) -> str:
        """The text that ids stand for."""
        return self.tokeniser.decode(ids).decode(errors="replace")

    @functools.cached_property
    def _builder(self) -> ByteRows:
        return corpus.prepare(self.source, self.tokeniser, self.held_out, self.data_dir)

    @functools.cached_property
    def _rows(self) -> dict[str, Rows]:
        return {split: Rows(self, corpus.Stream(self._builder, split, self.tokeniser.vocab), split) for split in SPLITS}


class Rows:
    """The rows of a split: of training whole ones alone."""

    def __init__(self, task: NextToken, stream: corpus.Stream, split: str):
        self.task, self.stream = task, stream
        asked = len(stream) - 1
        self._count = asked // task.length if split == "train" else -(-asked // task.length)
        if self._count < 1:
            raise ValueError(f"NextToken.length = {task.length}: {split} of {task.name} has but {len(stream)} ids")
        self._ids_per_byte = np.array(asked / max(stream.counts["bytes"], 1), np.float32)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        length = self.task.length
        ids = self.stream.read(index * length, (index + 1) * length + 1)
        inputs, target = np.zeros(length, np.int32), np.full(length, -1, np.int32)
        inputs[: len(ids) - 1], target[: len(ids) - 1] = ids[:-1], ids[1:]
        row: dict[str, np.ndarray] = {"inputs": inputs, "target": target, "ids_per_byte": self._ids_per_byte}
        return {**row, "reset": inputs == self.task.tokeniser.separator} if self.task.resets else row
