"""The body of a grid step of the TPU kernel: `step` of whole registers, tile of 8 tokens by tile of 8 tokens.

A tile row of a block, (8 lanes, 128), holds 8 tokens of each 128 channels, token r of the l-th at row 8 l + r. All tile
rows at one time, of all rows of the batch, are laid on a desk one below the other, in float32. Reading every eighth row
of it gives one token of 8 x 128 channels in one register, of whichever rows of the batch they are: a *chain*, which is
one recurrence. Results go back the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from longwave.kernels.linear_scan.pair import Number, shape, where, zero_like
from longwave.kernels.linear_scan.reference import Sweep, Tokens, step

SUBLANES, LANES = 8, 128  # a tile's tokens and channels; as many lane tiles as it has tokens fill a register
RESET, VALID, NOTHING, HANDED = 1, 2, 4, 8  # bits of a token's flags; the last two: what came to it in place of h


class Blocks(NamedTuple):
    """What a grid step works on: `rows` of the batch, `tiles` of 8 tokens, `lanes` of 128 channels."""

    rows: int
    tiles: int
    lanes: int


class Reads(NamedTuple):
    """What it reads; h, edge and handed only if the gradient of a is asked for.

    flags (rows, 1, tokens); a, x, h (rows, tiles, 8 lanes, 128), or a (lanes, 128); state, handed (rows, lanes, 128).
    edge: the one tile of h beside the block that h was swept through before.
    """

    flags: Any
    a: Number
    x: Number
    state: Any
    h: Number | None = None
    edge: Number | None = None
    handed: Number | None = None


class Writes(NamedTuple):
    """What it writes, as x, state and a. out: None in a composition, whose state is a map (P, S).

    da: the gradient of a, or None; of a (lanes, 128) its sum over time (rows, lanes, 128).
    """

    out: Number | None
    last: Any
    da: Number | None


class Desks(NamedTuple):
    """float32 in VMEM: (64 a chain, 128) for a tile's tokens, (8 a chain, 128) for what holds for all tokens.

    near: the tile of h beside that of `h`.    spread: the block's flags (rows, tokens, 128), int32, as `flags`, which
    are there where a chain has channels of several rows of the batch.
    """

    flags: Any
    spread: Any
    a: Number
    x: Number
    state: Any
    h: Number | None
    near: Number | None
    handed: Number | None
    out: Number | None
    da: Number | None

    @staticmethod
    def of(reads: Reads, writes: Writes, size: Blocks) -> Desks:
        """Their shapes, of arrays as `Reads` and `Writes` hold blocks of."""
        high = size.rows * size.lanes
        desk = lambda v: pltpu.VMEM((SUBLANES * high if v.ndim == 4 else high, LANES), jnp.float32)
        desks = lambda number: jax.tree.map(desk, number)
        flags = spread = None
        if reads.flags is not None:
            if size.lanes % SUBLANES:
                flags = pltpu.VMEM((SUBLANES * high, LANES), jnp.int32)
            spread = pltpu.VMEM((size.rows, -(-SUBLANES * size.tiles // LANES) * LANES, LANES), jnp.int32)
        into = map(desks, (reads.a, reads.x, reads.state, reads.h, reads.h, reads.handed, writes.out, writes.da))
        return Desks(flags, spread, *into)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """tiles: of all time.  reset, valid: whether there are such masks."""

    sweep: Sweep
    size: Blocks
    tiles: int
    reset: bool
    valid: bool

    def __call__(self, reads: Reads, out: Any, last: Any, da: Any, desks: Desks) -> None:
        """Walks through the tiles of a block; states, and sums over time, wait on their desks for the next."""
        constant, writes = len(shape(reads.a)) == 2, Writes(out, last, da)

        @pl.when(pl.program_id(2) == 0)
        def _():
            lay = lambda rows, row, desk, ref: _set(desk, rows, ref[row])
            self._each_row(lay, desks.state, reads.state)
            self._each_row(lay, desks.handed, reads.handed)
            if constant:
                self._each_row(lambda rows, row, desk, ref: _set(desk, rows, ref[...]), desks.a, reads.a)
                _put(desks.da, ..., jax.tree.map(jnp.zeros_like, desks.da))

        if reads.flags is not None:
            self._spread(reads.flags, desks.spread)
        block = pl.num_programs(2) - 1 - pl.program_id(2) if self.sweep.reverse else pl.program_id(2)
        tiles: Any = self.size.tiles
        if self.tiles % tiles:
            tiles = jnp.minimum(tiles, self.tiles - block * tiles)

        def advance(i: Array, carries: list) -> list:
            i = tiles - 1 - i if self.sweep.reverse else i
            begins = (i == 0, block == 0) if self.sweep.reverse else (i == tiles - 1, block == pl.num_programs(2) - 1)
            self._lay_out(reads, desks, i, begins[0])
            carries = [self._chain(desks, chain, i, constant, begins, *carry) for chain, carry in enumerate(carries)]
            back = lambda rows, row, desk, ref: _set(ref, (row, i), desk[rows].astype(ref.dtype))
            self._each_tile_row(back, desks.out, writes.out)
            if not constant:
                self._each_tile_row(back, desks.da, writes.da)
            return carries

        held = (desks.state, desks.da if constant else None)
        here = [self._still(chain) for chain in range(-(-self.size.rows * self.size.lanes // SUBLANES))]
        carries = jax.lax.fori_loop(0, tiles, advance, [_at(held, rows) for rows in here])
        for rows, carry in zip(here, carries, strict=True):
            _put(held, rows, carry)
        written = (writes.last, writes.da if constant else None)
        self._each_row(lambda rows, row, desk, ref: _set(ref, row, desk[rows]), held, written)

    def _chain(
        self, desks: Desks, chain: int, i: Array, constant: bool, begins: tuple, carry: Any, sums: Any
    ) -> tuple[Any, Any]:
        """The eight tokens of tile i. begins: whether h begins with this tile in its block, and with this block."""
        a = _at(desks.a, self._still(chain)) if constant else None
        for r in reversed(range(SUBLANES)) if self.sweep.reverse else range(SUBLANES):
            flags = self._flags(desks, chain, i, r)
            reset = flags & RESET != 0 if self.reset else None
            valid = flags & VALID != 0 if self.valid else None
            here = self._token(chain, r)
            token = Tokens(a if constant else _at(desks.a, here), _at(desks.x, here), reset, valid)
            if desks.out is None:
                P, S = carry
                carry = step(P, token._replace(x=zero_like(S)), self.sweep)[0], step(S, token, self.sweep)[0]
                continue
            carry, out = step(carry, token, self.sweep)
            _put(desks.out, here, out)
            if desks.h is None:
                continue
            da = out * self._before(desks, chain, r, flags, begins).conj()
            if constant:
                sums = sums + da
            else:
                _put(desks.da, here, da)
        return carry, sums

    def _before(self, desks: Desks, chain: int, r: int, flags: Any, begins: tuple) -> Number:
        """What token r was handed when h was swept: mostly the h beside it."""
        beside = r - 1 if self.sweep.reverse else r + 1
        inside = 0 <= beside < SUBLANES
        before = _at(desks.h if inside else desks.near, self._token(chain, beside % SUBLANES))
        handed = _at(desks.handed, self._still(chain))
        if not inside:
            before = where(begins[0] & begins[1], handed, before)
        if self.valid:
            before = where(flags & HANDED != 0, handed, before)
        return before if flags is None else where(flags & NOTHING != 0, zero_like(before), before)

    def _lay_out(self, reads: Reads, desks: Desks, i: Array, begins: Array) -> None:
        """Tile i of all arrays on their desks."""
        lay = lambda rows, row, desk, ref: _set(desk, rows, ref[row, i].astype(jnp.float32))
        self._each_tile_row(lay, desks.x, reads.x)
        if len(shape(reads.a)) == 4:
            self._each_tile_row(lay, desks.a, reads.a)
        if reads.h is not None:
            self._each_tile_row(lay, desks.h, reads.h)
            beside = jnp.where(begins, i, i - 1 if self.sweep.reverse else i + 1)
            choose = lambda h, edge: jnp.where(begins, edge.astype(jnp.float32), h.astype(jnp.float32))
            near = lambda rows, row, desk, ref, edge: _set(desk, rows, choose(ref[row, beside], edge[row, 0]))
            self._each_tile_row(near, desks.near, reads.h, reads.edge)
        if desks.flags is not None:
            for place in range(self.size.rows * self.size.lanes):
                tokens = desks.spread[place // self.size.lanes, pl.ds(i * SUBLANES, SUBLANES)]
                desks.flags[SUBLANES * place : SUBLANES * (place + 1)] = tokens

    def _flags(self, desks: Desks, chain: int, i: Array, r: int) -> Any:
        """Of token r: one for all channels of a row, or where a register holds several rows, one for each."""
        if desks.flags is not None:
            return desks.flags[self._token(chain, r)]
        row = chain * SUBLANES // self.size.lanes
        return None if desks.spread is None else desks.spread[row, pl.ds(i * SUBLANES + r, 1)]

    def _spread(self, flags: Any, spread: Any) -> None:
        """Flags of 128 tokens stand side by side in a row: one below the other, each 128 times."""

        def turn(c: Array, _: None) -> None:
            at = pl.ds(pl.multiple_of(c * LANES, LANES), LANES)
            for row in range(self.size.rows):
                spread[row, at] = jnp.broadcast_to(flags[row, :, at], (LANES, LANES)).T

        jax.lax.fori_loop(0, spread.shape[1] // LANES, turn, None)

    def _each_row(self, do: Callable, desks: Any, *refs: Any, tall: int = 1) -> None:
        """do(where it stands on its desk, row, desk, ...) for each row of the batch and each array."""
        high = tall * self.size.lanes
        for row in range(self.size.rows):
            jax.tree.map(partial(do, slice(row * high, (row + 1) * high), row), desks, *refs)

    def _each_tile_row(self, do: Callable, desks: Any, *refs: Any) -> None:
        self._each_row(do, desks, *refs, tall=SUBLANES)

    def _count(self, chain: int) -> int:
        return min(SUBLANES, self.size.rows * self.size.lanes - chain * SUBLANES)

    def _still(self, chain: int) -> slice:
        return slice(chain * SUBLANES, chain * SUBLANES + self._count(chain))

    def _token(self, chain: int, r: int) -> Any:
        return pl.ds(chain * SUBLANES**2 + r, self._count(chain), stride=SUBLANES)


def _at(refs: Any, index: Any) -> Any:
    return jax.tree.map(lambda ref: ref[index], refs)


def _put(refs: Any, index: Any, values: Any) -> None:
    jax.tree.map(lambda ref, value: _set(ref, index, value), refs, values)


def _set(ref: Any, index: Any, value: Array) -> None:
    ref[index] = value
