"""The one gradient rule of softmax attention, around forms that know a forward and a backward pass of their own.

A form is two functions on arrays in time:

    forward(q, k, v, q_at, k_at, scores) -> (o, lse)
    backward(q, k, v, q_at, k_at, lse, delta, do, scores) -> (dq, dk, dv)        delta = sum(o * do) - dlse

Kept from one for the other are the inputs, o and lse: O(t). `lse` is over all keys that a query sees, also those
that another device holds, so that each part of the keys finds its gradients alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longwave.kernels.attention import chunked
from longwave.kernels.attention.reference import Coordinates, Scores


class Form(NamedTuple):
    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]


CHUNKED = Form(chunked.forward, chunked.backward)


@dataclasses.dataclass(frozen=True)
class Forms:
    """The form of each platform that a program may be compiled for, and the one of all others."""

    tpu: Form | None = None
    cuda: Form | None = None
    default: Form = CHUNKED

    def run(self, name: str, *args: Any, scores: Scores) -> Any:
        """The function `name` of the form of the platform that is compiled for, whatever runs here."""
        of = lambda form: lambda *args: getattr(form, name)(*args, scores)
        own = {platform: of(form) for platform in ("tpu", "cuda") if (form := getattr(self, platform)) is not None}
        return jax.lax.platform_dependent(*args, default=of(self.default), **own) if own else of(self.default)(*args)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention(
    forms: Forms,
    scores: Scores,
    q: Float[Array, "b tq h d"],
    k: Float[Array, "b tk kv d"],
    v: Float[Array, "b tk kv dv"],
    q_at: Coordinates,
    k_at: Coordinates,
) -> tuple[Float[Array, "b tq h dv"], Float[Array, "b tq h"]]:
    """Output in v's dtype and float32 log-sum-exp."""
    return forms.run("forward", q, k, v, q_at, k_at, scores=scores)


def _forward(forms, scores, q, k, v, q_at, k_at):
    o, lse = attention(forms, scores, q, k, v, q_at, k_at)
    return (o, lse), (q, k, v, o, lse, q_at, k_at)


def _backward(forms, scores, kept, grads):
    q, k, v, o, lse, q_at, k_at = kept
    do, dlse = grads
    dq, dk, dv = forms.run("backward", q, k, v, q_at, k_at, lse, delta(o, lse, do, dlse), do, scores=scores)
    return dq, dk, dv, None, None


attention.defvjp(_forward, _backward)


def delta(o: Array, lse: Array, do: Array, dlse: Array) -> Float[Array, "b tq h"]:
    """sum(o * do) - dlse, and 0 for a query that sees nothing, whatever gradient its lse of -inf was given."""
    sums = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), -1)
    return jnp.where(lse == -jnp.inf, 0.0, sums - dlse)
