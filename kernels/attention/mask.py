"""Which key a query sees, as a function of their two positions: small masks joined by & and |.

    Causal() & (Window(512) | Sinks(4))        Causal() | Prefix(100)        Butterfly(64) | Global(64)

A mask answers three times: `visible` for pairs of tokens, and for pairs of blocks known only by the range of their
positions `live`, so that a block that nobody sees is neither fetched nor computed, and `whole`, so that one that all
see is not masked. `live` may say yes too often, never no; `whole` the other way round: both are exact for a single
mask, and may err so for a union or an intersection. Masks are hashable constants; documents and padding, which are
data, travel as segment ids.

`visible` compares, adds and shifts int32, so that a kernel can ask it of a tile of positions. A table (`BlockSparse`)
is no such formula: its answer for a tile is looked up beforehand (visits.py), and tiles must divide its blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

Positions = Int[Array, "..."]
Answer = Bool[Array, "..."] | bool


@dataclasses.dataclass(frozen=True)
class Mask:
    """Everything is visible. Positions broadcast against each other."""

    def visible(self, q: Positions, k: Positions) -> Answer:
        """Whether a query at position q sees a key at position k."""
        return True

    def live(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        """False only where no query of [q_lo, q_hi] sees any key of [k_lo, k_hi]."""
        return True

    def whole(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        """True only where every query of [q_lo, q_hi] sees every key of [k_lo, k_hi]."""
        return True

    @property
    def relative(self) -> bool:
        """Whether only the difference of two positions counts, so that they may count from anywhere."""
        return type(self) is Mask

    def map(self, f: Callable[[Mask], Mask]) -> Mask:
        """The same formula of f(leaf) for each of its leaves."""
        return f(self)

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other)


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """A query sees the positions up to its own plus `offset`: with tk - tq, the last query sees the last key."""

    offset: int = 0

    @property
    def relative(self) -> bool:
        return True

    def visible(self, q: Positions, k: Positions) -> Answer:
        return k <= q + self.offset

    def live(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return k_lo <= q_hi + self.offset

    def whole(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return k_hi <= q_lo + self.offset


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """A query sees the last `size` positions, its own included, and `ahead` after its own (None: as many as before).

    In counts of other tokens: size - 1 to the left and `ahead` to the right, both inclusive.
    """

    size: int
    ahead: int | None = None

    def __post_init__(self):
        _at_least(1, self, "size")
        if self.ahead is not None:
            _at_least(0, self, "ahead")

    @property
    def relative(self) -> bool:
        return True

    @property
    def right(self) -> int:
        return self.size - 1 if self.ahead is None else self.ahead

    def visible(self, q: Positions, k: Positions) -> Answer:
        return (k > q - self.size) & (k <= q + self.right)

    def live(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return (k_hi > q_lo - self.size) & (k_lo <= q_hi + self.right)

    def whole(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return (k_lo > q_hi - self.size) & (k_hi <= q_lo + self.right)


@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """Every query sees the first `count` positions.

    Joined with Causal by |, prefix language modelling (T5, arXiv:1910.10683); behind a window, attention sinks
    (StreamingLLM, arXiv:2309.17453): `Sinks` is the same mask.
    """

    count: int

    def visible(self, q: Positions, k: Positions) -> Answer:
        return k < self.count

    def live(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return k_lo < self.count

    def whole(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return k_hi < self.count


Sinks = Prefix


@dataclasses.dataclass(frozen=True)
class Global(Mask):
    """The first `count` positions see all and are seen by all (Longformer, arXiv:2004.05150; BigBird, 2007.14062)."""

    count: int

    def visible(self, q: Positions, k: Positions) -> Answer:
        return (q < self.count) | (k < self.count)

    def live(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return (q_lo < self.count) | (k_lo < self.count)

    def whole(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return (q_hi < self.count) | (k_hi < self.count)


@dataclasses.dataclass(frozen=True)
class Blocks(Mask):
    """Positions fall into blocks of `size`; a query sees the keys of its own."""

    size: int

    def __post_init__(self):
        _at_least(1, self, "size")

    def visible(self, q: Positions, k: Positions) -> Answer:
        return _block(q, self.size) == _block(k, self.size)

    def live(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        q_lo, q_hi, k_lo, k_hi = (_block(x, self.size) for x in (q_lo, q_hi, k_lo, k_hi))
        return (q_lo <= k_hi) & (k_lo <= q_hi)

    def whole(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        q_lo, q_hi, k_lo, k_hi = (_block(x, self.size) for x in (q_lo, q_hi, k_lo, k_hi))
        return (q_lo == k_hi) & (k_lo == q_hi)


@dataclasses.dataclass(frozen=True)
class ChunkSummary(Mask):
    """Positions of queries fall into chunks of `size`, and key j stands for chunk j: a query sees the chunks before
    its own, which is over before it began (RAT, arXiv:2507.04416).
    """

    size: int

    def __post_init__(self):
        _at_least(1, self, "size")

    def visible(self, q: Positions, k: Positions) -> Answer:
        return k < _block(q, self.size)

    def live(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return k_lo < _block(q_hi, self.size)

    def whole(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return k_hi < _block(q_lo, self.size)


@dataclasses.dataclass(frozen=True)
class Butterfly(Mask):
    """Block i of queries sees block j of keys where i = j, or where their binary numbers differ in one low bit.

    The flat block butterfly of Pixelated Butterfly (arXiv:2112.00029), which block-sparse FlashAttention names as
    its "fixed butterfly sparsity pattern" (arXiv:2205.14135, section 3.3): the support of a sum of butterfly
    factors, factor m joining i and i ^ 2 ** m. A sequence of n blocks has log2 n of them; `factors` keeps the first
    few (None: all), as `FlatBlockButterflySparsityConfig` of github.com/HazyResearch/fly does, whose global rows and
    columns are `| Global(count)`. Which block, factors and global part the FlashAttention paper took for its Long
    Range Arena runs it does not say.
    """

    block: int
    factors: int | None = None

    def __post_init__(self):
        _at_least(1, self, "block")
        if self.factors is not None:
            _at_least(1, self, "factors")

    def visible(self, q: Positions, k: Positions) -> Answer:
        x = _block(q, self.block) ^ _block(k, self.block)
        one_bit = (x & (x - 1)) == 0  # or none
        return one_bit if self.factors is None else one_bit & (x < 2**self.factors)

    def live(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        # The ranges meet, or one of them, with a bit turned on that was off, meets the other.
        xp = _numpy(q_lo, k_lo)
        a, b, c, d = (xp.asarray(_block(x, self.block))[..., None] for x in (q_lo, q_hi, k_lo, k_hi))
        bits = self._bits if xp is jnp else min(self._bits, int(max(b.max(), d.max(), 1)).bit_length())
        bit = np.arange(bits, dtype=np.int32).reshape((1,) * (a.ndim - 1) + (-1,))

        def turned(a, b, c, d):
            lo, hi = xp.maximum(a, c - (1 << bit)), xp.minimum(b, d - (1 << bit))
            off = ((lo >> bit) + ((lo >> bit) & 1)) << bit  # the first number from lo on with it off, if lo has it on
            return xp.maximum(lo, off) <= hi

        return ((a <= d) & (c <= b) | turned(a, b, c, d) | turned(c, d, a, b)).any(-1)

    def whole(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        # No block differs in at most one bit from each of four neighbours: three of either side are all there is.
        xp, last = _numpy(q_lo, k_lo), lambda lo, hi: _block(hi, self.block) - _block(lo, self.block)
        whole = (last(q_lo, q_hi) < 3) & (last(k_lo, k_hi) < 3)
        for i, j in np.ndindex(3, 3):
            q, k = xp.minimum(q_lo + i * self.block, q_hi), xp.minimum(k_lo + j * self.block, k_hi)
            whole = whole & self.visible(q, k)
        return whole

    @property
    def _bits(self) -> int:
        """Bits that may differ: numbers of blocks have no more than positions, which stay below 2 ** 30."""
        most = 31 - self.block.bit_length()
        return most if self.factors is None else min(self.factors, most)


@dataclasses.dataclass(frozen=True, init=False)
class BlockSparse(Mask):
    """Any pattern of blocks: a query in block i of `block` positions sees block j of keys where layout[i, j].

    What lies beyond the table sees nothing and is not seen. A kernel's blocks must divide `block`, and positions
    must count from 0, so that each of its tiles falls into one cell of the table.
    """

    block: int
    shape: tuple[int, int]
    cells: bytes = dataclasses.field(repr=False)

    def __init__(self, layout: Bool[Any, "nq nk"], block: int):
        layout = np.asarray(layout)
        if layout.ndim != 2 or not np.isin(layout, (0, 1)).all():
            raise ValueError(f"BlockSparse.layout: a table of bools (nq, nk) is expected; got {layout.shape}")
        for name, value in (("block", block), ("shape", layout.shape), ("cells", layout.astype(bool).tobytes())):
            object.__setattr__(self, name, value)
        _at_least(1, self, "block")

    @cached_property
    def layout(self) -> Bool[np.ndarray, "nq nk"]:
        return np.frombuffer(self.cells, bool).reshape(self.shape)

    @cached_property
    def _sums(self) -> Int[np.ndarray, "nq+1 nk+1"]:
        """How many cells before row i and column j are set."""
        return np.pad(np.cumsum(np.cumsum(self.layout, 0, dtype=np.int32), 1, dtype=np.int32), ((1, 0), (1, 0)))

    def visible(self, q: Positions, k: Positions) -> Answer:
        i, j = _block(q, self.block), _block(k, self.block)
        inside = (i >= 0) & (i < self.shape[0]) & (j >= 0) & (j < self.shape[1])
        return inside & _look_up(self.layout, i, j)

    def live(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return self._count(q_lo, q_hi, k_lo, k_hi)[0] > 0

    def whole(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        seen, cells = self._count(q_lo, q_hi, k_lo, k_hi)
        return seen == cells

    def _count(self, q_lo, q_hi, k_lo, k_hi) -> tuple[Any, Any]:
        """Set cells that the ranges touch, and all that they touch, within the table or not."""
        q_lo, q_hi, k_lo, k_hi = (_block(x, self.block) for x in (q_lo, q_hi, k_lo, k_hi))
        sums = lambda i, j: _look_up(self._sums, i, j)
        seen = sums(q_hi + 1, k_hi + 1) - sums(q_lo, k_hi + 1) - sums(q_hi + 1, k_lo) + sums(q_lo, k_lo)
        return seen, (q_hi + 1 - q_lo) * (k_hi + 1 - k_lo)


@dataclasses.dataclass(frozen=True)
class _Pair(Mask):
    a: Mask
    b: Mask

    @property
    def relative(self) -> bool:
        return self.a.relative and self.b.relative

    def map(self, f: Callable[[Mask], Mask]) -> Mask:
        return type(self)(self.a.map(f), self.b.map(f))


class And(_Pair):
    def visible(self, q: Positions, k: Positions) -> Answer:
        return self.a.visible(q, k) & self.b.visible(q, k)

    def live(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return self.a.live(q_lo, q_hi, k_lo, k_hi) & self.b.live(q_lo, q_hi, k_lo, k_hi)

    def whole(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return self.a.whole(q_lo, q_hi, k_lo, k_hi) & self.b.whole(q_lo, q_hi, k_lo, k_hi)


class Or(_Pair):
    def visible(self, q: Positions, k: Positions) -> Answer:
        return self.a.visible(q, k) | self.b.visible(q, k)

    def live(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return self.a.live(q_lo, q_hi, k_lo, k_hi) | self.b.live(q_lo, q_hi, k_lo, k_hi)

    def whole(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return self.a.whole(q_lo, q_hi, k_lo, k_hi) | self.b.whole(q_lo, q_hi, k_lo, k_hi)


def tables(mask: Mask) -> tuple[BlockSparse, ...]:
    """The distinct tables of a mask, in the order in which it names them."""
    found: dict[BlockSparse, None] = {}

    def note(leaf: Mask) -> Mask:
        if isinstance(leaf, BlockSparse):
            found.setdefault(leaf)
        return leaf

    mask.map(note)
    return tuple(found)


def granularity(mask: Mask) -> int | None:
    """What a kernel's blocks of queries and of keys must divide; None: they may be of any size."""
    return math.gcd(*(table.block for table in tables(mask))) or None


def _block(x: Any, size: int) -> Any:
    """floor(x / size). Inside a TPU kernel `//` will not do: it asks the default device what its sign is."""
    if size & (size - 1) == 0:
        return x >> (size.bit_length() - 1)
    if isinstance(x, jax.Array):  # lax.div rounds towards 0
        return lax.div(jnp.where(x < 0, x - (size - 1), x), jnp.full_like(x, size))
    return x // size


def _numpy(*xs: Any) -> Any:
    """The module that computes with these: constants stay constants."""
    return jnp if any(isinstance(x, jax.Array) for x in xs) else np


def _look_up(table: np.ndarray, i: Any, j: Any) -> Any:
    """table[i, j], of its edge where they lie outside; a constant where they are."""
    xp = _numpy(i, j)
    return xp.asarray(table)[tuple(xp.clip(x, 0, n - 1) for x, n in zip((i, j), table.shape, strict=True))]


def _at_least(least: int, mask: Mask, field: str) -> None:
    if (value := getattr(mask, field)) < least:
        raise ValueError(f"{type(mask).__name__}.{field} = {value}; it must be at least {least}")
