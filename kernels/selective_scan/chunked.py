"""Chunk by chunk in time: the form for CPUs, and for whatever no kernel serves.

The forward pass runs the recurrence token by token and saves the state before every span of `SPAN` tokens; no other
state outlives its chunk of `CHUNK`. The backward pass goes through the chunks from the last to the first, replays
each from the state before it (which is replayed from the one that was saved), and runs the adjoint over its tokens.
With a_t = exp(delta_t A), and dy the gradient of C . h + D x:

    g_t      = C_t dy_t + a_{t+1} g_{t+1}                    the gradient of h_t; a_t g_t is what a token hands on
    dB_t     = sum_d g_t delta_t x_t                         dC_t = sum_d h_t dy_t
    dx_t     = delta_t sum_n g_t B_t + D dy_t                dD   = sum_t dy_t x_t
    ddelta_t = sum_n a_t g_t h_{t-1} A + x_t sum_n g_t B_t   dA   = sum_t a_t g_t h_{t-1} delta_t

A state is (n, b, d) here: sums over n add whole vectors, and numbers of a token and a state are spread over channels
alone. Chunks of 32 tokens are as fast as spans of 128 and need a third of the memory. What is no recurrence is done for
a chunk at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from longwave.kernels.selective_scan.reference import OVER_TIME, SPAN, Inputs, biased, step_size

CHUNK = 32  # divides SPAN

Index = Int[Array, ""]
State = Float[Array, "n b d"]


class Tokens(NamedTuple):
    """A chunk as the recurrence sees it, time first, float32. On padding all is zero: the state passes by."""

    x: Float[Array, "c b d"]
    delta: Float[Array, "c b d"]
    B: Float[Array, "c n b 1"]
    C: Float[Array, "c n b 1"]
    reset: Bool[Array, "c b 1"] | None


def forward(
    inputs: Inputs, state: Float[Array, "b n d"], *, softplus: bool
) -> tuple[Float[Array, "b t d"], Float[Array, "b n d"], Float[Array, "b spans n d"]]:
    """(y in the dtype of x, the state after the last valid token, the state before every span)."""
    t = inputs.x.shape[1]
    inputs, chunks, spans = _whole_chunks(inputs)
    A = _A(inputs)

    def chunk(j: Index, carry: tuple[State, Array]) -> tuple[State, Array]:
        h, y = carry
        here = _at(inputs, j, chunks)
        tokens = _tokens(here, softplus)
        h, out = jax.lax.scan(lambda h, v: ((h := _step(h, v, A)), _over_states(v.C * h)), h, tokens)
        out = _swap(_skip(out, tokens.x, here.D))
        if here.z is not None:
            out = out * jax.nn.silu(here.z.astype(jnp.float32))
        return h, _write(y, out, j, here.valid)

    def span(i: Index, carry: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
        h, y, saved = carry
        saved = jax.lax.dynamic_update_slice_in_dim(saved, _swap(h)[:, None], i, axis=1)
        return *jax.lax.fori_loop(*_chunks_of(i, chunks), chunk, (h, y)), saved

    b, n, d = state.shape
    start = _swap(state.astype(jnp.float32)), jnp.zeros_like(inputs.x), jnp.zeros((b, spans, n, d), jnp.float32)
    h, y, saved = jax.lax.fori_loop(0, spans, span, start)
    return y[:, :t], _swap(h), saved


def backward(
    inputs: Inputs,
    saved: Float[Array, "b spans n d"],
    dy: Float[Array, "b t d"],
    dfinal: Float[Array, "b n d"],
    *,
    softplus: bool,
) -> tuple[Inputs, Float[Array, "b n d"]]:
    """(the gradients of the inputs in their dtypes, None for masks and what was None; that of the state)."""
    given, t = inputs, inputs.x.shape[1]
    inputs, chunks, spans = _whole_chunks(inputs)
    dy = _pad(dy, inputs.x.shape[1])
    A = _A(inputs)

    def span(i: Index, carry: tuple[State, State, Inputs]) -> tuple[State, State, Inputs]:
        first, end = _chunks_of(spans - 1 - i, chunks)
        h = _swap(jax.lax.dynamic_index_in_dim(saved, spans - 1 - i, axis=1, keepdims=False))

        def replay(j: Index, carry: tuple[State, Array]) -> tuple[State, Array]:
            h, before = carry
            h, _ = jax.lax.scan(lambda h, v: (_step(h, v, A), None), h, _tokens(_at(inputs, j, chunks), softplus))
            return h, jax.lax.dynamic_update_index_in_dim(before, h, j + 1 - first, axis=0)

        before = jnp.zeros((SPAN // CHUNK, *h.shape), jnp.float32).at[0].set(h)
        _, before = jax.lax.fori_loop(first, end - 1, replay, (h, before))

        def chunk(k: Index, carry: tuple[State, State, Inputs]) -> tuple[State, State, Inputs]:
            j = end - 1 - k
            h = jax.lax.dynamic_index_in_dim(before, j - first, axis=0, keepdims=False)
            here, cotangent = _at(inputs, j, chunks), _cut(dy, j, chunks)
            g, dA, gradients = carry
            g, dA, new = _chunk_backward(here, h, cotangent, g, dA, A, softplus)
            return g, dA, _put(gradients, new, j, here.valid)

        return jax.lax.fori_loop(0, end - first, chunk, carry)

    empty = jax.tree.map(jnp.zeros_like, inputs._replace(A=None, reset=None, valid=None))
    empty = empty._replace(**{k: v.astype(jnp.float32) for k in SUMMED if (v := getattr(empty, k)) is not None})
    g = _swap(dfinal.astype(jnp.float32))
    g, dA, gradients = jax.lax.fori_loop(0, spans, span, (g, jnp.zeros_like(g), empty))
    gradients = gradients._replace(A=jnp.sum(dA, axis=1).T)
    gradients = gradients._replace(**{k: v[:, :t] for k in OVER_TIME if (v := getattr(gradients, k)) is not None})
    like = given._replace(reset=None, valid=None)
    return jax.tree.map(lambda v, like: v.astype(like.dtype), gradients, like), _swap(g)


SUMMED = ("D", "dt_bias")  # over time and rows, as A


def _step(h: State, token: Tokens, A: Float[Array, "n 1 d"]) -> State:
    return jnp.exp(token.delta[None] * A) * _handed(h, token) + token.B * (token.delta * token.x)[None]


def _handed(h: State, token: Tokens) -> State:
    return h if token.reset is None else jnp.where(token.reset[None], 0, h)


def _chunk_backward(
    here: Inputs, h: State, cotangent: Float[Array, "b c d"], g: State, dA: State, A: Array, softplus: bool
) -> tuple[State, State, Inputs]:
    """(the gradient of the state before the chunk, dA so far, the gradients of a chunk: those over time and sums)."""
    tokens = _tokens(here, softplus)
    cotangent = _where(here.valid, cotangent.astype(jnp.float32))
    slope = dz = None
    if here.z is not None:
        z = _where(here.valid, here.z.astype(jnp.float32))
        gate = jax.nn.sigmoid(z)
        slope = cotangent * gate * (1 + z * (1 - gate))
        cotangent = cotangent * z * gate
    dy = _swap(cotangent)

    def replay(h: State, token: tuple[Tokens, Array]) -> tuple[State, tuple]:
        v, dy = token
        after = _step(h, v, A)
        y = None if slope is None else _over_states(v.C * after)
        return after, (_handed(h, v), _over_channels(after * dy[None]), y)

    def adjoint(carry: tuple[State, State], token: tuple[Tokens, State, Array]) -> tuple[tuple, tuple]:
        (g, dA), (v, before, dy) = carry, token
        g = g + v.C * dy[None]
        handed = jnp.exp(v.delta[None] * A) * g
        decayed = handed * before
        out = _over_states(g * v.B), _over_states(decayed * A), _over_channels(g * (v.delta * v.x)[None])
        return (_handed(handed, v), dA + decayed * v.delta[None]), out

    _, (before, dC, y) = jax.lax.scan(replay, h, (tokens, dy))
    (g, dA), (gB, through_A, dB) = jax.lax.scan(adjoint, (g, dA), (tokens, before, dy), reverse=True)
    if slope is not None:
        dz = slope * _swap(_skip(y, tokens.x, here.D))
    ddt = _where(here.valid, _swap(through_A + gB * tokens.x))
    if softplus:
        ddt = ddt * _where(here.valid, jax.nn.sigmoid(biased(here.dt, here.dt_bias)))
    dD = None if here.D is None else jnp.sum(dy * tokens.x, (0, 1))
    dt_bias = None if here.dt_bias is None else jnp.sum(ddt, (0, 1))
    dx = _swap(_skip(gB * tokens.delta, dy, here.D))
    rows_first = lambda v: jnp.transpose(v, (2, 0, 1))
    return g, dA, Inputs(dx, ddt, None, rows_first(dB), rows_first(dC), dD, dz, dt_bias)


def _over_states(v: State) -> Float[Array, "b d"]:
    return jnp.sum(v, axis=0)


def _over_channels(v: State) -> Float[Array, "n b"]:
    """As a matrix-vector product: XLA does not vectorise a CPU's sums along the last axis."""
    return jnp.dot(v, jnp.ones(v.shape[-1], v.dtype), precision=jax.lax.Precision.HIGHEST)


