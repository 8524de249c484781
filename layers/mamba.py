"""Mamba (Gu and Dao, 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752).

A state-space model whose step size, input and output maps depend on the token. Of an input u_t, for every channel of x:

    x = silu(conv(W_x u)),   z = W_z u                        conv: causal, depthwise, a few taps
    δ, B, C = W_δ x, W_B x, W_C x        Δ = softplus(W_dt δ + dt_bias)        A = -exp(A_log)
    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t        y_t = C_t . h_t + D x_t        N real states a channel
    out = W_out (y silu(z))

(Algorithm 2 and Section 3.4 of the paper.) Jamba (arXiv:2403.19887) normalises δ, B and C: `norm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longwave.kernels.selective_scan import selective_scan
from longwave.kernels.short_conv import short_conv
from longwave.layers.linear import linear, torch_uniform
from longwave.layers.mixer import Carry, Context, Mixer, Out
from longwave.layers.timescale import Softplus, log_uniform


class Mamba(Mixer):
    """Selective state-space layer (S6) with its convolution and gate.

    N:              states of a channel.      conv: taps of the convolution, the token itself included.
    expand:         channels of x, z and y for each of the width.
    dt_rank:        of the map from x to Δ; None: width / 16, rounded up.
    dt_min, dt_max: Δ starts between them, log-uniform, and at least at dt_floor.
    dt_init, dt_scale: W_dt starts uniform in ±dt_scale / sqrt(dt_rank) ("random"), or at that bound ("constant").
    conv_bias, bias: of the convolution; of the projections from and to the width.
    norm:           of δ, B and C, a constructor (width, rngs=...), as RMSNorm in Jamba; None: as the paper.
    residuals:      how many residual branches the model adds up: W_out starts divided by the root of it.

    The carry is float32: "conv" (b, conv - 1, channels), the last inputs of the convolution, and "ssm" (b, N,
    channels).
    """

    roles: ClassVar[dict[str, str]] = {
        "conv": "kernel", "conv_bias": "bias", "A_log": "A", "dt_bias": "dt",
        "D": "norm",  # a gain for each channel: as those of norms, it does not decay
    }  # fmt: skip
    keep_float32: ClassVar[frozenset[str]] = frozenset({"A_log", "dt_bias", "D"})

    def __init__(
        self,
        width: int,
        *,
        N: int = 16,
        conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_floor: float = 1e-4,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        conv_bias: bool = True,
        bias: bool = False,
        norm: Callable[..., nnx.Module] | None = None,
        residuals: int = 1,
        rngs: nnx.Rngs,
    ):
        rank = math.ceil(width / 16) if dt_rank is None else dt_rank
        at_least_one(self, N=N, conv=conv, expand=expand, dt_rank=rank, residuals=residuals)
        if dt_init not in ("random", "constant"):
            raise ValueError(f'Mamba.dt_init = {dt_init!r} must be "random" or "constant"')
        channels = expand * width
        self.channels, self.N, self.taps = channels, N, conv
        self.in_x = linear(width, channels, bias=bias, rngs=rngs)
        self.in_z = linear(width, channels, bias=bias, rngs=rngs)
        self.conv = nnx.Param(torch_uniform(rngs.params(), (conv, channels), fan_in=conv))
        self.conv_bias = nnx.Param(torch_uniform(rngs.params(), (channels,), fan_in=conv)) if conv_bias else None
        self.to_dt = linear(channels, rank, bias=False, rngs=rngs)
        self.to_B = linear(channels, N, bias=False, rngs=rngs)
        self.to_C = linear(channels, N, bias=False, rngs=rngs)
        if norm is not None:
            self.dt_norm, self.B_norm, self.C_norm = norm(rank, rngs=rngs), norm(N, rngs=rngs), norm(N, rngs=rngs)
        self.dt = linear(rank, channels, bias=False, rngs=rngs)
        bound = dt_scale / math.sqrt(rank)
        start = self.dt.kernel[...] * dt_scale if dt_init == "random" else jnp.full((rank, channels), bound)
        self.dt.kernel[...] = start
        self.dt_bias = nnx.Param(draw_dt_bias(channels, dt_min, dt_max, dt_floor, rngs=rngs))
        self.A_log = nnx.Param(jnp.tile(jnp.log(jnp.arange(1, N + 1, dtype=jnp.float32))[None], (channels, 1)))
        self.D = nnx.Param(jnp.ones(channels))
        self.out = out_projection(channels, width, bias=bias, residuals=residuals, rngs=rngs)

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """Zeros. Nothing depends on capacity."""
        return {
            "conv": jnp.zeros((batch, self.taps - 1, self.channels), jnp.float32),
            "ssm": jnp.zeros((batch, self.N, self.channels), jnp.float32),
        }

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        carry = {"conv": None, "ssm": None} if carry is None else carry
        masks: dict[str, Any] = {"reset": ctx.reset, "valid": ctx.valid, "axes": ctx.axes}
        u = unpadded(x, ctx)
        # `valid` keeps the projection's bias out of the taps, and the convolution's out of what follows.
        bias = None if self.conv_bias is None else self.conv_bias[...]
        v, conv = short_conv(self.in_x(u), self.conv[...], bias, state=carry["conv"], **masks)
        v = jax.nn.silu(v)
        dt, B, C = self.to_dt(v), self.to_B(v), self.to_C(v)
        if hasattr(self, "dt_norm"):
            dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        A = -jnp.exp(self.A_log[...].astype(jnp.float32))
        own: dict[str, Any] = {"D": self.D[...], "z": self.in_z(u), "dt_bias": self.dt_bias[...]}
        y, ssm = selective_scan(v, self.dt(dt), A, B, C, **own, state=carry["ssm"], **masks)
        return Out(unpadded(self.out(y), ctx), {"conv": conv, "ssm": ssm}, {})


# What Mamba-2 has in common


def at_least_one(mixer: Mixer, **sizes: int) -> None:
    """Raises ValueError naming the hyper-parameter that is not."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{type(mixer).__name__}.{name} = {size} must be at least 1")


def unpadded(x: Float[Array, "b t d"], ctx: Context) -> Float[Array, "b t d"]:
    """Zero on padding, whatever stood there."""
    return x if ctx.valid is None else jnp.where(ctx.valid[..., None], x, 0)


def draw_dt_bias(
    count: int, dt_min: float, dt_max: float, dt_floor: float, *, rngs: nnx.Rngs
) -> Float[Array, " count"]:
    """Biases with which softplus gives a dt that is log-uniform between its bounds, and not below the floor."""
    dt = jnp.exp(log_uniform((count,), dt_min, dt_max, rngs=rngs))
    return Softplus().inverse(jnp.maximum(dt, dt_floor))


def out_projection(channels: int, width: int, *, bias: bool, residuals: int, rngs: nnx.Rngs) -> nnx.Linear:
    """From the channels into the residual stream; as in GPT-2, its kernel is small where many branches add up."""
    layer = linear(channels, width, bias=bias, rngs=rngs)
    layer.kernel[...] = layer.kernel[...] / math.sqrt(residuals)
    return layer
