"""Mamba's selective scan: a diagonal recurrence with n states a channel, whose step sizes depend on the token.

One token is a step of the recurrence; TPUs run kernels where these serve, all else goes chunk by chunk. Whatever runs
saves the state before every span of tokens, and a gradient written by hand replays the rest: the states of all
tokens, (b, t, n, d), never exist.
"""

from __future__ import annotations

import logging
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from longwave.kernels.linear_scan.pair import through
from longwave.kernels.partition import Axes, left_to_xla, parts, sharded
from longwave.kernels.selective_scan import chunked, pallas_tpu, reference
from longwave.kernels.selective_scan.reference import Inputs, step_size

__all__ = ["selective_scan"]

State = Float[Array, "b n d"]


def selective_scan(
    x: Float[Array, "b t d"],
    dt: Float[Array, "b t d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b t n"],
    C: Float[Array, "b t n"],
    *,
    D: Float[Array, " d"] | None = None,
    z: Float[Array, "b t d"] | None = None,
    dt_bias: Float[Array, " d"] | None = None,
    softplus: bool = True,
    state: State | None = None,
    reset: Bool[Array, "b t"] | None = None,
    valid: Bool[Array, "b t"] | None = None,
    axes: Axes = Axes(),
) -> tuple[Float[Array, "b t d"], State]:
    """(y in the dtype of x, final state float32) of h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t, y_t = C_t . h_t.

    dt: delta = softplus(dt + dt_bias), or dt + dt_bias where `softplus` is false.
    A: real and negative: exp(delta A) is what a token leaves of the state.
    D, z: y_t = (C_t . h_t + D x_t) silu(z_t).
    state: h before the first token; None is zero.
    reset: true on the first token of a document: the state before it is cut off.
    valid: false on padding; the true entries of a row are contiguous. There y is 0, and the state passes by.
    axes: mesh axes that split batch, channels (`heads`) and time. Devices along those of time exchange (b, n, d)
        numbers each, and go through their tokens twice: once for the state that they hand on.
    """
    inputs = Inputs(x, dt, A, B, C, D, z, dt_bias, reset, valid)
    _check(inputs, state, axes)
    (b, t, d), n = x.shape, A.shape[1]
    axes = Axes(axes.batch, axes.heads, axes.seq if t > 1 else None).for_heads(d)
    state = jnp.zeros((b, n, d), jnp.float32) if state is None else state
    return _scan(softplus, axes, inputs, state.astype(jnp.float32))


def _check(inputs: Inputs, state: State | None, axes: Axes) -> None:
    x, A = inputs.x, inputs.A
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(f"x has shape {x.shape}: it must be (batch, time, channels), with at least one token")
    b, t, d = x.shape
    if A.ndim != 2 or A.shape[0] != d:
        raise ValueError(f"A has shape {A.shape}: with x of shape {x.shape} it must be ({d}, states)")
    n = A.shape[1]
    allowed = {"dt": (b, t, d), "B": (b, t, n), "C": (b, t, n), "D": (d,), "z": (b, t, d), "dt_bias": (d,)}
    allowed |= {"reset": (b, t), "valid": (b, t), "state": (b, n, d)}
    for name, value in (inputs._asdict() | {"state": state}).items():
        if value is not None and name in allowed and value.shape != allowed[name]:
            given = f"with x of shape {x.shape} and A of shape {A.shape}"
            raise ValueError(f"{name} has shape {value.shape}: {given} it must be {allowed[name]}")
    if t > 1 and t % parts(axes.seq):
        raise ValueError(f"x has {t} tokens, which {parts(axes.seq)} devices along {axes.seq!r} do not divide")


# The forms, on one device's shard


def _forward(inputs: Inputs, state: State, softplus: bool) -> tuple[Array, State, Array]:
    """(y, final state, saved)."""
    if inputs.x.shape[1] == 1:
        return *reference.scan(inputs, state, softplus=softplus), state[:, None]
    return _by_platform("forward", softplus, inputs, state)


def _backward(inputs: Inputs, saved: Array, dy: Array, dfinal: State, softplus: bool) -> tuple[Inputs, State]:
    """(gradients of the inputs, that of the state)."""
    return _by_platform("backward", softplus, inputs, saved, dy, dfinal)


def _by_platform(name: str, softplus: bool, inputs: Inputs, *args: Array) -> Any:
    """The function of this name of what suits the platform that is compiled for, whatever runs here."""
    of = lambda form: lambda *args: getattr(form, name)(*args, softplus=softplus)
    if reason := left_to_xla() or pallas_tpu.refusal(inputs):
        _log(f"on TPUs selective_scan runs chunk by chunk, not by its kernels: {reason}")
        return of(chunked)(inputs, *args)
    return jax.lax.platform_dependent(inputs, *args, tpu=of(pallas_tpu), default=of(chunked))


