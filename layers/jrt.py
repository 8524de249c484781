"""JRT-RNN's prefix linear attention (Arora et al., 2024, "Just read twice: closing the recall gap for recurrent
language models", arXiv:2407.05483, Section 4).

Based with an encoder: the first M tokens of a document are also read without order, by keys and values of their own.
Every query of the document meets that sum, those among the first M too:

    S_t = Σ_{i<=t} φ(k_i) v_i' + Σ_{i<=M} φ(k^e_i) v^e_i'        z_t = Σ_{i<=t} φ(k_i) + Σ_{i<=M} φ(k^e_i)
    y_t = W_out concat_h (S_t' φ(q_t)) / (z_t' φ(q_t) + eps)

So the order in which facts stand in a prefix matters less; behind it the layer is a recurrence that began at a state.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longwave.kernels.linear_attention import linear_attention
from longwave.layers.attention import places
from longwave.layers.based import taylor
from longwave.layers.bidirectional import mirror, mirror_index
from longwave.layers.heads import channels, join, masks, split
from longwave.layers.linear import linear
from longwave.layers.mamba import at_least_one, unpadded
from longwave.layers.mixer import Carry, Context, Mixer, Out, Unsupported


class JRT(Mixer):
    """Prefix linear attention with Taylor features.

    prefix:      M. A document's prefix are its first M tokens, or as many as the call in which it begins has of it.
    feature_dim: dimensions of a head's queries and keys before φ; its values have width / heads.
    eps:         of the division.

    Inside the prefix a token sees those behind it: neither causality nor a carry at any split can be promised, and
    `init_carry` raises. But the carry that a call returns goes on exactly as the paper generates: the prompt, read in
    one call, is the prefix, and what follows is causal. It is the sum of φ(k) v' and its sum of φ(k) as a last column,
    both with those of the encoder, float32, (b, heads, 1 + d + d², width / heads + 1).
    """

    supports = frozenset({"reset"})

    def __init__(
        self,
        width: int,
        *,
        heads: int = 16,
        prefix: int = 1024,
        feature_dim: int = 16,
        eps: float = 1e-12,
        rngs: nnx.Rngs,
    ):
        size = channels(self, width, 1, heads, "1")
        at_least_one(self, prefix=prefix, feature_dim=feature_dim)
        self.heads, self.V, self.prefix, self.eps = heads, size // heads, prefix, eps
        self.q, self.k, self.k_e = (linear(width, heads * feature_dim, bias=False, rngs=rngs) for _ in range(3))
        self.v, self.v_e, self.out = (linear(width, size, bias=False, rngs=rngs) for _ in range(3))

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        raise Unsupported(self, "carry", "a prefix is read in one call; the carry that it returns goes on from there")

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        if carry is not None and not isinstance(carry, jax.Array):
            raise Unsupported(self, "carry", "it goes on only from the carry of an earlier call")
        u = unpadded(x, ctx)
        if ctx.reset is None:
            start = self._summary(u, ctx) if carry is None else carry  # a carried document has had its prefix
            o, state = linear_attention(*self._causal(u), state=start, **masks(ctx))
        else:
            o, state = self._of_documents(u, carry, ctx)
        o = o.astype(jnp.float32)
        o = (o[..., :-1] / (o[..., -1:] + self.eps)).astype(x.dtype)
        return Out(unpadded(self.out(join(o)), ctx), state, {})

    def _causal(self, u: Float[Array, "b t d"]) -> tuple[Array, Array, Array]:
        q, k, v = (split(f(u), self.heads) for f in (self.q, self.k, self.v))
        return taylor(q), taylor(k), with_ones(v)

    def _encoder(self, u: Float[Array, "b t d"]) -> tuple[Array, Array]:
        k, v = (split(f(u), self.heads) for f in (self.k_e, self.v_e))
        return taylor(k), with_ones(v)

    def _encoded(self, u: Float[Array, "b t d"], ctx: Context, first: int) -> Float[Array, "b t h"]:
        """1 on the tokens of prefixes, of the documents from number `first` on."""
        b, t, _ = u.shape
        at = places(jnp.zeros(b, jnp.int32), t, ctx)
        there = (at.position < self.prefix) & (at.segment >= first)
        return jnp.broadcast_to(there[..., None], (b, t, self.heads)).astype(jnp.float32)

    def _summary(self, u: Float[Array, "b t d"], ctx: Context) -> Float[Array, "b h K V"]:
        """The encoder's sum over the prefix of each row, which is one document."""
        if ctx.valid is None:
            u = u[:, : self.prefix]
        k, v = self._encoder(u)
        w = self._encoded(u, ctx, 0)[..., None].astype(v.dtype)
        return jnp.einsum("bthk,bthv->bhkv", k, w * v, preferred_element_type=jnp.float32)

    def _of_documents(self, u: Float[Array, "b t d"], carry: Carry | None, ctx: Context) -> tuple[Array, Array]:
        """Packed documents: a token meets what its own prefix has before it and, in the mirror, behind it."""
        index, w = mirror_index(ctx, *u.shape[:2]), self._encoded(u, ctx, 0 if carry is None else 1)
        q, k, v = self._causal(u)
        k_e, v_e = self._encoder(u)
        o, state = linear_attention(q, k, v, state=carry, **masks(ctx))
        before, last = linear_attention(q, k_e, v_e, w=w, **masks(ctx))
        back = mirror(u, index)
        behind, _ = linear_attention(
            taylor(split(self.q(back), self.heads)), *self._encoder(back), w=mirror(w, index), **masks(ctx)
        )
        own = jnp.sum(q * k_e, -1, keepdims=True) * w[..., None].astype(v.dtype) * v_e  # is in both
        behind = split(mirror(join(behind), index), self.heads)
        o, before, behind, own = (m.astype(jnp.float32) for m in (o, before, behind, own))
        return o + before + behind - own, state + last


def with_ones(v: Float[Array, "b t h V"]) -> Float[Array, "b t h V+1"]:
    """The values with the column whose sum the division needs."""
    return jnp.concatenate((v, jnp.ones_like(v[..., :1])), -1)
