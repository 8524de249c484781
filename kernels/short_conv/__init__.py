"""A depthwise causal convolution of a few taps: shifted multiply-adds, aware of documents and padding, with a carry.

    y_t = bias + sum_j w_j x_{t - width + 1 + j}

Tap width - 1 is the token itself. The inputs stand behind the width - 1 before them in one array, and every tap is a
slice of it: XLA makes one pass of the sum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from longwave.kernels.partition import Axes, parts, sharded

__all__ = ["short_conv"]


def short_conv(
    x: Float[Array, "b t d"],
    w: Float[Array, "width d"],
    bias: Float[Array, " d"] | None = None,
    *,
    state: Float[Array, "b width-1 d"] | None = None,
    reset: Bool[Array, "b t"] | None = None,
    valid: Bool[Array, "b t"] | None = None,
    axes: Axes = Axes(),
) -> tuple[Float[Array, "b t d"], Float[Array, "b width-1 d"]]:
    """(y in the dtype of x, the last width - 1 valid inputs of the document, float32, zeros before its first).

    state: the inputs before the first valid token, as an earlier call returned them; None is zeros.
    reset: true on the first token of a document: taps do not reach across.
    valid: false on padding; the true entries of a row are contiguous. There y is 0, and x is not read.
    axes: mesh axes that split batch, channels (`heads`) and time. Along those of time, each device hands its last
        width - 1 tokens to the next.
    """
    _check(x, w, bias, state, axes)
    b, t, d = x.shape
    axes = Axes(axes.batch, axes.heads, axes.seq if t > 1 else None).for_heads(d)
    if state is None:
        state = jnp.zeros((b, w.shape[0] - 1, d), jnp.float32)
    dims = lambda v, names: None if v is None else names
    run = sharded(
        lambda *args: _local(*args, axes),
        axes,
        ("bth", ".h", dims(bias, "h"), "b.h", dims(reset, "bt"), dims(valid, "bt")),
        ("bth", "b.h"),
    )
    return run(x, w, bias, state.astype(jnp.float32), reset, valid)


def _check(x: Array, w: Array, bias: Array | None, state: Array | None, axes: Axes) -> None:
    b, t, d = x.shape
    if t < 1:
        raise ValueError(f"x has shape {x.shape}: expected at least one token")
    if w.ndim != 2 or w.shape[1] != d or w.shape[0] < 1:
        raise ValueError(f"w has shape {w.shape}: with x of shape {x.shape} it must be (width, {d})")
    width = w.shape[0]
    if bias is not None and bias.shape != (d,):
        raise ValueError(f"bias has shape {bias.shape}: with x of shape {x.shape} it must be {(d,)}")
    if state is not None and state.shape != (b, width - 1, d):
        raise ValueError(
            f"state has shape {state.shape}: with x of {x.shape} and {width} taps it must be {(b, width - 1, d)}"
        )
    shards = parts(axes.seq)
    if shards > 1 and t > 1 and (t % shards or t // shards < width - 1):
        raise ValueError(
            f"x has {t} tokens: {shards} devices along {axes.seq!r} must divide them into at least {width - 1} each"
        )


def _local(
    x: Float[Array, "b t d"],
    w: Float[Array, "width d"],
    bias: Float[Array, " d"] | None,
    state: Float[Array, "b k d"],
    reset: Bool[Array, "b t"] | None,
    valid: Bool[Array, "b t"] | None,
    axes: Axes,
) -> tuple[Float[Array, "b t d"], Float[Array, "b k d"]]:
    """One device's shard. k = width - 1 tokens stand ahead of its own."""
    t, k = x.shape[1], w.shape[0] - 1
    start = jax.lax.axis_index(axes.seq) * t if axes.seq else 0
    first, end = (0, t * parts(axes.seq)) if valid is None else _run(valid, start, axes)  # of each row, in all shards
    if valid is not None:
        x = jnp.where(valid[..., None], x, 0)
        reset = None if reset is None else reset & valid
    seen = _behind(x, state, first, start, axes, padded=valid is not None)
    starts = None if reset is None else _halo(reset, jnp.zeros((x.shape[0], k), bool), axes)
    y = _taps(seen, w, bias, None if starts is None else _reached(starts, k))
    if valid is not None:
        y = jnp.where(valid[..., None], y, 0)
    return y, _last(seen, k, starts, end, start, axes)


def _run(
    valid: Bool[Array, "b t"], start: Int[Array, ""] | int, axes: Axes
) -> tuple[Int[Array, " b"], Int[Array, " b"]]:
    """Where the valid tokens of each row start and end, in the time of all shards; (0, 0) of a row without any."""
    t = valid.shape[1]
    some = jnp.any(valid, 1)
    far = t * parts(axes.seq)
    first = jnp.where(some, start + jnp.argmax(valid, 1), far)
    end = jnp.where(some, start + t - jnp.argmax(valid[:, ::-1], 1), 0)
    if axes.seq:
        first, end = jax.lax.pmin(first, axes.seq), jax.lax.pmax(end, axes.seq)
    return jnp.where(first == far, 0, first), end


