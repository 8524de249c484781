"""The loss of tasks with one label a sequence: cross-entropy and accuracy, summed over examples."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from longwave.kernels.partition import Axes
from longwave.layers.mixer import Context
from longwave.training.task import Sums


def classification_sums(logits: Float[Array, "b classes"], label: Int[Array, "b"], weight: Float[Array, "b"]) -> Sums:
    """Cross-entropy and accuracy, weighted and summed over the batch."""
    log_probability = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)[:, 0]
    correct = (jnp.argmax(logits, axis=1) == label).astype(jnp.float32)
    return Sums(-(weight * log_probability).sum(), weight.sum(), {"accuracy": (weight * correct).sum()})


def classification_loss(model: nnx.Module, batch: Mapping[str, Array], key: PRNGKeyArray | None, axes: Axes) -> Sums:
    """The sums of one batch of padded sequences: inputs (b, t, ...), length (b,), label (b,), weight (b,)."""
    time = jnp.arange(batch["inputs"].shape[1])
    valid = time[None, :] < batch["length"][:, None]
    logits, _ = model(batch["inputs"], Context(valid=valid, key=key, axes=axes), train=key is not None)
    return classification_sums(logits, batch["label"], batch["weight"])
