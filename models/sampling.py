"""How the next token is chosen: transforms of logits, one after another, and a draw from what they leave.

    logits (b, v), seen (b, v)  ->  logits (b, v)           -inf: not to be chosen

`seen` is true for the ids that the row has had, prompt included. A transform is a frozen dataclass, so that a tuple of
them is a static argument. The usual order is Repetition, Temperature, TopK, TopP, MinP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Transform = Callable[[Float[Array, "b v"], Bool[Array, "b v"]], Float[Array, "b v"]]


@dataclasses.dataclass(frozen=True)
class Below:
    """The ids below `n`: a model may have more than its tokeniser knows."""

    n: int

    def __post_init__(self) -> None:
        _check(self, "n", self.n >= 1, "at least 1")

    def __call__(self, logits: Float[Array, "b v"], seen: Bool[Array, "b v"]) -> Float[Array, "b v"]:
        return jnp.where((jnp.arange(logits.shape[1]) < self.n)[None], logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Repetition:
    """Logits of ids that were seen are divided by `penalty` where positive, else multiplied (arXiv:1909.05858)."""

    penalty: float

    def __post_init__(self) -> None:
        _check(self, "penalty", self.penalty > 0, "more than 0; 1 changes nothing")

    def __call__(self, logits: Float[Array, "b v"], seen: Bool[Array, "b v"]) -> Float[Array, "b v"]:
        return jnp.where(seen, jnp.where(logits > 0, logits / self.penalty, logits * self.penalty), logits)


@dataclasses.dataclass(frozen=True)
class Temperature:
    """Logits divided by `value`."""

    value: float

    def __post_init__(self) -> None:
        _check(self, "value", self.value > 0, "more than 0; the limit 0 is the most probable token, without a draw")

    def __call__(self, logits: Float[Array, "b v"], seen: Bool[Array, "b v"]) -> Float[Array, "b v"]:
        return logits / self.value


@dataclasses.dataclass(frozen=True)
class TopK:
    """The `k` most probable ids, and those that are level with the last of them."""

    k: int

    def __post_init__(self) -> None:
        _check(self, "k", self.k >= 1, "at least 1")

    def __call__(self, logits: Float[Array, "b v"], seen: Bool[Array, "b v"]) -> Float[Array, "b v"]:
        least = jax.lax.top_k(logits, min(self.k, logits.shape[1]))[0][:, -1:]
        return jnp.where(logits < least, -jnp.inf, logits)


@dataclasses.dataclass(frozen=True)
class TopP:
    """The fewest most probable ids whose probabilities reach `p` together (arXiv:1904.09751)."""

    p: float

    def __post_init__(self) -> None:
        _check(self, "p", 0 < self.p <= 1, "more than 0, at most 1")

    def __call__(self, logits: Float[Array, "b v"], seen: Bool[Array, "b v"]) -> Float[Array, "b v"]:
        falling = -jnp.sort(-logits, axis=1)
        probability = jax.nn.softmax(falling, axis=1)
        before = jnp.cumsum(probability, axis=1) - probability
        least = jnp.min(jnp.where(before < self.p, falling, jnp.inf), axis=1, keepdims=True)
        return jnp.where(logits < least, -jnp.inf, logits)


@dataclasses.dataclass(frozen=True)
class MinP:
    """The ids at least `p` times as probable as the most probable one (arXiv:2407.01082)."""

    p: float

    def __post_init__(self) -> None:
        _check(self, "p", 0 < self.p <= 1, "more than 0, at most 1")

    def __call__(self, logits: Float[Array, "b v"], seen: Bool[Array, "b v"]) -> Float[Array, "b v"]:
        return jnp.where(logits < jnp.max(logits, axis=1, keepdims=True) + jnp.log(self.p), -jnp.inf, logits)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """transforms: in this order.    greedy: the largest logit instead of a draw."""

    transforms: tuple[Transform, ...] = ()
    greedy: bool = False

    def __call__(
        self,
        logits: Float[Array, "b v"],
        seen: Bool[Array, "b v"],
        keys: PRNGKeyArray,
        count: Int[Array, "b"],
    ) -> Int[Array, "b"]:
        """One id a row. What a row draws depends on its own key and on how many tokens it has drawn, nothing else."""
        for transform in self.transforms:
            logits = transform(logits, seen)
        if self.greedy:
            return jnp.argmax(logits, axis=1).astype(jnp.int32)
        draw = lambda key, n, row: jax.random.categorical(jax.random.fold_in(key, n), row)
        return jax.vmap(draw)(keys, count, logits).astype(jnp.int32)


GREEDY = Sampling(greedy=True)


def sampling(
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
) -> Sampling:
    """The usual order of those that are set; temperature 0 is greedy, and the penalty still counts."""
    penalty = () if repetition_penalty is None else (Repetition(repetition_penalty),)
    if temperature == 0:
        cuts = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        if given := [name for name, value in cuts.items() if value is not None]:
            raise ValueError(f"temperature = 0 with {given[0]} = {cuts[given[0]]}: expected None")
        return Sampling(penalty, greedy=True)
    heat = () if temperature == 1 else (Temperature(temperature),)
    most = () if top_k is None else (TopK(top_k),)
    mass = () if top_p is None else (TopP(top_p),)
    share = () if min_p is None else (MinP(min_p),)
    return Sampling((*penalty, *heat, *most, *mass, *share))


def _check(transform: Transform, field: str, holds: bool, allowed: str) -> None:
    if not holds:
        name, value = type(transform).__name__, getattr(transform, field)
        raise ValueError(f"{name}.{field} = {value}: expected {allowed}")