def _skip(y: Float[Array, "c b d"], x: Float[Array, "c b d"], D: Float[Array, " d"] | None) -> Float[Array, "c b d"]:
    return y if D is None else y + D.astype(jnp.float32)[None, None] * x


# From tokens to chunks, and back


def _tokens(here: Inputs, softplus: bool) -> Tokens:
    delta = step_size(here.dt, here.dt_bias, softplus)
    x, delta, B, C = (_where(here.valid, v.astype(jnp.float32)) for v in (here.x, delta, here.B, here.C))
    reset = here.reset
    if reset is not None:
        reset = _swap(reset if here.valid is None else reset & here.valid)[..., None]
    states = lambda v: jnp.transpose(v, (1, 2, 0))[..., None]
    return Tokens(_swap(x), _swap(delta), states(B), states(C), reset)


def _whole_chunks(inputs: Inputs) -> tuple[Inputs, int, int]:
    """(inputs with invalid tokens behind the last up to whole chunks, the number of chunks, that of spans)."""
    b, t = inputs.x.shape[:2]
    length = min(CHUNK, t)
    chunks = -(-t // length)
    if chunks * length > t:
        valid = jnp.ones((b, t), bool) if inputs.valid is None else inputs.valid
        whole = {name: v for name in OVER_TIME if (v := getattr(inputs, name)) is not None} | {"valid": valid}
        inputs = inputs._replace(**{name: _pad(v, chunks * length) for name, v in whole.items()})
    return inputs, chunks, -(-t // SPAN)


def _pad(v: Array, t: int) -> Array:
    return jnp.pad(v, ((0, 0), (0, t - v.shape[1])) + ((0, 0),) * (v.ndim - 2))


def _chunks_of(span: Index, chunks: int) -> tuple[Index, Index]:
    first = span * (SPAN // CHUNK)
    return first, jnp.minimum(first + SPAN // CHUNK, chunks)


def _at(inputs: Inputs, j: Index, chunks: int) -> Inputs:
    cut = {name: _cut(v, j, chunks) for name in OVER_TIME if (v := getattr(inputs, name)) is not None}
    return inputs._replace(**cut)


def _cut(v: Array, j: Index, chunks: int) -> Array:
    length = v.shape[1] // chunks
    return jax.lax.dynamic_slice_in_dim(v, j * length, length, axis=1)


def _put(gradients: Inputs, new: Inputs, j: Index, valid: Bool[Array, "b c"] | None) -> Inputs:
    """`new` in the place of its chunk, or added to a sum."""
    put = {k: _write(getattr(gradients, k), v, j, valid) for k in OVER_TIME if (v := getattr(new, k)) is not None}
    add = {k: getattr(gradients, k) + v for k in SUMMED if (v := getattr(new, k)) is not None}
    return gradients._replace(**put, **add)


def _write(whole: Array, part: Array, j: Index, valid: Bool[Array, "b c"] | None) -> Array:
    part = _where(valid, part).astype(whole.dtype)
    return jax.lax.dynamic_update_slice_in_dim(whole, part, j * part.shape[1], axis=1)


def _where(valid: Bool[Array, "b c"] | None, v: Float[Array, "b c k"]) -> Float[Array, "b c k"]:
    """Zero on padding, whatever stands there."""
    return v if valid is None else jnp.where(valid[..., None], v, 0)


def _swap(v: Array) -> Array:
    return jnp.swapaxes(v, 0, 1)


def _A(inputs: Inputs) -> Float[Array, "n 1 d"]:
    return inputs.A.astype(jnp.float32).T[:, None]
