"""The exact chunked form with state: linear in length, a `lax.scan` over chunks.

With c tokens in a chunk and x the state before it,

    y_i = sum_{j<=i} K_{i-j} u_j + C Ā^(i+1) x          x' = Ā^c x + sum_j Ā^(c-1-j) B̄ u_j

Documents and padding act by selection alone: what is cut never enters a sum, and no decay is ever inverted.
The valid tokens of a chunk are contiguous: what they read and write is rolled into place in the same tables.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from longwave.kernels.lti_ssm.kernel_generation import powers
from longwave.kernels.lti_ssm.system import Diagonal

CHUNK = 64
MASKED_CHUNK = 16  # with resets each row has a Toeplitz matrix of its own: c multiplications a token, not a matmul

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Tables(NamedTuple):
    """What a system does within a chunk of c tokens; s = 2n stacks real and imaginary parts.

    toeplitz: K_{i-j} at (i, j), D on the diagonal.
    read:     row i reads the state before the chunk into y_i.
    write:    row j writes u_j into the state after the chunk.
    power:    Ā^m for m = 0..c, real and imaginary part.
    """

    toeplitz: Float[Array, "h c c"]
    read: Float[Array, "h c s"]
    write: Float[Array, "h c s"]
    power: Float[Array, "c+1 h 2 n"]


def tables(system: Diagonal, c: int) -> Tables:
    re, im = powers(system.log_A, c + 1)
    re, im = re.transpose(0, 2, 1), im.transpose(0, 2, 1)  # (h, c + 1, n)
    B, C = system.B[:, None], 2 * system.C[:, None]

    def pairs(v: Array, re: Array, im: Array) -> tuple[Array, Array]:
        return v.real * re - v.imag * im, v.real * im + v.imag * re

    CA_re, CA_im = pairs(C, re, im)
    taps = jnp.sum(B.real * CA_re[:, :c] - B.imag * CA_im[:, :c], axis=-1).at[:, 0].add(system.D)
    lag = jnp.arange(c)[:, None] - jnp.arange(c)[None]
    return Tables(
        toeplitz=jnp.where(lag >= 0, taps[:, jnp.maximum(lag, 0)], 0),
        read=jnp.concatenate((CA_re[:, 1:], -CA_im[:, 1:]), axis=-1),
        write=jnp.concatenate(pairs(B, re[:, c - 1 :: -1], im[:, c - 1 :: -1]), axis=-1),
        power=jnp.stack((re, im), axis=2).transpose(1, 0, 2, 3),
    )


def chunked_scan(
    system: Diagonal,
    state: Float[Array, "b h 2 n"],
    u: Float[Array, "b t h"],
    reset: Bool[Array, "b t"] | None,
    valid: Bool[Array, "b t"] | None,
) -> tuple[Float[Array, "b h 2 n"], Float[Array, "b t h"]]:
    """The state after the last valid token, and y. Invalid tokens of u must be zero."""
    chunk = CHUNK if reset is None else MASKED_CHUNK
    table = tables(system, min(chunk, u.shape[1]))

    @jax.checkpoint  # the backward pass keeps only the states between chunks
    def body(state: Array, inputs: tuple) -> tuple[Array, Array]:
        u, reset, valid = inputs
        y = _emit(table, state, u, reset, valid)
        return _advance(table, state, u, reset, valid), y

    return _over_chunks(body, state, (u, reset, valid), chunk)


def final_state(
    system: Diagonal, u: Float[Array, "b t h"], valid: Bool[Array, "b t"] | None
) -> Float[Array, "b h 2 n"]:
    """The state after the last valid token, from the zero state. Invalid tokens of u must be zero."""
    table = tables(system, min(CHUNK, u.shape[1]))
    body = lambda state, inputs: (_advance(table, state, inputs[0], None, inputs[1]), None)
    empty = jnp.zeros((u.shape[0], u.shape[2], 2, system.log_A.shape[1]), jnp.float32)
    return _over_chunks(body, empty, (u, valid), CHUNK)[0]


def _over_chunks(body: Callable[..., tuple], state: Array, inputs: tuple, chunk: int) -> tuple:
    """Scan `body` over whole chunks of (b, t, ...) arrays, then the rest as one shorter chunk."""
    b, t = inputs[0].shape[:2]
    k, ys = t // chunk, []
    if k:
        split = lambda x: jnp.moveaxis(x[:, : k * chunk].reshape(b, k, chunk, *x.shape[2:]), 1, 0)
        state, y = jax.lax.scan(body, state, jax.tree.map(split, inputs))
        ys.append(jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(b, k * chunk, *y.shape[3:]), y))
    if t % chunk:
        state, y = body(state, jax.tree.map(lambda x: x[:, k * chunk :], inputs))
        ys.append(y)
    return state, jax.tree.map(lambda *y: jnp.concatenate(y, axis=1), *ys)


def _emit(table: Tables, state: Array, u: Array, reset: Array | None, valid: Array | None) -> Array:
    """y (b, m, h) of a chunk of m tokens, from its inputs and the state before it."""
    m = u.shape[1]
    toeplitz = table.toeplitz[:, :m, :m]
    stacked = state.reshape(*state.shape[:2], -1)
    carried = _einsum("bhs,his->bih", stacked, table.read[:, :m])
    if valid is not None:  # the first valid token reads row 0
        start = m - jnp.sum(jnp.cumsum(valid, axis=1) > 0, axis=1)
        carried = _roll(carried, start)
    if reset is None:
        y = _einsum("hij,bjh->bih", toeplitz, u) + carried
    else:
        document = jnp.cumsum(reset, axis=1)
        same = document[:, :, None] == document[:, None, :]
        # Selected and summed in one pass: the (b, h, i, j) products are never stored.
        kept = jnp.where(same[:, None], toeplitz[None] * u.transpose(0, 2, 1)[:, :, None], 0)
        y = jnp.sum(kept, axis=-1).transpose(0, 2, 1) + jnp.where(document[..., None] == 0, carried, 0)
    return y if valid is None else jnp.where(valid[..., None], y, 0)


def _advance(table: Tables, state: Array, u: Array, reset: Array | None, valid: Array | None) -> Array:
    """The state after a chunk of m tokens."""
    m = u.shape[1]
    if reset is not None:
        document = jnp.cumsum(reset, axis=1)
        u = jnp.where((document == document[:, -1:])[..., None], u, 0)
        state = jnp.where((document[:, -1] == 0)[:, None, None, None], state, 0)
    if valid is None:
        power = table.power[m][None]
    else:  # the last valid token writes through the last row
        trailing = m - jnp.sum(jnp.cumsum(valid[:, ::-1], axis=1) > 0, axis=1)
        u = _roll(u, trailing)
        power = table.power[jnp.sum(valid, axis=1)]
    re, im = power[:, :, 0], power[:, :, 1]
    x_re, x_im = state[:, :, 0], state[:, :, 1]
    decayed = jnp.stack((re * x_re - im * x_im, re * x_im + im * x_re), axis=2)
    return decayed + _einsum("bjh,hjs->bhs", u, table.write[:, -m:]).reshape(state.shape)


def _roll(x: Float[Array, "b m h"], shift: Array) -> Float[Array, "b m h"]:
    """Each row moved later by its own shift, around the end."""
    source = (jnp.arange(x.shape[1])[None] - shift[:, None]) % x.shape[1]
    return jnp.take_along_axis(x, source[..., None], axis=1)
