"""Linear attention on TPUs: what the kernels serve, and how arrays come to them and back."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longwave.kernels.linear_attention import tpu_backward, tpu_erase_backward, tpu_erase_inverse, tpu_forward
from longwave.kernels.linear_attention.reference import SPAN, Inputs, unpadded
from longwave.kernels.linear_attention.tpu_layout import Plan

WIDE = 256  # K and V of a head
STREAMS = {"forward": 2, "backward": 4}  # arrays as wide as v that a kernel reads and writes


def refusal(inputs: Inputs, chunk: int | None = None) -> str | None:
    """Why the kernels do not serve these; None: they do. chunk: what runs of segments start at multiples of."""
    q, k, v, g, beta = *inputs[:4], inputs.beta
    if others := {x.dtype.name for x in (q, k, v)} - {"float32", "bfloat16"}:
        return f"q, k or v is {' and '.join(sorted(others))}, they take float32 and bfloat16"
    if g is not None and g.ndim == 4:
        return f"g has shape {g.shape}, a decay for each of K: they take one for each head, (b, t, h)"
    if beta is not None and beta.ndim == 4:
        return f"beta has shape {beta.shape}, a gate for each of K: they take one for each head, (b, t, h)"
    if max(q.shape[-1], v.shape[-1]) > WIDE:
        return f"heads of K = {q.shape[-1]} and V = {v.shape[-1]}: they take up to {WIDE}"
    if chunk is not None and chunk % SPAN:
        return f"segments that start at multiples of {chunk}: they take multiples of {SPAN}"
    return None


def forward(
    inputs: Inputs, state: Float[Array, "b h K V"], *, scale: float
) -> tuple[Float[Array, "b t h V"], Float[Array, "b h K V"], Float[Array, "b n h K V"]]:
    """(o in the dtype of v, final state, the state before every span)."""
    o, final, saved = forward_segments(inputs, state[:, None], None, scale=scale)
    return o, final[:, 0], saved


def backward(
    inputs: Inputs,
    saved: Float[Array, "b n h K V"],
    do: Float[Array, "b t h V"],
    dfinal: Float[Array, "b h K V"],
    *,
    scale: float,
) -> tuple[Inputs, Float[Array, "b h K V"]]:
    """(gradients in the dtypes of the inputs, None for masks; the gradient of the state)."""
    gradients, dstate = backward_segments(inputs, None, saved, None, do, dfinal[:, None], scale=scale)
    return gradients, dstate[:, 0]


def forward_segments(
    inputs: Inputs, states: Float[Array, "b s h K V"], ids: Int[Array, "b t"] | None, *, scale: float
) -> tuple[Float[Array, "b t h V"], Float[Array, "b s h K V"], Float[Array, "b n h K V"]]:
    """The same with a state for each segment. ids: None: of one segment alone."""
    tokens = unpadded(inputs)
    plan = Plan.of(tokens, scale, streams=STREAMS["forward"], segments=ids is not None)
    steps = None if ids is None else plan.of_steps(ids)
    arrays = plan.keys(tokens.q), plan.keys(tokens.k), plan.values(tokens.v)
    gates = plan.rows(tokens), plan.starts(tokens)
    inverse = tpu_erase_inverse.call(plan, arrays[1], *gates) if plan.erase else None
    o, final, saved = tpu_forward.call(plan, steps, *arrays, *gates, inverse, plan.states(states))
    spans = -(-plan.t // SPAN)
    return plan.of_values(o).astype(inputs.v.dtype), plan.of_states(final), plan.of_states(saved)[:, :spans]


def backward_segments(
    inputs: Inputs,
    states: Float[Array, "b s h K V"] | None,
    saved: Float[Array, "b n h K V"],
    ids: Int[Array, "b t"] | None,
    do: Float[Array, "b t h V"],
    dfinal: Float[Array, "b s h K V"],
    *,
    scale: float,
) -> tuple[Inputs, Float[Array, "b s h K V"]]:
    """states: what every segment began with, stands in `saved` too."""
    del states
    tokens = unpadded(inputs)
    plan = Plan.of(tokens, scale, streams=STREAMS["backward"], segments=ids is not None)
    steps = None if ids is None else plan.of_steps(ids)
    if inputs.valid is not None:
        do = jnp.where(inputs.valid[..., None, None], do, 0)
    arrays = plan.keys(tokens.q), plan.keys(tokens.k), plan.values(tokens.v), plan.values(do)
    gates, kept = (plan.rows(tokens), plan.starts(tokens)), (plan.states(saved), plan.states(dfinal))
    if plan.erase:
        inverse = tpu_erase_inverse.call(plan, arrays[1], *gates)
        found = tpu_erase_backward.call(plan, steps, *arrays, *gates, inverse, *kept)
    else:
        found = tpu_backward.call(plan, steps, *arrays, *gates, *kept)
    dg, dw, dbeta = (None, None, None) if found.rows is None else plan.of_rows(found.rows, tokens)
    if dg is not None and inputs.valid is not None:
        dg = jnp.where(inputs.valid[..., None], dg, 0)
    dq, dk = plan.of_keys(found.dq, inputs.q), plan.of_keys(found.dk, inputs.k)
    dv = plan.of_values(found.dv).astype(inputs.v.dtype)
    return Inputs(dq, dk, dv, dg, dw, None, None, dbeta), plan.of_states(found.dstate)
