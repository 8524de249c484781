"""The recurrence with a matrix for a state, one step straight from the equations, and the step's scan over time.

    D = exp(g_t) S_{t-1}        S_t = D + k_t (w_t v_t - D' (beta_t k_t))'        o_t = scale S_t' q_t

A reset puts 0 in the place of exp(g). An invalid token neither erases, writes nor reads: S passes by, and o is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

SPAN = 256  # tokens between the states that the forward pass saves for the gradient


class Inputs(NamedTuple):
    """The tokens of a call; of one token: without t.

    q: (b, t, hq, K); k: (b, t, hk, K); v: (b, t, h, V); g: (b, t, h), (b, t, h, K) or None: no decay; w: (b, t, h)
    or None: 1; reset, valid: (b, t) or None; beta: as g, or None: nothing is erased. hq and hk divide h: head i reads
    q head i // (h / hq), and k alike.
    """

    q: Float[Array, "b *t hq K"]
    k: Float[Array, "b *t hk K"]
    v: Float[Array, "b *t h V"]
    g: Float[Array, "b *t h"] | Float[Array, "b *t h K"] | None
    w: Float[Array, "b *t h"] | None
    reset: Bool[Array, "b *t"] | None
    valid: Bool[Array, "b *t"] | None
    beta: Float[Array, "b *t h"] | Float[Array, "b *t h K"] | None = None


def unpadded(inputs: Inputs) -> Inputs:
    """The same without `valid`: a padding token keeps the state (g = beta = 0), writes k = v = 0 and reads q = 0.

    Whatever stood there, NaN too, is gone from values and gradients.
    """
    if inputs.valid is None:
        return inputs
    valid = inputs.valid
    keep = lambda x: jnp.where(over(valid, x), x, 0)
    q, k, v = keep(inputs.q), keep(inputs.k), keep(inputs.v)
    g, w, beta = (None if x is None else keep(x) for x in (inputs.g, inputs.w, inputs.beta))
    return Inputs(q, k, v, g, w, None if inputs.reset is None else inputs.reset & valid, None, beta)


def step(state: Float[Array, "b h K V"], token: Inputs, *, scale: float) -> tuple[Array, Array]:
    """(the state after a token, o (b, h, V)), float32."""
    token = unpadded(token)
    h = token.v.shape[1]
    q, k, v = (jnp.repeat(x, h // x.shape[1], axis=1).astype(jnp.float32) for x in token[:3])
    if token.reset is not None:
        state = jnp.where(over(token.reset, state), 0, state)
    if token.g is not None:
        decay = jnp.exp(token.g.astype(jnp.float32))
        state = state * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])
    if token.w is not None:
        v = v * token.w.astype(jnp.float32)[..., None]
    if token.beta is not None:
        beta = token.beta.astype(jnp.float32)
        erased = k * (beta if beta.ndim == 3 else beta[..., None])
        v = v - jnp.sum(erased[..., None] * state, axis=-2)
    state = state + k[..., :, None] * v[..., None, :]
    return state, scale * jnp.sum(q[..., None] * state, axis=-2)


def attend(inputs: Inputs, state: Float[Array, "b h K V"], *, scale: float) -> tuple[Array, Array]:
    """(o (b, t, h, V) in the dtype of v, final state): `step` token by token."""

    def body(state: Array, token: Inputs) -> tuple[Array, Array]:
        state, o = step(state, token, scale=scale)
        return state, o.astype(token.v.dtype)

    over_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs)
    state, o = jax.lax.scan(body, state.astype(jnp.float32), over_time)
    return jnp.moveaxis(o, 0, 1), state


def over(mask: Array, x: Array) -> Array:
    """The mask over the leading dimensions of x."""
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
