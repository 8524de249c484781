"""Softmax attention whose weights are dropped: what Transformers with attention dropout train with.

    o_q = sum_k m_qk / (1 - rate) exp(s_qk - lse_q) v_k          m_qk = 1 with probability 1 - rate, else 0

The sum of the weights is taken before the dropout, so that parts over disjoint sets of keys still `merge`. Blocks of
queries come in turn and are formed again for the backward pass: O(t) memory, but all scores of a block at once, and
none of the speed of `kernels.attention`, which serves every call without dropout.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from longwave.kernels.attention import Mask
from longwave.kernels.attention.reference import Coordinates, einsum32, visible

BLOCK = 256  # queries at once, and fewer where their scores are more than
SCORES = 2**21  # of a row and head


def dropped_attention(
    q: Float[Array, "b tq h d"],
    k: Float[Array, "b tk kv d"],
    v: Float[Array, "b tk kv dv"],
    *,
    rate: float,
    key: PRNGKeyArray,
    reach: int | None = None,
    mask: Mask = Mask(),
    positions: tuple[Int[Array, "*b tq"] | None, Int[Array, "*b tk"] | None] = (None, None),
    segment_ids: tuple[Int[Array, "*b tq"] | None, Int[Array, "*b tk"] | None] = (None, None),
) -> tuple[Float[Array, "b tq h dv"], Float[Array, "b tq h"]]:
    """(output, log-sum-exp) as `kernels.attention.attention` gives them, with dropout of the weights.

    reach: keys and queries are the same tokens, and the mask shows none `reach` or more away: the others are not
        scored. None: all are.
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout = {rate}: expected at least 0 and less than 1")
    b, tq, _, d = q.shape
    tk, kv = k.shape[1:3]
    at = lambda positions, segments, t: Coordinates(
        jnp.broadcast_to(jnp.arange(t) if positions is None else positions, (b, t)),
        jnp.broadcast_to(jnp.zeros((), jnp.int32) if segments is None else segments, (b, t)),
    )
    c = min(BLOCK, tq)
    if reach is not None and c + 2 * reach >= tk:
        reach = None
    if reach is None:
        c = min(c, max(SCORES // tk, 1))
    n = -(-tq // c)
    margin = 0 if reach is None else reach - 1
    keys = tk if reach is None else c + 2 * margin  # that a block of queries may see
    # Padding: queries of segment -2 and keys of -1 see and are seen by none.
    queries = _padded((q, at(positions[0], segment_ids[0], tq)), 0, n * c - tq, -2)
    behind = margin + (0 if reach is None else n * c - tk)
    others = _padded((k, v, at(positions[1], segment_ids[1], tk)), margin, behind, -1)

    @jax.checkpoint
    def block(i: Int[Array, ""]) -> tuple[Array, Array]:
        take = lambda size, step: lambda x: lax.dynamic_slice_in_dim(x, i * step, size, axis=1)
        q, q_at = jax.tree.map(take(c, c), queries)
        k, v, k_at = jax.tree.map(take(keys, 0 if reach is None else c), others)
        q = rearrange(q, "b q (n g) d -> b q n g d", n=kv)
        s = d**-0.5 * einsum32("bqngd,bknd->bngqk", q, k)
        s = jnp.where(jnp.asarray(visible(mask, q_at, k_at))[:, None, None], s, -jnp.inf)
        m = lax.stop_gradient(jnp.max(s, -1, keepdims=True))
        p = jnp.exp(s - jnp.where(m == -jnp.inf, 0.0, m))
        l = p.sum(-1, keepdims=True)
        blind = l == 0
        l = jnp.where(blind, 1.0, l)
        keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate, p.shape)
        o = einsum32("bngqk,bknd->bqngd", jnp.where(keep, p / (l * (1 - rate)), 0.0), v)
        lse = jnp.where(blind, -jnp.inf, jnp.where(blind, 0.0, m) + jnp.log(l))[..., 0]
        return rearrange(o, "b q n g d -> b q (n g) d").astype(v.dtype), rearrange(lse, "b n g q -> b q (n g)")

    in_time = lambda x: rearrange(x, "i b c ... -> b (i c) ...")[:, :tq]
    o, lse = lax.map(block, jnp.arange(n))
    return in_time(o), in_time(lse)


def _padded(arrays: tuple, before: int, after: int, segment: int) -> tuple:
    """Along time; by zeros, and by the given segment."""
    *values, at = arrays
    pad = lambda x, fill=0: jnp.pad(
        x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2), constant_values=jnp.asarray(fill, x.dtype)
    )
    return (*map(pad, values), Coordinates(pad(at.position), pad(at.segment, segment)))
