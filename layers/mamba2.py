"""Mamba-2 (Dao and Gu, 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured
State Space Duality", arXiv:2405.21060).

A head of P channels shares one decay, so that its state is a matrix (N, P) and the layer is linear attention with a
gate (SSD): C reads as a query, B writes as a key, both shared by the heads of a group. Of an input u_t:

    z, x, B, C, dt = W_z u, conv(W_x u), conv(W_B u), conv(W_C u), W_dt u         conv ends in silu
    Δ = clip(softplus(dt + dt_bias))        A = -exp(A_log)                       one of each a head
    S_t = exp(Δ_t A) S_{t-1} + B_t (Δ_t x_t)'        y_t = S_t' C_t + D x_t
    out = W_out norm(y silu(z))                      the norm of each group's channels

(Section 7 of the paper.) Every slice has a projection and a convolution of its own, so that each can be sharded; side
by side in the order z, x, B, C, dt they are the paper's single ones.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from longwave.kernels.linear_attention import linear_attention
from longwave.kernels.short_conv import short_conv
from longwave.layers.linear import linear, torch_uniform
from longwave.layers.mamba import at_least_one, draw_dt_bias, out_projection, unpadded
from longwave.layers.mixer import Carry, Context, Mixer, Out

SLICES = ("x", "B", "C")  # that are convolved


class GatedRMSNorm(nnx.Module):
    """RMS normalisation of y silu(z) over each of `groups` equal parts of the features: the gate comes first.

    Computed in float32. With several groups, a model split over devices needs no sum across them.
    """

    roles: ClassVar[dict[str, str]] = {"scale": "norm"}

    def __init__(self, width: int, *, groups: int = 1, eps: float = 1e-5, rngs: nnx.Rngs | None = None):
        self.groups, self.eps = groups, eps
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, y: Float[Array, "b t d"], z: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        v = y.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
        v = rearrange(v, "b t (g d) -> b t g d", g=self.groups)
        v = v * jax.lax.rsqrt(jnp.mean(jnp.square(v), -1, keepdims=True) + self.eps)
        v = rearrange(v, "b t g d -> b t (g d)")
        return (v * self.scale[...].astype(jnp.float32)[None, None]).astype(y.dtype)


class Mamba2(Mixer):
    """State-space duality layer with its convolutions, gate and norm.

    N, P, G:   states of a channel; channels of a head; groups of heads, each with a B and a C of its own.
    conv:      taps of the convolutions, the token itself included.
    expand:    channels of x, z and y for each of the width.
    A_init:    -A starts uniform between these two.
    dt_min, dt_max: Δ starts between them, log-uniform, and at least at dt_floor.
    dt_limit:  Δ never leaves these bounds; None in the second place: no upper one.
    D_per_channel: a D for each channel instead of each head.
    conv_bias, bias: of the convolutions; of the projections from and to the width.
    norm_eps:  of the norm behind the gate.
    residuals: how many residual branches the model adds up: W_out starts divided by the root of it.

    The carry is float32: "conv", the last inputs of the convolutions, (b, conv - 1, ...) each of "x", "B" and "C", and
    "ssm" (b, heads, N, P).
    """

    roles: ClassVar[dict[str, str]] = {
        **{f"conv_{s}": "kernel" for s in SLICES}, **{f"conv_{s}_bias": "bias" for s in SLICES},
        "A_log": "A", "dt_bias": "dt", "D": "norm",  # a gain: it does not decay
    }  # fmt: skip
    keep_float32: ClassVar[frozenset[str]] = frozenset({"A_log", "dt_bias", "D"})

    def __init__(
        self,
        width: int,
        *,
        N: int = 128,
        P: int = 64,
        G: int = 1,
        conv: int = 4,
        expand: int = 2,
        A_init: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_floor: float = 1e-4,
        dt_limit: tuple[float, float | None] = (0.0, None),
        D_per_channel: bool = False,
        conv_bias: bool = True,
        bias: bool = False,
        norm_eps: float = 1e-5,
        residuals: int = 1,
        rngs: nnx.Rngs,
    ):
        at_least_one(self, N=N, P=P, G=G, conv=conv, expand=expand, residuals=residuals)
        channels = expand * width
        heads = channels // P
        if channels % P or heads % G:
            raise ValueError(
                f"Mamba2.P = {P} must divide expand * width = {channels}, and Mamba2.G = {G} the number of heads"
            )
        if not 0 < A_init[0] <= A_init[1]:
            raise ValueError(f"Mamba2.A_init = {A_init} must be two positive bounds, ascending")
        if dt_limit[0] < 0 or (dt_limit[1] is not None and dt_limit[1] <= dt_limit[0]):
            raise ValueError(f"Mamba2.dt_limit = {dt_limit} must be two bounds of at least 0, ascending")
        self.channels, self.heads, self.N, self.P, self.G, self.taps = channels, heads, N, P, G, conv
        self.dt_limit = dt_limit
        widths = {"x": channels, "B": G * N, "C": G * N}
        self.in_z = linear(width, channels, bias=bias, rngs=rngs)
        for name, size in widths.items():
            setattr(self, f"in_{name}", linear(width, size, bias=bias, rngs=rngs))
            setattr(self, f"conv_{name}", nnx.Param(torch_uniform(rngs.params(), (conv, size), fan_in=conv)))
            if conv_bias:
                drawn = torch_uniform(rngs.params(), (size,), fan_in=conv)
                setattr(self, f"conv_{name}_bias", nnx.Param(drawn))
        self.in_dt = linear(width, heads, bias=bias, rngs=rngs)
        self.dt_bias = nnx.Param(draw_dt_bias(heads, dt_min, dt_max, dt_floor, rngs=rngs))
        A = jax.random.uniform(rngs.params(), (heads,), minval=A_init[0], maxval=A_init[1])
        self.A_log = nnx.Param(jnp.log(A))
        self.D = nnx.Param(jnp.ones(channels if D_per_channel else heads))
        self.norm = GatedRMSNorm(channels, groups=G, eps=norm_eps)
        self.out = out_projection(channels, width, bias=bias, residuals=residuals, rngs=rngs)

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """Zeros. Nothing depends on capacity."""
        widths = {name: getattr(self, f"conv_{name}").shape[-1] for name in SLICES}
        return {
            "conv": {name: jnp.zeros((batch, self.taps - 1, size), jnp.float32) for name, size in widths.items()},
            "ssm": jnp.zeros((batch, self.heads, self.N, self.P), jnp.float32),
        }

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        masks: dict[str, Any] = {"reset": ctx.reset, "valid": ctx.valid, "axes": ctx.axes}
        u = unpadded(x, ctx)
        slices, conv = {}, {}
        for name in SLICES:
            w, bias = getattr(self, f"conv_{name}")[...], getattr(self, f"conv_{name}_bias", None)
            # `valid` keeps the projection's bias out of the taps, and the convolution's out of what follows.
            slices[name], conv[name] = short_conv(
                getattr(self, f"in_{name}")(u),
                w,
                None if bias is None else bias[...],
                state=None if carry is None else carry["conv"][name],
                **masks,
            )
        v, B, C = (jax.nn.silu(slices[name]) for name in SLICES)
        v = rearrange(v, "b t (h p) -> b t h p", p=self.P)
        B, C = (rearrange(m, "b t (g n) -> b t g n", g=self.G) for m in (B, C))
        dt = self.step_size(self.in_dt(u))
        decay = dt * -jnp.exp(self.A_log[...].astype(jnp.float32))[None, None]
        y, ssm = linear_attention(C, B, v, decay, w=dt, state=None if carry is None else carry["ssm"], **masks)
        D = self.D[...].reshape(self.heads, -1)[None, None]
        y = rearrange(y + (D * v).astype(y.dtype), "b t h p -> b t (h p)")
        y = self.out(self.norm(y, self.in_z(u)))
        return Out(unpadded(y, ctx), {"conv": conv, "ssm": ssm}, {})

    def step_size(self, dt: Float[Array, "b t h"]) -> Float[Array, "b t h"]:
        """Δ of every token and head, float32."""
        dt = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32)[None, None])
        low, high = self.dt_limit
        dt = jnp.maximum(dt, low) if low > 0 else dt
        return dt if high is None else jnp.minimum(dt, high)
