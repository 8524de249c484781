"""What identifies the arrays of a state: shape, dtype and a sum over their bits, the same on any mesh."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from longwave.training import differences


class ArrayRecord(NamedTuple):
    """What is remembered of one array."""

    shape: list[int]
    dtype: str
    fingerprint: int


def describe(state: Any) -> dict[str, ArrayRecord]:
    """Path of every array -> its shape, dtype and fingerprint.

    One program for all of them, and nothing else under way: on several processes, many small programs with a
    collective each can start in different orders and wait for each other for ever.
    """
    leaves = differences.leaf_paths(jax.block_until_ready(state))
    sums = jax.device_get(_fingerprints(leaves))
    return {path: ArrayRecord(list(x.shape), str(x.dtype), int(sums[path])) for path, x in leaves.items()}


@jax.jit
def _fingerprints(leaves: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    return {path: _fingerprint(leaf) for path, leaf in leaves.items()}


def _fingerprint(x: Array) -> UInt32[Array, ""]:
    """A 32-bit sum of the bits of x, each element weighted by its position.

    Integer sums do not depend on order, so the result is the same on any mesh; the weights are odd, so that
    one changed element always changes the sum.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.iscomplexobj(x):
        return _fingerprint(x.real) + jnp.uint32(3) * _fingerprint(x.imag)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    # Numbers of 64 bits become two of 32 in a new last axis.
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)
