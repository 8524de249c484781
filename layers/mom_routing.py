"""Where the tokens of a mixture of memories stand: a frame of static length in which every memory has a run of slots.

A token goes to k of m memories, so that t tokens always fill t k slots, whoever gets them. In the frame the runs of the
memories follow each other, each from a multiple of `chunk` on:

    [tail | tokens of memory 0, in order | padding] [tail | tokens of memory 1 | padding] ... [padding]

A token's slot is the start of its memory's run, the tail, and the number of earlier tokens of that memory: a running
count, hence no sort, and nothing that could depend on a later token. The tail is the last inputs of the memory before
this call: a convolution that runs over the frame finds them where it looks, and what stands before them it never sees.
Integers are scattered once, to turn the map around. Values only ever move by gathers, in both directions of both maps.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from longwave.kernels.aot.chips import traced_for
from longwave.kernels.linear_attention.reference import SPAN


def run_chunk(t: int, k: int, memories: int) -> int:
    """What runs start at multiples of: a power of two, 16 to 256, that makes padding at most a sixteenth of the frame
    of a long sequence. For TPUs, whose kernels take a state at multiples of 256 alone: that, up to a third of padding.
    """
    if traced_for() is not None and 2 * memories * SPAN <= t * k:
        return SPAN
    share = max(t * k // (16 * memories), 1)
    return min(max(1 << (share.bit_length() - 1), 16), SPAN)


class Frame(NamedTuple):
    """A frame of f slots. The number of what is not there: f for a slot, t for a token.

    token: of each slot; memory: whose run it is in, -1 behind the last.
    slots: of each token, in the order in which its memories were given; slot_of: the same by memory.
    start, count: first slot of every run, its tail's; tokens in it.
    tail: length of a tail.
    document: of each slot's token, counted from 0, the one that was open before; tails are of that. None: of one.
    last: document of each row's last token.
    """

    token: Int[Array, "b f"]
    memory: Int[Array, "b f"]
    slots: Int[Array, "b t k"]
    slot_of: Int[Array, "b t m"]
    start: Int[Array, "b m"]
    count: Int[Array, "b m"]
    tail: int
    document: Int[Array, "b f"] | None
    last: Int[Array, " b"] | None

    @property
    def valid(self) -> Bool[Array, "b f"]:
        """Slots that hold a token."""
        return self.token < self.slots.shape[1]

    @property
    def reset(self) -> Bool[Array, "b f"] | None:
        """The first token of a document in each run."""
        if self.document is None:
            return None
        before = jnp.pad(self.document[:, :-1], ((0, 0), (1, 0)))  # a run's first slot is its tail's
        return self.valid & (self.document != before)

    def of_tokens(
        self, x: Float[Array, "b t d"], tails: Float[Array, "b m tail d"] | None = None
    ) -> Float[Array, "b f d"]:
        """What belongs to tokens, in all their slots, behind the tails; None: zeros."""
        return self._filled(x, self.token, self.slots, tails)

    def of_pairs(
        self, x: Float[Array, "b t m d"], tails: Float[Array, "b m tail d"] | None = None
    ) -> Float[Array, "b f d"]:
        """What every memory makes of every token, in the slots of those that go to it."""
        b, t, m, d = x.shape
        pair = jnp.where(self.valid, self.token * m + self.memory, t * m)
        return self._filled(x.reshape(b, t * m, d), pair, self.slot_of.reshape(b, t * m, 1), tails)

    def summed(self, y: Float[Array, "b f d"]) -> Float[Array, "b t d"]:
        """Of each token, the sum over its slots."""
        return _summed(y, self.slots, self.token)

    def tails(self, x: Float[Array, "b f d"]) -> Float[Array, "b m tail d"]:
        """The last inputs of every run, those of its old tail included; zero before the last document of the row."""
        there = (self.start + self.count)[..., None] + jnp.arange(self.tail)[None, None]
        b, m, tail = there.shape
        there = there.reshape(b, m * tail)
        if self.document is not None:
            kept = jnp.take_along_axis(self.document, there, axis=1) == self._last
            there = jnp.where(kept, there, x.shape[1])
        back = _inverse(there, x.shape[1])
        return _moved(x, there, back[..., None]).reshape(b, m, tail, -1)

    def forgotten(self) -> Bool[Array, "b m"] | None:
        """Memories that the last document of the row did not visit, of whatever earlier one they know."""
        if self.document is None:
            return None
        end = self.start + self.tail + self.count - 1
        return jnp.take_along_axis(self.document, end, axis=1) != self._last

    @property
    def _last(self) -> Int[Array, "b 1"]:
        assert self.last is not None
        return self.last[:, None]

    def _filled(
        self, x: Float[Array, "b n d"], there: Int[Array, "b f"], back: Int[Array, "b n j"], tails: Array | None
    ) -> Float[Array, "b f d"]:
        if tails is None:
            return _moved(x, there, back)
        b, n, d = x.shape
        m, f = self.start.shape[1], there.shape[1]
        slots = (self.start[..., None] + jnp.arange(self.tail)[None, None]).reshape(b, m * self.tail)
        number = _inverse(slots, f)
        there = jnp.where(number < m * self.tail, n + number, jnp.where(self.valid, there, n + m * self.tail))
        own = jnp.pad(slots[..., None], ((0, 0), (0, 0), (0, back.shape[2] - 1)), constant_values=f)
        x = jnp.concatenate((x, tails.astype(x.dtype).reshape(b, m * self.tail, d)), axis=1)
        return _moved(x, there, jnp.concatenate((back, own), axis=1))


def lay_out(
    memories_of: Int[Array, "b t k"],
    memories: int,
    *,
    tail: int,
    chunk: int,
    reset: Bool[Array, "b t"] | None = None,
    valid: Bool[Array, "b t"] | None = None,
) -> Frame:
    """The frame of tokens that go to these memories, all different; invalid ones go nowhere. tail: at least 1."""
    b, t, k = memories_of.shape
    f = (t * k + memories * (tail + chunk - 1)) // chunk * chunk
    goes = (memories_of[..., None] == jnp.arange(memories)[None, None, None]).any(2)
    goes = goes if valid is None else goes & valid[..., None]
    number = jnp.cumsum(goes, axis=1, dtype=jnp.int32)
    count = number[:, -1]
    runs = -(-(tail + count) // chunk) * chunk
    ends = jnp.cumsum(runs, axis=1)
    start = ends - runs
    slot_of = jnp.where(goes, start[:, None] + (tail - 1) + number, f)
    slots = jnp.take_along_axis(slot_of, memories_of, axis=2)
    token = _inverse(slots.reshape(b, t * k), f)
    token = jnp.where(token < t * k, token // k, t)
    memory = (jnp.arange(f)[None, :, None] >= ends[:, None]).sum(2, dtype=jnp.int32)
    memory = jnp.where(memory < memories, memory, -1)
    document = last = None
    if reset is not None:
        number = jnp.cumsum(reset if valid is None else reset & valid, axis=1, dtype=jnp.int32)
        document = jnp.take_along_axis(number, token, axis=1, mode="fill", fill_value=0)
        last = number[:, -1]
    return Frame(token, memory, slots, slot_of, start, count, tail, document, last)


def _inverse(there: Int[Array, "b n"], m: int) -> Int[Array, "b m"]:
    """Who went to each of m places: n where nobody did."""
    n = there.shape[1]
    put = lambda there: jnp.full(m, n, jnp.int32).at[there].set(jnp.arange(n, dtype=jnp.int32), mode="drop")
    return jax.vmap(put)(there)


# Two linear maps, each the transpose of the other. `there` says who comes to each of m places, `back` to which (at most
# j) places each of n goes; a number past the end: nobody, nowhere.


@jax.custom_vjp
def _moved(x: Float[Array, "b n d"], there: Int[Array, "b m"], back: Int[Array, "b n j"]) -> Float[Array, "b m d"]:
    return _rows(x, there)


@jax.custom_vjp
def _summed(y: Float[Array, "b m d"], back: Int[Array, "b n j"], there: Int[Array, "b m"]) -> Float[Array, "b n d"]:
    if back.shape[2] == 1:
        return _rows(y, back[..., 0])
    return sum(_rows(y, back[..., j]).astype(jnp.float32) for j in range(back.shape[2])).astype(y.dtype)


_moved.defvjp(
    lambda x, there, back: (_moved(x, there, back), (back, there)),
    lambda maps, d: (_summed(d, *maps), None, None),
)
_summed.defvjp(
    lambda y, back, there: (_summed(y, back, there), (there, back)),
    lambda maps, d: (_moved(d, *maps), None, None),
)


def _rows(x: Float[Array, "b n d"], index: Int[Array, "b m"]) -> Float[Array, "b m d"]:
    return jnp.take_along_axis(x, index[..., None], axis=1, mode="fill", fill_value=0)
