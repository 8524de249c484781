"""How long the blocks of the TPU kernels are."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array

from longwave.kernels.attention.mask import Mask, granularity
from longwave.kernels.attention.tpu_layout import Layout

VMEM_LIMIT = 48 * 2**20  # bytes a kernel may use: there is that much on every chip
LONGEST = 512  # queries or keys of a tile of the backward kernel


class Cut(NamedTuple):
    """Blocks of q queries by k keys, of pieces of (queries, keys), each of tiles (tpu_plan.py)."""

    q: int
    k: int
    piece: tuple[int, int]
    tile: tuple[int, int]


def forward(q: Array, k: Array, v: Array, mask: Mask) -> Cut:
    """Blocks of two pieces either way, pieces of two tiles, tiles of 512: shorter where time is."""
    size = granularity(mask)
    (bq, pq, cq), (bk, pk, ck) = (_nested(t, size) for t in (q.shape[1], k.shape[1]))
    return Cut(bq, bk, (pq, pk), (cq, ck))


def _nested(t: int, size: int | None) -> tuple[int, int, int]:
    """Lengths of block, piece and tile, each a multiple of the next."""
    piece = _even(t, 1024 if size is None else min(size, 1024))
    tile = piece // 2 if piece > 512 and piece % 256 == 0 else piece
    return piece * (2 if size is None and t > piece else 1), piece, tile


class BackwardCut(NamedTuple):
    """Blocks of q queries by k keys, of one tile; `part` queries stay in VMEM, fetched into so many buffers."""

    q: int
    k: int
    part: int
    buffers: int

    @property
    def tile(self) -> tuple[int, int]:
        return self.q, self.k

    piece = tile


def backward(layout: Layout, tq: int, tk: int, itemsize: int, mask: Mask) -> BackwardCut:
    """Of queries all that fit into VMEM (tpu_backward.py); only where these are fewer than tq is `part` less."""
    size = granularity(mask)
    q, k = (_even(t, LONGEST if size is None else min(size, LONGEST)) for t in (tq, tk))
    tiles = 4 * q * k * 4 + 16 * k * (layout.lanes + layout.lanes_v) * itemsize
    fetched, kept = (layout.lanes + layout.lanes_v) * itemsize + 8 * layout.fold, layout.lanes * (4 + 2 * itemsize)
    room = VMEM_LIMIT * 3 // 4 - tiles
    padded = -(-tq // q) * q
    for buffers in (2, 1):
        most = room // (layout.group * (buffers * fetched + kept))
        if most >= padded:
            return BackwardCut(q, k, padded, buffers)
    parts = -(-padded // most)
    return BackwardCut(q, k, -(-padded // (parts * q)) * q, 1)


def _even(t: int, most: int) -> int:
    """The length of as few blocks of at most so many as there can be, equal but for a multiple of 128."""
    n = -(-t // most)
    return min(most, -(-t // (n * 128)) * 128)
