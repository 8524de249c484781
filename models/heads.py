"""Poolings over time and the heads that end a model."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from longwave.kernels.partition import Axes
from longwave.layers.linear import MakeLinear, linear
from longwave.layers.mixer import Context
from longwave.layers.mlp import gelu

Pooling = Callable[[Float[Array, "b t d"], Bool[Array, "b t"] | None], Float[Array, "b d"]]


def mean(x: Float[Array, "b t d"], valid: Bool[Array, "b t"] | None) -> Float[Array, "b d"]:
    """Mean over the valid positions, summed in float32."""
    x = x.astype(jnp.float32)
    if valid is None:
        return x.mean(1)
    count = jnp.maximum(valid.sum(1), 1).astype(jnp.float32)
    return jnp.where(valid[..., None], x, 0.0).sum(1) / count[:, None]


def largest(x: Float[Array, "b t d"], valid: Bool[Array, "b t"] | None) -> Float[Array, "b d"]:
    """The largest value of every feature over the valid positions; 0 where there are none."""
    x = x.astype(jnp.float32)
    if valid is None:
        return x.max(1)
    return jnp.where(valid.any(1)[:, None], jnp.where(valid[..., None], x, -jnp.inf).max(1), 0.0)


def last(x: Float[Array, "b t d"], valid: Bool[Array, "b t"] | None) -> Float[Array, "b d"]:
    """The last valid position."""
    if valid is None:
        return x[:, -1].astype(jnp.float32)
    index = valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0].astype(jnp.float32)


def first(x: Float[Array, "b t d"], valid: Bool[Array, "b t"] | None) -> Float[Array, "b d"]:
    """The first valid position. For models that see both directions."""
    if valid is None:
        return x[:, 0].astype(jnp.float32)
    return jnp.take_along_axis(x, jnp.argmax(valid, axis=1)[:, None, None], axis=1)[:, 0].astype(jnp.float32)


def cls(x: Float[Array, "b t d"], valid: Bool[Array, "b t"] | None) -> Float[Array, "b d"]:
    """`first`, where `Backbone.cls_token` has put its vector."""
    return first(x, valid)


class _Decision(nnx.Module):
    """The end of a model: vectors through `hidden` layers with an activation to `classes` logits, in float32."""

    def __init__(
        self,
        width: int,
        *,
        classes: int,
        hidden: Sequence[int],
        activation: Callable[[Array], Array],
        linear: MakeLinear,
        rngs: nnx.Rngs,
    ):
        widths = (width, *hidden)
        self.activation = activation
        self.hidden = nnx.List([linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])
        self.out = linear(widths[-1], classes, rngs=rngs)

    @property
    def keep_float32(self) -> frozenset[str]:
        layers = ("out", *(f"hidden/{i}" for i in range(len(self.hidden))))
        return frozenset(f"{layer}/{name}" for layer in layers for name in ("kernel", "bias"))

    def _logits(self, e: Float[Array, "b d"]) -> Float[Array, "b classes"]:
        for layer in self.hidden:
            e = self.activation(layer(e))
        return self.out(e)


class Classifier(_Decision):
    """Backbone, pooling, affine map to `classes` logits; the last two in float32 (classes = 1 serves regression).

    hidden: widths of layers between pooling and logits, each followed by `activation`.
    linear: constructor of the affine maps: how they are initialised.
    """

    def __init__(
        self,
        backbone: nnx.Module,
        *,
        classes: int,
        pooling: Pooling = mean,
        hidden: Sequence[int] = (),
        activation: Callable[[Array], Array] = gelu,
        linear: MakeLinear = linear,
        rngs: nnx.Rngs,
    ):
        _check_summary_token(self, backbone, pooling)
        self.backbone, self.pooling = backbone, pooling
        width: int = backbone.width  # ty: ignore[missing-attribute]: every backbone has one
        super().__init__(width, classes=classes, hidden=hidden, activation=activation, linear=linear, rngs=rngs)

    def __call__(
        self, inputs: Array, ctx: Context = Context(), train: bool = False
    ) -> tuple[Float[Array, "b classes"], tuple]:
        """The logits and the mixers' side outputs."""
        y, _, aux, valid = self.backbone(inputs, None, ctx, train)
        return self._logits(self.pooling(y, valid)), aux


Interaction = Callable[[Float[Array, "b d"], Float[Array, "b d"]], Float[Array, "b e"]]


def side_by_side(a: Float[Array, "b d"], b: Float[Array, "b d"]) -> Float[Array, "b e"]:
    """[a, b]"""
    return jnp.concatenate([a, b], axis=1)


def compared(a: Float[Array, "b d"], b: Float[Array, "b d"]) -> Float[Array, "b e"]:
    """[a, b, a - b, a * b] (natural language inference: Mou et al., 2016)"""
    return jnp.concatenate([a, b, a - b, a * b], axis=1)


