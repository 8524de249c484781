"""The recurrence straight from the equations: one step, and its scan over time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from longwave.kernels.lti_ssm.system import Diagonal


def step(
    system: Diagonal, state: Float[Array, "b h 2 n"], u: Float[Array, "b h"]
) -> tuple[Float[Array, "b h 2 n"], Float[Array, "b h"]]:
    """x_t = Ā x_{t-1} + B̄ u_t; y_t = 2 Re(C x_t) + D u_t. Returns x_t (real and imaginary part) and y_t."""
    log_A, B, C = system.log_A[None], system.B[None], system.C[None]
    x = jnp.exp(log_A) * (state[:, :, 0] + 1j * state[:, :, 1]) + B * u[..., None]
    y = 2 * jnp.sum(C * x, axis=-1).real + system.D[None] * u
    return jnp.stack((x.real, x.imag), axis=2), y


def masked_step(
    system: Diagonal,
    state: Float[Array, "b h 2 n"],
    u: Float[Array, "b h"],
    reset: Bool[Array, "b"] | None,
    valid: Bool[Array, "b"] | None,
) -> tuple[Float[Array, "b h 2 n"], Float[Array, "b h"]]:
    """`step` after forgetting the state where `reset`; where not `valid`, y is 0 and the state stays."""
    before = state if reset is None else jnp.where(reset[:, None, None, None], 0, state)
    after, y = step(system, before, u)
    if valid is None:
        return after, y
    return jnp.where(valid[:, None, None, None], after, state), jnp.where(valid[:, None], y, 0)


def scan(
    system: Diagonal,
    state: Float[Array, "b h 2 n"],
    u: Float[Array, "b t h"],
    reset: Bool[Array, "b t"] | None,
    valid: Bool[Array, "b t"] | None,
) -> tuple[Float[Array, "b h 2 n"], Float[Array, "b t h"]]:
    """`masked_step` token by token."""
    over_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (u, reset, valid))
    state, y = jax.lax.scan(lambda s, x: masked_step(system, s, *x), state, over_time)
    return state, jnp.moveaxis(y, 0, 1)
