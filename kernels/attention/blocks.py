"""How long the blocks of the TPU kernels are: what the autotuner found on a chip (blocks.json), else by one rule."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from longwave.kernels.aot import frozen
from longwave.kernels.aot.chips import traced_for
from longwave.kernels.attention.mask import Mask, granularity
from longwave.kernels.attention.reference import Coordinates
from longwave.kernels.attention.tpu_layout import LANES, Layout, Shaped
from longwave.kernels.attention.visits import Split, pairs

VMEM_LIMIT = 48 * 2**20  # bytes a kernel may use: there is that much on every chip
BACKWARD_VMEM_LIMIT = 56 * 2**20  # of 64 on a v5p, the least; what is kept decides how long a sequence fits
LONGEST = 512  # queries or keys of a tile of the backward kernel
TABLE = Path(__file__).with_name("blocks.json")


class Cut(NamedTuple):
    """Blocks of q queries by k keys, of pieces of (queries, keys), each of tiles (tpu_plan.py)."""

    q: int
    k: int
    piece: tuple[int, int]
    tile: tuple[int, int]

    @property
    def row(self) -> dict[str, int]:
        """As the table has it."""
        (pq, pk), (cq, ck) = self.piece, self.tile
        return {"q": self.q, "k": self.k, "piece_q": pq, "piece_k": pk, "tile_q": cq, "tile_k": ck}

    @classmethod
    def of(cls, row: Mapping[str, int]) -> Cut:
        return cls(row["q"], row["k"], (row["piece_q"], row["piece_k"]), (row["tile_q"], row["tile_k"]))


def problem(q: Shaped, v: Shaped, mask: Mask) -> str:
    """What the table calls it. Of any length: blocks that divide it serve."""
    return f"forward {mask} d={max(q.shape[-1], v.shape[-1])} {q.dtype.name}"


def forward(q: Shaped, k: Shaped, v: Shaped, mask: Mask, chip: str | None = None) -> Cut:
    """The blocks of the table for a chip, by default that traced for, where they divide both lengths; else `rule`'s."""
    chip = chip or traced_for()
    row = frozen.blocks(TABLE, chip).get(problem(q, v, mask)) if chip else None
    if row and q.shape[1] % row["q"] == k.shape[1] % row["k"] == 0:
        return Cut.of(row)
    return rule(q, k, v, mask)


def rule(q: Shaped, k: Shaped, v: Shaped, mask: Mask) -> Cut:
    """Blocks of two pieces either way, pieces of two tiles of 512; less where time is shorter, or a table finer.

    Tiles are halved where much of them is dead, as in a narrow window. One rule for all chips.
    """
    size = granularity(mask)
    (pq, cq), (pk, ck) = (_nested(t, size) for t in (q.shape[1], k.shape[1]))
    # Sums of each head of a block of lanes lie in VMEM. What a table says is known of a block, not of its pieces.
    times_q, times_k = (1 if size else 2 if t > piece else 1 for t, piece in ((q.shape[1], pq), (k.shape[1], pk)))
    if Layout.of(q, k, v).fold > 4:
        times_q = 1

    def computed(c: int) -> int:
        at = Coordinates(), Coordinates()
        return c * c * int(pairs(mask, *at, Split(q.shape[1], c), Split(k.shape[1], c))[0].sum())

    if cq == ck == 512 and computed(256) < 0.8 * computed(512):
        cq = ck = 256
        pk *= times_k  # what is live of these keys, in one stretch of code
        times_k = 1
    return Cut(times_q * pq, times_k * pk, (pq, pk), (cq, ck))


def _nested(t: int, size: int | None) -> tuple[int, int]:
    """Lengths of a piece and of its tiles."""
    piece = _even(t, 1024)
    if size is not None and t > min(size, 1024):
        piece = divisor(size, 1024)
    return piece, piece // 2 if piece > 512 and piece % 256 == 0 else piece


def divisor(size: int, most: int) -> int:
    """The largest multiple of 128 up to `most` that divides size; 128 where none does: `visits.refusal` says so."""
    return max((c for c in range(128, most + 1, 128) if size % c == 0), default=128)


class BackwardCut(NamedTuple):
    """Blocks of q queries by k keys, of one tile each.

    tiles:   blocks of keys in a grid step.
    part:    queries that stay in VMEM, fetched into so many `buffers`: into two while the last ones are computed. 0:
             not even a block of the shortest fits.
    """

    q: int
    k: int
    tiles: int
    part: int
    buffers: int

    @property
    def tile(self) -> tuple[int, int]:
        return self.q, self.k

    piece = tile


def backward(layout: Layout, tq: int, tk: int, itemsize: int, mask: Mask, longest: int | None = None) -> BackwardCut:
    """Of queries all that fit into VMEM (tpu_backward.py); only where these are fewer than tq is `part` less.

    longest: queries or keys of a block: LONGEST, and less where no block of so many queries of a wide group fits.
    """
    size, lanes, longest = granularity(mask), layout.lanes + layout.lanes_v, longest or LONGEST
    cut = lambda t: _even(t, longest) if size is None or t <= min(size, longest) else divisor(size, longest)
    q, k = cut(tq), cut(tk)
    padded, n = -(-tq // q) * q, -(-tk // k)
    a_tile = k * lanes * (4 * itemsize + 4)  # k, v, dk and dv, each twice, and two sums
    for buffers, tiles in itertools.product((2, 1), (4, 3, 2, 1)):
        a_query = (lanes + layout.lanes) * itemsize * buffers + layout.lanes * 4 + 16 * layout.fold  # with q, do, dq
        room = BACKWARD_VMEM_LIMIT - tiles * a_tile - 24 * q * k
        most = room // (layout.group * a_query) // q * q
        if n % tiles == 0 and most >= padded:
            return BackwardCut(q, k, tiles, padded, buffers)
    if not most and longest > LANES:
        return backward(layout, tq, tk, itemsize, mask, longest // 2)
    if not most:
        return BackwardCut(q, k, tiles, 0, buffers)
    parts = -(-padded // most)
    return BackwardCut(q, k, tiles, -(-padded // (parts * q)) * q, buffers)


def _even(t: int, most: int) -> int:
    """The length of as few blocks of at most so many as there can be, equal but for a multiple of 128."""
    n = -(-t // most)
    return min(most, -(-t // (n * 128)) * 128)
