"""Aaren (Feng et al., 2024, "Attention as an RNN", arXiv:2405.13956): attention whose queries are learned constants.

    k_t, v_t = W_k x_t, W_v x_t        s_t = q . k_t / sqrt(P)        q: a vector a head
    y_t = W_out concat_h sum_{j<=t} exp(s_j) v_j / sum_{j<=t} exp(s_j)

A query that is the same at all times makes the softmax a recurrence in (m, u, w): the maximum of the scores, and in
units of exp(m) the sums of exp(s_j) and of exp(s_j) v_j. It is mLSTM's memory with keys 1, i = s, and no forgetting.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longwave.kernels.attention.reference import einsum32
from longwave.kernels.mlstm import empty, mlstm
from longwave.layers.heads import join, masks, split
from longwave.layers.linear import MakeLinear, lecun
from longwave.layers.mamba import at_least_one, unpadded
from longwave.layers.mixer import Carry, Context, Mixer, Out


class Aaren(Mixer):
    """Softmax over all earlier tokens with a learned query for each head.

    heads:  of width / heads channels each.
    bias:   of the three projections.      linear: their constructor: how they are initialised.

    q starts N(0, 1). The paper's layer takes q through a matrix too, which would only be another name for the product.
    The carry is `kernels.mlstm.State`, float32: of every head w (1, P), u (1) and m.
    """

    roles: ClassVar[dict[str, str]] = {"q": "embed"}

    def __init__(self, width: int, *, heads: int = 8, bias: bool = False, linear: MakeLinear = lecun, rngs: nnx.Rngs):
        at_least_one(self, heads=heads)
        if width % heads:
            raise ValueError(f"Aaren.heads = {heads} must divide the width {width}")
        self.q = nnx.Param(jax.random.normal(rngs.params(), (heads, width // heads)))
        self.k, self.v, self.out = (linear(width, width, bias=bias, rngs=rngs) for _ in range(3))

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """Sums of nothing. Nothing depends on capacity."""
        heads, P = self.q.shape
        return empty(batch, heads, 1, P)

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        heads, P = self.q.shape
        u = unpadded(x, ctx)
        k, v = (split(f(u), heads) for f in (self.k, self.v))
        s = einsum32("bthp,hp->bth", k, self.q[...]) * P**-0.5
        ones = jnp.ones((*s.shape, 1), v.dtype)
        o, carry = mlstm(ones, ones, v, s, plain=True, state=carry, **masks(ctx))
        y = self.out(join(o))
        return Out(unpadded(y, ctx), carry, {})
