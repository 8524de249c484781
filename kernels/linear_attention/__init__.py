"""Linear attention: a matrix for a state, that every token fades, erases from, writes to and reads.

    D = exp(g_t) S_{t-1}        S_t = D + k_t (w_t v_t - D' (beta_t k_t))'        o_t = scale S_t' q_t

Linear attention, retention, GLA and Mamba-2's SSD are this recurrence without beta; DeltaNet, Gated DeltaNet and KDA
have it. One token is `reference.step`; more of them run in chunks. The gradient keeps the inputs and the state before
every 256 tokens.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from longwave.kernels.linear_attention import chunked, over_devices, pallas_tpu, reference
from longwave.kernels.linear_attention.reference import Inputs
from longwave.kernels.partition import Axes, left_to_xla, parts, sharded

__all__ = ["linear_attention"]


def linear_attention(
    q: Float[Array, "b t hq K"],
    k: Float[Array, "b t hk K"],
    v: Float[Array, "b t h V"],
    g: Float[Array, "b t h"] | Float[Array, "b t h K"] | None = None,
    *,
    w: Float[Array, "b t h"] | None = None,
    beta: Float[Array, "b t h"] | Float[Array, "b t h K"] | None = None,
    scale: float = 1.0,
    normaliser: float | None = None,
    state: Float[Array, "b h K V"] | Float[Array, "b s h K V"] | None = None,
    reset: Bool[Array, "b t"] | None = None,
    valid: Bool[Array, "b t"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    chunk: int | None = None,
    axes: Axes = Axes(),
) -> tuple[Float[Array, "b t h V"], Float[Array, "b h K V"] | Float[Array, "b s h K V"]]:
    """(o in the dtype of v, final state in float32) of the recurrence above. A gate that is None costs nothing.

    q, k, v: hq and hk divide h: head i reads q head i // (h / hq) and k head i // (h / hk).
    g: log of the decay, at most 0 (-inf forgets all): of a head, or of every key dimension. None: no decay.
    w: gate of what is written; None: 1. Mamba-2 is q = C, k = B, v = x, w = dt, g = dt A.
    beta: gate of what is erased, the delta rule: of a head, or of every key dimension. None: nothing. DeltaNet is
        w = beta. If keys have length 1 and every head has a beta from 0 to 2, erasing enlarges no state; else it may.
    normaliser: eps > 0: o_t = scale S_t' q_t / (scale s_t' q_t + eps), with s as S made of a 1 in the place of v. The
        state is then (b, h, K, V + 1): its last column is s. None: no division.
    state: S before the first token; None is zero.
    reset: true on the first token of a document: nothing passes between it and the token before.
    valid: false on padding, which neither writes nor is read; there o is 0.
    segment_ids: 0, ..., s - 1: every segment has a state of its own, and `state` holds those of all (b, s, h, K, V).
        The tokens of a segment stand together, and begin at a multiple of `chunk`. A negative id is padding; the
        state of a segment that does not come stays.
    chunk: given with segment_ids, and only then; the best are multiples of 256, and of 32 on CPUs alone.
    axes: mesh axes that split batch, heads and time. Devices along those of time exchange a state each.
    """
    if normaliser is not None:
        if normaliser <= 0:
            raise ValueError(f"linear_attention: normaliser = {normaliser}; it must be None or above 0")
        v = jnp.concatenate((v, jnp.ones_like(v[..., :1])), axis=-1)
    _check(Inputs(q, k, v, g, w, reset, valid, beta), state, segment_ids, chunk, axes)
    (b, t, h, V), K = v.shape, q.shape[-1]
    state = jnp.zeros((b, h, K, V)) if state is None else state.astype(jnp.float32)
    if segment_ids is not None:
        padding = segment_ids < 0
        valid = ~padding if valid is None else valid & ~padding
    inputs = Inputs(q, k, v, g, w, reset, valid, beta)
    if t == 1:
        o, state = _one_token(inputs, state, segment_ids, scale)
    else:
        axes = axes.for_heads(h)
        q, k = (jnp.repeat(x, math.lcm(x.shape[2], parts(axes.heads)) // x.shape[2], axis=2) for x in (q, k))
        o, state = _attend(Call(scale, chunk, axes), inputs._replace(q=q, k=k), state, segment_ids)
    if normaliser is not None:
        total = o[..., -1:].astype(jnp.float32) + normaliser
        o = (o[..., :-1].astype(jnp.float32) / total).astype(v.dtype)
    return o, state


def _check(x: Inputs, state: Array | None, segment_ids: Array | None, chunk: int | None, axes: Axes) -> None:
    def refuse(field: str, value: object, allowed: str) -> None:
        raise ValueError(f"linear_attention: {field} = {value}; it must be {allowed}")

    (b, t, h, V), K = x.v.shape, x.q.shape[-1]
    if t < 1:
        refuse("v.shape", x.v.shape, "of at least one token")
    for name, keys in (("q", x.q), ("k", x.k)):
        if keys.shape[:2] != (b, t) or keys.shape[3:] != (K,) or h % keys.shape[2]:
            refuse(f"{name}.shape", keys.shape, f"{(b, t, 'a divisor of ' + str(h), K)}")
    shapes = {
        "g": [(b, t, h), (b, t, h, K)],
        "w": [(b, t, h)],
        "beta": [(b, t, h), (b, t, h, K)],
        "reset": [(b, t)],
        "valid": [(b, t)],
    }
    for name, allowed in shapes.items():
        if (given := getattr(x, name)) is not None and given.shape not in allowed:
            refuse(f"{name}.shape", given.shape, " or ".join(map(str, allowed)))
    if segment_ids is None:
        if chunk is not None:
            refuse("chunk", chunk, "None without segment_ids")
        if state is not None and state.shape != (b, h, K, V):
            refuse("state.shape", state.shape, f"{(b, h, K, V)}")
    else:
        if segment_ids.shape != (b, t):
            refuse("segment_ids.shape", segment_ids.shape, f"{(b, t)}")
        if chunk is None or chunk < 1:
            refuse("chunk", chunk, "a positive number with segment_ids: what their runs start at multiples of")
        if state is None or state.ndim != 5 or (state.shape[0], *state.shape[2:]) != (b, h, K, V):
            shape = None if state is None else state.shape
            refuse("state.shape", shape, f"{(b, 'segments', h, K, V)} with segment_ids")
        if axes.seq and parts(axes.seq) > 1:
            refuse("axes.seq", repr(axes.seq), "None with segment_ids")
    if t > 1 and t % parts(axes.seq):
        refuse("t", t, f"a multiple of the {parts(axes.seq)} devices along axes.seq = {axes.seq!r}")


def _one_token(x: Inputs, state: Array, segment_ids: Array | None, scale: float) -> tuple[Array, Array]:
    token = jax.tree.map(lambda x: x[:, 0], x)
    if segment_ids is None:
        state, o = reference.step(state, token, scale=scale)
        return o[:, None].astype(x.v.dtype), state
    place = (jnp.arange(len(state)), segment_ids[:, 0])
    after, o = reference.step(state[place], token, scale=scale)
    return o[:, None].astype(x.v.dtype), state.at[place].set(after)


@dataclasses.dataclass(frozen=True)
class Call:
    """What is known when a call is traced."""

    scale: float
    chunk: int | None
    axes: Axes

    def run(self, name: str, *args: Any, inputs: Inputs) -> Any:
        """That function of the form of the platform that is compiled for."""

        def chunks(way: chunked.Way) -> Callable:
            length = way.chunk if inputs.beta is None else way.erasing
            if self.chunk is not None:
                length = math.gcd(length, self.chunk)
            return partial(getattr(chunked, name), scale=self.scale, way=way._replace(chunk=length))

        forms = {platform: chunks(way) for platform, way in chunked.WAYS.items()}
        if reason := left_to_xla() or pallas_tpu.refusal(inputs, self.chunk):
            _log(f"on TPUs linear_attention runs in chunks, not by its kernels: {reason}")
        else:
            forms["tpu"] = partial(getattr(pallas_tpu, name), scale=self.scale)
        return jax.lax.platform_dependent(*args, default=forms.pop("gpu"), **forms)


@cache
def _log(message: str) -> None:
    """Once."""
    logging.getLogger(__name__).info(message)


# The gradient. The rule stands around `shard_map`, not inside it.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: Call, inputs: Inputs, state: Array, segment_ids: Array | None) -> tuple[Array, Array]:
    return _attend_fwd(call, inputs, state, segment_ids)[0]


def _attend_fwd(call: Call, inputs: Inputs, state: Array, segment_ids: Array | None) -> tuple:
    def run(inputs: Inputs, state: Array, segment_ids: Array | None) -> tuple[Array, Array, Array]:
        if segment_ids is not None:
            return call.run("forward_segments", inputs, state, segment_ids, inputs=inputs)
        if not call.axes.seq:
            return call.run("forward", inputs, state, inputs=inputs)
        forward = lambda inputs, state: call.run("forward", inputs, state, inputs=inputs)
        state, final = over_devices.handed(inputs, state, call.axes.seq, forward)
        o, _, saved = call.run("forward", inputs, state, inputs=inputs)
        return o, final, saved

    dims = _dims(inputs), _over_states(state), None if segment_ids is None else "bt"
    split = sharded(run, call.axes, dims, ("bth.", _over_states(state), "bth.."))
    o, final, saved = split(inputs, state, segment_ids)
    return (o, final), (inputs, saved, segment_ids, None if segment_ids is None else state)


def _attend_bwd(call: Call, kept: tuple, cotangents: tuple[Array, Array]) -> tuple:
    def run(
        inputs: Inputs, saved: Array, segment_ids: Array | None, state: Array | None, do: Array, dfinal: Array
    ) -> tuple[Inputs, Array]:
        if segment_ids is not None:
            return call.run("backward_segments", inputs, state, saved, segment_ids, do, dfinal, inputs=inputs)
        if not call.axes.seq:
            return call.run("backward", inputs, saved, do, dfinal, inputs=inputs)
        backward = lambda inputs, *args: call.run("backward", inputs, *args, inputs=inputs)
        handed = over_devices.handed_back(inputs, do, dfinal, call.axes.seq, backward, scale=call.scale)
        dfinal, dstate = handed
        return call.run("backward", inputs, saved, do, dfinal, inputs=inputs)[0], dstate

    (inputs, saved, segment_ids, state), (do, dfinal) = kept, cotangents
    states = _over_states(dfinal)
    dims = _dims(inputs), "bth..", None if segment_ids is None else "bt", None if state is None else states
    grads = _dims(inputs)._replace(reset=None, valid=None)
    split = sharded(run, call.axes, (*dims, "bth.", states), (grads, states))
    return *split(inputs, saved, segment_ids, state, do, dfinal), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _dims(inputs: Inputs) -> Inputs:
    """Names of the dimensions of each array."""
    return jax.tree.map(lambda x: "bth."[: x.ndim], inputs)


def _over_states(state: Array) -> str:
    return "bh.." if state.ndim == 4 else "b.h.."
