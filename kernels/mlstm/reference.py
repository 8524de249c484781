"""The recurrence with a running maximum, one step straight from the equations, and the step's scan over time.

    lf = log sigmoid(f_t)              m_t = max(lf + m_{t-1}, i_t)
    C_t = exp(lf + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t v_t'
    n_t = exp(lf + m_{t-1} - m_t) n_{t-1} + exp(i_t - m_t) k_t
    o_t = scale C_t' q_t / (max(|scale n_t' q_t|, exp(-m_t)) + eps)

What these stand for, exp(m) C and exp(m) n, may have any size; C and n themselves stay near 1. Before the first token
of a document there is nothing: C = n = 0 and m = -inf, here EMPTY, which no sum turns into NaN. m is a unit of
measure, and o and later states do not depend on it but through eps: gradients take it as a constant. An invalid token
neither writes nor reads: the state passes by, and o is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

EMPTY = -1e30  # the maximum of nothing
LOWEST = -65536.0  # of log sigmoid(f): the sum of 256 of them is still exact


class State(NamedTuple):
    """float32. m is also what C and n are measured in: exp(m) C and exp(m) n are the memory and its normaliser."""

    C: Float[Array, "b h K V"]
    n: Float[Array, "b h K"]
    m: Float[Array, "b h"]


class Inputs(NamedTuple):
    """The tokens of a call; of one token: without t. f: None: nothing is forgotten."""

    q: Float[Array, "b *t h K"]
    k: Float[Array, "b *t h K"]
    v: Float[Array, "b *t h V"]
    i: Float[Array, "b *t h"]
    f: Float[Array, "b *t h"] | None
    reset: Bool[Array, "b *t"] | None
    valid: Bool[Array, "b *t"] | None


class Read(NamedTuple):
    """How o is read. eps: added to the denominator. plain: divide by n' q itself, 0 where that is 0."""

    scale: float
    eps: float
    plain: bool

    def __call__(self, numerator: Array, denominator: Array, m: Array) -> Array:
        """(..., V) of (..., V), (...) and (...)."""
        d = self.scale * denominator
        d = jnp.where(d == 0, 1, d) if self.plain else jnp.maximum(jnp.abs(d), jnp.exp(-m)) + self.eps
        return self.scale * numerator / d[..., None]


def empty(b: int, h: int, K: int, V: int) -> State:
    """The state before the first token."""
    return State(jnp.zeros((b, h, K, V)), jnp.zeros((b, h, K)), jnp.full((b, h), EMPTY, jnp.float32))


def unpadded(inputs: Inputs) -> Inputs:
    """The same without `valid`: padding writes with i = -inf, is not forgotten at (f = inf) and reads with q = 0.

    Whatever stood there, NaN too, is gone from values and gradients.
    """
    if inputs.valid is None:
        return inputs
    valid = inputs.valid
    keep = lambda x, other=0.0: jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - valid.ndim)), x, other)
    q, k, v = keep(inputs.q), keep(inputs.k), keep(inputs.v)
    i = keep(inputs.i, -jnp.inf)
    f = None if inputs.f is None else keep(inputs.f, jnp.inf)
    return Inputs(q, k, v, i, f, None if inputs.reset is None else inputs.reset & valid, None)


def log_forget(f: Float[Array, "*x"]) -> Float[Array, "*x"]:
    """log sigmoid(f), float32, no less than LOWEST."""
    return jnp.maximum(jax.nn.log_sigmoid(f.astype(jnp.float32)), LOWEST)


def step(state: State, token: Inputs, read: Read) -> tuple[State, Array]:
    """(the state after a token, o (b, h, V)), float32."""
    token = unpadded(token)
    q, k, v, i = (x.astype(jnp.float32) for x in token[:4])
    C, n, m = state
    before = m if token.f is None else log_forget(token.f) + m
    if token.reset is not None:
        before = jnp.where(token.reset[:, None], -jnp.inf, before)
    m = jax.lax.stop_gradient(jnp.maximum(jnp.maximum(before, i), EMPTY))
    keep, write = jnp.exp(before - m), jnp.exp(i - m)
    n = keep[..., None] * n + write[..., None] * k
    C = keep[..., None, None] * C + (write[..., None] * k)[..., None] * v[..., None, :]
    return State(C, n, m), read(jnp.sum(q[..., None] * C, axis=-2), jnp.sum(q * n, axis=-1), m)


def attend(inputs: Inputs, state: State, read: Read) -> tuple[Array, State]:
    """(o (b, t, h, V) in the dtype of v, final state): `step` token by token."""

    def body(state: State, token: Inputs) -> tuple[State, Array]:
        state, o = step(state, token, read)
        return state, o.astype(token.v.dtype)

    over_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs)
    state, o = jax.lax.scan(body, state, over_time)
    return jnp.moveaxis(o, 0, 1), state
