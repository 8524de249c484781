"""Normalisations with one call: norm(x, valid=None, train=False). Statistics and scaling are float32 inside.

Only BatchNorm uses `valid` and `train`; it is the one layer of Longwave with a state (running mean and variance).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

Valid = Bool[Array, "b t"] | None


class LayerNorm(nnx.Module):
    """Layer normalisation over the features (Ba et al., 2016). eps as in PyTorch, which the S4 lineage used."""

    roles = {"scale": "norm", "bias": "norm"}

    def __init__(self, width: int, *, eps: float = 1e-5, rngs: nnx.Rngs | None = None):
        self.eps = eps
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "b t d"], valid: Valid = None, train: bool = False) -> Float[Array, "b t d"]:
        u = x.astype(jnp.float32)
        u = u - u.mean(-1, keepdims=True)
        u = u * jax.lax.rsqrt(jnp.square(u).mean(-1, keepdims=True) + self.eps)
        return _affine(u, self.scale[...], self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation (Zhang & Sennrich, 2019)."""

    roles = {"scale": "norm"}

    def __init__(self, width: int, *, eps: float = 1e-6, rngs: nnx.Rngs | None = None):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "b t d"], valid: Valid = None, train: bool = False) -> Float[Array, "b t d"]:
        u = x.astype(jnp.float32)
        u = u * jax.lax.rsqrt(jnp.square(u).mean(-1, keepdims=True) + self.eps)
        return (u * self.scale[...].astype(jnp.float32)[None, None]).astype(x.dtype)


class BatchNorm(nnx.Module):
    """Batch normalisation over examples and time (Ioffe & Szegedy, 2015), with PyTorch's conventions.

    Running statistics move by `1 - momentum` of the way to the batch's, the variance by its unbiased estimate.
    Under a mesh the statistics are those of the global batch.

    ignore_padding: leave invalid positions out of the statistics. The official S4 code includes them; its configs of
        record set this to False.
    """

    roles = {"scale": "norm", "bias": "norm"}

    def __init__(
        self,
        width: int,
        *,
        momentum: float = 0.9,
        eps: float = 1e-5,
        ignore_padding: bool = True,
        rngs: nnx.Rngs | None = None,
    ):
        self.momentum, self.eps, self.ignore_padding = momentum, eps, ignore_padding
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(width)), nnx.BatchStat(jnp.ones(width))

    def __call__(self, x: Float[Array, "b t d"], valid: Valid = None, train: bool = False) -> Float[Array, "b t d"]:
        u = x.astype(jnp.float32)
        mean, var = self.mean[...], self.var[...]
        if train:
            mean, var = self._batch_statistics(u, valid if self.ignore_padding else None)
        u = (u - mean[None, None]) * jax.lax.rsqrt(var + self.eps)[None, None]
        return _affine(u, self.scale[...], self.bias[...]).astype(x.dtype)

    def _batch_statistics(self, u: Float[Array, "b t d"], valid: Valid) -> tuple[Array, Array]:
        if valid is None:
            count = jnp.float32(u.shape[0] * u.shape[1])
            mean = u.mean((0, 1))
            var = jnp.square(u - mean[None, None]).mean((0, 1))
        else:
            weight = valid[..., None].astype(u.dtype)
            count = jnp.maximum(weight.sum(), 1.0)
            mean = jnp.where(valid[..., None], u, 0.0).sum((0, 1)) / count
            var = (weight * jnp.square(jnp.where(valid[..., None], u, 0.0) - mean[None, None])).sum((0, 1)) / count
        unbiased = var * count / jnp.maximum(count - 1.0, 1.0)
        keep = self.momentum
        self.mean[...] = keep * self.mean[...] + (1 - keep) * jax.lax.stop_gradient(mean)
        self.var[...] = keep * self.var[...] + (1 - keep) * jax.lax.stop_gradient(unbiased)
        return mean, var


def _affine(u: Array, scale: Array, bias: Array) -> Array:
    return u * scale.astype(jnp.float32)[None, None] + bias.astype(jnp.float32)[None, None]
