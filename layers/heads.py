"""What the layers around the matrix-state recurrence (kernels/linear_attention) share: heads and their norms, keys of
length one, projections behind a short convolution, gates of low rank, the decay of Mamba-2's kind.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from longwave.kernels.short_conv import short_conv
from longwave.layers.linear import linear, torch_uniform
from longwave.layers.mamba import at_least_one, draw_dt_bias
from longwave.layers.mixer import Carry, Context, Mixer


def masks(ctx: Context) -> dict[str, Any]:
    """What operations are told of a call."""
    return {"reset": ctx.reset, "valid": ctx.valid, "axes": ctx.axes}


def split(x: Float[Array, "b t hd"], heads: int) -> Float[Array, "b t h d"]:
    return rearrange(x, "b t (h d) -> b t h d", h=heads)


def join(x: Float[Array, "b t h d"]) -> Float[Array, "b t hd"]:
    return rearrange(x, "b t h d -> b t (h d)")


def channels(mixer: Mixer, width: int, expand: float, heads: int, name: str) -> int:
    """expand * width, which must be whole heads. Raises ValueError naming the hyper-parameter if it is not."""
    at_least_one(mixer, heads=heads)
    size = round(expand * width)
    if size < 1 or size % heads or not math.isclose(size, expand * width):  # 1.1 * 10 is not quite 11
        raise ValueError(
            f"{type(mixer).__name__}.heads = {heads} must divide {name} * width = {expand:g} * {width} = "
            f"{expand * width:g}"
        )
    return size


def unit(x: Float[Array, "b t h d"], eps: float = 1e-6) -> Float[Array, "b t h d"]:
    """Vectors of length one, computed in float32; eps stands under the root."""
    u = x.astype(jnp.float32)
    return (u * jax.lax.rsqrt(jnp.sum(jnp.square(u), -1, keepdims=True) + eps)).astype(x.dtype)


class HeadNorm(nnx.Module):
    """RMS normalisation of each head's vector, with one scale for the heads alike. Computed in float32."""

    roles: ClassVar[dict[str, str]] = {"scale": "norm"}

    def __init__(self, size: int, *, eps: float = 1e-5):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size))

    def __call__(self, x: Float[Array, "b t h d"]) -> Float[Array, "b t h d"]:
        u = x.astype(jnp.float32)
        u = u * jax.lax.rsqrt(jnp.mean(jnp.square(u), -1, keepdims=True) + self.eps)
        return (u * self.scale[...].astype(jnp.float32)[None, None, None]).astype(x.dtype)


class GroupNorm(nnx.Module):
    """Mean and variance of each head's vector normalised away (Wu & He, 2018), then scale and bias of every channel."""

    roles: ClassVar[dict[str, str]] = {"scale": "norm", "bias": "norm"}

    def __init__(self, heads: int, size: int, *, eps: float = 1e-5):
        self.eps = eps
        self.scale, self.bias = nnx.Param(jnp.ones((heads, size))), nnx.Param(jnp.zeros((heads, size)))

    def __call__(self, x: Float[Array, "b t h d"]) -> Float[Array, "b t h d"]:
        u = x.astype(jnp.float32)
        u = u - jnp.mean(u, -1, keepdims=True)
        u = u * jax.lax.rsqrt(jnp.mean(jnp.square(u), -1, keepdims=True) + self.eps)
        scale, bias = (p[...].astype(jnp.float32)[None, None] for p in (self.scale, self.bias))
        return (u * scale + bias).astype(x.dtype)


class LowRank(nnx.Module):
    """W_up W_low x (+ bias): the map of a gate."""

    def __init__(self, width: int, rank: int, size: int, *, bias: bool, rngs: nnx.Rngs):
        self.low = linear(width, rank, bias=False, rngs=rngs)
        self.up = linear(rank, size, bias=bias, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t e"]:
        return self.up(self.low(x))


class ConvolvedHeads(nnx.Module):
    """q, k, v = silu(conv(W x)) in heads, q and k of length one: what the layers of the delta rule read and write.

    conv: causal, depthwise, so many taps, the token itself included; one for each of the three. Its carry is float32:
    the last conv - 1 inputs of each.
    """

    roles: ClassVar[dict[str, str]] = {f"conv_{name}": "kernel" for name in "qkv"}

    def __init__(self, width: int, *, heads: int, key: int, value: int, conv: int, rngs: nnx.Rngs):
        self.heads = heads
        for name, size in {"q": heads * key, "k": heads * key, "v": heads * value}.items():
            setattr(self, name, linear(width, size, bias=False, rngs=rngs))
            setattr(self, f"conv_{name}", nnx.Param(torch_uniform(rngs.params(), (conv, size), fan_in=conv)))

    def init_carry(self, batch: int) -> Carry:
        taps = {name: getattr(self, f"conv_{name}").shape for name in "qkv"}
        return {name: jnp.zeros((batch, conv - 1, size), jnp.float32) for name, (conv, size) in taps.items()}

    def __call__(
        self, x: Float[Array, "b t d"], carry: Carry | None, ctx: Context
    ) -> tuple[tuple[Float[Array, "b t h _"], ...], Carry]:
        """((q, k, v), the carry)."""
        heads, last = [], {}
        for name in "qkv":
            state = None if carry is None else carry[name]
            taps = getattr(self, f"conv_{name}")[...]
            y, last[name] = short_conv(getattr(self, name)(x), taps, state=state, **masks(ctx))
            heads.append(split(jax.nn.silu(y), self.heads))
        q, k, v = heads
        return (unit(q), unit(k), v), last


class Decay(nnx.Module):
    """g = -exp(A_log) softplus(a + dt_bias), float32: the log decay of Mamba-2, of each head or of every key dimension.

    shape: (heads,) or (heads, key dimensions) of a and dt_bias; A_log is of each head. -A starts uniform between the
    two of A_init, the softplus log-uniform between 0.001 and 0.1.
    """

    roles: ClassVar[dict[str, str]] = {"A_log": "A", "dt_bias": "dt"}
    keep_float32: ClassVar[frozenset[str]] = frozenset({"A_log", "dt_bias"})

    def __init__(self, shape: tuple[int, ...], *, A_init: tuple[float, float], rngs: nnx.Rngs):
        low, high = A_init
        if not 0 <= low < high:
            raise ValueError(f"A_init = {A_init} must be two bounds of at least 0, ascending")
        A = high - (high - low) * jax.random.uniform(rngs.params(), shape[:1])  # not `low` itself: log 0
        self.A_log = nnx.Param(jnp.log(A))
        count = shape[0] * (shape[1] if len(shape) == 2 else 1)
        self.dt_bias = nnx.Param(draw_dt_bias(count, 1e-3, 1e-1, 1e-4, rngs=rngs).reshape(shape))

    def __call__(self, a: Float[Array, "b t *h"]) -> Float[Array, "b t *h"]:
        dt = jax.nn.softplus(a.astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32)[None, None])
        A = jnp.exp(self.A_log[...].astype(jnp.float32))
        return -A.reshape(1, 1, -1, *(1,) * (dt.ndim - 3)) * dt
