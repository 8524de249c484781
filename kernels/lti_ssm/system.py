"""Linear time-invariant state-space systems and their discretisation.

    x'(t) = A x(t) + B u(t)        ->        x_t = Ā x_{t-1} + B̄ u_t,   y_t = 2 Re(C x_t) + D u_t

States come in conjugate pairs of which one half is stored, hence the 2 Re.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Complex, Float


class Diagonal(NamedTuple):
    """A discrete diagonal system per channel h, of n conjugate pairs.

    log_A:  log Ā: its powers are exp(l log Ā), so a long kernel never multiplies rounding errors up.
    B, C:   B̄ and C.
    D:      the skip connection.
    C_anti: a second read-out, for the system that runs from the end (two-sided, no state): its kernel acts on
            the tokens ahead, beginning with the next one.
    """

    log_A: Complex[Array, "h n"]
    B: Complex[Array, "h n"]
    C: Complex[Array, "h n"]
    D: Float[Array, "h"]
    C_anti: Complex[Array, "h n"] | None = None


def zoh(
    A: Complex[Array, "h n"], B: Complex[Array, "h n"], dt: Float[Array, "h"]
) -> tuple[Complex[Array, "h n"], Complex[Array, "h n"]]:
    """(log Ā, B̄) where u is held constant over a step: Ā = exp(dt A), B̄ = (exp(dt A) - 1) / A * B."""
    log_A = dt[:, None] * A
    return log_A, jnp.expm1(log_A) / A * B


def bilinear(
    A: Complex[Array, "h n"], B: Complex[Array, "h n"], dt: Float[Array, "h"]
) -> tuple[Complex[Array, "h n"], Complex[Array, "h n"]]:
    """(log Ā, B̄) of the trapezoidal rule: Ā = (1 + dt A/2) / (1 - dt A/2), B̄ = dt B / (1 - dt A/2).

    The logarithm is formed from dt A, not from Ā: near 1, rounding Ā would cost the decay rate its digits.
    """
    z = dt[:, None] * A / 2
    x, y = z.real, z.imag
    growth = 4 * x / ((1 - x) ** 2 + y**2)  # |Ā|^2 - 1, at least -1
    log_modulus = jnp.log1p(jnp.maximum(growth, -1 + 1e-6)) / 2
    angle = jnp.arctan2(y, 1 + x) + jnp.arctan2(y, 1 - x)
    return log_modulus + 1j * angle, dt[:, None] * B / (1 - z)
