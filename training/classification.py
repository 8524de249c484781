"""Losses of tasks with classes: one label a sequence, or labels at some of its positions. Cross-entropy and accuracy,
summed over examples."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from longwave.kernels.partition import Axes
from longwave.layers.mixer import Context
from longwave.training.task import Sums


def classification_sums(logits: Float[Array, "b classes"], label: Int[Array, "b"], weight: Float[Array, "b"]) -> Sums:
    """Cross-entropy and accuracy, weighted and summed over the batch."""
    log_probability = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)[:, 0]
    correct = (jnp.argmax(logits, axis=1) == label).astype(jnp.float32)
    return Sums(-(weight * log_probability).sum(), weight.sum(), {"accuracy": (weight * correct).sum()})


def classification_loss(model: nnx.Module, batch: Mapping[str, Array], key: PRNGKeyArray | None, axes: Axes) -> Sums:
    """The sums of one batch: inputs (b, t, ...), label (b,), weight (b,); and length (b,), of padded sequences only.

    Of pairs: inputs (b, 2, t, ...), and length (b, 2).
    """
    ctx = Context(valid=_valid(batch), key=key, axes=axes)
    logits, aux = model(batch["inputs"], ctx, train=key is not None)
    return classification_sums(logits, batch["label"], batch["weight"])._replace(aux=aux)


def token_classification_sums(
    logits: Float[Array, "b q classes"], label: Int[Array, "b q"], weight: Float[Array, "b"]
) -> Sums:
    """Cross-entropy and accuracy over the answers asked for, each of equal weight; where label is negative, none is."""
    asked = (label >= 0) * weight[:, None]
    log_probability = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(label, 0)[..., None], axis=2)[..., 0]
    correct = (jnp.argmax(logits, axis=2) == label).astype(jnp.float32)
    return Sums(-(asked * log_probability).sum(), asked.sum(), {"accuracy": (asked * correct).sum()})


def token_classification_loss(
    model: nnx.Module, batch: Mapping[str, Array], key: PRNGKeyArray | None, axes: Axes
) -> Sums:
    """The sums of one batch: inputs (b, t, ...), weight (b,), and either label (b, t), or position and label (b, q).

    With positions, logits are formed at these q alone: at all t, a large vocabulary would cost more than the model.
    """
    ctx = Context(valid=_valid(batch), key=key, axes=axes)
    logits, aux = model(batch["inputs"], ctx, train=key is not None, position=batch.get("position"))
    return token_classification_sums(logits, batch["label"], batch["weight"])._replace(aux=aux)


def _valid(batch: Mapping[str, Array]) -> Bool[Array, "b *pair t"] | None:
    """Which positions are no padding; None where no batch has any: a mask costs, and hides the cheaper forms."""
    if "length" not in batch:
        return None
    length = batch["length"][..., None]
    return jax.lax.broadcasted_iota(jnp.int32, batch["inputs"].shape[: length.ndim], length.ndim - 1) < length
