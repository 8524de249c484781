"""Which key a query sees, as a function of their two positions: small masks joined by & and |.

    Causal() & (Window(512) | Sinks(4))

A mask answers three times: `visible` for pairs of tokens, and for pairs of blocks known only by the range of their
positions `live`, so that a block that nobody sees is neither fetched nor computed, and `whole`, so that one that all
see is not masked. `live` may say yes too often, never no; `whole` the other way round. Masks are hashable constants;
documents and padding, which are data, travel as segment ids.
"""

from __future__ import annotations

import dataclasses

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

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other)


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """A query sees its own position and earlier ones."""

    def visible(self, q: Positions, k: Positions) -> Answer:
        return k <= q

    def live(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return k_lo <= q_hi

    def whole(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return k_hi <= q_lo


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """A query sees positions less than `size` away: with Causal, the last `size` tokens, its own included."""

    size: int

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"Window.size = {self.size}; it must be at least 1")

    def visible(self, q: Positions, k: Positions) -> Answer:
        return (q - k < self.size) & (k - q < self.size)

    def live(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return (q_lo - k_hi < self.size) & (k_lo - q_hi < self.size)

    def whole(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return (q_hi - k_lo < self.size) & (k_hi - q_lo < self.size)


@dataclasses.dataclass(frozen=True)
class Sinks(Mask):
    """Every query sees the first `count` positions (StreamingLLM, arXiv:2309.17453)."""

    count: int

    def visible(self, q: Positions, k: Positions) -> Answer:
        return k < self.count

    def live(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return k_lo < self.count

    def whole(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return k_hi < self.count


@dataclasses.dataclass(frozen=True)
class Blocks(Mask):
    """Positions fall into blocks of `size`; a query sees the keys of its own."""

    size: int

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"Blocks.size = {self.size}; it must be at least 1")

    def visible(self, q: Positions, k: Positions) -> Answer:
        return q // self.size == k // self.size

    def live(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return (q_lo // self.size <= k_hi // self.size) & (k_lo // self.size <= q_hi // self.size)

    def whole(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return (q_lo // self.size == k_hi // self.size) & (k_lo // self.size == q_hi // self.size)


@dataclasses.dataclass(frozen=True)
class And(Mask):
    a: Mask
    b: Mask

    def visible(self, q: Positions, k: Positions) -> Answer:
        return self.a.visible(q, k) & self.b.visible(q, k)

    def live(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return self.a.live(q_lo, q_hi, k_lo, k_hi) & self.b.live(q_lo, q_hi, k_lo, k_hi)

    def whole(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return self.a.whole(q_lo, q_hi, k_lo, k_hi) & self.b.whole(q_lo, q_hi, k_lo, k_hi)


@dataclasses.dataclass(frozen=True)
class Or(Mask):
    a: Mask
    b: Mask

    def visible(self, q: Positions, k: Positions) -> Answer:
        return self.a.visible(q, k) | self.b.visible(q, k)

    def live(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return self.a.live(q_lo, q_hi, k_lo, k_hi) | self.b.live(q_lo, q_hi, k_lo, k_hi)

    def whole(self, q_lo: Positions, q_hi: Positions, k_lo: Positions, k_hi: Positions) -> Answer:
        return self.a.whole(q_lo, q_hi, k_lo, k_hi) | self.b.whole(q_lo, q_hi, k_lo, k_hi)