def _halo(v: Array, ahead: Array, axes: Axes) -> Array:
    """v behind the last k entries of the shard before, which the first shard has from `ahead` (b, k, ...)."""
    k = ahead.shape[1]
    if axes.seq and k:
        n = parts(axes.seq)
        handed = jax.lax.ppermute(v[:, v.shape[1] - k :], axes.seq, [(i, i + 1) for i in range(n - 1)])
        ahead = jnp.where(jax.lax.axis_index(axes.seq) == 0, ahead, handed)
    return jnp.concatenate((ahead.astype(v.dtype), v), axis=1)


def _behind(
    x: Float[Array, "b t d"],
    state: Float[Array, "b k d"],
    first: Int[Array, " b"] | int,
    start: Int[Array, ""] | int,
    axes: Axes,
    padded: bool,
) -> Float[Array, "b k+t d"]:
    """x behind the k tokens before it; the state stands directly before the first valid token of all shards."""
    t, k = x.shape[1], state.shape[1]
    if k == 0:
        return x
    if not padded:
        return _halo(x, state.astype(x.dtype), axes)
    seen = _halo(x, jnp.zeros_like(state, x.dtype), axes)
    place = jnp.clip(first - start, -k, t + k) + k  # the margins take in a state that belongs to another shard
    wide = jnp.pad(seen, ((0, 0), (k, k), (0, 0)))
    put = lambda row, state, at: jax.lax.dynamic_update_slice_in_dim(row, state, at, axis=0)
    return jax.vmap(put)(wide, state.astype(x.dtype), place)[:, k : 2 * k + t]


def _reached(starts: Bool[Array, "b k+t"], k: int) -> list[Bool[Array, "b t"]]:
    """For each tap, whether its token is of the document of the token that it counts for."""
    t = starts.shape[1] - k
    reached = [jnp.ones((starts.shape[0], t), bool)]
    for back in range(k):
        reached.append(reached[-1] & ~starts[:, k - back : k - back + t])
    return reached[::-1]


@jax.custom_vjp
def _taps(
    seen: Float[Array, "b k+t d"],
    w: Float[Array, "width d"],
    bias: Float[Array, " d"] | None,
    reached: list[Bool[Array, "b t"]] | None,
) -> Float[Array, "b t d"]:
    t = seen.shape[1] - (w.shape[0] - 1)
    y = jnp.float32(0) if bias is None else bias.astype(jnp.float32)[None, None]
    for j, row in enumerate(w.astype(jnp.float32)):
        y = y + row[None, None] * _heard(seen[:, j : j + t], reached, j)
    return y.astype(seen.dtype)


def _heard(v: Float[Array, "b t d"], reached: list[Bool[Array, "b t"]] | None, j: int) -> Float[Array, "b t d"]:
    """What belongs to tap j, float32; 0 where the tap would reach into another document."""
    v = v if reached is None else jnp.where(reached[j][..., None], v, 0)
    return v.astype(jnp.float32)


def _taps_fwd(seen: Array, w: Array, bias: Array | None, reached: list[Array] | None) -> tuple[Array, tuple]:
    return _taps(seen, w, bias, reached), (seen, w, bias, reached)


def _taps_bwd(kept: tuple, dy: Float[Array, "b t d"]) -> tuple:
    """The taps in the other direction, in one pass too. Sums over tokens are products with ones: XLA's own are slow."""
    seen, w, bias, reached = kept
    t, k = dy.shape[1], w.shape[0] - 1
    over_tokens = lambda v: jnp.dot(jnp.ones(dy.shape[0] * t), v.reshape(-1, v.shape[-1]), precision="highest")
    dseen, dw = jnp.zeros(seen.shape, jnp.float32), []
    for j, row in enumerate(w.astype(jnp.float32)):
        heard = _heard(dy, reached, j)
        dseen = dseen + row[None, None] * jnp.pad(heard, ((0, 0), (j, k - j), (0, 0)))
        dw.append(over_tokens(heard * seen[:, j : j + t].astype(jnp.float32)))
    dbias = None if bias is None else over_tokens(dy.astype(jnp.float32)).astype(bias.dtype)
    return dseen.astype(seen.dtype), jnp.stack(dw).astype(w.dtype), dbias, None


_taps.defvjp(_taps_fwd, _taps_bwd)


def _last(
    seen: Float[Array, "b k+t d"],
    k: int,
    starts: Bool[Array, "b k+t"] | None,
    end: Int[Array, " b"] | int,
    start: Int[Array, ""] | int,
    axes: Axes,
) -> Float[Array, "b k d"]:
    """The k inputs before `end`, of the last document only. The shard that holds them hands them to all."""
    end = jnp.broadcast_to(jnp.asarray(end - start), seen.shape[:1])
    t = seen.shape[1] - k
    at = jnp.clip(end, 0, t)
    cut = lambda v: jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, k, axis=0))(v, at)
    last = cut(seen).astype(jnp.float32)
    if starts is not None and k:
        later = jnp.cumsum(cut(starts)[:, ::-1], 1)[:, ::-1] - cut(starts)  # documents that start behind the token
        last = jnp.where((later == 0)[..., None], last, 0)
    if axes.seq:
        here = (end > 0) & (end <= t) | (start == 0) & (end == 0)  # a row without a valid token ends before the first
        last = jax.lax.psum(jnp.where(here[:, None, None], last, 0), axes.seq)
    return last
