"""The diagonal linear recurrence h_t = a_t h_{t-1} + x_t, real or complex, in either direction.

One token is a step of the recurrence; CPUs run chunks side by side, TPUs a kernel that passes over memory once, other
backends compose by `associative_scan`. All are sweeps of one `step`, and so is the gradient, which keeps a and h alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from operator import itemgetter
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from longwave.kernels.linear_scan import associative, chunked, pallas_tpu, reference
from longwave.kernels.linear_scan.pair import Number, Pair, float32, pair, shape, through, where, zero_like
from longwave.kernels.linear_scan.reference import Sweep, Tokens
from longwave.kernels.partition import Axes, left_to_xla, parts, sharded

__all__ = ["Pair", "linear_scan", "pair"]

N = TypeVar("N", Float[Array, "..."], Pair)  # a, x, state and results are all real, or all of type Pair


def linear_scan(
    a: N,
    x: N,
    state: N | None = None,
    *,
    reverse: bool = False,
    reset: Bool[Array, "b t"] | None = None,
    valid: Bool[Array, "b t"] | None = None,
    axes: Axes = Axes(),
) -> tuple[N, N]:
    """(h (b, t, d) in the dtype of x, final state (b, d) float32) of h_t = a_t h_{t-1} + x_t.

    a: (d,), the same at all times, or (b, t, d).    x: (b, t, d). Parallel forms multiply a over stretches of time:
        products above 3e38 give NaN, even where x and state are zero.
    state: h before the first token, (b, d); None is zero.
    reverse: h_t = a_t h_{t+1} + x_t. `state` is then h behind the last token, and the final state what the
        first token hands to those before it.
    reset: true on the first token of a document: nothing passes between it and the token before.
    valid: false on padding; the true entries of a row are contiguous. There h is 0, and the state passes by.
    axes: mesh axes that split batch, channels and time. Devices along those of time exchange (b, d) numbers each.
    """
    _check(a, x, state)
    b, t, d = shape(x)
    if t > 1 and t % parts(axes.seq):
        raise ValueError(f"x has {t} tokens, which {parts(axes.seq)} devices along {axes.seq!r} do not divide")
    axes = Axes(axes.batch, axes.heads, axes.seq if t > 1 else None).for_heads(d)
    if state is None:
        state = jax.tree.map(lambda v: jnp.zeros((b, d)), x)
    widen = lambda mask: None if mask is None else mask[..., None]
    return _scan(reverse, axes, a, x, float32(state), widen(reset), widen(valid))


def _check(a: Number, x: Number, state: Number | None) -> None:
    if len({isinstance(v, Pair) for v in (a, x, state) if v is not None}) > 1:
        raise TypeError("a, x and state must be all real or all of type Pair")
    b, t, d = shape(x)
    if t < 1:
        raise ValueError(f"x has shape {shape(x)}: expected at least one token")
    if shape(a) not in ((d,), (b, t, d)):
        raise ValueError(f"a has shape {shape(a)}: with x of shape {(b, t, d)} it must be {(d,)} or {(b, t, d)}")
    if state is not None and shape(state) != (b, d):
        raise ValueError(f"state has shape {shape(state)}: with x of shape {(b, t, d)} it must be {(b, d)}")


# The forms


def _sweep(tokens: Tokens, state: Number, sweep: Sweep, axes: Axes) -> tuple[Number, Number, Number]:
    """(out, final state, the state that the local tokens are handed (1, b, d)) on one device's shard."""
    if shape(tokens.x)[1] == 1 and not axes.seq:
        out, final = reference.sweep_tokens(tokens, state, sweep)
        return out, final, jax.tree.map(lambda v: v[None], state)

    def kernel(tokens: Tokens, state: Number) -> tuple[Number, Number, Number]:
        handed, after = _handed(lambda: pallas_tpu.compose(tokens, sweep), state, sweep, axes)
        out, last = pallas_tpu.sweep_tokens(tokens, handed, sweep)
        return out, last if after is None else after, jax.tree.map(lambda v: v[None], handed)

    form = lambda form: lambda tokens, state: _parallel(form, tokens, state, sweep, axes)
    return _by_platform(form, kernel, tokens, state)


