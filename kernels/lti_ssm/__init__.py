"""y of a linear time-invariant state-space system, with its state.

The FFT form runs when there is neither a state nor a reset, the recurrence on one token, the chunked form
otherwise. They agree.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from longwave.kernels.long_conv import long_conv
from longwave.kernels.lti_ssm.chunked import chunked_scan, final_state
from longwave.kernels.lti_ssm.kernel_generation import vandermonde
from longwave.kernels.lti_ssm.reference import masked_step
from longwave.kernels.lti_ssm.system import Diagonal, bilinear, zoh
from longwave.kernels.partition import Axes, sharded

__all__ = ["Diagonal", "bilinear", "lti_ssm", "vandermonde", "zoh"]


def lti_ssm(
    u: Float[Array, "b t h"],
    system: Diagonal,
    state: Float[Array, "b h 2 n"] | None = None,
    *,
    reset: Bool[Array, "b t"] | None = None,
    valid: Bool[Array, "b t"] | None = None,
    return_state: bool = True,
    axes: Axes = Axes(),
) -> tuple[Float[Array, "b t h"], Float[Array, "b h 2 n"] | None]:
    """(y, state after the last valid token): y in the dtype of u, the state float32; None is the zero state.

    reset: true on the first token of a document: what came before is forgotten.
    valid: false on padding; the true entries of a row are contiguous. There y is 0, and the token neither
        writes the state nor lets it decay.
    return_state: False returns None instead of the state; the compiler drops it as well where it is not used.
    axes: mesh axes that split batch and channels.
    A two-sided system (C_anti) has no state: raises ValueError on state, reset or return_state.
    """
    if system.C_anti is not None and (state is not None or reset is not None or return_state):
        raise ValueError("a two-sided system (C_anti) needs state=None, reset=None and return_state=False")
    anti = None if system.C_anti is None else "h."
    dims = Diagonal("h.", "h.", "h.", "h", anti)  # ty: ignore[invalid-argument-type]: names of dimensions, leaf by leaf
    optional = lambda x, d: None if x is None else d
    run = sharded(
        lambda *args: _lti_ssm(*args, return_state),
        axes.for_heads(u.shape[2]),
        ("b.h", dims, optional(state, "bh.."), optional(reset, "b."), optional(valid, "b.")),
        ("b.h", "bh.." if return_state else None),
    )
    return run(u, system, state, reset, valid)


def _lti_ssm(
    u: Array,
    system: Diagonal,
    state: Array | None,
    reset: Array | None,
    valid: Array | None,
    return_state: bool,
) -> tuple[Array, Array | None]:
    dtype, (b, t, h) = u.dtype, u.shape
    if valid is not None:
        u = jnp.where(valid[..., None], u, 0)
        reset = None if reset is None else reset & valid
    if state is None and reset is None and t > 1:
        y = _convolve(system, u)
        if valid is not None:
            y = jnp.where(valid[..., None], y, 0)
        return y, final_state(system, u.astype(jnp.float32), valid) if return_state else None

    u = u.astype(jnp.float32)
    if state is None:
        state = jnp.zeros((b, h, 2, system.log_A.shape[1]), jnp.float32)
    if t == 1:
        first = lambda x: None if x is None else x[:, 0]
        state, y = masked_step(system, state, u[:, 0], first(reset), first(valid))
        y = y[:, None]
    else:
        state, y = chunked_scan(system, state, u, reset, valid)
    return y.astype(dtype), state if return_state else None


def _convolve(system: Diagonal, u: Array) -> Array:
    """The whole sequence from the zero state; D is the kernel's tap at lag 0."""
    t = u.shape[1]
    k = vandermonde(system.C * system.B, system.log_A, t).at[:, 0].add(system.D)
    if system.C_anti is None:
        return long_conv(u, k)
    return long_conv(u, k, vandermonde(system.C_anti * system.B, system.log_A, t - 1))
