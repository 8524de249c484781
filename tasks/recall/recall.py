"""What the recall tasks share: questions in a row of tokens, and what is counted of their answers.

A batch holds inputs (b, t), position (b, q) of the questions, label (b, q), the answers, and cell (b,), all int32. An
answer may have several tokens. All but its last are inputs behind the question, and it counts as right only when each
of them is: what greedy decoding would get right. A cell is a kind of row that is counted by itself, such as a depth.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from longwave.kernels.partition import Axes
from longwave.layers.mixer import Context
from longwave.models import heads
from longwave.models.inputs import Tokens
from longwave.tasks.recall.batches import SPLITS, Arrays, Rows, batch_spec, digest, fresh_batches, generator
from longwave.tasks.recall.streaming import streamed_logits
from longwave.training.classification import token_classification_sums
from longwave.training.pipeline import evaluation_batches, train_batches
from longwave.training.task import Batch, Sums


@dataclasses.dataclass(frozen=True)
class Group:
    """Cells whose accuracy is reported together, and the share of all answers that is theirs."""

    cells: tuple[int, ...]
    share: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(abc.ABC):
    """A recall task whose rows are all of one length. Row i of a set or batch is of cell i % len(cells).

    seed:  of all sets.
    chunk: evaluation reads longer rows in chunks of so many tokens, by the mixers' carry: in memory that does not
        depend on the length (where the carry's does not); None: at once.
    tied:  logits come from the table of embeddings, and not from a matrix of their own.
    """

    seed: int = 0
    chunk: int | None = None
    tied: bool = False

    kind: ClassVar[str]
    fresh: ClassVar[bool] = True  # whether every training row is new
    metric: ClassVar[str] = "accuracy"
    larger_is_better: ClassVar[bool] = True
    advice: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.seed < 0 or (self.chunk is not None and self.chunk < 1):
            self.refuse("seed", "chunk", expected="a seed from 0 on, and a chunk of at least a token or None")
        sizes = dict(self.splits)
        if set(sizes) != set(SPLITS) or min(sizes.values()) < 1:
            raise ValueError(f"{type(self).__name__}.sizes: {sizes}, expected at least one row of each")
        if any(sizes[split] % len(self.cells) for split in SPLITS[1:]):
            raise ValueError(
                f"{type(self).__name__}.sizes: {sizes['valid']} and {sizes['test']} rows of valid and test, expected "
                f"multiples of {len(self.cells)}: as many of every depth"
            )

    def refuse(self, *fields: str, expected: str) -> None:
        values = ", ".join(f"{field} = {getattr(self, field)!r}" for field in fields)
        raise ValueError(f"{type(self).__name__}.{values}: expected {expected}")

    # What each task gives.

    @property
    @abc.abstractmethod
    def name(self) -> str: ...

    @property
    @abc.abstractmethod
    def inputs(self) -> Tokens: ...

    @property
    @abc.abstractmethod
    def splits(self) -> Mapping[str, int]: ...

    @property
    @abc.abstractmethod
    def questions(self) -> int:
        """Tokens of a row that are asked for."""

    @abc.abstractmethod
    def draw(self, rng: np.random.Generator, rows: int) -> Arrays:
        """So many rows of the distribution."""

    def guesses(self, test: Arrays) -> dict[str, float]:
        """Accuracy of the cheapest look-ups."""
        return {}

    # What most leave as it is.

    @property
    def answer(self) -> int:
        """Tokens of an answer."""
        return 1

    @property
    def cells(self) -> tuple[str, ...]:
        """Names of the cells."""
        return ("",)

    # What they share.

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        return batch_spec(batch_size, self.inputs.length, self.questions)

    def stream(
        self, split: str, *, batch_size: int, seed: int = 0, step: int = 0, rows: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        check_split(self, split)
        if split == "train" and self.fresh:
            entropy = (SPLITS.index(split), self.seed, seed)
            return fresh_batches(self.draw_cells, batch_size=batch_size, entropy=entropy, step=step, rows=rows)
        source = Rows(self._sets[split])
        if split == "train":
            return train_batches(source, batch_size=batch_size, seed=seed, step=step, rows=rows)
        return evaluation_batches(source, batch_size=batch_size, step=step, rows=rows)

    def draw_cells(self, rng: np.random.Generator, rows: int) -> Arrays:
        """Rows that know their cell."""
        return self.draw(rng, rows) | {"cell": np.arange(rows, dtype=np.int32) % len(self.cells)}

    def head(self, backbone: nnx.Module, *, rngs: nnx.Rngs) -> nnx.Module:
        return heads.TokenClassifier(backbone, classes=self.inputs.vocab, tied=self.tied, rngs=rngs)

    def loss(
        self, model: nnx.Module, batch: Mapping[str, Array], key: PRNGKeyArray | None, axes: Axes = Axes()
    ) -> Sums:
        return recall_loss(model, batch, key, axes, answer=self.answer, chunk=self.chunk, groups=self.groups)

    @functools.cached_property
    def groups(self) -> Mapping[str, Group]:
        share = 1 / len(self.cells)
        return {name: Group((i,), share) for i, name in enumerate(self.cells) if name}

    def fingerprint(self) -> dict[str, Any]:
        return {"name": self.name, "splits": dict(self.splits), "digest": digest(*self._sets.values())}

    @functools.cached_property
    def baselines(self) -> Mapping[str, float]:
        return self.baselines_of(self._sets["valid"], self._sets["test"])

    def baselines_of(self, valid: Arrays, test: Arrays) -> dict[str, float]:
        """Accuracy on `test` of the token most frequent in valid for all, and of the cheapest look-ups."""
        guess = np.bincount(valid["label"].ravel()).argmax()
        right = (test["label"] == guess).reshape(-1, self.answer).all(1)
        return {"majority": float(right.mean()), **self.guesses(test)}

    def row(self, result: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        return table_row(self.name, result, self.baselines, self.groups)

    @functools.cached_property
    def _sets(self) -> Mapping[str, Arrays]:
        sizes = {split: size for split, size in self.splits.items() if not (self.fresh and split == "train")}
        return {split: self.draw_cells(generator(split, self.seed), size) for split, size in sizes.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fresh(Recall):
    """A recall task that trains on new rows at every step.

    sizes: rows of valid and test, fixed by `seed`.     epoch: fresh rows that count as one.
    """

    sizes: tuple[int, int] = (2_000, 2_000)
    epoch: int = 65_536

    @property
    def splits(self) -> Mapping[str, int]:
        if len(self.sizes) != 2:
            self.refuse("sizes", expected="rows of valid and of test")
        return dict(zip(SPLITS, (self.epoch, *self.sizes), strict=True))


def recall_loss(
    model: nnx.Module,
    batch: Mapping[str, Array],
    key: PRNGKeyArray | None,
    axes: Axes,
    *,
    answer: int,
    chunk: int | None,
    groups: Mapping[str, Group],
) -> Sums:
    """The sums of one batch; logits are formed at the questions alone. Evaluation also counts each group."""
    inputs, position = batch["inputs"], batch["position"]
    if key is None and chunk is not None and inputs.shape[1] > chunk:
        logits, aux = streamed_logits(model, inputs, position, chunk=chunk, axes=axes), ()
    else:
        logits, aux = model(inputs, Context(key=key, axes=axes), train=key is not None, position=position)
    return recall_sums(logits, batch, answer=answer, groups={} if key is not None else groups)._replace(aux=aux)


def recall_sums(
    logits: Float[Array, "b q classes"], batch: Mapping[str, Array], *, answer: int, groups: Mapping[str, Group]
) -> Sums:
    """Cross-entropy over tokens and accuracy over answers; where a label is negative, nothing is asked.

    Sums are divided by the number of all answers in the end, so that those of a group are scaled by its share here.
    """
    label, weight = batch["label"], batch["weight"]
    sums = token_classification_sums(logits, label, weight)
    asked = (label >= 0) * weight[:, None]
    right = jnp.argmax(logits, axis=2) == label
    whole = right.reshape(right.shape[0], -1, answer).all(2)
    count = (asked.reshape(*whole.shape, answer) * whole[..., None]).sum((1, 2))
    metrics = {"accuracy": count.sum()}
    for name, group in groups.items():
        member = (batch["cell"][:, None] == jnp.asarray(group.cells)[None]).any(1)
        metrics[f"accuracy/{name}"] = (count * member).sum() / group.share
    return Sums(sums.loss, sums.weight, metrics)


def check_split(task: Any, split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split = {split!r}: {type(task).__name__} has {', '.join(SPLITS)}")


def table_row(
    name: str,
    result: Mapping[str, Mapping[str, float]],
    baselines: Mapping[str, float],
    columns: Mapping[str, Any],
) -> dict[str, Any]:
    scores = {split: result[split]["accuracy"] for split in SPLITS[1:] if split in result}
    test = result.get("test", {})
    by = {column: test[f"accuracy/{column}"] for column in columns if f"accuracy/{column}" in test}
    return {"task": name, **scores, **by, **baselines}
