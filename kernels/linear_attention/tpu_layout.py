"""How the TPU kernels of linear attention lay arrays out, and what one step of their grid holds.

Heads lie side by side in lanes, as projections make them: (b, t, h, V) is read as (b, t, h V), and nothing is moved.
Key heads are padded to whole tiles of 128 lanes. Value heads of 32 or 64 share one: a *slab* of lanes is a head, or
the heads of one tile. Gates, one number a token and head, lie along lanes: (b, h, decay and write, t).
Inside a kernel everything stands transposed, tokens in lanes: a gate is then a row that spreads over sublanes for
nothing, heads of 64 fill the matrix units that heads of 64 lanes would leave half empty, and sums over V are rows too.
A state stands as (V, K), the heads of a program below one another.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from longwave.kernels.linear_attention.reference import SPAN, Inputs

LANES = 128
WIDEST = 2048  # lanes of values that one program holds
WINDOWS = 24 * 2**20  # bytes of blocks that stream through VMEM, each buffered twice
VMEM_LIMIT = 48 * 2**20  # what the compiler may use in all
LOG2E = math.log2(math.e)
MOST = 8  # chunks of a grid step
NOTHING_LEFT = -104.0  # exp of it, and of all that is less, is 0 in float32


@dataclasses.dataclass(frozen=True)
class Plan:
    """b, t, h, K, V: as they come; groups: of heads that share q and k.    wide_k, wide_v: lanes of a head.

    heads: of one program.    chunk: tokens of a chunk; chunks: of a grid step.    n: steps along time.
    decay, write, erase, reset: whether there are such gates.    dtype: of what is multiplied.
    With an erase gate a program holds one head, and chunks are half as long: two of them share a saved state.
    """

    b: int
    t: int
    h: int
    K: int
    V: int
    groups: int
    wide_k: int
    wide_v: int
    heads: int
    chunk: int
    chunks: int
    n: int
    decay: bool
    write: bool
    erase: bool
    reset: bool
    scale: float
    dtype: Any

    @classmethod
    def of(cls, inputs: Inputs, scale: float, *, streams: int, segments: bool = False) -> Plan:
        """streams: arrays as wide as v that pass through, and as many as wide as q.

        segments: with states of segments a grid step is one span, which is of one of them.
        """
        (b, t, hq, K), hk, (h, V) = inputs.q.shape, inputs.k.shape[2], inputs.v.shape[2:]
        groups = math.lcm(hq, hk)
        share = h // groups
        erase = inputs.beta is not None
        folded = [wide for wide in (LANES // 4, LANES // 2) if wide >= V and share % (LANES // wide) == 0 and not erase]
        wide_k, wide_v = _whole(K), folded[0] if folded else _whole(V)
        fold = max(1, LANES // wide_v)
        fitting = [n for n in range(fold, share + 1, fold) if share % n == 0 and n * wide_v <= max(WIDEST, wide_v)]
        heads = 1 if erase else max(fitting)
        dtype = jnp.bfloat16 if {x.dtype for x in inputs[:3]} == {jnp.dtype("bfloat16")} else jnp.dtype("float32")
        span = min(SPAN, _whole(t))
        chunk = LANES if erase else span
        each = span // chunk
        total = each * -(-t // span)
        width = 2 * streams * (heads * wide_v + wide_k) * jnp.dtype(dtype).itemsize * chunk
        width += 2 * 4 * heads * wide_v * wide_k
        most = each if segments else max(each, min(MOST, WINDOWS // width))
        chunks = max(n for n in range(each, most + 1, each) if total % n == 0)
        gates = inputs.g is not None, inputs.w is not None, erase, inputs.reset is not None
        found = (chunk, chunks, total // chunks, *gates, scale, jnp.dtype(dtype))
        return cls(b, t, h, K, V, groups, wide_k, wide_v, heads, *found)

    @property
    def lanes(self) -> int:
        """Of a slab."""
        return max(self.wide_v, LANES)

    @property
    def fold(self) -> int:
        """Heads of a slab."""
        return self.lanes // self.wide_v

    @property
    def slabs(self) -> int:
        """Of a program."""
        return self.heads // self.fold

    @property
    def shares(self) -> int:
        """Programs that share q and k."""
        return self.h // self.groups // self.heads

    @property
    def tokens(self) -> int:
        """Of a grid step."""
        return self.chunks * self.chunk

    @property
    def gates(self) -> int:
        """Numbers a token and head."""
        return self.decay + self.write + self.erase

    @property
    def each(self) -> int:
        """Chunks of a saved state."""
        return min(SPAN, _whole(self.t)) // self.chunk

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.b, self.h // self.heads, self.n

    def together(self, chunks: int, slabs: int) -> tuple[int, int]:
        """How many chunks, or slabs of a chunk, at most these, have their code in one stretch."""
        if self.slabs > 1:
            return 1, max(n for n in range(1, slabs + 1) if self.slabs % n == 0)
        return max(n for n in range(1, chunks + 1) if self.chunks % n == 0), 1

    # Arrays

    def keys(self, x: Float[Array, "b t n K"]) -> Float[Array, "b T lanes"]:
        return self._padded(jnp.repeat(x, self.groups // x.shape[2], axis=2), self.wide_k)

    def values(self, x: Float[Array, "b t h V"]) -> Float[Array, "b T lanes"]:
        return self._padded(x, self.wide_v)

    def _padded(self, x: Float[Array, "b t n d"], wide: int) -> Float[Array, "b T lanes"]:
        extra = self.n * self.tokens - self.t, wide - x.shape[3]
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (0, extra[0]), (0, 0), (0, extra[1])))
        return x.reshape(self.b, -1, x.shape[2] * wide)

    def of_values(self, x: Float[Array, "b T lanes"]) -> Float[Array, "b t h V"]:
        return x.reshape(self.b, -1, self.h, self.wide_v)[:, : self.t, :, : self.V]

    def of_keys(self, x: Float[Array, "b T lanes"], like: Float[Array, "b t n K"]) -> Float[Array, "b t n K"]:
        """The sum over all that one head of `like` was given to."""
        x = x.reshape(self.b, -1, x.shape[2] // self.wide_k, self.wide_k)[:, : self.t, :, : self.K]
        shared = x.shape[2] // like.shape[2]
        if shared > 1:
            x = jnp.sum(x.reshape(*x.shape[:2], -1, shared, self.K).astype(jnp.float32), 3)
        return x.astype(like.dtype)

    def states(self, x: Float[Array, "*n h K V"]) -> Float[Array, "*n hV K"]:
        extra = ((0, self.wide_k - self.K), (0, self.wide_v - self.V))
        x = jnp.pad(x.astype(jnp.float32), ((0, 0),) * (x.ndim - 2) + extra).swapaxes(-1, -2)
        return x.reshape(*x.shape[:-3], -1, self.wide_k)

    def of_states(self, x: Float[Array, "*n hV K"]) -> Float[Array, "*n h K V"]:
        x = x.reshape(*x.shape[:-2], self.h, self.wide_v, self.wide_k)
        return x[..., : self.V, : self.K].swapaxes(-1, -2)

    def rows(self, inputs: Inputs) -> Float[Array, "b h gates T"] | None:
        """Of each token and head: the sum of log2 decays from its chunk's first token on, the write and the erase gate.

        Decays between tokens are differences of these sums: 24 bits of a sum of -1000 leave them right to 6e-5, which
        is less than bfloat16 products round off.
        """
        found = []
        if inputs.g is not None:
            g = inputs.g.astype(jnp.float32)
            g = g if inputs.reset is None else jnp.where(inputs.reset[..., None], 0, g)  # what it decays is cut
            found.append(LOG2E * jnp.cumsum(self._by_chunk(jnp.maximum(g, NOTHING_LEFT)), -1))
        found += [self._by_chunk(x.astype(jnp.float32)) for x in (inputs.w, inputs.beta) if x is not None]
        return jnp.stack(found, 2).reshape(self.b, self.h, self.gates, -1) if found else None

    def of_rows(self, rows: Float[Array, "b h gates T"], inputs: Inputs) -> tuple[Array | None, ...]:
        """The gradients of g, w and beta, from those of the sums of log decays (natural ones) and of the two gates."""
        whole = lambda x: jnp.swapaxes(x.reshape(self.b, self.h, -1), 1, 2)[:, : self.t]
        dg = dw = dbeta = None
        if inputs.g is not None:
            by_chunk = rows[:, :, 0].reshape(self.b, self.h, -1, self.chunk)
            dg = whole(jnp.flip(jnp.cumsum(jnp.flip(by_chunk, -1), -1), -1))
            dg = (dg if inputs.reset is None else jnp.where(inputs.reset[..., None], 0, dg)).astype(inputs.g.dtype)
        if inputs.w is not None:
            dw = whole(rows[:, :, int(self.decay)]).astype(inputs.w.dtype)
        if inputs.beta is not None:
            dbeta = whole(rows[:, :, -1]).astype(inputs.beta.dtype)
        return dg, dw, dbeta

    def starts(self, inputs: Inputs) -> Int[Array, "b 1 T"] | None:
        """Of each token the place in its chunk where its document starts; -1: before the chunk."""
        if inputs.reset is None:
            return None
        reset = self._by_chunk(inputs.reset[..., None])[:, 0]
        places = jnp.where(reset, jnp.arange(self.chunk)[None, None], -1)
        return jax.lax.cummax(places, axis=2).astype(jnp.int32).reshape(self.b, 1, -1)

    def of_steps(self, ids: Int[Array, "b t"]) -> Int[Array, "b n"]:
        """Of each grid step whose state it goes on with: padding with that before it, or where there is none behind it.

        In a row of padding the state that comes first passes by.
        """
        ids = ids[:, :: self.tokens].astype(jnp.int32)
        places = jnp.where(ids < 0, -1, jnp.arange(self.n)[None])
        before = jax.lax.cummax(places, axis=1)
        first = jnp.argmax(ids >= 0, axis=1, keepdims=True)
        return jnp.maximum(jnp.take_along_axis(ids, jnp.where(before < 0, first, before), axis=1), 0)

    def _by_chunk(self, x: Array) -> Float[Array, "b h n chunk"]:
        x = jnp.pad(x, ((0, 0), (0, self.n * self.tokens - self.t), (0, 0)))
        return jnp.swapaxes(x, 1, 2).reshape(self.b, x.shape[2], -1, self.chunk)

    # Blocks

    def specs(self, *, reverse: bool = False) -> Specs:
        return Specs(self, reverse)


@dataclasses.dataclass(frozen=True)
class Specs:
    """Blocks of a grid of (rows of the batch, programs, time). reverse: time runs backwards."""

    plan: Plan
    reverse: bool

    def _when(self, time: Any) -> Any:
        return self.plan.n - 1 - time if self.reverse else time

    def keys(self, *, shared: bool = True) -> pl.BlockSpec:
        """shared: one for all programs of a group; or each its own."""
        plan, shares = self.plan, self.plan.shares if shared else 1
        return pl.BlockSpec(
            (1, plan.tokens, plan.wide_k), lambda i, j, l, *_: (i, self._when(l), jax.lax.div(j, jnp.int32(shares)))
        )

    def values(self) -> pl.BlockSpec:
        plan = self.plan
        return pl.BlockSpec((1, plan.tokens, plan.heads * plan.wide_v), lambda i, j, l, *_: (i, self._when(l), j))

    def rows(self) -> pl.BlockSpec:
        plan = self.plan
        return pl.BlockSpec((1, plan.heads, plan.gates, plan.tokens), lambda i, j, l, *_: (i, j, 0, self._when(l)))

    def inverses(self) -> pl.BlockSpec:
        plan = self.plan
        return pl.BlockSpec((1, plan.heads, plan.tokens, plan.chunk), lambda i, j, l, *_: (i, j, self._when(l), 0))

    def starts(self) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, self.plan.tokens), lambda i, j, l, *_: (i, 0, self._when(l)))

    def saved(self) -> pl.BlockSpec:
        plan = self.plan
        size = (1, plan.chunks // plan.each, plan.heads * plan.wide_v, plan.wide_k)
        return pl.BlockSpec(size, lambda i, j, l, *_: (i, self._when(l), j, 0))

    def state(self) -> pl.BlockSpec:
        """Of the segment of a step, if segments have states."""
        plan = self.plan
        size = (1, None, plan.heads * plan.wide_v, plan.wide_k)
        return pl.BlockSpec(size, lambda i, j, l, *ids: (i, ids[0][i, self._when(l)] if ids else 0, j, 0))

    def enters(self, ids: Any) -> Any:
        """In a kernel: whether a step is the first one to go on with its state. ids: of the steps, or None."""
        row, step = pl.program_id(0), pl.program_id(2)
        if ids is None:
            return step == 0
        return (step == 0) | (ids[row, self._when(step)] != ids[row, self._when(jnp.maximum(step - 1, 0))])

    def call(self, kernel: Any, ids: Int[Array, "b n"] | None, given: Any, *, ins: Any, outs: Any, **how: Any) -> Any:
        """kernel(ids, blocks of given, blocks of the outputs and scratch ...).

        The state is the last of `given` and the output `how["state"]`: states of segments that do not come stay.
        """
        some = tuple(None if x is None else spec for x, spec in zip(given, ins, strict=True))
        scratch, shape, state = (how.pop(name) for name in ("scratch", "shape", "state"))
        prefetched = [] if ids is None else [ids]
        operands = len(jax.tree.leaves((prefetched, given)))
        return pl.pallas_call(
            kernel if prefetched else partial(kernel, None),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(prefetched),
                grid=self.plan.grid,
                in_specs=(type(given)(*some),),
                out_specs=outs,
                scratch_shapes=scratch,
            ),
            out_shape=shape,
            input_output_aliases={operands - 1: state} if prefetched else {},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
            ),
            **how,
        )(*prefetched, given)


def _whole(n: int) -> int:
    return -(-n // LANES) * LANES
