"""The language model: a backbone that reads tokens, and logits of the next one, by its own table or by one more.

    logits_t = W norm(x_t)          W: the table of embeddings (tied, arXiv:1608.05859), or `head` (untied)

A table may have more rows than the vocabulary (TokenEmbedding.multiple: shapes that matrix units and meshes like). The
logits of these rows are the lowest float32, so that no softmax, sample or gradient knows of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from longwave.kernels.partition import Axes
from longwave.layers.linear import lecun
from longwave.layers.mixer import Carry, Context, Mixer

LOGITS = 2**24  # numbers of logits that a loss forms at a time: 64 MiB of float32
LOWEST = float(jnp.finfo(jnp.float32).min)  # where no token is: finite, so that 0 times it is 0


class LanguageModelOut(NamedTuple):
    """What the backbone's result becomes: logits (or the cost of each token), the carry, the mixers' side outputs."""

    logits: Float[Array, "b t rows"]
    carry: Carry
    aux: tuple[dict[str, Any], ...]


class Costs(NamedTuple):
    """-ln p of every target, 0 where none is asked for; the carry; the mixers' side outputs."""

    nll: Float[Array, "b s"]
    carry: Carry
    aux: tuple[dict[str, Any], ...]


class LanguageModel(nnx.Module):
    """Backbone and next-token logits in float32.

    backbone: reads ids through a TokenEmbedding, and sees no later token.
    vocab:    how many ids there are; at most the rows of the table.
    tied:     the table of embeddings makes the logits too; False: a matrix of its own, `head`, without bias.
    """

    def __init__(self, backbone: nnx.Module, *, vocab: int, tied: bool = True, rngs: nnx.Rngs):
        if not hasattr(getattr(backbone, "encoder", None), "embedding"):
            raise ValueError("LanguageModel: the backbone's encoder has no table; expected a TokenEmbedding")
        for _, module in nnx.iter_modules(backbone):
            if isinstance(module, Mixer) and "causal" not in module.supports:
                raise ValueError(
                    f"LanguageModel: {type(module).__name__} sees later tokens, and would copy what it is to predict; "
                    "expected a causal mixer (layers.Attention.causal = True, layers.S4.bidirectional = False)"
                )
        if hasattr(backbone, "cls"):
            raise ValueError("LanguageModel: Backbone.cls_token = True; expected False, every step is one token")
        self.backbone, self.vocab = backbone, vocab
        rows, width = backbone.encoder.embedding.shape  # ty: ignore[missing-attribute]: seen above
        if not 0 < vocab <= rows:
            raise ValueError(f"LanguageModel.vocab = {vocab}: expected 1 to the {rows} rows of the table")
        self.head = None if tied else lecun(width, rows, bias=False, rngs=rngs)

    def __call__(
        self, ids: Int[Array, "b t"], carry: Carry | None = None, ctx: Context = Context(), train: bool = False
    ) -> LanguageModelOut:
        """The logits of what follows every token. Memory: b t rows numbers; `costs` and `last` need less."""
        y, carry, aux, _ = self.backbone(ids, carry, ctx, train)
        return LanguageModelOut(self.logits(y, ctx.axes), carry, aux)

    def last(self, ids: Int[Array, "b t"], carry: Carry | None = None, ctx: Context = Context()) -> LanguageModelOut:
        """The logits (b, 1, rows) behind the last column alone: what reading a prompt needs."""
        y, carry, aux, _ = self.backbone(ids, carry, ctx)
        return LanguageModelOut(self.logits(y[:, -1:], ctx.axes), carry, aux)

    def costs(
        self,
        ids: Int[Array, "b t"],
        target: Int[Array, "b s"],
        carry: Carry | None = None,
        ctx: Context = Context(),
        train: bool = False,
    ) -> Costs:
        """-ln p(target) of what follows the last s tokens; 0 where target is negative.

        Logits exist for a part of the tokens at a time, also in the backward pass.
        """
        y, carry, aux, _ = self.backbone(ids, carry, ctx, train)
        y = y[:, y.shape[1] - target.shape[1] :]
        return Costs(next_token_costs(y, self._table(ctx.axes), target, self.vocab), carry, aux)

    def logits(self, y: Float[Array, "b t d"], axes: Axes = Axes()) -> Float[Array, "b t rows"]:
        """Of what the backbone gives."""
        return table_logits(y, self._table(axes), self.vocab)

    def _table(self, axes: Axes) -> Float[Array, "rows d"]:
        if self.head is not None:
            return self.head.kernel[...].T
        table = self.backbone.encoder.embedding[...]  # ty: ignore[missing-attribute]: seen when it was made
        # Split over devices by its columns, it would make XLA gather the activations instead.
        return jax.lax.with_sharding_constraint(table, axes.spec("..")) if axes else table


def table_logits(y: Float[Array, "b t d"], table: Float[Array, "rows d"], vocab: int) -> Float[Array, "b t rows"]:
    """y table', summed in float32; the lowest number where a row is no token."""
    logits = jnp.einsum("btd,vd->btv", y, table.astype(y.dtype), preferred_element_type=jnp.float32)
    if vocab == table.shape[0]:
        return logits
    return jnp.where((jnp.arange(table.shape[0]) < vocab)[None, None], logits, LOWEST)


def next_token_costs(
    y: Float[Array, "b t d"], table: Float[Array, "rows d"], target: Int[Array, "b t"], vocab: int
) -> Float[Array, "b t"]:
    """-log_softmax(y table')[target], 0 where target < 0; at most about `LOGITS` logits at a time."""

    def costs(y: Array, target: Array) -> Array:
        logits = table_logits(y, table, vocab)
        own = jnp.take_along_axis(logits, jnp.maximum(target, 0)[..., None], axis=2)[..., 0]
        return jnp.where(target < 0, 0, jax.nn.logsumexp(logits, axis=2) - own)

    b, t = target.shape
    parts = -(-b * t * table.shape[0] // LOGITS)
    if parts == 1:
        return costs(y, target)
    size = -(-t // parts)
    parts = -(-t // size)
    filled = parts * size - t
    y = jnp.pad(y, ((0, 0), (0, filled), (0, 0)))
    target = jnp.pad(target, ((0, 0), (0, filled)), constant_values=-1)
    split = lambda a: jnp.moveaxis(a.reshape(b, parts, size, *a.shape[2:]), 1, 0)
    body = jax.checkpoint(lambda _, part: (None, costs(*part)), prevent_cse=False)
    _, nll = jax.lax.scan(body, None, (split(y), split(target)))
    return jnp.moveaxis(nll, 0, 1).reshape(b, -1)[:, :t]
