"""Rotary position embedding (RoFormer, arXiv:2104.09864, equation 34), half-split as in GPT-NeoX and LLaMA.

Component i < d/2 turns with component i + d/2 by the angle position * base^(-2i/d). RoFormer pairs neighbours
(2i, 2i + 1) instead: the same map after a fixed permutation of components, so of the projections' columns.
A score <rope(q, m), rope(k, n)> depends on m - n alone.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope(
    x: Float[Array, "b t h d"], positions: Int[Array, "*b t"], *, base: float = 10_000.0
) -> Float[Array, "b t h d"]:
    """Turns each head of x by its token's position, (t,) or (b, t). d must be even; angles are float32."""
    d = x.shape[-1]
    if d % 2:
        raise ValueError(f"rope needs an even head dimension, got {d}")
    frequency = base ** (-jnp.arange(0, d, 2, dtype=jnp.float32) / d)
    angle = positions[..., None].astype(jnp.float32) * frequency[(None,) * positions.ndim]
    angle = angle.reshape(-1, positions.shape[-1], 1, d // 2)  # (b or 1, t, 1, d/2)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)
