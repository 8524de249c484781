"""The erase gate (delta rule) in chunks: tokens that see what those before them have just written.

A token writes u_i = w_i v_i - S''(beta_i k_i), S' its decayed state, which holds the chunk's earlier u. In a chunk that
S enters these are the rows of

    (I + L) u = w v - E S        L_ij = (beta_i k_i exp(b_i - b_j)) . k_j   (j < i)        E_i = beta_i k_i exp(b_i)

so that beta k reads as q does, strictly before itself: `decay.py` makes L and E as it makes A and enter q. With
X = (I + L)^-1, U = X w v and W = X E the walk over the chunks is

    u = U - W S        S <- fade S + (leave k)' u

and backward, with du0 = A' do and what reads of the chunk alone give to S, D = q' (enter do),

    du = du0 + (leave k) dS        dS <- fade dS + D - W' du

two products each, the same with the roles of W and leave k exchanged. All else is side by side: y = w v - E S has the
gradient dy = X' du, and to the reads of beta k, L u and E S, comes -dy as do comes to those of q. No gradient of X is
ever formed.

X comes from substitution in blocks of 8 tokens and from [[P, 0], [R, Q]]^-1 = [[P^-1, 0], [-Q^-1 R P^-1, Q^-1]] above,
in float32. Its power series (products of I + L^(2^i)) is never used: for repeated keys its terms outgrow float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from longwave.kernels.attention.reference import einsum32
from longwave.kernels.linear_attention import decay

BLOCK = 8  # tokens: up to here substitution, on all blocks at once


class Erase(NamedTuple):
    """X: (I + L)^-1.  W: X E.  left: leave k."""

    X: Float[Array, "n G c c"]
    W: Float[Array, "n G c K"]
    left: Float[Array, "n G c K"]


def erase(reads: decay.Reads) -> Erase:
    """Of reads by q and by beta k."""
    X = inverse(jnp.tril(reads.A[1][:, :, 0], -1))
    return Erase(X, _exact(X, _scaled(reads.q[1], reads.enter)), _scaled(reads.k, reads.leave))


def _scaled(x: Float[Array, "n G c K"], factor: Float[Array, "n G 1 c"] | None) -> Float[Array, "n G c K"]:
    return x.astype(jnp.float32) if factor is None else x * factor[:, :, 0, :, None]


class Link(NamedTuple):
    """What a chunk adds to the state S that passes it by: local + write' u, with u + read S in the place of u.

    Without an erase gate it is `local` alone, and the others are None. `local` may have axes of length 1.
    """

    local: Float[Array, "*n G K V"]
    u: Float[Array, "*n G c V"] | None = None
    read: Float[Array, "*n G c K"] | None = None
    write: Float[Array, "*n G c K"] | None = None

    def __call__(self, S: Float[Array, "G K V"]) -> tuple[Float[Array, "G K V"], Float[Array, "G c V"] | None]:
        """(what is added, u + read S)."""
        if self.u is None or self.read is None or self.write is None:
            return self.local, None
        u = self.u + einsum32("gck,gkv->gcv", self.read, S)
        return self.local + einsum32("gck,gcv->gkv", self.write, u), u


def onwards(of: Erase, u: Float[Array, "n G c V"]) -> Link:
    """The chunks' links, from u = w v."""
    return Link(jnp.zeros((len(u), 1, 1, 1)), _exact(of.X, u), -of.W, of.left)


def backwards(of: Erase, dlocal: Float[Array, "n G K V"], du: Float[Array, "n G c V"]) -> Link:
    """Those of the gradient, from what reads of the chunk alone give to S and to u."""
    return Link(dlocal, du, of.left, -of.W)


def unsolved(of: Erase, du: Float[Array, "n G c V"]) -> Float[Array, "n G c V"]:
    """dy."""
    return _exact(jnp.swapaxes(of.X, -1, -2), du)


def inverse(L: Float[Array, "n G c c"]) -> Float[Array, "n G c c"]:
    """(I + L)^-1 of L strictly below its diagonal. c is a power of two."""
    c = L.shape[-1]
    chunks = L.reshape(-1, c, c)
    m = min(BLOCK, c)
    X = _substituted(_blocks(chunks, m, 0))
    while m < c:
        first, second = X[0::2], X[1::2]
        low = -_exact(second, _exact(_blocks(chunks, m, m), first))
        X = jnp.concatenate((jnp.pad(first, [(0, 0), (0, 0), (0, m)]), jnp.concatenate((low, second), -1)), -2)
        m *= 2
    return X.reshape(L.shape)


def _blocks(L: Float[Array, "N c c"], m: int, below: int) -> Float[Array, "Ns m m"]:
    """Those on the diagonal (below = 0), or each second one's left neighbour (below = m)."""
    starts = range(below, L.shape[-1], m + below)
    return jnp.stack([L[:, i : i + m, i - below : i - below + m] for i in starts], 1).reshape(-1, m, m)


def _substituted(L: Float[Array, "N m m"]) -> Float[Array, "N m m"]:
    """Row after row of the inverse; the blocks lie along the last axis, which vectors are made of."""
    m = L.shape[-1]
    L = jnp.moveaxis(L, 0, -1)
    rows: list[Array] = []
    for i, unit in enumerate(jnp.eye(m)[..., None]):
        rows.append(jnp.broadcast_to(unit, L[0].shape))
        for j in range(i):
            rows[i] = rows[i] - L[i, j][None] * rows[j]
    return jnp.moveaxis(jnp.stack(rows), -1, 0)


def _exact(a: Float[Array, "... i j"], b: Float[Array, "... j k"]) -> Float[Array, "... i k"]:
    return jnp.matmul(a, b.astype(jnp.float32), precision=lax.Precision.HIGHEST)
