"""Time split over devices: what each device's tokens are handed.

All tokens of a device together are an affine map of the state, S -> fade S + local. Devices tell each other these maps,
(b, h, K, V) numbers whatever the length, and each composes those before its own; the gradient goes the other way.

With an erase gate it is S -> M S + local, M a matrix (K, K): both come from one run of the device's tokens on the state
[0 I] of V + K columns, with the values [v 0]. The gradient's map, M', is found in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from longwave.kernels.attention.reference import einsum32
from longwave.kernels.linear_attention.reference import SPAN, Inputs, unpadded
from longwave.kernels.partition import Names, parts

Form = Callable[..., tuple]  # what runs the recurrence on one device, forward or backward


def handed(inputs: Inputs, state: Float[Array, "b h K V"], seq: Names, forward: Form) -> tuple[Array, Array]:
    """(the state before this device's tokens, the one after those of all)."""
    if inputs.beta is not None:
        _, final, _ = forward(_widened(inputs), _identity(state))
        return _compose(*_affine(final, state), state, seq, reverse=False)
    x = unpadded(inputs)
    u = x.v.astype(jnp.float32) * (1 if x.w is None else x.w.astype(jnp.float32)[..., None])
    run = _run(x)
    until = None
    if x.g is not None:
        behind = _sums(x.g, reverse=True)
        until = jnp.pad(behind[:, 1:], [(0, 0), (0, 1)] + [(0, 0)] * (behind.ndim - 2))
    local = _outer(x.k, u, until, None if run is None else run == run[:, -1:])
    return _compose(_fade(x, run), local, state, seq, reverse=False)


def handed_back(
    inputs: Inputs,
    do: Float[Array, "b t h V"],
    dfinal: Float[Array, "b h K V"],
    seq: Names,
    backward: Form,
    *,
    scale: float,
) -> tuple[Array, Array]:
    """(the gradient of the state after this device's tokens, that of the state before those of all)."""
    if inputs.beta is not None:
        identity = _identity(dfinal)
        saved = jnp.zeros((identity.shape[0], -(-do.shape[1] // SPAN), *identity.shape[1:]))  # it depends on none
        _, dstate = backward(_widened(inputs), saved, _beside(do, inputs.k.shape[-1]), identity)
        return _compose(*_affine(dstate, dfinal), dfinal, seq, reverse=True)
    x = unpadded(inputs)
    run = _run(x)
    since = None if x.g is None else _sums(x.g, reverse=False)
    local = _outer(x.q, scale * do.astype(jnp.float32), since, None if run is None else run == 0)
    return _compose(_fade(x, run), local, dfinal, seq, reverse=True)


def _widened(inputs: Inputs) -> Inputs:
    return inputs._replace(v=_beside(inputs.v, inputs.k.shape[-1]))


def _beside(v: Float[Array, "b t h V"], K: int) -> Float[Array, "b t h V+K"]:
    """[v 0]."""
    return jnp.pad(v, [(0, 0)] * 3 + [(0, K)])


def _identity(state: Float[Array, "b h K V"]) -> Float[Array, "b h K V+K"]:
    """[0 I]."""
    eye = jnp.broadcast_to(jnp.eye(state.shape[-2]), (*state.shape[:-1], state.shape[-2]))
    return jnp.concatenate((jnp.zeros_like(state), eye), -1)


def _affine(after: Float[Array, "b h K V+K"], state: Float[Array, "b h K V"]) -> tuple[Array, Array]:
    """(M, local)."""
    V = state.shape[-1]
    return after[..., V:], after[..., :V]


def _run(x: Inputs) -> Array | None:
    return None if x.reset is None else jnp.cumsum(x.reset.astype(jnp.int32), axis=1)


def _sums(g: Array, *, reverse: bool) -> Array:
    return jax.lax.cumsum(g.astype(jnp.float32), axis=1, reverse=reverse)


def _fade(x: Inputs, run: Array | None) -> Float[Array, "b h K V"]:
    """The factor of the state that passes all tokens by, (b, h, K or 1, 1)."""
    if x.g is None:
        fade = jnp.ones((x.v.shape[0], x.v.shape[2], 1, 1))
    else:
        fade = jnp.exp(jnp.sum(x.g.astype(jnp.float32), axis=1))
        fade = fade[..., None] if fade.ndim == 3 else fade[..., None, None]
    return fade if run is None else jnp.where((run[:, -1] == 0)[:, None, None, None], fade, 0)


def _outer(
    k: Float[Array, "b t hk K"], u: Float[Array, "b t h V"], g: Array | None, counts: Bool[Array, "b t"] | None
) -> Float[Array, "b h K V"]:
    """sum_t exp(g) k u' over the tokens that count; decays that are no vectors go with u, so that k is not repeated."""
    h = u.shape[2]
    if counts is not None:
        u = jnp.where(counts[..., None, None], u, 0)
    if g is not None and g.ndim == 3:
        u = u * jnp.exp(g)[..., None]
    elif g is not None:
        k = jnp.repeat(k, h // k.shape[2], axis=2).astype(jnp.float32) * jnp.exp(g)
    u = u.reshape(*u.shape[:2], k.shape[2], -1, u.shape[-1])
    S = einsum32("btgk,btgrv->bgrkv", k, u)
    return S.reshape(S.shape[0], h, *S.shape[-2:])


def _compose(passing: Array, local: Array, state: Array, seq: Names, *, reverse: bool) -> tuple[Array, Array]:
    """passing: factors (b, h, K or 1, 1), or a matrix (b, h, K, K)."""
    n, place = parts(seq), jax.lax.axis_index(seq)
    maps = jax.lax.all_gather((passing, local), seq)
    passed = jnp.multiply if passing.shape[-1] == 1 else partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    before = [state] * n
    for i in reversed(range(n)) if reverse else range(n):
        before[i] = state
        state = passed(maps[0][i], state) + maps[1][i]
    return jnp.stack(before)[place], state
