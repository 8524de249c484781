"""ELM, the expressive leaky memory neuron in its branch form (Spieler et al., 2023, "The ELM Neuron: an Efficient and
Expressive Cortical Neuron Model Can Solve Long-Horizon Tasks", arXiv:2306.16922).

    b_t = κ_b b_{t-1} + sums over each branch of relu(w_s) x_t          κ_b = exp(-dt / tau_b)
    Δ_t = 1.7159 tanh(2/3 MLP([b_t, κ_m m_{t-1}]))                      one hidden layer, ReLU
    m_t = κ_m m_{t-1} + (1 - κ_λ) Δ_t                                   κ_m = exp(-dt / tau_m), κ_λ = exp(-λ dt / tau_m)
    y_t = W_y m_t + b_y

The traces b are a linear recurrence, and what the MLP's first layer makes of them is made for all tokens at once. The
memory m is not linear in itself: its tokens are taken one by one.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from longwave.kernels.linear_scan import linear_scan
from longwave.kernels.partition import Axes, sharded
from longwave.layers.linear import linear, torch_uniform
from longwave.layers.mamba import at_least_one, unpadded
from longwave.layers.mixer import Carry, Context, Mixer, Out

UNROLL = 4  # steps of the scan's loop at a time


class ELM(Mixer):
    """One neuron: leaky branches, a leaky memory with an MLP for its nonlinear integration, a linear readout.

    memory:   units of the memory, d_m.
    branches: each sums width / branches neighbouring inputs; None: as many as inputs.
    hidden:   units of the MLP; None: 2 memory.
    lam:      λ, how much faster the memory takes in than it forgets.
    tau_b:    time constant of the branches.
    tau_min, tau_max: time constants of the memory, log-spaced between them.
    learn_tau: whether those are learned, by a sigmoid between the same bounds.
    w_s:      where the synapses' weights start.
    dt:       time between two tokens, in the unit of the time constants.

    The carry is float32: "b" (b, branches) and "m" (b, memory).
    """

    roles: ClassVar[dict[str, str]] = {"w_s": "B", "tau_m": "dt"}
    keep_float32: ClassVar[frozenset[str]] = frozenset({"tau_m"})

    def __init__(
        self,
        width: int,
        *,
        memory: int = 100,
        branches: int | None = None,
        hidden: int | None = None,
        lam: float = 5.0,
        tau_b: float = 5.0,
        tau_min: float = 1.0,
        tau_max: float = 1000.0,
        learn_tau: bool = False,
        w_s: float = 0.5,
        dt: float = 1.0,
        rngs: nnx.Rngs,
    ):
        branches, hidden = width if branches is None else branches, 2 * memory if hidden is None else hidden
        at_least_one(self, memory=memory, branches=branches, hidden=hidden)
        if width % branches:
            raise ValueError(f"ELM.branches = {branches} must divide the width {width}")
        for name, value in {"lam": lam, "tau_b": tau_b, "tau_min": tau_min, "dt": dt}.items():
            if value <= 0:
                raise ValueError(f"ELM.{name} = {value} must be positive")
        if tau_max <= tau_min:
            raise ValueError(f"ELM.tau_max = {tau_max} must be above tau_min = {tau_min}")
        self.memory, self.branches, self.lam, self.dt = memory, branches, lam, dt
        self.tau_b, self.tau_min, self.tau_max = tau_b, tau_min, tau_max
        self.w_s = nnx.Param(jnp.full(width, w_s, jnp.float32))

        def init(key, shape, dtype=jnp.float32, out_sharding=None):  # the two are one layer
            return torch_uniform(key, shape, dtype, fan_in=branches + memory)

        self.from_b = nnx.Linear(branches, hidden, kernel_init=init, bias_init=init, rngs=rngs)
        self.from_m = nnx.Linear(memory, hidden, use_bias=False, kernel_init=init, rngs=rngs)
        self.to_m = linear(hidden, memory, rngs=rngs)
        self.tau_m = nnx.Param(self.tau_start()) if learn_tau else None
        self.out = linear(memory, width, rngs=rngs)

    def tau_start(self) -> Float[Array, " m"]:
        """What a sigmoid between the bounds makes log-spaced."""
        inside = np.geomspace(self.tau_min + 1e-6, self.tau_max - 1e-6, self.memory)
        share = (inside - self.tau_min) / (self.tau_max - self.tau_min)
        return jnp.asarray(np.log(share / (1 - share)), jnp.float32)

    def tau(self) -> Float[Array, " m"]:
        """The time constants of the memory."""
        at = self.tau_start() if self.tau_m is None else self.tau_m[...]
        return self.tau_min + (self.tau_max - self.tau_min) * jax.nn.sigmoid(at.astype(jnp.float32))

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """Zeros. Nothing depends on capacity."""
        return {"b": jnp.zeros((batch, self.branches)), "m": jnp.zeros((batch, self.memory))}

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        carry = self.init_carry(len(x)) if carry is None else carry
        masks: dict[str, Any] = {"reset": ctx.reset, "valid": ctx.valid}
        u = unpadded(x, ctx).astype(jnp.float32)
        synapses = jax.nn.relu(self.w_s[...]).astype(jnp.float32)[None, None] * u
        branches = jnp.sum(synapses.reshape(*u.shape[:2], self.branches, -1), axis=-1)
        keep = jnp.full(self.branches, np.exp(-self.dt / self.tau_b), jnp.float32)
        b, last_b = linear_scan(keep, branches, carry["b"], **masks, axes=ctx.axes)
        to_hidden = self.from_b(b.astype(x.dtype)).astype(jnp.float32)
        tau = self.tau()
        kappa, write = jnp.exp(-self.dt / tau), -jnp.expm1(-self.lam * self.dt / tau)
        W = [p[...].astype(jnp.float32) for p in (self.from_m.kernel, self.to_m.kernel, self.to_m.bias)]
        none = lambda dims: [None if mask is None else dims for mask in masks.values()]
        dims = ("bt.", *none("bt"), "b.", ["..", "..", "."], ".", ".")
        run = sharded(remember, Axes(ctx.axes.batch), dims, ("bt.", "b."))  # time and memory are whole on every device
        m, last_m = run(to_hidden, *masks.values(), carry["m"], W, kappa, write)
        return Out(unpadded(self.out(m.astype(x.dtype)), ctx), {"b": last_b, "m": last_m}, {})


def remember(
    to_hidden: Float[Array, "b t hidden"],
    reset: Bool[Array, "b t"] | None,
    valid: Bool[Array, "b t"] | None,
    m: Float[Array, "b m"],
    W: list[Array],
    kappa: Float[Array, " m"],
    write: Float[Array, " m"],
) -> tuple[Float[Array, "b t m"], Float[Array, "b m"]]:
    """(m after every token, and after the last). W: the MLP's matrices from m and to Δ, and the bias of the latter."""
    from_m, to_delta, bias = W

    def step(m: Array, token: tuple[Array, Array | None, Array | None]) -> tuple[Array, Array]:
        to_hidden, reset, valid = token
        kept = kappa[None] * (m if reset is None else jnp.where(reset[:, None], 0, m))
        hidden = jax.nn.relu(to_hidden + kept @ from_m)
        delta = 1.7159 * jnp.tanh((hidden @ to_delta + bias[None]) * (2 / 3))
        new = kept + write[None] * delta
        m = new if valid is None else jnp.where(valid[:, None], new, m)
        return m, new

    over_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (to_hidden, reset, valid))
    last, m = jax.lax.scan(step, m, over_time, unroll=UNROLL)
    return jnp.moveaxis(m, 0, 1), last
