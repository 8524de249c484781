"""LRU: a diagonal linear recurrence parameterised for stable training (Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu
and De, 2023, "Resurrecting Recurrent Neural Networks for Long Sequences").

    x_t = λ x_{t-1} + γ B u_t        y_t = Re(C x_t) + D u_t        N complex states, shared by all channels

    λ = exp(-exp(nu_log) + i exp(theta_log))        γ = exp(gamma_log), at the start sqrt(1 - |λ|²)

|λ| < 1 whatever is learned, and γ keeps the size of the state that of its input. What follows is the paper's GLU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longwave.kernels.linear_scan import Pair, linear_scan
from longwave.layers.half_glu import FullGLU, gated, tanh_gelu
from longwave.layers.mixer import Carry, Context, Mixer, Out
from longwave.layers.s5 import project_in, project_out


class LRU(Mixer):
    """Linear recurrent unit.

    N:            number of complex states.
    r_min, r_max: |λ| starts between them, uniform on the ring's area.
    max_phase:    the phase of λ starts uniform in [0, max_phase].
    activation, dropout, output: what follows, as in S5. None ends the layer after the recurrence.
    """

    roles: ClassVar[dict[str, str]] = {
        "nu_log": "A", "theta_log": "A", "gamma_log": "B", "B": "B", "C": "C", "D": "D",
    }  # fmt: skip
    keep_float32: ClassVar[frozenset[str]] = frozenset({"nu_log", "theta_log", "gamma_log"})

    def __init__(
        self,
        width: int,
        *,
        N: int = 64,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        activation: Callable[[Array], Array] = tanh_gelu,
        dropout: float = 0.0,
        output: Callable[..., nnx.Module] | None = FullGLU,
        rngs: nnx.Rngs,
    ):
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(f"r_min is {r_min}, r_max is {r_max}: 0 <= r_min < r_max <= 1 must hold")
        if max_phase <= 0:
            raise ValueError(f"max_phase is {max_phase}: it must be positive")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}: it must be in [0, 1)")
        self.width, self.N, self.activation, self.rate = width, N, activation, dropout
        # Drawn from (0, 1]: at 0 a phase or, with r_min 0, a decay would have no logarithm.
        draw = lambda: 1 - jax.random.uniform(rngs.params(), (N,))
        nu = -0.5 * jnp.log(draw() * (r_max**2 - r_min**2) + r_min**2)
        nu = jnp.maximum(nu, 1e-8)
        self.nu_log, self.theta_log = nnx.Param(jnp.log(nu)), nnx.Param(jnp.log(max_phase * draw()))
        self.gamma_log = nnx.Param(0.5 * jnp.log(-jnp.expm1(-2 * nu)))
        self.B = nnx.Param(jax.random.normal(rngs.params(), (N, width, 2)) / math.sqrt(2 * width))
        self.C = nnx.Param(jax.random.normal(rngs.params(), (width, N, 2)) / math.sqrt(N))
        self.D = nnx.Param(jax.random.normal(rngs.params(), (width,)))
        self.output = None if output is None else output(width, rngs=rngs)

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """The state: a Pair of (b, N) float32. Nothing depends on capacity."""
        return Pair(jnp.zeros((batch, self.N)), jnp.zeros((batch, self.N)))

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        u = x if ctx.valid is None else jnp.where(ctx.valid[..., None], x, 0)
        modulus, phase = jnp.exp(-jnp.exp(self.nu_log[...])), jnp.exp(self.theta_log[...])
        Lambda = Pair(modulus * jnp.cos(phase), modulus * jnp.sin(phase))
        B = jnp.exp(self.gamma_log[...])[:, None, None] * self.B[...].astype(jnp.float32)
        Bu = project_in(jax.lax.complex(B[..., 0], B[..., 1]), u)
        states, carry = linear_scan(Lambda, Bu, carry, reset=ctx.reset, valid=ctx.valid, axes=ctx.axes)
        y = project_out(self.C[...], states) + self.D[...].astype(x.dtype)[None, None] * u
        y = gated(y, ctx, activation=self.activation, dropout_rate=self.rate, output=self.output)
        return Out(y, carry, {})