@cache
def _log(message: str) -> None:
    """Once."""
    logging.getLogger(__name__).info(message)


# Time split over devices: what a shard makes of the state that it is handed is a map, state -> P state + S


def _decay(inputs: Inputs, softplus: bool) -> State:
    """P of a shard's tokens: exp(A sum delta), and zero where a document starts among them."""
    delta = step_size(inputs.dt, inputs.dt_bias, softplus)
    reset = inputs.reset
    if inputs.valid is not None:
        delta = jnp.where(inputs.valid[..., None], delta, 0)
        reset = None if reset is None else reset & inputs.valid
    P = jnp.exp(jnp.sum(delta, axis=1)[:, None] * inputs.A.astype(jnp.float32).T[None])
    return P if reset is None else jnp.where(jnp.any(reset, axis=1)[:, None, None], 0, P)


def _handed(P: State, S: State, state: State, seq: Any, *, reverse: bool = False) -> tuple[State, State]:
    """(what this shard is handed, what all shards make of `state`), in the order of time or the other way."""
    every = range(parts(seq))
    maps = jax.lax.all_gather((P, S), seq)
    handed = []
    for i in reversed(every) if reverse else every:
        handed.append(state)
        state = through(maps[0][i], state) + maps[1][i]
    handed = handed[::-1] if reverse else handed
    return jnp.stack(handed)[jax.lax.axis_index(seq)], state


# The gradient. The rule stands around `shard_map`, not inside it.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(softplus: bool, axes: Axes, inputs: Inputs, state: State) -> tuple[Array, State]:
    return _scan_fwd(softplus, axes, inputs, state)[0]


def _scan_fwd(softplus: bool, axes: Axes, inputs: Inputs, state: State) -> tuple:
    """Keeps the inputs and the state before every span, also before a shard's first."""

    def run(inputs: Inputs, state: State) -> tuple[Array, State, Array]:
        if not axes.seq:
            return _forward(inputs, state, softplus)
        own = _forward(inputs, jnp.zeros_like(state), softplus)[1]
        state, final = _handed(_decay(inputs, softplus), own, state, axes.seq)
        y, _, saved = _forward(inputs, state, softplus)
        return y, final, saved

    y, final, saved = sharded(run, axes, (_dims(inputs), "b.h"), ("bth", "b.h", "bt.h"))(inputs, state)
    return (y, final), (inputs, saved)


def _scan_bwd(softplus: bool, axes: Axes, residuals: tuple[Inputs, Array], cotangents: tuple[Array, State]) -> tuple:
    inputs, saved = residuals

    def run(inputs: Inputs, saved: Array, dy: Array, dfinal: State) -> tuple[Inputs, State]:
        dstate = None
        if axes.seq:
            own = _backward(inputs, saved, dy, jnp.zeros_like(dfinal), softplus)[1]
            dfinal, dstate = _handed(_decay(inputs, softplus), own, dfinal, axes.seq, reverse=True)
        gradients, first = _backward(inputs, saved, dy, dfinal, softplus)
        return _summed(gradients, axes), first if dstate is None else dstate

    without_masks = _dims(inputs)._replace(reset=None, valid=None)
    dims = (_dims(inputs), "bt.h", "bth", "b.h")
    return sharded(run, axes, dims, (without_masks, "b.h"))(inputs, saved, *cotangents)


_scan.defvjp(_scan_fwd, _scan_bwd)


def _summed(gradients: Inputs, axes: Axes) -> Inputs:
    """What several devices share has the sum of their gradients: A, D and dt_bias all tokens, B and C all channels."""
    names = lambda *axes: tuple(n for axis in axes for n in ((axis,) if isinstance(axis, str) else axis or ()))
    add = lambda v, names: jax.lax.psum(v.astype(jnp.float32), names).astype(v.dtype) if names else v
    over = {"A": names(axes.batch, axes.seq), "B": names(axes.heads)}
    over |= {"D": over["A"], "dt_bias": over["A"], "C": over["B"]}
    return gradients._replace(**{k: add(v, over[k]) for k in over if (v := getattr(gradients, k)) is not None})


def _dims(inputs: Inputs) -> Inputs:
    """Names of the dimensions of each."""
    dims = Inputs("bth", "bth", "h.", "bt.", "bt.", "h", "bth", "h", "bt", "bt")
    return Inputs(*(None if v is None else names for v, names in zip(inputs, dims, strict=True)))