def _adjoint(tokens: Tokens, state: Number, h: Number, handed: Number, sweep: Sweep, axes: Axes) -> tuple:
    """(out, final state, the gradient of a) of an adjoint on one device's shard.

    h, handed: what the sweep the other way put out, and what it was handed (1, b, d).
    The gradient is float32; of a (d,) it is the sum over time (b, d).
    """

    def kernel(tokens: Tokens, state: Number, h: Number, handed: Number) -> tuple[Number, Number, Number]:
        to_adjoint, after = _handed(lambda: pallas_tpu.compose(tokens, sweep), state, sweep, axes)
        g, last, da = pallas_tpu.adjoint(tokens, to_adjoint, h, jax.tree.map(itemgetter(0), handed), sweep)
        return g, last if after is None else after, da

    def form(form: Callable) -> Callable:
        return lambda *args: _with_gradient(lambda *args: _parallel(form, *args, axes), *args, sweep)

    if shape(tokens.x)[1] == 1 and not axes.seq:
        return _with_gradient(lambda *args: _sweep(*args, axes), tokens, state, h, handed, sweep)
    return _by_platform(form, kernel, tokens, state, h, handed)


def _with_gradient(
    run: Callable, tokens: Tokens, state: Number, h: Number, handed: Number, sweep: Sweep
) -> tuple[Number, Number, Number]:
    g, final, _ = run(tokens, state, sweep)
    da = float32(g) * float32(_before(h, handed, tokens.reset, tokens.valid, not sweep.reverse)).conj()
    if len(shape(tokens.a)) == 1:
        return g, final, jax.tree.map(lambda v: jnp.sum(v, 1), da)
    return g, final, jax.tree.map(lambda v, like: v.astype(like.dtype), da, tokens.a)


def _by_platform(form: Callable, kernel: Callable, tokens: Tokens, *args: Number) -> Any:
    """`form` of what suits the platform that is compiled for; on TPUs `kernel`, where it serves such tokens."""
    own: dict[str, Callable] = {"cpu": form(chunked.sweep_tokens), "tpu": kernel}
    if reason := left_to_xla() or pallas_tpu.refusal(tokens):
        _log(f"on TPUs linear_scan runs by associative_scan, not by its kernel: {reason}")
        del own["tpu"]
    return jax.lax.platform_dependent(tokens, *args, default=form(associative.sweep_tokens), **own)


@cache
def _log(message: str) -> None:
    """Once."""
    logging.getLogger(__name__).info(message)


def _parallel(form: Callable, tokens: Tokens, state: Number, sweep: Sweep, axes: Axes) -> tuple:
    """A form that first says what map its tokens are altogether, and then asks what they are handed."""
    handed = after = None

    def incoming(P: Number, S: Number) -> Number:
        nonlocal handed, after
        handed, after = _handed(lambda: (P, S), state, sweep, axes)
        return handed

    out, last = form(tokens, incoming, sweep)
    return out, last if after is None else after, jax.tree.map(lambda v: v[None], handed)


def _handed(
    maps: Callable[[], tuple[Number, Number]], state: Number, sweep: Sweep, axes: Axes
) -> tuple[Number, Number | None]:
    """(what this device's tokens are handed, the state after those of all devices). Alone: (state, None)."""
    return _over_devices(*maps(), state, sweep, axes) if axes.seq else (state, None)


