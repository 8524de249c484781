"""The task contract: what the loop asks of a data set and its objective, and nothing more.

A task is one file and one `.gin`. It knows its data, its head, its loss and its baselines; the loop knows none of that.
A batch is a dict of NumPy arrays whose first axis is the example; static shapes, so that the step compiles once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from longwave.models.inputs import Features, Tokens

__all__ = ["Batch", "Features", "MakeBackbone", "Sums", "Task", "Tokens"]

Batch = Mapping[str, np.ndarray]


class Sums(NamedTuple):
    """Sums over the examples (or tokens) of a batch; a padded row has weight 0 and adds nothing.

    loss / weight is what is minimised; metrics[name] / weight is what is reported. Sums of several batches, hosts or
    micro-batches add, and are divided once at the end: never a mean of means. aux: the mixers' side outputs, which the
    step reads (`Run.side_loss`) and drops.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]
    aux: Any = ()


class Task(Protocol):
    """What a task provides.

    name:       how it is named in tables ("listops").
    inputs:     what the backbone must encode (Tokens or Features).
    splits:     split name -> number of examples; "train", "valid" and "test" are what the loop reads.
    batch_spec: batch size -> {name: jax.ShapeDtypeStruct} of one global batch.
    stream:     an endless (train) or single-pass (valid, test) iterator of batches. Batch k is a pure function of
                (seed, k); `step` is the first k. A single pass visits every example once; its last batch is padded
                with rows of weight 0. `rows`: the positions inside the global batch that this process holds, in the
                order to be yielded; None: all of them. The mesh decides them: they may be any part of the batch, in
                any order, and other processes may hold the same. Every process gets equally many batches.
    head:       wraps the backbone into the model that `loss` calls.
    loss:       the sums of one batch. `key` is None in evaluation.
    metric:     the name among Sums.metrics, or "loss", that selects the best checkpoint.
    larger_is_better: of the metric.
    fingerprint: what identifies the data; stored with the checkpoint and compared on resume.
    baselines:  label -> metric on test of what needs no model (majority, the cheapest look-ups), from the data itself.
    row:        one row of the result table from {"valid": {...}, "test": {...}}: includes the baselines.
    advice:     what to print after the result, such as how to run the task of which this is a short form; or "".
    """

    name: str
    inputs: Tokens | Features
    metric: str
    larger_is_better: bool
    advice: str

    @property
    def splits(self) -> Mapping[str, int]: ...

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]: ...

    def stream(
        self, split: str, *, batch_size: int, seed: int = 0, step: int = 0, rows: Sequence[int] | None = None
    ) -> Iterator[Batch]: ...

    def head(self, backbone: nnx.Module, *, rngs: nnx.Rngs) -> nnx.Module: ...

    def loss(self, model: nnx.Module, batch: Mapping[str, Array], key: Array | None, axes: Any) -> Sums: ...

    def fingerprint(self) -> Mapping[str, Any]: ...

    @property
    def baselines(self) -> Mapping[str, float]: ...

    def row(self, result: Mapping[str, Mapping[str, float]]) -> dict[str, Any]: ...


MakeBackbone = Callable[..., nnx.Module]  # (inputs, rngs=...) -> backbone
