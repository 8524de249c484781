"""The selective scan on a TPU: one pass over memory forward, one backward, that never lay (t, d, n) down in HBM.

The grid walks (rows, blocks of channels, spans), spans last and backward in reverse. `tpu_forward.py` and
`tpu_backward.py` are a step of it, `tpu_layout.py` says how numbers lie in it. What is no whole block is padded:
invalid tokens behind the last, and channels and states of zeros.

How fast it can be: a state of a channel and token takes delta A, exp2, a h, B u, +, C h, + of the vector unit (an
exponential takes one of its slots to be issued), 7 of 4 x 1,024 a cycle. 4,096 tokens of 4,096 channels of 16 states
are thus 0.31 ms at 1.5 GHz, three times what the arrays take to stream from HBM as bfloat16.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longwave.kernels.selective_scan import tpu_backward, tpu_forward
from longwave.kernels.selective_scan.reference import SPAN, Inputs
from longwave.kernels.selective_scan.tpu_layout import LOG2E, RESET, VALID, Plan, Reads

WIDEST = 128  # states of a channel: more than that do not fit into registers and VMEM


def refusal(inputs: Inputs) -> str | None:
    """Why the kernels do not serve this call; None: they do."""
    streams = {"x": inputs.x, "dt": inputs.dt, "B": inputs.B, "C": inputs.C, "z": inputs.z}
    for name, v in streams.items():
        if v is not None and v.dtype.name not in ("float32", "bfloat16"):
            return f"{name} is {v.dtype.name}, they take float32 and bfloat16"
    n = inputs.A.shape[1]
    return f"n is {n}, they take at most {WIDEST} states of a channel" if n > WIDEST else None


def forward(
    inputs: Inputs, state: Float[Array, "b n d"], *, softplus: bool
) -> tuple[Float[Array, "b t d"], Float[Array, "b n d"], Float[Array, "b spans n d"]]:
    """(y in the dtype of x, the state after the last valid token, the state before every span of SPAN tokens)."""
    b, t, d = inputs.x.shape
    n = inputs.A.shape[1]
    plan = Plan.of(b, t, d, n, tpu_forward.MOST)
    reads = _reads(inputs, plan, state=state)
    y, last, saved = tpu_forward.forward(reads, plan, softplus=softplus, masked=inputs.reset is not None)
    return y[:, :t, :d], last[:, :n, :d], saved[:, :, :n, :d]


def backward(
    inputs: Inputs,
    saved: Float[Array, "b spans n d"],
    dy: Float[Array, "b t d"],
    dfinal: Float[Array, "b n d"],
    *,
    softplus: bool,
) -> tuple[Inputs, Float[Array, "b n d"]]:
    """(gradients in the dtypes of the inputs, the gradient of the state before the first token)."""
    b, t, d = inputs.x.shape
    n = inputs.A.shape[1]
    plan = Plan.of(b, t, d, n, tpu_backward.MOST)
    reads = _reads(inputs, plan, state=saved, dy=dy, dfinal=dfinal)
    out = tpu_backward.backward(reads, plan, softplus=softplus, masked=inputs.reset is not None)
    tokens = lambda v: None if v is None else v[:, :t, :d]
    narrow = lambda v: jnp.sum(v, 1)[:, :n, :t].swapaxes(1, 2)  # over blocks of channels
    channels = lambda v: None if v is None else jnp.sum(v, (0, 1))[:d]
    gradients = Inputs(
        x=tokens(out.dx),
        dt=tokens(out.ddt),
        A=jnp.sum(out.dA, 0)[:n, :d].T,
        B=narrow(out.dB),
        C=narrow(out.dC),
        D=channels(out.dD),
        z=tokens(out.dz),
        dt_bias=channels(out.dbias),
    )
    like = lambda v, primal: None if v is None else v.astype(primal.dtype)
    return Inputs(*map(like, gradients, inputs)), out.dstate[:, :n, :d]


def _reads(inputs: Inputs, plan: Plan, *, state: Array, dy: Array | None = None, dfinal: Array | None = None) -> Reads:
    """The arrays as the kernels take them."""

    def padded(v: Any, *shape: int) -> Any:
        """Zeros behind, up to the last of its sizes."""
        if v is None or v.shape[-len(shape) :] == shape:
            return v
        sizes = (*v.shape[: -len(shape)], *shape)
        return jnp.pad(v, [(0, size - old) for old, size in zip(v.shape, sizes, strict=True)])

    float32 = lambda v: None if v is None else v.astype(jnp.float32)
    row = lambda v: None if v is None else padded(float32(v)[None], plan.d)
    token = lambda v: padded(v, plan.t, plan.d)
    seen = lambda v: v if inputs.valid is None else jnp.where(inputs.valid[..., None], v, 0)
    narrow = lambda v: _parts(padded(seen(v), plan.t, plan.n))
    still = lambda v: padded(float32(v), plan.n, plan.d)
    return Reads(
        x=token(inputs.x),
        dt=token(inputs.dt),
        z=token(inputs.z),
        B=narrow(inputs.B),
        C=narrow(inputs.C),
        A=padded(LOG2E * float32(inputs.A).T, plan.n, plan.d),
        D=row(inputs.D),
        dt_bias=row(inputs.dt_bias),
        flags=_flags(inputs, plan),
        state=still(state),
        dy=token(dy),
        dfinal=still(dfinal),
    )


def _parts(v: Float[Array, "b t n"]) -> Float[Array, "b t parts*n"]:
    """float32 numbers of bfloat16 digits side by side, whose sum v is: itself, or three."""
    rest, parts = v.astype(jnp.float32), []
    for _ in range(1 if v.dtype == jnp.bfloat16 else 3):
        # Not a cast there and back, which XLA may leave out.
        parts.append(jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
        rest = rest - parts[-1]
    return jnp.concatenate(parts, -1)


def _flags(inputs: Inputs, plan: Plan) -> Int[Array, "b 1 t"] | None:
    """RESET and VALID; tokens of the padding are not valid, and nothing is reset by what is not valid."""
    b, t, _ = inputs.x.shape
    if inputs.reset is None and inputs.valid is None and t == plan.t:
        return None
    valid = jnp.ones((b, t), bool) if inputs.valid is None else inputs.valid
    reset = jnp.zeros((b, t), bool) if inputs.reset is None else inputs.reset & valid
    flags = reset.astype(jnp.int32) * RESET + valid.astype(jnp.int32) * VALID
    return jnp.pad(flags, ((0, 0), (0, -(-plan.t // SPAN) * SPAN - t)))[:, None]
