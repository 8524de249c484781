"""One recall task at several settings: trained at some, asked at many, with the accuracy of each.

    train.task = @grid.Grid()
    grid.Grid.task = @mqar.MQAR()
    grid.Grid.fields = ('length', 'pairs')
    grid.Grid.train = ((64, 4), (128, 8))
    grid.Grid.test = ((64, 4), (128, 8), (256, 64))

Mixed training sets, curricula, and lengths beyond that of training are all of this form. Batches are of one setting
each, so that nothing is padded; the step compiles once for each shape.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from longwave.kernels.partition import Axes
from longwave.models.inputs import Tokens
from longwave.tasks.recall.batches import SPLITS, Arrays, Rows, batch_spec, digest, generator, whole_batch
from longwave.tasks.recall.recall import Group, Recall, check_split, recall_loss, table_row
from longwave.training.pipeline import evaluation_batches
from longwave.training.task import Batch, Sums

# order(batches of an epoch at each setting, seed, k) -> setting of training batch k, and its number among its batches
Order = Callable[[Sequence[int], int, int], tuple[int, int]]


def mixed(counts: Sequence[int], seed: int, k: int) -> tuple[int, int]:
    """Batches of all settings in random order, anew in every epoch."""
    epoch, place = divmod(k, sum(counts))
    flat = int(_shuffled(sum(counts), seed, epoch)[place])
    ends = np.cumsum(counts)
    setting = int(np.searchsorted(ends, flat, side="right"))
    return setting, flat - int(ends[setting] - counts[setting])


def curriculum(counts: Sequence[int], seed: int, k: int, *, epochs: int = 8) -> tuple[int, int]:
    """One setting after the other, `epochs` epochs of each; then the last without end."""
    setting = 0
    while setting < len(counts) - 1 and k >= epochs * counts[setting]:
        k -= epochs * counts[setting]
        setting += 1
    epoch, place = divmod(k, counts[setting])
    return setting, int(_shuffled(counts[setting], seed, epoch, setting)[place])


@functools.lru_cache(maxsize=4)
def _shuffled(count: int, *entropy: int) -> np.ndarray:
    return np.random.default_rng(entropy).permutation(count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """The task.

    task:   what is asked; its fields that are not named below hold at every setting, its `sizes` and `epoch` nowhere.
    fields: its fields that differ between settings.
    train, test: the settings, each a value for every field. Validation asks other rows of the settings of test.
    rows:   rows of an epoch at each setting of train. A training set that the task draws only once consists of fixed
        batches, drawn when they are needed; of the others, each batch is new.
    sizes:  rows of valid and of test at each setting of test.
    order:  in which order training meets the settings: `mixed` or `curriculum`.
    """

    task: Recall
    fields: tuple[str, ...]
    train: tuple[tuple[Any, ...], ...]
    test: tuple[tuple[Any, ...], ...]
    rows: tuple[int, ...]
    sizes: tuple[int, int] = (1_000, 1_000)
    order: Order = mixed

    metric: ClassVar[str] = "accuracy"
    larger_is_better: ClassVar[bool] = True
    advice: ClassVar[str] = ""

    def __post_init__(self) -> None:
        known = {field.name for field in dataclasses.fields(self.task)} - {"seed", "chunk", "tied", "sizes", "epoch"}
        if not self.fields or not set(self.fields) <= known:
            raise ValueError(f"Grid.fields = {self.fields}: expected some of {', '.join(sorted(known))}")
        for name, settings in (("train", self.train), ("test", self.test)):
            if not settings or any(len(setting) != len(self.fields) for setting in settings):
                raise ValueError(f"Grid.{name} = {settings}: expected settings of {len(self.fields)} values each")
        if len(self.rows) != len(self.train) or min(self.rows) < 1:
            raise ValueError(f"Grid.rows = {self.rows}: expected one for each of {len(self.train)} settings")
        cells = len(self._tests[0].cells)
        if len(self.sizes) != 2 or min(self.sizes) < 1 or any(size % cells for size in self.sizes):
            raise ValueError(f"Grid.sizes = {self.sizes}: expected rows of valid and test, multiples of {cells}")
        if len({(member.inputs.vocab, member.answer, member.cells) for member in self._members}) > 1:
            raise ValueError(f"Grid.fields = {self.fields}: settings must share vocabulary, answer and depths")

    @functools.cached_property
    def _trains(self) -> tuple[Recall, ...]:
        return tuple(dataclasses.replace(self.task, **dict(zip(self.fields, s, strict=True))) for s in self.train)

    @functools.cached_property
    def _tests(self) -> tuple[Recall, ...]:
        return tuple(dataclasses.replace(self.task, **dict(zip(self.fields, s, strict=True))) for s in self.test)

    @property
    def _members(self) -> tuple[Recall, ...]:
        return (*self._trains, *self._tests)

    @property
    def name(self) -> str:
        return f"{self.task.kind}-by-{'-'.join(self.fields)}"

    @property
    def inputs(self) -> Tokens:
        """`length` is that of the longest row of all."""
        return Tokens(self.task.inputs.vocab, max(member.inputs.length for member in self._members))

    @property
    def splits(self) -> Mapping[str, int]:
        valid, test = (size * len(self.test) for size in self.sizes)
        return dict(zip(SPLITS, (sum(self.rows), valid, test), strict=True))

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Of the longest batch of training; the others, and those of evaluation, have lengths of their own."""
        longest = max(member.inputs.length for member in self._trains)
        return batch_spec(batch_size, longest, max(member.questions for member in self._trains))

    def stream(
        self, split: str, *, batch_size: int, seed: int = 0, step: int = 0, rows: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        check_split(self, split)
        if split == "train":
            return self._train(batch_size, seed, step, rows)
        parts = (
            evaluation_batches(Rows(self._fixed(split, i)), batch_size=batch_size, rows=rows)
            for i in range(len(self.test))
        )
        return itertools.islice(itertools.chain.from_iterable(parts), step, None)

    def _train(self, batch_size: int, seed: int, step: int, rows: Sequence[int] | None) -> Iterator[Batch]:
        counts = [max(1, size // batch_size) for size in self.rows]
        for k in itertools.count(step):
            setting, number = self.order(counts, seed, k)
            entropy = (seed, k) if self.task.fresh else (setting, number)
            rng = np.random.default_rng((SPLITS.index("train"), self.task.seed, *entropy))
            yield whole_batch(self._trains[setting].draw_cells(rng, batch_size), rows)

    def _fixed(self, split: str, setting: int, rows: int | None = None) -> Arrays:
        """The set of a split at a setting of test; its cells are numbered behind those of the settings before."""
        rows = self.sizes[SPLITS.index(split) - 1] if rows is None else rows
        arrays = self._tests[setting].draw_cells(generator(split, self.task.seed, setting), rows)
        return arrays | {"cell": arrays["cell"] + np.int32(setting * len(self.task.cells))}

    def head(self, backbone: nnx.Module, *, rngs: nnx.Rngs) -> nnx.Module:
        return self.task.head(backbone, rngs=rngs)

    def loss(
        self, model: nnx.Module, batch: Mapping[str, Array], key: PRNGKeyArray | None, axes: Axes = Axes()
    ) -> Sums:
        task = self.task
        return recall_loss(model, batch, key, axes, answer=task.answer, chunk=task.chunk, groups=self.groups)

    @functools.cached_property
    def groups(self) -> Mapping[str, Group]:
        """Each setting; each depth over all settings; and each depth at each setting."""
        cells, settings = self.task.cells, [self._label(setting) for setting in self.test]
        n, shares = len(cells), self._shares
        whole = {label: Group(tuple(range(i * n, (i + 1) * n)), shares[i]) for i, label in enumerate(settings)}
        if n == 1:
            return whole
        count = range(len(settings))
        depths = {cell: Group(tuple(i * n + j for i in count), 1 / n) for j, cell in enumerate(cells)}
        each = {
            f"{s},{c}": Group((i * n + j,), shares[i] / n) for i, s in enumerate(settings) for j, c in enumerate(cells)
        }
        return {**whole, **depths, **each}

    def _label(self, setting: tuple[Any, ...]) -> str:
        return ",".join(f"{field}={value}" for field, value in zip(self.fields, setting, strict=True))

    @functools.cached_property
    def _shares(self) -> tuple[float, ...]:
        """Of all tokens asked for, those asked at each setting of test."""
        questions = [member.questions for member in self._tests]
        return tuple(q / sum(questions) for q in questions)

    def fingerprint(self) -> dict[str, Any]:
        some = [self._fixed(split, i, len(self.task.cells)) for split in SPLITS[1:] for i in range(len(self.test))]
        return {"name": self.name, "splits": dict(self.splits), "train": list(self.train), "digest": digest(*some)}

    @functools.cached_property
    def baselines(self) -> Mapping[str, float]:
        """The member's own, each setting by its share."""
        total: dict[str, float] = {}
        for i, (member, share) in enumerate(zip(self._tests, self._shares, strict=True)):
            for name, value in member.baselines_of(self._fixed("valid", i), self._fixed("test", i)).items():
                total[name] = total.get(name, 0.0) + share * value
        return total

    def row(self, result: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        return table_row(self.name, result, self.baselines, {self._label(setting): None for setting in self.test})