def _over_devices(P: Number, S: Number, state: Number, sweep: Sweep, axes: Axes) -> tuple[Number, Number]:
    """(the state that this device's tokens are handed, the state after all devices), from the maps of them all."""
    n, place = parts(axes.seq), jax.lax.axis_index(axes.seq)
    maps = jax.lax.all_gather((P, S), axes.seq)
    handed = []
    for i in reversed(range(n)) if sweep.reverse else range(n):
        handed.append(state)
        P, S = jax.tree.map(itemgetter(i), maps)
        state = through(P, state) + S
    place = n - 1 - place if sweep.reverse else place
    return jax.tree.map(lambda *v: jnp.stack(v)[place], *handed), state


# The gradient: the adjoint step, swept the other way. The rule stands around `shard_map`, not inside it.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(
    reverse: bool, axes: Axes, a: Number, x: Number, state: Number, reset: Array | None, valid: Array | None
) -> tuple[Number, Number]:
    return _scan_fwd(reverse, axes, a, x, state, reset, valid)[0]


def _scan_fwd(
    reverse: bool, axes: Axes, a: Number, x: Number, state: Number, reset: Array | None, valid: Array | None
) -> tuple:
    """Keeps a, h and, of every shard, the state that it was handed."""
    run = sharded(
        lambda a, x, state, *masks: _sweep(Tokens(a, x, *masks), state, Sweep(reverse), axes),
        axes,
        (_dims(a), _dims(x), _dims(state), _dims(reset), _dims(valid)),
        (_dims(x), _dims(state), _dims(state, "tbh")),
    )
    h, final, handed = run(a, x, state, reset, valid)
    return (h, final), (a, h, handed, reset, valid)


def _scan_bwd(reverse: bool, axes: Axes, residuals: tuple, cotangents: tuple[Number, Number]) -> tuple:
    a, h, handed, reset, valid = residuals
    dh, dfinal = cotangents

    def run(a: Number, h: Number, handed: Number, dh: Number, dfinal: Number, *masks: Array | None) -> tuple:
        g, dstate, da = _adjoint(Tokens(a, dh, *masks), dfinal, h, handed, Sweep(not reverse, adjoint=True), axes)
        if len(shape(a)) == 1:
            da = jax.tree.map(lambda v: jnp.sum(v, 0), da)
            da = jax.lax.psum(da, names) if (names := (*_names(axes.batch), *_names(axes.seq))) else da
            da = jax.tree.map(lambda v, like: v.astype(like.dtype), da, a)
        return da, g, dstate

    operands = (a, h, handed, dh, dfinal, reset, valid)
    dims = (_dims(a), _dims(h), _dims(handed, "tbh"), _dims(dh), _dims(dfinal), _dims(reset), _dims(valid))
    da, dx, dstate = sharded(run, axes, dims, (_dims(a), _dims(h), _dims(dfinal)))(*operands)
    return da, dx, dstate, None, None


_scan.defvjp(_scan_fwd, _scan_bwd)


def _before(h: Number, handed: Number, reset: Array | None, valid: Array | None, reverse: bool) -> Number:
    """What every token was handed: the h beside it in the sweep, `handed` at the border, zero across a reset."""
    handed = jax.tree.map(lambda e, v: e[0][:, None].astype(v.dtype), handed, h)
    left = where(reset, zero_like(h), h) if reverse and reset is not None else h
    left = left if valid is None else where(valid, left, handed)  # padding ahead of the first valid token
    beside = (lambda v, e: (v[:, 1:], e)) if reverse else (lambda v, e: (e, v[:, :-1]))
    before = jax.tree.map(lambda v, e: jnp.concatenate(beside(v, e), axis=1), left, handed)
    return before if reverse or reset is None else where(reset, zero_like(before), before)


def _names(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else axis or ()


def _dims(number: Any, dims: str | None = None) -> Any:
    """Names of the dimensions of each array: channels, (batch, channels) or (batch, time, channels or 1)."""
    by_shape = lambda v: {1: "h", 2: "bh", 3: "bt." if v.dtype == bool else "bth"}[v.ndim]
    return jax.tree.map(lambda v: dims or by_shape(v), number)
