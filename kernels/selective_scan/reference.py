"""The recurrence, one step straight from the equations, and the step's scan over time.

    delta_t = softplus(dt_t + dt_bias)                      or dt_t + dt_bias itself; 0 for an invalid token
    h_t     = exp(delta_t A) h_{t-1} + delta_t B_t x_t      for every channel and each of its n states; A real
    y_t     = (C_t . h_t + D x_t) silu(z_t)

Gu and Dao, *Mamba: Linear-Time Sequence Modeling with Selective State Spaces* (2023), equations 2 and 4: zero-order
hold for A, Euler's rule for B, as every implementation has it. All is computed in float32. This is what decoding
runs, and what the other forms are held to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SPAN = 128  # tokens between the states that a forward pass saves for the backward pass


class Inputs(NamedTuple):
    """x, dt, z (b, t, d); A (d, n); B, C (b, t, n); D, dt_bias (d,); reset, valid (b, t). Of one token: without t.

    The last five may be None.
    """

    x: Any
    dt: Any
    A: Any
    B: Any
    C: Any
    D: Any = None
    z: Any = None
    dt_bias: Any = None
    reset: Any = None
    valid: Any = None


OVER_TIME = ("x", "dt", "B", "C", "z", "reset", "valid")


def step(h: Float[Array, "b n d"], token: Inputs, *, softplus: bool) -> tuple[Array, Float[Array, "b d"]]:
    """(the state after the token, its output in the dtype of x).

    A reset cuts off the state before the token. An invalid token hands on what it was handed, and puts out zero.
    """
    x, B, C = (v.astype(jnp.float32) for v in (token.x, token.B, token.C))
    delta = step_size(token.dt, token.dt_bias, softplus)
    before = h if token.reset is None else jnp.where(token.reset[:, None, None], 0, h)
    A = token.A.astype(jnp.float32).T
    after = jnp.exp(delta[:, None] * A[None]) * before + B[:, :, None] * (delta * x)[:, None]
    y = jnp.sum(C[:, :, None] * after, axis=1)
    if token.D is not None:
        y = y + token.D.astype(jnp.float32)[None] * x
    if token.z is not None:
        y = y * jax.nn.silu(token.z.astype(jnp.float32))
    if token.valid is not None:
        after = jnp.where(token.valid[:, None, None], after, h)
        y = jnp.where(token.valid[:, None], y, 0)
    return after, y.astype(token.x.dtype)


def step_size(dt: Float[Array, "... d"], dt_bias: Float[Array, " d"] | None, softplus: bool) -> Float[Array, "... d"]:
    """delta, float32."""
    dt = biased(dt, dt_bias)
    return jax.nn.softplus(dt) if softplus else dt


def biased(dt: Float[Array, "... d"], dt_bias: Float[Array, " d"] | None) -> Float[Array, "... d"]:
    """dt + dt_bias, float32."""
    dt = dt.astype(jnp.float32)
    if dt_bias is None:
        return dt
    return dt + jnp.reshape(dt_bias.astype(jnp.float32), (1,) * (dt.ndim - 1) + dt_bias.shape)


def scan(inputs: Inputs, state: Float[Array, "b n d"], *, softplus: bool) -> tuple[Array, Float[Array, "b n d"]]:
    """(y (b, t, d) in the dtype of x, the state after the last valid token): `step` token by token."""
    first = lambda v: None if v is None else jnp.moveaxis(v, 1, 0)
    over_time = {name: first(getattr(inputs, name)) for name in OVER_TIME}
    body = lambda h, token: step(h, inputs._replace(**token), softplus=softplus)
    state, y = jax.lax.scan(body, state.astype(jnp.float32), over_time)
    return jnp.moveaxis(y, 0, 1), state
