"""How the memories of a mixture (layers/mom.py) are written: the gates of one recurrence.

    S' = exp(g) S        S = S' + k (w v - S'^T (beta k))^T        o = scale S^T q

A rule holds the gates' parameters: of each of `sets` memories its own maps from the token, and what all memories share.
It is made of (width, heads=, P=, sets=, rngs=), P key dimensions to a head. `gates(x)` are float32 features of every
token for every set; rule(q, k, *gates), of the tokens that a memory saw, is what the recurrence takes beside `scale`.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longwave.layers.heads import Decay, split, unit
from longwave.layers.retnet import log_decay


class Written(NamedTuple):
    """q and k as they are used, and the gates of `linear_attention`."""

    q: Float[Array, "b t h P"]
    k: Float[Array, "b t h P"]
    g: Float[Array, "b t h"] | Float[Array, "b t h P"] | None = None
    w: Float[Array, "b t h"] | None = None
    beta: Float[Array, "b t h"] | None = None


class GatedDelta(nnx.Module):
    """Gated DeltaNet (arXiv:2412.06464): beta = w = sigmoid(W_b x), g = -exp(A_log) softplus(W_a x + dt_bias); q and k
    of length 1."""

    roles: ClassVar[dict[str, str]] = {"W_a": "weight", "W_b": "weight"}

    def __init__(self, width: int, *, heads: int, P: int, sets: int, rngs: nnx.Rngs):
        self.W_a, self.W_b = (nnx.Param(small_xavier(rngs, sets, width, heads)) for _ in range(2))
        self.decay = Decay((heads,), A_init=(0.0, 16.0), rngs=rngs)
        self.scale = P**-0.5

    def gates(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t sets h"], ...]:
        return each(x, self.W_a[...]), each(x, self.W_b[...])

    def __call__(self, q: Array, k: Array, a: Float[Array, "b t h"], b: Float[Array, "b t h"]) -> Written:
        beta = jax.nn.sigmoid(b)
        return Written(unit(q), unit(k), g=self.decay(a), w=beta, beta=beta)


class Delta(nnx.Module):
    """DeltaNet (arXiv:2406.06484): beta = w = sigmoid(W_b x), no decay; q and k of length 1."""

    roles: ClassVar[dict[str, str]] = {"W_b": "weight"}

    def __init__(self, width: int, *, heads: int, P: int, sets: int, rngs: nnx.Rngs):
        self.W_b = nnx.Param(small_xavier(rngs, sets, width, heads))
        self.scale = P**-0.5

    def gates(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t sets h"], ...]:
        return (each(x, self.W_b[...]),)

    def __call__(self, q: Array, k: Array, b: Float[Array, "b t h"]) -> Written:
        beta = jax.nn.sigmoid(b)
        return Written(unit(q), unit(k), w=beta, beta=beta)


class GLA(nnx.Module):
    """Gated linear attention (arXiv:2312.06635): a decay for each key dimension, g = log sigmoid(W_2 W_1 x + b) / 16,
    its map of rank 16."""

    roles: ClassVar[dict[str, str]] = {"W_1": "weight", "W_2": "weight", "b": "bias"}

    def __init__(self, width: int, *, heads: int, P: int, sets: int, rank: int = 16, rngs: nnx.Rngs):
        self.W_1 = nnx.Param(small_xavier(rngs, sets, width, rank))
        self.W_2 = nnx.Param(small_xavier(rngs, sets, rank, heads * P))
        self.b = nnx.Param(jnp.zeros((sets, heads * P)))
        self.scale = P**-0.5

    def gates(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t sets hP"], ...]:
        # In float32: XLA on CPUs has no product of batches from bfloat16 to float32.
        low, up = each(x, self.W_1[...]), self.W_2[...].astype(jnp.float32)
        gate = jnp.einsum("btsr,src->btsc", low, up)
        return (gate + self.b[...].astype(jnp.float32)[None, None],)

    def __call__(self, q: Array, k: Array, gate: Float[Array, "b t hP"]) -> Written:
        return Written(q, k, g=jax.nn.log_sigmoid(split(gate, k.shape[2])) / 16)


class Linear(nnx.Module):
    """Linear attention (arXiv:2006.16236), without decay, feature map or normaliser: the sum of k v'."""

    def __init__(self, width: int, *, heads: int, P: int, sets: int, rngs: nnx.Rngs):
        self.scale = P**-0.5

    def gates(self, x: Float[Array, "b t d"]) -> tuple[()]:
        return ()

    def __call__(self, q: Array, k: Array) -> Written:
        return Written(q, k)


class Retention(nnx.Module):
    """Retention (RetNet, arXiv:2307.08621): the fixed decay 1 - 2^(-5 - h) of head h = 0, 1, ...; no rotation."""

    def __init__(self, width: int, *, heads: int, P: int, sets: int, rngs: nnx.Rngs):
        self.heads, self.scale = heads, P**-0.5

    def gates(self, x: Float[Array, "b t d"]) -> tuple[()]:
        return ()

    def __call__(self, q: Array, k: Array) -> Written:
        return Written(q, k, g=jnp.broadcast_to(jnp.asarray(log_decay(self.heads))[None, None], k.shape[:3]))


class Mamba2(nnx.Module):
    """Mamba-2 (arXiv:2405.21060): w = dt = softplus(W_dt x + dt_bias), g = -exp(A_log) dt; o = S' q."""

    roles: ClassVar[dict[str, str]] = {"W_dt": "weight"}

    def __init__(self, width: int, *, heads: int, P: int, sets: int, rngs: nnx.Rngs):
        self.W_dt = nnx.Param(small_xavier(rngs, sets, width, heads))
        self.decay = Decay((heads,), A_init=(0.0, 16.0), rngs=rngs)
        self.scale = 1.0

    def gates(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t sets h"], ...]:
        return (each(x, self.W_dt[...]),)

    def __call__(self, q: Array, k: Array, dt: Float[Array, "b t h"]) -> Written:
        step = jax.nn.softplus(dt + self.decay.dt_bias[...].astype(jnp.float32)[None, None])
        return Written(q, k, g=self.decay(dt), w=step)


# What they share


def each(x: Float[Array, "b t d"], W: Float[Array, "sets d f"]) -> Float[Array, "b t sets f"]:
    """x by the map of every set, float32."""
    return jnp.einsum("btd,sdf->btsf", x, W, preferred_element_type=jnp.float32)


def small_xavier(rngs: nnx.Rngs, sets: int, width_in: int, width_out: int) -> Float[Array, "sets d f"]:
    """Of each set uniform with a^2 = 6 / (width_in + width_out), times 2^-2.5: how MoM's and fla's layers start."""
    init = jax.nn.initializers.variance_scaling(2.0**-5, "fan_avg", "uniform", batch_axis=0)
    return init(rngs.params(), (sets, width_in, width_out))
