"""Linear work in matmuls: a scan over chunks of tokens, whose gradient keeps the state before each and makes it again.

With b the sums of log sigmoid(f) from a chunk's start, m and C what enters it and u = [v 1]:

    D_ij = b_i - b_j + i_j  for j <= i, else -inf           m_i = max(b_i + m, max_j D_ij)
    [num den]_i = exp(b_i + m - m_i) q_i [C n] + sum_j q_i k_j' exp(D_ij - m_i) u_j
    [C n] <- exp(b_c + m - m_c) [C n] + sum_j k_j' exp(D_cj - m_c) u_j         m <- m_c

m_i is the maximum that the recurrence has at token i, and what the chunk hands on is its last token's row. A token of
another document has D = -inf.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from longwave.kernels.attention.reference import einsum32
from longwave.kernels.mlstm.reference import EMPTY, Inputs, Read, State, log_forget, unpadded
from longwave.kernels.partition import Names, parts

CHUNK = 64  # work inside a chunk grows with its length, work on states with its inverse


def attend(inputs: Inputs, state: State, read: Read) -> tuple[Array, State]:
    """(o (b, t, h, V) in the dtype of v, final state)."""
    b, t, h, V = inputs.v.shape
    c = min(CHUNK, t)
    body = jax.checkpoint(lambda state, chunk: _chunk(state, chunk, read))
    state, o = lax.scan(body, state, _chunks(inputs, c))
    return jnp.moveaxis(o, 0, 1).reshape(b, -1, h, V)[:, :t], state


def handed(inputs: Inputs, state: State, seq: Names) -> tuple[State, State]:
    """(the state before this device's tokens, the one after those of all devices along seq).

    All tokens of a device together are a map of the state: it fades, and what they wrote by themselves is added.
    Devices tell each other these maps, K (V + 1) + 2 numbers a head whatever the length.
    """
    x = unpadded(inputs)
    b, _, h, _ = x.v.shape
    fade = jnp.zeros((b, h)) if x.f is None else jnp.sum(log_forget(x.f), axis=1)
    if x.reset is not None:
        fade = jnp.where(jnp.any(x.reset, axis=1)[:, None], -jnp.inf, fade)
    nothing = jax.tree.map(lambda x: jnp.full_like(x, 0), state)._replace(m=jnp.full_like(state.m, EMPTY))
    _, local = attend(inputs, nothing, Read(1.0, 0.0, plain=True))
    maps = lax.all_gather((fade, local), seq)
    before = []
    for device in range(parts(seq)):
        before.append(state)
        fade, local = jax.tree.map(lambda x, device=device: x[device], maps)
        m = lax.stop_gradient(jnp.maximum(fade + state.m, local.m))
        old, new = jnp.exp(fade + state.m - m), jnp.exp(local.m - m)
        over = lambda s, x: s.reshape(s.shape + (1,) * (x.ndim - s.ndim)) * x
        state = State(*(over(old, x) + over(new, y) for x, y in zip(state[:2], local[:2], strict=True)), m)
    return jax.tree.map(lambda *x: jnp.stack(x)[lax.axis_index(seq)], *before), state


def _chunks(inputs: Inputs, c: int) -> Inputs:
    """(b, t, ...) -> (n, b, c, ...); what is behind the last token is padding."""
    b, t = inputs.v.shape[:2]
    if t % c:
        valid = jnp.ones((b, t), bool) if inputs.valid is None else inputs.valid
        inputs = inputs._replace(valid=valid)
        pad = lambda x: jnp.pad(x, [(0, 0), (0, -t % c)] + [(0, 0)] * (x.ndim - 2))
        inputs = jax.tree.map(pad, inputs)
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(b, -1, c, *x.shape[2:]), 1, 0), inputs)


def _chunk(state: State, chunk: Inputs, read: Read) -> tuple[State, Array]:
    x = unpadded(chunk)
    heads_first = lambda x: jnp.moveaxis(x, 2, 1)
    q, k, v, i = (heads_first(x) for x in x[:4])
    c = i.shape[-1]
    see = jnp.asarray(np.tri(c, dtype=bool))[None, None]
    D, enter = i.astype(jnp.float32)[..., None, :], state.m[..., None]
    if x.f is not None:
        between, since = _sums(heads_first(log_forget(x.f)))
        D, enter = D + between, enter + since
    if x.reset is not None:
        document = jnp.cumsum(x.reset.astype(jnp.int32), axis=1)[:, None]
        see = see & (document[..., :, None] == document[..., None, :])
        enter = jnp.where(document == 0, enter, -jnp.inf)
    D = jnp.where(see, D, -jnp.inf)
    m = lax.stop_gradient(jnp.maximum(jnp.maximum(enter, jnp.max(D, axis=-1)), EMPTY))
    enter, D = jnp.exp(enter - m), jnp.exp(D - m[..., None])
    u = jnp.concatenate((v, jnp.ones_like(v[..., :1])), axis=-1)
    S = jnp.concatenate((state.C, state.n[..., None]), axis=-1)
    both = enter[..., None] * einsum32("bhik,bhkv->bhiv", q, S)
    both = both + einsum32("bhij,bhjv->bhiv", einsum32("bhik,bhjk->bhij", q, k) * D, u)
    S = enter[..., -1:, None] * S + einsum32("bhjk,bhjv->bhkv", k, D[..., -1, :, None] * u)
    o = read(both[..., :-1], both[..., -1], m)
    return State(S[..., :-1], S[..., -1], m[..., -1]), jnp.moveaxis(o, 1, 2).astype(v.dtype)


def _sums(g: Float[Array, "b h c"]) -> tuple[Float[Array, "b h c c"], Float[Array, "b h c"]]:
    """The sums of g over j < l <= i, and over l <= i.

    Whole numbers lose no digit in the differences of their sums, and what is left is small.
    """
    whole = jnp.round(g)
    b, rest = (jnp.cumsum(part, axis=-1) for part in (whole, g - whole))
    difference = lambda b: b[..., :, None] - b[..., None, :]
    return difference(b) + difference(rest), b + rest
