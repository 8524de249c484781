"""Pretraining on a task's own inputs, without its labels: masked or causal prediction, then fine-tuning.

Amos, Berant, Gupta, "Never Train from Scratch: Fair Comparison of Long-Sequence Models Requires Data-Driven Priors"
(2024). Two lines make it of any task:

    train.task = @pretraining.Masked()      # or @pretraining.Causal()
    pretraining.Masked.task = @listops.ListOps()

and a further run with `train.initial = 'RUN_DIR'` starts from the backbone of the best step; its head is new.

What the model reads: a masked token is one id more than the task has; real channels are 0 where masked, beside one more
channel that is 1 there. So the encoder has one row more, its last, which fine-tuning drops. Padding is neither masked
nor predicted. The two sequences of a pair are two sequences.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from longwave.kernels.partition import Axes
from longwave.layers.mixer import Context, Mixer
from longwave.models import heads
from longwave.models.inputs import Features, Tokens
from longwave.training.classification import token_classification_sums
from longwave.training.task import Batch, Sums, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Levels:
    """Real values that are `count` equally spaced ones from low to high, such as pixels: predicted as classes."""

    count: int = 256
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.count < 2 or not self.low < self.high:
            raise ValueError(f"{self}: expected at least 2 levels, and low < high")

    def ids(self, x: Float[Array, "b t 1"]) -> Int[Array, "b t"]:
        """Which level every value is."""
        scaled = (x[..., 0] - self.low) / (self.high - self.low) * (self.count - 1)
        return jnp.clip(jnp.round(scaled), 0, self.count - 1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining(abc.ABC):
    """What both kinds share. Tokens are predicted by cross-entropy.

    task:   whose inputs they are.
    levels: of real-valued inputs: how they are predicted as classes; None: as real numbers, by absolute error.
    """

    task: Task
    levels: Levels | None = None

    metric: ClassVar[str] = "loss"
    larger_is_better: ClassVar[bool] = False
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        inputs, kind = self.task.inputs, type(self).__name__
        if self.levels is not None and not (isinstance(inputs, Features) and inputs.channels == 1):
            raise ValueError(f"{kind}.levels = {self.levels}: expected None, as {self.task.name} gives {inputs}")

    # What each kind gives.

    @property
    @abc.abstractmethod
    def inputs(self) -> Tokens | Features: ...

    @abc.abstractmethod
    def problem(
        self, inputs: Array, target: Array, valid: Bool[Array, "b t"], key: PRNGKeyArray
    ) -> tuple[Array, Array, Bool[Array, "b t"]]:
        """(what the model reads, what its outputs are compared with, at which positions) of inputs and their classes
        or values."""

    # What they share.

    @property
    def name(self) -> str:
        return f"{self.task.name}-{self.kind}"

    @property
    def advice(self) -> str:
        return "Fine-tuning: the same model on the task itself, with train.initial = this run's folder"

    @property
    def splits(self) -> Mapping[str, int]:
        return self.task.splits

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        spec = self.task.batch_spec(batch_size)
        return {name: spec[name] for name in ("inputs", "length", "weight") if name in spec}

    def stream(
        self, split: str, *, batch_size: int, seed: int = 0, step: int = 0, rows: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        return self.task.stream(split, batch_size=batch_size, seed=seed, step=step, rows=rows)

    def head(self, backbone: nnx.Module, *, rngs: nnx.Rngs) -> nnx.Module:
        return heads.TokenClassifier(backbone, classes=self._outputs, rngs=rngs)

    def loss(
        self, model: nnx.Module, batch: Mapping[str, Array], key: PRNGKeyArray | None, axes: Axes = Axes()
    ) -> Sums:
        """Sums over predicted positions. What evaluation draws is the same every time."""
        inputs, valid, weight = self._sequences(batch)
        masking, dropout = jax.random.split(jax.random.key(0) if key is None else key)
        everywhere = jnp.ones(inputs.shape[:2], bool) if valid is None else valid
        read, target, asked = self.problem(inputs, self._target(inputs), everywhere, masking)
        ctx = Context(valid=valid, key=None if key is None else dropout, axes=axes)
        output, aux = model(read, ctx, train=key is not None)
        if target.ndim == 2:
            return token_classification_sums(output, jnp.where(asked, target, -1), weight)._replace(aux=aux)
        counts = asked * weight[:, None]
        return Sums((counts * jnp.abs(output - target).mean(2)).sum(), counts.sum(), {}, aux)

    def fingerprint(self) -> dict[str, Any]:
        own = {field.name: str(getattr(self, field.name)) for field in dataclasses.fields(self) if field.name != "task"}
        return {**self.task.fingerprint(), "pretraining": {"kind": self.kind, **own}}

    @functools.cached_property
    def baselines(self) -> dict[str, float]:
        """One guess for all positions of test, from validation: the frequency of every class, or the median."""
        if self.levels is None and isinstance(self.task.inputs, Features):
            median = np.median(np.concatenate(list(itertools.islice(self._targets("valid"), 16))), axis=0)
            errors = [(np.abs(values - median).mean(1).sum(), len(values)) for values in self._targets("test")]
            return {"median": float(np.divide(*np.sum(errors, axis=0)))}
        valid, test = (
            np.sum([np.bincount(ids, minlength=self._outputs) for ids in self._targets(split)], axis=0)
            for split in ("valid", "test")
        )
        return {"frequencies": float(-np.log((valid + 1) / (valid + 1).sum()) @ (test / test.sum()))}

    def row(self, result: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        row: dict[str, Any] = {"task": self.name}
        for split in ("valid", "test"):
            row |= {f"{split} {name}": value for name, value in result.get(split, {}).items()}
        return {**row, **self.baselines}

    @property
    def _outputs(self) -> int:
        if self.levels is not None:
            return self.levels.count
        return self.task.inputs.vocab if isinstance(self.task.inputs, Tokens) else self.task.inputs.channels

    def _target(self, inputs: Array) -> Int[Array, "b t"] | Float[Array, "b t c"]:
        return inputs if self.levels is None else self.levels.ids(inputs)

    def _targets(self, split: str) -> Iterator[np.ndarray]:
        """Those of every position that is no padding, batch by batch."""
        for batch in self.stream(split, batch_size=64):
            inputs, valid, weight = self._sequences(batch)
            rows = np.asarray(self._target(inputs))
            real = np.ones(rows.shape[:2], bool) if valid is None else np.asarray(valid)
            yield rows[real & (np.asarray(weight) > 0)[:, None]]

    def _sequences(
        self, batch: Mapping[str, Array] | Batch
    ) -> tuple[Array, Bool[Array, "b t"] | None, Float[Array, "b"]]:
        """(inputs, which are no padding, weight) with one row a sequence; None: no padding."""
        inputs, weight = jnp.asarray(batch["inputs"]), jnp.asarray(batch["weight"])
        inputs = inputs.reshape(-1, *inputs.shape[-1 if isinstance(self.task.inputs, Tokens) else -2 :])
        weight = jnp.repeat(weight, inputs.shape[0] // weight.shape[0])
        if "length" not in batch:
            return inputs, None, weight
        length = jnp.asarray(batch["length"]).reshape(-1)
        return inputs, jnp.arange(inputs.shape[1])[None] < length[:, None], weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masked(Pretraining):
    """Positions drawn at random are hidden, and predicted from all others. ratio: how many of them, in expectation."""

    ratio: float

    kind: ClassVar[str] = "masked"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio < 1:
            raise ValueError(f"Masked.ratio = {self.ratio}: expected a share between 0 and 1")

    @property
    def inputs(self) -> Tokens | Features:
        own = self.task.inputs
        if isinstance(own, Tokens):
            return dataclasses.replace(own, vocab=own.vocab + 1)
        return dataclasses.replace(own, channels=own.channels + 1)

    def problem(
        self, inputs: Array, target: Array, valid: Bool[Array, "b t"], key: PRNGKeyArray
    ) -> tuple[Array, Array, Bool[Array, "b t"]]:
        # Drawn at full length, then cut: what is drawn does not depend on how far a batch is padded.
        drawn = jax.random.uniform(key, (inputs.shape[0], self.inputs.length)) < self.ratio
        mask = drawn[:, : inputs.shape[1]] & valid
        return self.hide(inputs, mask), target, mask

    def hide(self, inputs: Array, mask: Bool[Array, "b t"]) -> Array:
        """The inputs without what stands where `mask` is true."""
        if isinstance(self.task.inputs, Tokens):
            return jnp.where(mask, self.task.inputs.vocab, inputs)
        mask = mask[..., None]
        return jnp.concatenate([jnp.where(mask, 0, inputs), mask.astype(inputs.dtype)], axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Causal(Pretraining):
    """Every position but the first is predicted from those before it, by a model that sees no others."""

    kind: ClassVar[str] = "causal"

    @property
    def inputs(self) -> Tokens | Features:
        return self.task.inputs

    def head(self, backbone: nnx.Module, *, rngs: nnx.Rngs) -> nnx.Module:
        for _, module in nnx.iter_modules(backbone):
            if isinstance(module, Mixer) and "causal" not in module.supports:
                raise ValueError(
                    f"Causal: {type(module).__name__} sees both directions, and would copy what it is to predict; "
                    "expected a causal mixer (layers.S4.bidirectional = False, layers.Attention.causal = True)"
                )
        return super().head(backbone, rngs=rngs)

    def problem(
        self, inputs: Array, target: Array, valid: Bool[Array, "b t"], key: PRNGKeyArray
    ) -> tuple[Array, Array, Bool[Array, "b t"]]:
        following = jnp.roll(valid, -1, axis=1).at[:, -1].set(False)
        return inputs, jnp.roll(target, -1, axis=1), following & valid