class PairClassifier(_Decision):
    """Two sequences, one backbone for both, and a decision on the two vectors: the dual encoder.

    interaction: of the two pooled vectors, into one.
    hidden, activation, linear: as of Classifier; hidden None: one layer as wide as the backbone.

    Inputs are (b, 2, t) or (b, 2, t, c), and so is `ctx.valid`. The backbone sees 2 b sequences.
    """

    def __init__(
        self,
        backbone: nnx.Module,
        *,
        classes: int = 2,
        pooling: Pooling = mean,
        interaction: Interaction = compared,
        hidden: Sequence[int] | None = None,
        activation: Callable[[Array], Array] = gelu,
        linear: MakeLinear = linear,
        rngs: nnx.Rngs,
    ):
        _check_summary_token(self, backbone, pooling)
        self.backbone, self.pooling, self.interaction = backbone, pooling, interaction
        width: int = backbone.width  # ty: ignore[missing-attribute]: every backbone has one
        hidden = (width,) if hidden is None else hidden
        one = jax.ShapeDtypeStruct((1, width), jnp.float32)
        joint = jax.eval_shape(interaction, one, one).shape[1]
        super().__init__(joint, classes=classes, hidden=hidden, activation=activation, linear=linear, rngs=rngs)

    def __call__(
        self, inputs: Array, ctx: Context = Context(), train: bool = False
    ) -> tuple[Float[Array, "b classes"], tuple]:
        """The logits and the mixers' side outputs, of 2 b sequences."""
        if inputs.ndim < 3 or inputs.shape[1] != 2:
            raise ValueError(f"PairClassifier takes inputs (b, 2, t) or (b, 2, t, c); got {inputs.shape}")
        flat = lambda x: None if x is None else x.reshape(-1, *x.shape[2:])
        ctx = dataclasses.replace(ctx, valid=flat(ctx.valid), reset=flat(ctx.reset))
        y, _, aux, valid = self.backbone(flat(inputs), None, ctx, train)
        e = self.pooling(y, valid).reshape(inputs.shape[0], 2, -1)
        return self._logits(self.interaction(e[:, 0], e[:, 1])), aux


def _check_summary_token(head: nnx.Module, backbone: nnx.Module, pooling: Pooling) -> None:
    pooling = inspect.unwrap(pooling)  # what a config refers to comes wrapped
    if hasattr(backbone, "cls") != (pooling is cls):
        name = getattr(pooling, "__name__", pooling)
        raise ValueError(
            f"{type(head).__name__}.pooling = {name} with Backbone.cls_token = {hasattr(backbone, 'cls')}: "
            "the summary token and the pooling `cls` go together"
        )


class TokenClassifier(nnx.Module):
    """Backbone and an affine map to `classes` logits at every token, or at those asked for; the map in float32.

    tied: the logits are made by the table of embeddings instead, one class an id, as in a language model.
    """

    keep_float32 = frozenset({"out/kernel", "out/bias"})

    def __init__(self, backbone: nnx.Module, *, classes: int, tied: bool = False, rngs: nnx.Rngs):
        self.backbone, self.classes = backbone, classes
        width: int = backbone.width  # ty: ignore[missing-attribute]: every backbone has one
        table = getattr(getattr(backbone, "encoder", None), "embedding", None)
        if tied and (table is None or len(table) < classes):
            has = "has no table" if table is None else f"has a table of {len(table)} rows"
            raise ValueError(f"TokenClassifier.tied: the backbone's encoder {has}; expected one for {classes} classes")
        self.out = None if tied else linear(width, classes, rngs=rngs)

    def __call__(
        self,
        inputs: Array,
        ctx: Context = Context(),
        train: bool = False,
        position: Int[Array, "b q"] | None = None,
    ) -> tuple[Float[Array, "b q classes"], tuple]:
        """The logits at `position` (None: at every token), and the mixers' side outputs."""
        y, _, aux, _ = self.backbone(inputs, None, ctx, train)
        if y.shape[1] != inputs.shape[1]:
            raise ValueError(
                f"TokenClassifier: the backbone makes {y.shape[1]} steps of {inputs.shape[1]} tokens: expected as many "
                "(no PatchEncoder, no cls_token)"
            )
        if position is not None:
            y = jnp.take_along_axis(y, position[..., None], axis=1)
        return self.logits(y, ctx.axes), aux

    def logits(self, y: Float[Array, "b q d"], axes: Axes = Axes()) -> Float[Array, "b q classes"]:
        """Of what the backbone gives."""
        y = y.astype(jnp.float32)
        if self.out is not None:
            return self.out(y)
        table = self.backbone.encoder.embedding[...]  # ty: ignore[missing-attribute]: seen when it was made
        # Split over devices by its columns, it would make XLA gather the activations instead.
        table = jax.lax.with_sharding_constraint(table, axes.spec("..")) if axes else table
        return jnp.einsum("bqd,cd->bqc", y, table[: self.classes].astype(jnp.float32))
