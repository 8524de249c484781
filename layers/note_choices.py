"""What a MemMamba layer may choose: which tokens count, what a window becomes, what a window is worth, what leaves.

trigger(position, score) -> bool, all (b, t)      Periodic, Every, Above
pool_fn(x (..., w, n)) -> (..., n)                pool_max, pool_mean, pool_min, pool_rms, pool_softmax
scorer(width, rngs=...)(x, mixer) -> (b, t)       Learned, StepSize
replace(...) -> slots (b, e)                      FIFO, Priority, Reservoir
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from longwave.layers.mamba import Mamba

# Triggers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Periodic:
    """The first `on` tokens of every `period` of the document: both decisions of the paper's Figure 2."""

    period: int = 200
    on: int = 50

    def __post_init__(self) -> None:
        if not 0 < self.on <= self.period:
            raise ValueError(f"Periodic.on = {self.on}, period = {self.period}: 0 < on <= period must hold")

    def __call__(self, position: Int[Array, "b t"], score: Float[Array, "b t"]) -> Bool[Array, "b t"]:
        return position % self.period < self.on

    def most(self, t: int) -> int:
        """Of t successive tokens of one document, at most so many count."""
        return t // self.period * self.on + min(t % self.period, self.on)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Every:
    """Every token."""

    def __call__(self, position: Int[Array, "b t"], score: Float[Array, "b t"]) -> Bool[Array, "b t"]:
        return jnp.ones(position.shape, bool)

    def most(self, t: int) -> int:
        return t


@dataclasses.dataclass(frozen=True, kw_only=True)
class Above:
    """Tokens whose score is above the threshold τ: `learned` with the scorer Learned, `delta` with StepSize."""

    threshold: float = 0.5
    needs_score: ClassVar[bool] = True

    def __call__(self, position: Int[Array, "b t"], score: Float[Array, "b t"]) -> Bool[Array, "b t"]:
        return score > self.threshold

    def most(self, t: int) -> int:
        return t


# What a window of w tokens becomes, channel by channel


def pool_max(x: Float[Array, "*b w n"]) -> Float[Array, "*b n"]:
    return jnp.max(x, axis=-2)


def pool_mean(x: Float[Array, "*b w n"]) -> Float[Array, "*b n"]:
    return jnp.mean(x, axis=-2)


def pool_min(x: Float[Array, "*b w n"]) -> Float[Array, "*b n"]:
    return jnp.min(x, axis=-2)


def pool_rms(x: Float[Array, "*b w n"]) -> Float[Array, "*b n"]:
    """Root of the mean square; 1e-6 keeps its gradient finite at zero."""
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=-2) + 1e-6)


def pool_softmax(x: Float[Array, "*b w n"]) -> Float[Array, "*b n"]:
    """Mean with weights softmax(x) over the window."""
    return jnp.sum(jax.nn.softmax(x, axis=-2) * x, axis=-2)


# What a token is worth


class Learned(nnx.Module):
    """σ(w · x_t + b)."""

    roles: ClassVar[dict[str, str]] = {"w": "gate", "b": "bias"}
    keep_float32: ClassVar[frozenset[str]] = frozenset({"w", "b"})

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (width,)) * width**-0.5)
        self.b = nnx.Param(jnp.zeros(()))

    def __call__(self, x: Float[Array, "b t d"], mixer: nnx.Module) -> Float[Array, "b t"]:
        w = self.w[...].astype(jnp.float32)
        return jax.nn.sigmoid(jnp.sum(x.astype(jnp.float32) * w[None, None], axis=-1) + self.b[...])


class StepSize(nnx.Module):
    """The step size Δ that a Mamba behind would take for the token by itself, without neighbours in its convolution,
    mean over channels: DeciMamba's measure of importance (arXiv:2406.14528). No parameters of its own."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        pass

    def __call__(self, x: Float[Array, "b t d"], mixer: nnx.Module) -> Float[Array, "b t"]:
        if not isinstance(mixer, Mamba):
            raise ValueError(f"StepSize reads the step sizes of a Mamba, not of {type(mixer).__name__}")
        v = mixer.in_x(x.astype(jnp.float32)) * mixer.conv[...][-1].astype(jnp.float32)[None, None]
        if mixer.conv_bias is not None:
            v = v + mixer.conv_bias[...][None, None]
        dt = mixer.to_dt(jax.nn.silu(v))
        dt = mixer.dt_norm(dt) if hasattr(mixer, "dt_norm") else dt
        return jnp.mean(jax.nn.softplus(mixer.dt(dt) + mixer.dt_bias[...][None, None]), axis=-1)


# What leaves a full pool


class Windows(NamedTuple):
    """Completed windows in their order: `score`, `number` within the document (0 begins a new one), `live`: is one."""

    score: Float[Array, "b e"]
    number: Int[Array, "b e"]
    live: Bool[Array, "b e"]


class Slots(NamedTuple):
    """What the pool holds: the score and number of each slot's window; number -1: nothing."""

    score: Float[Array, "b k"]
    number: Int[Array, "b k"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FIFO:
    """The oldest leaves."""

    def __call__(self, new: Windows, held: Slots) -> Int[Array, "b e"]:
        """The slot that each window takes; k: none."""
        k = held.number.shape[1]
        return jnp.where(new.live, new.number % k, k)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Priority:
    """The k windows of the highest scores stay, of equal ones the older. A scan over scores alone, without gradient."""

    needs_score: ClassVar[bool] = True

    def __call__(self, new: Windows, held: Slots) -> Int[Array, "b e"]:
        k = held.number.shape[1]
        slots = jnp.arange(k)[None]

        def take(held: Slots, window: Windows) -> tuple[Slots, Array]:
            score, number, live = (v[:, None] for v in window)
            lowest = jnp.min(held.score, axis=1, keepdims=True)
            youngest = jnp.argmax(jnp.where(held.score == lowest, held.number, -1), axis=1)[:, None]
            slot = jnp.where(number < k, number, jnp.where(score > lowest, youngest, k))
            slot = jnp.where(live, slot, k)
            here = slots == slot
            return Slots(jnp.where(here, score, held.score), jnp.where(here, number, held.number)), slot[:, 0]

        new, held = lax.stop_gradient((new, held))
        _, slot = lax.scan(take, held, jax.tree.map(lambda v: v.T, new))
        return slot.T


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reservoir:
    """Every window of the document so far stays with equal probability (Vitter, 1985, Algorithm R): the control that
    learns nothing. The draw for window c depends on c and the seed alone."""

    seed: int = 0

    def draw(self, number: Int[Array, "..."]) -> Int[Array, "..."]:
        """Uniform in 0 ... number."""
        key = jax.random.key(self.seed)
        one = lambda c: jax.random.randint(jax.random.fold_in(key, c), (), 0, c + 1)
        return jax.vmap(one)(jnp.maximum(number, 0).ravel()).reshape(number.shape)

    def __call__(self, new: Windows, held: Slots) -> Int[Array, "b e"]:
        k = held.number.shape[1]
        slot = jnp.where(new.number < k, new.number, self.draw(new.number))
        return jnp.where(new.live & (slot < k), slot, k)


Trigger = Periodic | Every | Above
Replacement = Any  # FIFO, Priority, Reservoir or the like
