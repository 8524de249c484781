"""The body of every model: encoder, positions if any, blocks of mixer and MLP, final norm.

A block is   x + drop(mixer(norm(x)))  and then, with an MLP,  x + drop(mlp(norm(x)))     (prenorm)
or           norm(x + drop(mixer(x)))                                                    (postnorm).

Layers of one kind can be stacked and run by `lax.scan` (one compilation for all of them); rematerialisation keeps only
the blocks' inputs for the backward pass. Blocks know neither vocabulary nor mesh; only `ctx.axes` passes through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from longwave.layers.attention import places
from longwave.layers.dropout import dropout
from longwave.layers.mixer import Carry, Context, Mixer, Out
from longwave.layers.norms import LayerNorm
from longwave.models.encoders import encoder_for
from longwave.models.inputs import Inputs

MakeMixer = Callable[..., Mixer]  # (width, rngs=...) -> mixer
SCAN_FROM_DEPTH = 8  # below this, unrolled layers compile as fast and leave XLA more to fuse


class Block(nnx.Module):
    """One layer: a mixer and, if given, a position-wise network, each with norm, dropout and residual."""

    def __init__(
        self,
        width: int,
        *,
        mixer: MakeMixer,
        mlp: Callable[..., nnx.Module] | None,
        norm: Callable[..., nnx.Module],
        prenorm: bool,
        dropout: float,
        tie_dropout: bool,
        rngs: nnx.Rngs,
    ):
        self.prenorm, self.rate, self.tied = prenorm, dropout, tie_dropout
        self.norm, self.mixer = norm(width, rngs=rngs), mixer(width, rngs=rngs)
        if mlp is not None:
            self.mlp_norm, self.mlp = norm(width, rngs=rngs), mlp(width, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        carry: Carry | None = None,
        ctx: Context = Context(),
        train: bool = False,
        dtype: jnp.dtype | None = None,
    ) -> Out:
        """dtype: what mixer and MLP compute in, where the residual stream is wider; None: that of x."""
        keys = (None,) * 4 if ctx.key is None else tuple(jax.random.split(ctx.key, 4))
        out = Out(x, (), {})

        narrow = lambda u: u if dtype is None else u.astype(dtype)

        def mix(u: Array) -> Array:
            nonlocal out
            out = self.mixer(narrow(u), carry, dataclasses.replace(ctx, key=keys[0]))
            return out.y

        x = self._residual(x, self.norm, mix, keys[1], ctx, train)
        if hasattr(self, "mlp"):
            x = self._residual(x, self.mlp_norm, lambda u: self.mlp(narrow(u), keys[2]), keys[3], ctx, train)
        return Out(x, out.carry, out.aux)

    def _residual(
        self,
        x: Array,
        norm: nnx.Module,
        f: Callable[[Array], Array],
        key: Array | None,
        ctx: Context,
        train: bool,
    ) -> Array:
        if self.prenorm:
            return x + dropout(f(norm(x, ctx.valid, train)), self.rate, key, tied=self.tied)
        return norm(x + dropout(f(x), self.rate, key, tied=self.tied), ctx.valid, train)


class BackboneOut(NamedTuple):
    """y (b, t, width), with t and `valid` as the encoder left them; one carry and one dict of side outputs a layer."""

    y: Float[Array, "b t d"]
    carry: Carry
    aux: tuple[dict[str, Any], ...]
    valid: Bool[Array, "b t"] | None


class Backbone(nnx.Module):
    """Encoder, `depth` blocks, final norm: inputs -> BackboneOut(y (b, t, width), carry, aux, valid).

    inputs: what the encoder reads.
    mixers: constructors, repeated over the depth: (S4D, S4D, Attention) makes every third layer attention.
    mlp, norm: constructors.    final_norm: after the last block; None: where prenorm needs it. S5 has none.
    dropout: of the residual branches; input_dropout: of what enters the first block; tie_dropout: one mask for all
        time steps, as the S4 lineage trains.
    encoder: constructor (inputs, width, rngs=...).     cls_token: a learned vector before the first valid token, which
        starts as `cls_init` draws it.
    positions: constructor (length, width, rngs=...) of what is added to every token, the summary token included, by
        its number in its document; None: nothing.
    residual_float32: the sum of the residual branches stays float32 when the rest computes in bfloat16, as in Mamba's
        code; needs prenorm.
    scan: run repeats of the pattern by `lax.scan` over stacked parameters; None: from 8 layers on. Not for mixers that
        read lower layers.      remat: keep only block inputs for the backward pass.
    aux of the result is a tuple with one dict a layer (stacked along axis 0 inside each pattern position when scanned).
    """

    roles = {"cls": "embed"}

    def __init__(
        self,
        inputs: Inputs,
        *,
        width: int,
        depth: int,
        mixers: Sequence[MakeMixer],
        mlp: Callable[..., nnx.Module] | None = None,
        norm: Callable[..., nnx.Module] = LayerNorm,
        prenorm: bool = True,
        final_norm: bool | None = None,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        tie_dropout: bool = True,
        encoder: Callable[..., nnx.Module] = encoder_for,
        cls_token: bool = False,
        cls_init: Callable[..., Array] = jax.nn.initializers.normal(1.0),
        positions: Callable[..., nnx.Module] | None = None,
        residual_float32: bool = False,
        scan: bool | None = None,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        pattern = tuple(mixers)
        if not pattern or depth % len(pattern):
            raise ValueError(f"Backbone.depth = {depth} must be a multiple of the {len(pattern)} mixers given")
        if residual_float32 and not prenorm:
            raise ValueError("Backbone.residual_float32 = True: with prenorm = False the norms' outputs are the stream")
        self.width, self.depth, self.remat = width, depth, remat
        self.residual_float32 = residual_float32
        self.input_rate, self.tied = input_dropout, tie_dropout
        self.encoder = encoder(inputs, width, rngs=rngs)
        if cls_token:
            self.cls = nnx.Param(cls_init(rngs.params(), (width,)))
        if positions is not None:
            self.positions = positions(inputs.length + cls_token, width, rngs=rngs)
        repeats = depth // len(pattern)
        reads_below = any(nnx.eval_shape(lambda m=m: m(width, rngs=nnx.Rngs(0))).reads_below for m in set(pattern))
        if scan and reads_below:
            raise ValueError("Backbone.scan = True: a mixer here reads lower layers, which a scan cannot offer")
        self.scan = repeats > 1 and (depth >= SCAN_FROM_DEPTH and not reads_below if scan is None else scan)

        def block(mixer: MakeMixer, key: Array) -> Block:
            return Block(
                width,
                mixer=mixer,
                mlp=mlp,
                norm=norm,
                prenorm=prenorm,
                dropout=dropout,
                tie_dropout=tie_dropout,
                rngs=nnx.Rngs(params=key),
            )

        keys = jax.random.split(rngs.params(), (repeats, len(pattern)))
        if self.scan:
            make = lambda mixer: jax.vmap(lambda key: block(mixer, key))
            self.layers = nnx.List([make(m)(keys[:, i]) for i, m in enumerate(pattern)])
        else:
            flat = keys.reshape(depth, *keys.shape[2:])
            self.layers = nnx.List([block(pattern[i % len(pattern)], flat[i]) for i in range(depth)])
        self.norm = norm(width, rngs=rngs) if (prenorm if final_norm is None else final_norm) else None

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """One carry a layer; of a scanned position, stacked along axis 0."""
        init = lambda layer: layer.mixer.init_carry(batch, capacity=capacity)
        return tuple(jax.vmap(init)(layer) if self.scan else init(layer) for layer in self.layers)

    def __call__(
        self, inputs: Array, carry: Carry | None = None, ctx: Context = Context(), train: bool = False
    ) -> BackboneOut:
        x = self.encoder(inputs, ctx.axes)
        if x.shape[1] != inputs.shape[1]:
            ctx = _patched(x, inputs, ctx)
        if hasattr(self, "cls"):
            if carry is not None or ctx.reset is not None:
                raise ValueError("Backbone.cls_token: one token a sequence has no meaning with a carry or with resets")
            x, ctx = _prepend(self.cls[...], x, ctx)
        if hasattr(self, "positions"):
            if carry is not None:
                raise ValueError("Backbone.positions: a carry does not tell how many tokens went before")
            x = x + self.positions(_numbers(x, ctx), ctx.axes).astype(x.dtype)
        if ctx.key is not None:  # layers take the keys 0, 1, ... depth - 1
            x = dropout(x, self.input_rate, jax.random.fold_in(ctx.key, self.depth), tied=self.tied)
        dtype = x.dtype
        x = _constrain(x.astype(jnp.float32) if self.residual_float32 else x, ctx)
        run = self._scanned if self.scan else self._unrolled
        x, carry, aux = run(x, carry, ctx, train, dtype)
        if self.norm is not None:
            x = self.norm(x, ctx.valid, train)
        return BackboneOut(x.astype(dtype), carry, aux, ctx.valid)

    def _unrolled(
        self, x: Array, carry: Carry | None, ctx: Context, train: bool, dtype: jnp.dtype
    ) -> tuple[Array, Carry, tuple]:
        keys = [None] * self.depth if ctx.key is None else list(jax.random.split(ctx.key, self.depth))
        carries, aux = [], []
        for i, layer in enumerate(self.layers):
            below = tuple(aux) if layer.mixer.reads_below else ()
            out = self._block(layer, x, None if carry is None else carry[i], ctx, keys[i], below, train, dtype)
            x = _constrain(out.y, ctx)
            carries.append(out.carry)
            aux.append(out.aux)
        return x, tuple(carries), tuple(aux)

    def _scanned(
        self, x: Array, carry: Carry | None, ctx: Context, train: bool, dtype: jnp.dtype
    ) -> tuple[Array, Carry, tuple]:
        repeats, pattern = self.depth // len(self.layers), len(self.layers)
        keys = None if ctx.key is None else jax.random.split(ctx.key, (repeats, pattern))

        def body(x: Array, slices: Any) -> tuple[Array, Any]:
            layers, carries, keys = slices
            outs, stats = [], []
            for i, layer in enumerate(layers):
                key = None if keys is None else keys[i]
                out = self._block(layer, x, None if carries is None else carries[i], ctx, key, (), train, dtype)
                x = _constrain(out.y, ctx)
                outs.append((out.carry, out.aux))
                stats.append(nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat)))
            return x, (tuple(c for c, _ in outs), tuple(a for _, a in outs), tuple(stats))

        x, (carries, aux, stats) = jax.lax.scan(body, x, (tuple(self.layers), carry, keys))
        for layer, stat in zip(self.layers, stats, strict=True):
            nnx.update(layer, stat)
        return x, carries, aux

    def _block(
        self,
        layer: Block,
        x: Array,
        carry: Carry,
        ctx: Context,
        key: Array | None,
        below: tuple,
        train: bool,
        dtype: jnp.dtype,
    ) -> Out:
        """One block, rematerialised if asked. Statistics leave a rematerialised region as results, not by mutation."""
        ctx = dataclasses.replace(ctx, key=key, below=below)
        if not self.remat:
            return layer(x, carry, ctx, train, dtype)

        def pure(layer: Block, x: Array, carry: Carry, ctx: Context) -> tuple[Out, Any]:
            out = layer(x, carry, ctx, train, dtype)
            return out, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

        out, stats = jax.checkpoint(pure, prevent_cse=not self.scan)(layer, x, carry, ctx)
        nnx.update(layer, stats)
        return out


def _constrain(x: Array, ctx: Context) -> Array:
    """States the layout of activations at block boundaries, the one place where XLA needs telling."""
    return jax.lax.with_sharding_constraint(x, ctx.axes.spec("bt.")) if ctx.axes else x


def _numbers(x: Array, ctx: Context) -> Int[Array, "b t"]:
    """The number of every token in its document; of padding, any."""
    if ctx.valid is None and ctx.reset is None:
        return jnp.arange(x.shape[1])[None]
    return jnp.maximum(places(jnp.zeros(x.shape[0], jnp.int32), x.shape[1], ctx).position, 0)


def _patched(x: Array, inputs: Array, ctx: Context) -> Context:
    """The context of an encoder that made one step of several."""
    if ctx.reset is not None:
        raise ValueError(f"the encoder turns {inputs.shape[1]} steps into {x.shape[1]}: resets are lost between them")
    if ctx.valid is None:
        return ctx
    return dataclasses.replace(ctx, valid=ctx.valid.reshape(x.shape[0], x.shape[1], -1).any(-1))


def _prepend(token: Array, x: Array, ctx: Context) -> tuple[Array, Context]:
    """Inserts `token` before the first valid token of every row; the sequence becomes one longer."""
    token = jnp.broadcast_to(token.astype(x.dtype)[None, None], (x.shape[0], 1, x.shape[2]))
    if ctx.valid is None:
        return jnp.concatenate([token, x], axis=1), ctx
    first = jnp.argmax(ctx.valid, axis=1)[:, None]
    index = jnp.arange(x.shape[1] + 1)[None]
    source = jnp.clip(index - (index > first), 0, x.shape[1] - 1)
    moved = jnp.take_along_axis(x, source[..., None], axis=1)
    valid = jnp.take_along_axis(ctx.valid, source, axis=1) | (index == first)
    return jnp.where((index == first)[..., None], token, moved), dataclasses.replace(ctx, valid=valid)
