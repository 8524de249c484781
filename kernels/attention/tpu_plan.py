"""What is constant of one call of a TPU kernel, its list of visits, and the blocks that these name.

A grid step costs as much as a few hundred issued instructions, so that blocks are long. They are computed piece by
piece, and a piece in tiles: which of its tiles are live and which whole is its pattern. Where positions are constants
there are few patterns (a causal mask has two: below the diagonal, and on it), and a kernel holds straight-line code
for each, in which dead tiles do not occur and only some are masked.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from longwave.kernels.attention import tpu_layout
from longwave.kernels.attention.blocks import BackwardCut, Cut
from longwave.kernels.attention.reference import Coordinates, Scores
from longwave.kernels.attention.tpu_layout import Layout, Shaped
from longwave.kernels.attention.visits import LIVE, Split, pairs, visits

Side = Literal["q", "k"]
MOST_PATTERNS = 5  # with code of their own; pieces of any other pattern are masked throughout
BITS = 3  # of Steps.patterns, for each piece of a block
DEAD, MASKED, WHOLE = range(3)
Pattern = tuple[tuple[int, ...], ...]  # of each tile of a piece, by queries and by keys: DEAD, MASKED or WHOLE


class Steps(NamedTuple):
    """Lists of visits (visits.py), and of each the patterns of its pieces, BITS each: 0 where none is live."""

    q: Int[Array | np.ndarray, "rows n"]
    k: Int[Array | np.ndarray, "rows n"]
    flags: Int[Array | np.ndarray, "rows n"]
    patterns: Int[Array | np.ndarray, "rows n"]

    @property
    def rows(self) -> int:
        """1: one list for all batch rows."""
        return self.flags.shape[0]


@dataclasses.dataclass(frozen=True)
class Plan:
    """piece, tile: (queries, keys) of those of a block.   positions, segments: whether they are data."""

    layout: Layout
    scores: Scores
    q: Split
    k: Split
    piece: tuple[int, int]
    tile: tuple[int, int]
    positions: bool
    segments: bool

    @classmethod
    def of(
        cls,
        q: Shaped,
        k: Shaped,
        v: Shaped,
        q_at: Coordinates,
        k_at: Coordinates,
        scores: Scores,
        cut: Cut | BackwardCut,
    ) -> Plan:
        splits = Split(q.shape[1], cut.q), Split(k.shape[1], cut.k)
        positions = q_at.position is not None or k_at.position is not None
        return cls(Layout.of(q, k, v), scores, *splits, cut.piece, cut.tile, positions, k_at.segment is not None)

    @property
    def tq(self) -> int:
        """Queries with padding."""
        return self.q.n * self.q.c

    @property
    def tk(self) -> int:
        return self.k.n * self.k.c

    @property
    def pieces(self) -> tuple[int, int]:
        """Of a block, by queries and by keys."""
        return self.q.c // self.piece[0], self.k.c // self.piece[1]

    @property
    def tiles(self) -> tuple[int, int]:
        """Of a piece, by queries and by keys."""
        return self.piece[0] // self.tile[0], self.piece[1] // self.tile[1]

    @property
    def single(self) -> bool:
        """Whether every block of queries has one visit, of one piece."""
        return self.k.n == 1 and self.pieces == (1, 1)

    def places(self, q_at: Coordinates, k_at: Coordinates) -> list[Int[Array, "rows 1 t"]]:
        """Positions and segments of queries, then those of keys, where they are data."""
        if self.positions:
            q_at, k_at = q_at.placed(self.q.t), k_at.placed(self.k.t)
        return [*tpu_layout.places(q_at, self.tq), *tpu_layout.places(k_at, self.tk)]

    def steps(self, q_at: Coordinates, k_at: Coordinates) -> tuple[Steps, tuple[Pattern, ...]]:
        """Visits by queries, NumPy where they are constants, and the patterns that they name."""
        found = visits(self.scores.mask, q_at, k_at, self.q, self.k)
        constant = isinstance(found.flags, np.ndarray)
        size = self.tile if constant else self.piece
        live, whole = pairs(self.scores.mask, q_at, k_at, Split(self.q.t, size[0]), Split(self.k.t, size[1]))
        if constant:
            codes, patterns = self._kinds(np.where(live[0], np.where(whole[0], WHOLE, MASKED), DEAD))
            codes = codes[None]
        else:
            patterns = tuple(((state,) * self.tiles[1],) * self.tiles[0] for state in (WHOLE, MASKED))
            codes = jnp.where(live, jnp.where(whole, 1, 2), 0)
        codes = _cut(codes, (self.q.n, self.k.n), self.pieces)
        packed = (codes << (BITS * np.arange(codes.shape[-1], dtype=np.int32))[None, None, None]).sum(-1)
        row = np.arange(found.q.shape[0])[:, None] if packed.shape[0] > 1 else 0
        lit = (found.flags & LIVE) // LIVE  # 0 in the tail of a list, which repeats a visit
        numbers = (packed[row, found.q, found.k] * lit).astype(np.int32)
        return Steps(found.q, found.k, found.flags, numbers), patterns

    def _kinds(self, states: Int[np.ndarray, "nq nk"]) -> tuple[Int[np.ndarray, "nq nk"], tuple[Pattern, ...]]:
        """Of every piece the number of its pattern, from the states of tiles; and the patterns."""
        n = self.q.n * self.pieces[0], self.k.n * self.pieces[1]
        of_pieces = _cut(states[None], n, self.tiles)[0]
        kinds, kind, count = np.unique(
            of_pieces.reshape(-1, of_pieces.shape[-1]), axis=0, return_inverse=True, return_counts=True
        )
        kept = [i for i in np.argsort(-count) if kinds[i].any()]
        few, rest = kept[:MOST_PATTERNS], kept[MOST_PATTERNS:]
        codes = np.zeros(len(kinds), np.int32)
        codes[few], codes[rest] = 1 + np.arange(len(few)), 1 + len(few)
        patterns = [kinds[i].reshape(self.tiles) for i in few] + [np.full(self.tiles, MASKED)] * bool(rest)
        return codes[kind.reshape(n)], tuple(tuple(tuple(row) for row in pattern.tolist()) for pattern in patterns)


def _cut(x: Any, n: tuple[int, int], of: tuple[int, int]) -> Any:
    """(rows, q, k) -> (rows, *n, what is in a cell), with 0 where there is only padding."""
    xp, (i, j) = jnp if isinstance(x, jax.Array) else np, of
    x = xp.pad(x, [(0, 0), (0, n[0] * i - x.shape[1]), (0, n[1] * j - x.shape[2])])
    return x.reshape(-1, n[0], i, n[1], j).swapaxes(2, 3).reshape(-1, *n, i * j)


class Part(NamedTuple):
    """Queries and keys of a piece, from and up to, that are computed at once."""

    q: tuple[int, int]
    k: tuple[int, int]
    masked: bool


def parts(plan: Plan, pattern: Pattern, longest: int) -> list[Part]:
    """The live tiles of a pattern, joined where they meet: over queries freely, over `longest` keys at most."""
    (qc, kc), found = plan.tile, []
    across = max(1, longest // kc)
    for start in range(0, plan.tiles[1], across):
        columns = [row[start : start + across] for row in pattern]
        for states, stripes in itertools.groupby(range(len(columns)), key=lambda i: columns[i]):
            above, *_, below = *(stripes := list(stripes)), stripes[-1]
            for live, tiles in itertools.groupby(range(len(states)), key=lambda j: states[j] != DEAD):
                if live:
                    left, *_, right = *(tiles := list(tiles)), tiles[-1]
                    keys = ((start + left) * kc, (start + right + 1) * kc)
                    masked = any(states[j] == MASKED for j in tiles)
                    found.append(Part((above * qc, (below + 1) * qc), keys, masked))
    return found


class Specs(NamedTuple):
    """Blocks of a grid (b, blocks of lanes of queries, visits), looked up in the prefetched lists."""

    plan: Plan
    rows: int

    def lanes(self, side: Side, width: int) -> pl.BlockSpec:
        """Of (b, t, lanes): q and o, or k and v, which a group of query heads shares."""
        group = 1 if side == "q" else self.plan.layout.group
        block = (1, self._size(side), width)
        return pl.BlockSpec(block, lambda b, h, i, *steps: (b, self._at(side, b, i, steps), h // group))

    def row(self) -> pl.BlockSpec:
        """Of (b, h, 1, tq): numbers of queries."""
        block = (1, self.plan.layout.fold, 1, self.plan.q.c)
        return pl.BlockSpec(block, lambda b, h, i, *steps: (b, h, 0, self._at("q", b, i, steps)))

    def places(self, arrays: tuple[Array, ...]) -> list[pl.BlockSpec]:
        """Of what `Plan.places` gives."""

        def spec(side: Side, x: Array) -> pl.BlockSpec:
            block, row = (1, 1, self._size(side)), min(x.shape[0], 2) - 1
            return pl.BlockSpec(block, lambda b, h, i, *steps: (b * row, 0, self._at(side, b, i, steps)))

        half = len(arrays) // 2
        return [spec("q", x) for x in arrays[:half]] + [spec("k", x) for x in arrays[half:]]

    def _size(self, side: Side) -> int:
        return getattr(self.plan, side).c

    def _at(self, side: Side, b: Any, i: Any, steps: Any) -> Any:
        return getattr(Steps(*steps), side)[b if self.rows > 1 else 0, i]
