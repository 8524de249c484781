"""S5: one diagonal state-space model of the whole width (Smith, Warrington and Linderman, 2023, "Simplified State Space
Layers for Sequence Modeling").

    x_t = Λ̄ x_{t-1} + B̄ u_t        y_t = 2 Re(C x_t) + D u_t        P/2 complex states, shared by all channels

(Λ̄, B̄) come from Λ, B and a step of every state's own. Λ and the coordinates of B and C start from J blocks of the
normal part of HiPPO-LegS. What follows is the official block: GELU, dropout and a gate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from longwave.kernels.linear_scan import Pair, linear_scan, pair
from longwave.kernels.lti_ssm import zoh
from longwave.layers.half_glu import HalfGLU1, gated, tanh_gelu
from longwave.layers.hippo import legs_matrices
from longwave.layers.mixer import CAPABILITIES, Carry, Context, Mixer, Out, Unsupported
from longwave.layers.timescale import log_uniform

_lecun_normal = jax.nn.initializers.lecun_normal


def blocks(P: int, J: int, conj_sym: bool = True) -> tuple[Complex[np.ndarray, "p"], Complex[np.ndarray, "P p"]]:
    """(Λ, V) of J equal blocks: eigenvalues and eigenvectors of the normal part of LegS of size P/J.

    With conj_sym only the members with Im Λ < 0 of the conjugate pairs: p = P/2, else P.
    """
    A, _ = legs_matrices(P // J)
    frequency, V = np.linalg.eigh(-0.5j * (A - A.T))
    V = V * (np.abs(V[0]) / V[0])  # whatever phase LAPACK returns
    kept = len(A) // 2 if conj_sym else len(A)
    return np.tile(-0.5 + 1j * frequency[:kept], J), np.kron(np.eye(J), V[:, :kept])


# Initialisations of C: (key, width, V (P, p)) -> (width, p)


def trunc_standard_normal(key: PRNGKeyArray, width: int, V: Complex[Array, "P p"]) -> Complex[Array, "h p"]:
    """C V with a truncated normal C of variance 1/P (real and imaginary part), for every channel by itself."""
    C = _lecun_normal(batch_axis=0)(key, (width, len(V), 2))
    return (C[..., 0] + 1j * C[..., 1]) @ V


def lecun_normal(key: PRNGKeyArray, width: int, V: Complex[Array, "P p"]) -> Complex[Array, "h p"]:
    """C V with a truncated normal C of variance 1/(P width): flax takes all the leading dimensions for fan-in."""
    C = _lecun_normal()(key, (width, len(V), 2))
    return (C[..., 0] + 1j * C[..., 1]) @ V


def complex_normal(key: PRNGKeyArray, width: int, V: Complex[Array, "P p"]) -> Complex[Array, "h p"]:
    """Standard complex normal, in the coordinates of the eigenvectors."""
    return jax.random.normal(key, (width, V.shape[1]), jnp.complex64)


class S5(Mixer):
    """State-space layer with one state of size P for all channels.

    P, J:          state size, and into how many HiPPO blocks it is divided at the start.
    conj_sym:      states come in conjugate pairs, of which one half is stored: P/2 complex states. Else P.
    C_init:        trunc_standard_normal, lecun_normal, complex_normal or your own.
    discretization: (Λ, B, dt) -> (log Λ̄, B̄): zoh or bilinear.
    dt_min, dt_max: bounds between which dt is drawn log-uniformly, per state.
    step_rescale:  factor on every dt, for inputs of another sampling rate.
    clip_eigs:     keeps Re Λ at most -1e-4, so that no state grows.
    bidirectional: a second C reads the states of a scan from the end; supports no carry and is not causal.
    activation, dropout, output: what follows. `output` is a module class called with (width, rngs=rngs): HalfGLU1,
                   HalfGLU2, FullGLU, Ungated; None ends the layer after the state space.
    """

    roles: ClassVar[dict[str, str]] = {
        "Lambda_re": "A", "Lambda_im": "A", "B": "B", "C": "C", "D": "D", "log_step": "dt",
    }  # fmt: skip
    keep_float32: ClassVar[frozenset[str]] = frozenset({"Lambda_re", "Lambda_im", "log_step"})

    def __init__(
        self,
        width: int,
        *,
        P: int = 64,
        J: int = 1,
        conj_sym: bool = True,
        C_init: Callable[..., Complex[Array, "h p"]] = lecun_normal,
        discretization: Callable[..., tuple[Array, Array]] = zoh,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        step_rescale: float = 1.0,
        clip_eigs: bool = False,
        bidirectional: bool = False,
        activation: Callable[[Array], Array] = tanh_gelu,
        dropout: float = 0.0,
        output: Callable[..., nnx.Module] | None = HalfGLU1,
        rngs: nnx.Rngs,
    ):
        if J < 1 or P < 1 or P % J or (conj_sym and P // J % 2):
            even = " of even size: they hold conjugate pairs" if conj_sym else ""
            raise ValueError(f"P is {P}, J is {J}: P must divide into J blocks{even}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}: it must be in [0, 1)")
        self.width, self.conj_sym, self.discretization = width, conj_sym, discretization
        self.step_rescale, self.clip_eigs, self.bidirectional = step_rescale, clip_eigs, bidirectional
        self.activation, self.rate = activation, dropout
        self.supports = frozenset({"reset"}) if bidirectional else CAPABILITIES

        Lambda, V = blocks(P, J, conj_sym)
        self.Lambda_re = nnx.Param(jnp.asarray(Lambda.real, jnp.float32))
        self.Lambda_im = nnx.Param(jnp.asarray(Lambda.imag, jnp.float32))
        V = jnp.asarray(V, jnp.complex64)
        self.B = nnx.Param(_parts(V.conj().T @ _lecun_normal()(rngs.params(), (P, width))))
        C = [C_init(rngs.params(), width, V) for _ in range(2 if bidirectional else 1)]
        self.C = nnx.Param(_parts(jnp.stack(C)))
        self.D = nnx.Param(jax.random.normal(rngs.params(), (width,)))
        self.log_step = nnx.Param(log_uniform((len(Lambda),), dt_min, dt_max, rngs=rngs))
        self.output = None if output is None else output(width, rngs=rngs)

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """The state: a Pair of (b, p) float32. Nothing depends on capacity."""
        self._refuse_if_bidirectional(True)
        shape = (batch, self.Lambda_re.shape[0])
        return Pair(jnp.zeros(shape), jnp.zeros(shape))

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        self._refuse_if_bidirectional(carry is not None)
        u = x if ctx.valid is None else jnp.where(ctx.valid[..., None], x, 0)
        Lambda, B = self.discretise()
        scan = partial(linear_scan, pair(Lambda), project_in(B, u), reset=ctx.reset, valid=ctx.valid, axes=ctx.axes)
        states, carry = scan(carry)
        C = self.C[...] * (2 if self.conj_sym else 1)
        y = project_out(C[0], states) + self.D[...].astype(x.dtype)[None, None] * u
        if self.bidirectional:
            states, _ = scan(reverse=True)
            y, carry = y + project_out(C[1], states), ()
        y = gated(y, ctx, activation=self.activation, dropout_rate=self.rate, output=self.output)
        return Out(y, carry, {})

    def discretise(self) -> tuple[Complex[Array, "p"], Complex[Array, "p h"]]:
        """(Λ̄, B̄) from the parameters."""
        real = jnp.minimum(self.Lambda_re[...], -1e-4) if self.clip_eigs else self.Lambda_re[...]
        Lambda = jax.lax.complex(real, self.Lambda_im[...])
        B = self.B[...].astype(jnp.float32)
        dt = self.step_rescale * jnp.exp(self.log_step[...])
        log_Lambda, B = self.discretization(Lambda[:, None], jax.lax.complex(B[..., 0], B[..., 1]), dt)
        return jnp.exp(log_Lambda[:, 0]), B

    def _refuse_if_bidirectional(self, asked: bool) -> None:
        if self.bidirectional and asked:
            raise Unsupported(self, "carry", "bidirectional=True also runs from the end of the whole sequence")


def project_in(B: Complex[Array, "p h"], u: Float[Array, "b t h"]) -> Pair:
    """B u, by one real matmul."""
    both = jnp.concatenate((B.real, B.imag)).astype(u.dtype)
    return Pair(*jnp.split(jnp.einsum("bth,ph->btp", u, both), 2, axis=-1))


def project_out(C: Float[Array, "h p 2"], x: Pair) -> Float[Array, "b t h"]:
    """Re(C x), by one real matmul."""
    both = jnp.concatenate((C[..., 0], -C[..., 1]), axis=1).astype(x.re.dtype)
    return jnp.einsum("btp,hp->bth", jnp.concatenate((x.re, x.im), axis=-1), both)


def _parts(z: Complex[Array, "..."]) -> Float[Array, "... 2"]:
    return jnp.stack((z.real, z.imag), axis=-1)
