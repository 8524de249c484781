"""Dropout as a function of an explicit key."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, PRNGKeyArray


def dropout(
    x: Float[Array, "b t d"], rate: float, key: PRNGKeyArray | None, *, tied: bool = True
) -> Float[Array, "b t d"]:
    """Zeroes features with probability `rate` and rescales the rest; the identity when key is None (evaluation).

    tied: one mask for all time steps of a row, as S4 trains (Dropout1d / variational dropout).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout = {rate}: expected at least 0 and less than 1")
    if key is None or rate == 0.0:
        return x
    shape = (x.shape[0], 1, x.shape[2]) if tied else x.shape
    keep = jax.random.bernoulli(key, 1.0 - rate, shape)
    return x * (keep / (1.0 - rate)).astype(x.dtype)
