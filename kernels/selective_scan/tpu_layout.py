"""What the TPU kernels forward and backward have in common: blocks, desks, and the steps around the recurrence.

A block is up to 128 tokens of up to 4,096 channels. The n states of 128 channels at one time are one value (n, 128):
states in sublanes, channels in lanes. What a token gives all states of its channels (delta, delta x) is a row of a
desk, loaded into all sublanes at once. What it gives all channels (B, C) must stand in all lanes, and is spread there
by a product with ones on the otherwise idle matrix unit, once for all channels of a block. That is exact: a number of
bfloat16 is one part, of float32 three.

A sum over states goes through memory too: the eight sublanes of a token's value are laid down 9 rows from the next
token's, and read back with stride 9, one sublane of eight tokens at a time. So seven additions sum eight tokens, and
what they give is a tile as the output has it. (Stride 8 would meet the same bank of memory eight times.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from longwave.kernels.selective_scan.reference import SPAN

SUBLANES, LANES = 8, 128
TILE = 32  # tokens at a time
SKEW = SUBLANES + 1
UNROLL: int | bool = True  # false where a kernel is interpreted, which is quick to run but slow to compile
RESET, VALID = 1, 2  # bits of a token's flags
LOG2E = math.log2(math.e)
VMEM_LIMIT = 48 * 2**20


class Plan(NamedTuple):
    """tokens, tiles (of 128 channels): of a block.  group: tiles whose recurrences advance side by side.

    b, t, d, n: of the arrays, whole blocks and sublanes.
    """

    b: int
    t: int
    d: int
    n: int
    tokens: int
    tiles: int
    group: int

    @classmethod
    def of(cls, b: int, t: int, d: int, n: int, most: int) -> Plan:
        """most: states of 128 channels in a block."""
        n = _up(n, SUBLANES)
        tokens = min(SPAN, _up(t, TILE))
        tiles = pl.cdiv(d, LANES)
        group = max(1, min(4, tiles, 64 // n))  # registers: 8 for states, and as many for A
        blocks = pl.cdiv(tiles, max(group, most // n))
        if b * blocks == 1 and tiles >= 4 * group:
            blocks = 2  # chips with two cores
        own = _up(pl.cdiv(tiles, blocks), group)
        return cls(b, _up(t, tokens), own * blocks * LANES, n, tokens, own, group)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.b, self.d // (self.tiles * LANES), self.t // self.tokens

    @property
    def trips(self) -> tuple[int, int]:
        """Of the loops over a block's tokens and over its groups of channels."""
        return self.tokens // TILE, self.tiles // self.group

    def desk(self) -> Any:
        """A float32 number for each token and channel of a block."""
        return pltpu.VMEM((self.tiles, self.tokens, LANES), jnp.float32)

    def spread(self) -> Any:
        """A float32 number for each token and state, in all lanes."""
        return pltpu.VMEM((self.tokens, self.n, LANES), jnp.float32)

    def sums(self) -> Any:
        return pltpu.VMEM((self.group * SKEW * TILE, LANES), jnp.float32)


class Reads(NamedTuple):
    """Blocks: x, dt, z (tokens, channels); B, C (tokens, parts n); A (n, channels), times log2(e); D, dt_bias (1,
    channels); flags (1, 128); state (n, channels). Backward also dy, as x, and dfinal, as state.
    """

    x: Any
    dt: Any
    z: Any
    B: Any
    C: Any
    A: Any
    D: Any
    dt_bias: Any
    flags: Any
    state: Any
    dy: Any = None
    dfinal: Any = None


def specs(reads: Reads, plan: Plan, span: Callable[[Any], Any]) -> Reads:
    """Their blocks. span: grid index -> span. The states of backward are those before each span."""
    wide = plan.tiles * LANES
    token = pl.BlockSpec((None, plan.tokens, wide), lambda i, j, k: (i, span(k), j))
    still = pl.BlockSpec((None, plan.n, wide), lambda i, j, k: (i, 0, j))
    row = pl.BlockSpec((1, wide), lambda i, j, k: (0, j))
    saved = pl.BlockSpec((None, None, plan.n, wide), lambda i, j, k: (i, span(k), 0, j))
    narrow = lambda v: pl.BlockSpec((None, plan.tokens, v.shape[2]), lambda i, j, k: (i, span(k), 0))
    by_name = Reads(
        x=token,
        dt=token,
        z=token,
        B=narrow(reads.B),
        C=narrow(reads.C),
        A=pl.BlockSpec((plan.n, wide), lambda i, j, k: (0, j)),
        D=row,
        dt_bias=row,
        flags=pl.BlockSpec((None, 1, SPAN), lambda i, j, k: (i, 0, span(k))),
        state=saved if reads.state.ndim == 4 else still,
        dy=token,
        dfinal=still,
    )
    return Reads(*(None if v is None else spec for v, spec in zip(reads, by_name, strict=True)))


