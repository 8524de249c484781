"""What turns a task's inputs into (b, t, width): encoder(inputs, axes), of the kind that `encoder_for` chooses; and
tables of positions, added to it: positions(at, axes), at (b or 1, t) the number of each token in its document."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from longwave.kernels.partition import Axes
from longwave.layers.linear import linear
from longwave.models.inputs import Features, Inputs, Tokens


def _expect(encoder: nnx.Module, inputs: Inputs, kind: type, instead: str) -> None:
    if not isinstance(inputs, kind):
        raise ValueError(
            f"{type(encoder).__name__} reads {kind.__name__}, the task gives {inputs}: "
            f"set Backbone.encoder to {instead}, or leave it out"
        )


class TokenEmbedding(nnx.Module):
    """A table of vectors, N(0, std^2) at the start. Ids outside the vocabulary give NaN, never silence.

    std:      1 as torch.nn.Embedding; language models with tied logits take 0.02.
    multiple: the table's rows are filled up to a multiple of it, with rows that no id names.
    """

    roles = {"embedding": "embed"}

    def __init__(self, inputs: Tokens, width: int, *, std: float = 1.0, multiple: int = 1, rngs: nnx.Rngs):
        _expect(self, inputs, Tokens, "LinearEncoder")
        if multiple < 1:
            raise ValueError(f"TokenEmbedding.multiple = {multiple}: expected at least 1")
        rows = -(-inputs.vocab // multiple) * multiple
        self.vocab = inputs.vocab
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (rows, width)))

    def __call__(self, ids: Int[Array, "b t"], axes: Axes = Axes()) -> Float[Array, "b t d"]:
        table = self.embedding[...]
        if self.vocab < table.shape[0]:
            ids = jnp.where(ids < self.vocab, ids, table.shape[0])
        return _rows(table, ids, axes)


class OneHotEncoder(nnx.Module):
    """An affine map of one-hot tokens, started as flax starts its Dense: how S5 reads tokens.

    The same function as a table of vectors plus a bias; but the table is a weight, and decays as one.
    """

    roles = {"table": "weight"}

    def __init__(self, inputs: Tokens, width: int, *, rngs: nnx.Rngs):
        _expect(self, inputs, Tokens, "LinearEncoder")
        self.table = nnx.Param(jax.nn.initializers.lecun_normal()(rngs.params(), (inputs.vocab, width)))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, ids: Int[Array, "b t"], axes: Axes = Axes()) -> Float[Array, "b t d"]:
        return _rows(self.table[...], ids, axes) + self.bias[...][None, None]


class LinearEncoder(nnx.Module):
    """An affine map of the channels (pixels, samples) at every time step."""

    def __init__(self, inputs: Features, width: int, *, rngs: nnx.Rngs):
        _expect(self, inputs, Features, "TokenEmbedding")
        self.proj = linear(inputs.channels, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"], axes: Axes = Axes()) -> Float[Array, "b t d"]:
        return self.proj(x.astype(self.proj.kernel[...].dtype))


class PatchEncoder(nnx.Module):
    """An affine map of `patch` successive time steps to one: (b, t, c) -> (b, t / patch, width).

    A patch is valid if any of its steps is.
    """

    def __init__(self, inputs: Features, width: int, *, patch: int, rngs: nnx.Rngs):
        _expect(self, inputs, Features, "TokenEmbedding")
        if inputs.length % patch:
            raise ValueError(f"PatchEncoder.patch = {patch} must divide the input length {inputs.length}")
        self.patch = patch
        self.proj = linear(inputs.channels * patch, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"], axes: Axes = Axes()) -> Float[Array, "b s d"]:
        x = x.reshape(x.shape[0], -1, self.patch * x.shape[2])
        return self.proj(x.astype(self.proj.kernel[...].dtype))


class LearnedPositions(nnx.Module):
    """A table of vectors, one a position, N(0, std^2) at the start. Positions outside of it give NaN, never silence."""

    roles = {"embedding": "embed"}

    def __init__(self, length: int, width: int, *, std: float = 0.02, rngs: nnx.Rngs):
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (length, width)))

    def __call__(self, at: Int[Array, "b t"], axes: Axes = Axes()) -> Float[Array, "b t d"]:
        return _rows(self.embedding[...], at, axes)


class SinusoidalPositions(nnx.Module):
    """sin(p w_i) in feature 2 i, cos(p w_i) in feature 2 i + 1, w_i = 10000^(-2 i / width) (arXiv:1706.03762, 3.5)."""

    def __init__(self, length: int, width: int, *, rngs: nnx.Rngs | None = None):
        if width % 2:
            raise ValueError(f"SinusoidalPositions: width = {width} must be even: a sine and a cosine each")
        self.length, self.width = length, width

    def __call__(self, at: Int[Array, "b t"], axes: Axes = Axes()) -> Float[Array, "b t d"]:
        # Made on the host in float64: the phase of position 4,000 in float32 would be off by 2e-4.
        angle = np.arange(self.length)[:, None] * 10_000.0 ** (-np.arange(0, self.width, 2) / self.width)
        table = np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(self.length, self.width)
        return _rows(jnp.asarray(table, jnp.float32), at, Axes())


def _rows(table: Float[Array, "v d"], ids: Int[Array, "b t"], axes: Axes) -> Float[Array, "b t d"]:
    if axes:  # a look-up in a table split over devices would make XLA gather the activations instead
        table = jax.lax.with_sharding_constraint(table, axes.spec(".."))
    return table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def encoder_for(inputs: Inputs, width: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """TokenEmbedding for Tokens, LinearEncoder for Features."""
    if isinstance(inputs, Tokens):
        return TokenEmbedding(inputs, width, rngs=rngs)
    return LinearEncoder(inputs, width, rngs=rngs)
