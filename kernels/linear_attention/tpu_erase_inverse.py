"""The kernel that an erase gate adds on TPUs: the inverse of every chunk's triangle, all chunks side by side.

    Y = (I + M)^-1        M_ji = beta_i k_j k_i E_ji for j < i

(j, the token that wrote, in sublanes, and i, the one that erases, in lanes; E as in `tpu_forward.py`). What the tokens
of a chunk write is then u = r Y with r = w v - beta e^b k S: the walk over chunks only multiplies.

Blocks of 16 tokens on the diagonal lie side by side in lanes and are solved by substitution, row by row from the
last; they are merged into blocks of twice the length, [[A, -A M B], [0, B]], by products of float32 in full precision.
A sum of powers of M would be faster and wrong: where keys repeat, the powers grow past every digit.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from longwave.kernels.linear_attention.tpu_gates import NN, NT, Matrix, decays, gates, parts, times, visible
from longwave.kernels.linear_attention.tpu_layout import VMEM_LIMIT, Plan

BASE = 16  # tokens of a block that is solved by substitution
TOGETHER = 4  # chunks in one stretch of code, at most


class Refs(NamedTuple):
    k: Any  # (1, tokens, K)
    rows: Any  # (1, 1, gates, tokens)
    starts: Any  # (1, 1, tokens), or None


def call(plan: Plan, *arrays: Array | None) -> Float[Array, "b h T chunk"]:
    """Of each head and chunk Y, one below the other. arrays: as `Refs`."""
    specs, given = plan.specs(), Refs(*arrays)
    ins = Refs(specs.keys(), specs.rows(), specs.starts())
    return pl.pallas_call(
        lambda refs, out: _kernel(plan, refs, out),
        grid=plan.grid,
        in_specs=(Refs(*(None if x is None else spec for x, spec in zip(given, ins, strict=True))),),
        out_specs=specs.inverses(),
        out_shape=jax.ShapeDtypeStruct((plan.b, plan.h, plan.n * plan.tokens, plan.chunk), plan.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=cost(plan),
        name="linear_attention_inverse",
    )(given)


def flops(plan: Plan) -> int:
    """Of half the products of keys and of the substitution."""
    return plan.b * plan.t * plan.h * plan.chunk * (plan.K + plan.chunk // 3)


def cost(plan: Plan) -> pl.CostEstimate:
    tokens = plan.b * plan.n * plan.tokens
    return pl.CostEstimate(
        flops=flops(plan),
        transcendentals=tokens * plan.h * plan.chunk * plan.decay,
        bytes_accessed=tokens * (plan.groups * plan.wide_k + plan.h * plan.chunk) * plan.dtype.itemsize,
    )


def together(plan: Plan) -> int:
    return max(n for n in range(1, TOGETHER + 1) if plan.chunks % n == 0)


def _kernel(plan: Plan, refs: Refs, out: Any) -> None:
    side = together(plan)

    def visit(n: Any, _: None) -> None:
        starts = [pl.multiple_of((n * side + x) * plan.chunk, plan.chunk) for x in range(side)]
        at = [pl.ds(start, plan.chunk) for start in starts]
        found = inverses([triangle(plan, refs, tokens) for tokens in at])
        for tokens, Y in zip(at, found, strict=True):
            out[0, 0, tokens] = Y.astype(out.dtype)

    lax.fori_loop(0, plan.chunks // side, visit, None, unroll=plan.chunks == side)


def triangle(plan: Plan, refs: Refs, at: Any) -> Matrix:
    """M of a chunk."""
    k, starts = refs.k[0, at], None if refs.starts is None else refs.starts[0, :, at]
    found = gates(plan, refs.rows, starts, 0, at)
    (part,) = parts(plan)
    (E,) = decays(plan, found)
    return visible(times(times(exact(k, k, NT), E), found.erase), part, starts, strictly=True)


def exact(a: Array, b: Array, dimensions: Any) -> Float[Array, "m n"]:
    """A product with no rounding of its operands."""
    how = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dimensions, precision=how, preferred_element_type=jnp.float32)


def inverses(M: list[Matrix]) -> list[Matrix]:
    """(I + M)^-1 of strictly upper triangular matrices, in step: one waits where another computes."""
    size, of = len(M[0]), BASE
    Y = [_spread(blocks, size) for blocks in _solved(jnp.stack([_gathered(x, of) for x in M]))]
    while of < size:
        halves = [_halves(y, of) for y in Y]
        beside = [exact(_beside(x, of), y, NN) for x, y in zip(M, Y, strict=True)]
        beside = [
            exact(first, _woven(x, jnp.zeros_like(x), of), NN) for x, (first, _) in zip(beside, halves, strict=True)
        ]
        Y = [_woven(first - x, second, of) for x, (first, second) in zip(beside, halves, strict=True)]
        of *= 2
    return Y


def _beside(M: Matrix, of: int) -> Float[Array, "half lanes"]:
    """Its rows of the first of every two blocks, where they stand over the second."""
    first, _ = _halves(M, of)
    row, lane = (lax.div(lax.broadcasted_iota(jnp.int32, first.shape, n), jnp.int32(of)) for n in (0, 1))
    return jnp.where(lane == 2 * row + 1, first, 0)


def _halves(x: Matrix, of: int) -> tuple[Float[Array, "half lanes"], Float[Array, "half lanes"]]:
    """Rows of the first of every two blocks, and of the second."""
    first, second = ([x[n : n + of] for n in range(start, len(x), 2 * of)] for start in (0, of))
    return jnp.concatenate(first), jnp.concatenate(second)


def _woven(first: Float[Array, "half lanes"], second: Float[Array, "half lanes"], of: int) -> Matrix:
    """The other way round."""
    return jnp.concatenate([x[n : n + of] for n in range(0, len(first), of) for x in (first, second)])


def _gathered(M: Matrix, of: int) -> Float[Array, "of lanes"]:
    """The blocks on the diagonal, side by side."""
    lane = lax.div(lax.broadcasted_iota(jnp.int32, (of, len(M)), 1), jnp.int32(of))
    blocks = [M[n : n + of] for n in range(0, len(M), of)]
    return reduce(lambda found, n: jnp.where(lane == n, blocks[n], found), range(1, len(blocks)), blocks[0])


def _spread(blocks: Float[Array, "of lanes"], size: int) -> Matrix:
    """The other way round, with 0 beside them."""
    of = len(blocks)
    lane = lax.div(lax.broadcasted_iota(jnp.int32, blocks.shape, 1), jnp.int32(of))
    return jnp.concatenate([jnp.where(lane == n, blocks, 0) for n in range(size // of)])


def _solved(M: Float[Array, "n of lanes"]) -> Float[Array, "n of lanes"]:
    """The inverses of I + M of blocks side by side: y_j = e_j - sum of M_ji y_i over i > j."""
    n, of, lanes = M.shape
    rows = M.reshape(n * of, lanes)
    place = lambda shape: lax.rem(lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1), jnp.int32(of))
    start = lax.broadcasted_iota(jnp.int32, rows.shape, 1) - place(rows.shape)
    Y = (lax.broadcasted_iota(jnp.int32, M.shape, 1) == place(M.shape)).astype(jnp.float32)
    for i in reversed(range(1, of)):
        column = jnp.take_along_axis(rows, start + i, axis=1, mode="promise_in_bounds")
        Y = Y - column.reshape(M.shape) * Y[:, i : i + 1]
    return Y