# Inside of a kernel


def each_token(body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`body(k, carry)` for the tokens of a tile one after the other, as one piece of code."""
    return jax.lax.fori_loop(0, TILE, body, carry, unroll=UNROLL)


def tile(i: Any) -> Any:
    """The i-th tile of tokens."""
    return pl.ds(pl.multiple_of(i * TILE, TILE), TILE)


def lane(j: Any) -> Any:
    """The j-th 128 channels of a block."""
    return pl.ds(j * LANES if isinstance(j, int) else pl.multiple_of(j * LANES, LANES), LANES)


def row(ref: Any, *index: Any, n: int) -> Array:
    """A token's row, in n sublanes."""
    return jnp.broadcast_to(ref[index][None], (n, ref.shape[-1]))


def lay_flags(flags: Any, marks: Any) -> None:
    """Flags that stand side by side, one below the other, each 128 times."""
    if marks is not None:
        marks[:] = jnp.broadcast_to(flags[:], (SPAN, LANES)).T


def has(marks: Array, bit: int) -> Array:
    """Whether tokens have this flag, in all lanes."""
    return marks & bit != 0


def prepare(i: Any, reads: Reads, desks: Any, plan: Plan, tiles: Callable[[Any, int], None]) -> None:
    """B and C of a tile of tokens on their desks, and `tiles(rows, j)` for all channels, which it says what to do with.

    By turns, a few of each: so the compiler has something to do while the matrix unit works.
    """
    turns = 4
    count = TILE // turns
    for turn in range(turns):
        first = i * TILE + turn * count
        _spread(first, count, reads.B, desks.B)
        _spread(first, count, reads.C, desks.C)
        for j in range(turn, plan.tiles, turns):
            tiles(tile(i), j)


def _spread(first: Any, count: int, parts: Any, to: Any) -> None:
    """The n numbers of some tokens, in all lanes: each alone in a row, times ones."""
    n, width = to.shape[1], parts.shape[1]
    state, column = (jax.lax.broadcasted_iota(jnp.int32, (n, width), axis) for axis in (0, 1))
    own = jax.lax.rem(column, n) == state
    alone = jnp.where(own[None], parts[pl.ds(first, count)][:, None], 0.0).reshape(count * n, width)
    ones = jnp.ones((width, LANES), jnp.bfloat16)
    spread = jnp.dot(alone.astype(jnp.bfloat16), ones, preferred_element_type=jnp.float32)
    to[pl.ds(first, count)] = spread.reshape(count, n, LANES)


def step_size(v: Float[Array, "..."], softplus: bool) -> Float[Array, "..."]:
    return jnp.maximum(v, 0.0) + jnp.log1p(jnp.exp2(-LOG2E * jnp.abs(v))) if softplus else v


def read(ref: Any, rows: Any, j: Any) -> Float[Array, "tile 128"]:
    return ref[rows, lane(j)].astype(jnp.float32)


def raw_step(reads: Reads, rows: Any, j: Any) -> Float[Array, "tile 128"]:
    """What the step size is the softplus of."""
    v = read(reads.dt, rows, j)
    return v if reads.dt_bias is None else v + reads.dt_bias[:, lane(j)]


def lay_steps(rows: Any, j: int, reads: Reads, desks: Any, *, softplus: bool) -> None:
    """delta and u = delta x of a tile; 0 where a token is invalid."""
    size = step_size(raw_step(reads, rows, j), softplus)
    into = size * read(reads.x, rows, j)
    if desks.marks is not None:
        valid = has(desks.marks[rows], VALID)
        size, into = jnp.where(valid, size, 0.0), jnp.where(valid, into, 0.0)
    desks.delta[j, rows], desks.u[j, rows] = size, into


def fold(value: Float[Array, "n 128"]) -> Float[Array, "8 128"]:
    """Its sublanes summed to eight."""
    total = value[:SUBLANES]
    for s in range(SUBLANES, value.shape[0], SUBLANES):
        total = total + value[s : s + SUBLANES]
    return total


def lay_down(sums: Any, j: int, k: Any, value: Float[Array, "n 128"]) -> None:
    """The value of token k of a tile, to be summed over states."""
    sums[pl.ds(SKEW * (j * TILE + k), SUBLANES)] = fold(value)


def summed(sums: Any, j: int) -> Float[Array, "tile 128"]:
    """The sums over states of what was laid down for a tile of tokens."""
    found = []
    for first in range(SKEW * j * TILE, SKEW * (j + 1) * TILE, SKEW * SUBLANES):
        eighths = [sums[pl.ds(first + s, SUBLANES, stride=SKEW)] for s in range(SUBLANES)]
        found.append(sum(eighths[1:], start=eighths[0]))
    return jnp.concatenate(found)


def _up(size: int, whole: int) -> int:
    return -(-size // whole) * whole
