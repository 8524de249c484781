"""The note pool: what a layer wrote down of its document, in a fixed number of slots, for all tokens at once.

Some tokens are noted. Every w noted ones make a window, whose summary takes a slot of the pool, or none. A token reads
the pool as the tokens before it left it. Three numberings make this parallel: tokens (t), noted tokens in their order
(m), completed windows in theirs (e). The pool has e + 1 states, `table` says which summary each of its slots holds in
each of them, and a token needs only the number of its state.

Reading goes by spans of tokens. The keys of a span are the pool before it and the windows completed inside; a mask
tells which of them are in the pool of a token. Memory and time are linear in t, and no slot is copied for a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from longwave.layers.attention import Places
from longwave.layers.note_choices import Replacement, Slots, Windows

SPAN = 200  # tokens: the period of the paper's Figure 2, so that in every span as many read

Pool = dict[str, Array]


def empty_pool(batch: int, *, window: int, slots: int, width: int) -> Pool:
    """The carried state. Notes are float32, `width` numbers and the score behind them; counts are int32.

    position: tokens that the document has had.      rank: those of them that were noted.
    open:     the last `window` noted tokens, the newest last.
    note:     the summary that each slot holds.      number: which of the document's windows it is; -1: none.
    """
    count = lambda: jnp.zeros(batch, jnp.int32)
    zeros = lambda n: jnp.zeros((batch, n, width + 1), jnp.float32)
    number = jnp.full((batch, slots), -1, jnp.int32)
    return {"position": count(), "rank": count(), "open": zeros(window), "note": zeros(slots), "number": number}


class Notes(NamedTuple):
    """All summaries of a call, the k carried ones first, and what the pool's states hold.

    note:  of every summary, its score last.      document: its document (`Places.segment`); -2: no summary.
    slot:  which slot a completed window took; k: none.      table: which summary a slot holds in each state.
    state: the state that a token reads: how many windows this call completed before it.
    """

    note: Float[Array, "b k+e n+1"]
    document: Int[Array, "b k+e"]
    slot: Int[Array, "b e"]
    table: Int[Array, "b e+1 k"]
    state: Int[Array, "b t"]


def take_notes(
    pool: Pool,
    note: Float[Array, "b t n"],
    score: Float[Array, "b t"],
    noted: Bool[Array, "b t"],
    at: Places,
    *,
    most: int,
    pool_fn: Callable[[Array], Array],
    replace: Replacement,
) -> tuple[Notes, Pool]:
    """The notes of a call and the pool after it. `most`: a bound on how many tokens of a row are noted."""
    b, _, n = note.shape
    w, k = pool["open"].shape[1], pool["note"].shape[1]
    count = jnp.cumsum(noted, axis=1, dtype=jnp.int32)
    begins = (at.position == 0) & (at.segment >= 0)
    rank = count - lax.cummax(jnp.where(begins, count - noted, -pool["rank"][:, None]), axis=1)  # this token included
    done = noted & (rank % w == 0)
    ended = jnp.cumsum(done, axis=1, dtype=jnp.int32)

    both = lambda old, x: jnp.concatenate([old, x], axis=1)
    new = jnp.concatenate([note, score[..., None]], axis=2)
    written = both(pool["open"], take(new, nth(noted, most)))
    e = completed(most, w)
    last = nth(done, e)
    inside = take(count, last)[..., None] + jnp.arange(w)[None, None]  # the w ones up to the last, behind `open`
    windows = take(written, inside.reshape(b, -1)).reshape(b, e, w, n + 1)
    best = jnp.max(windows[..., -1], axis=2)
    found = Windows(best, take(rank, last) // w - 1, jnp.arange(e)[None] < ended[:, -1:])
    slot = replace(found, Slots(pool["note"][..., -1], pool["number"]))

    own = jnp.where(slot[..., None] == jnp.arange(k)[None, None], k + jnp.arange(e)[None, :, None], 0)
    start = jnp.broadcast_to(jnp.arange(k)[None, None], (b, 1, k))
    result = Notes(
        note=both(pool["note"], jnp.concatenate([pool_fn(windows[..., :-1]), best[..., None]], axis=2)),
        document=both(jnp.where(pool["number"] >= 0, 0, -2), jnp.where(found.live, take(at.segment, last), -2)),
        slot=slot,
        table=lax.cummax(both(start, own), axis=1),
        state=ended - done,
    )
    held = result.table[:, -1]
    keep = take(result.document, held) == at.last[:, None]
    return result, {
        "position": at.end,
        "rank": rank[:, -1],
        "open": take(written, count[:, -1:] + jnp.arange(w)[None]),
        "note": jnp.where(keep[..., None], take(result.note, held), 0),
        "number": jnp.where(keep, take(both(pool["number"], found.number), held), -1),
    }


def read_notes(
    notes: Notes,
    x: Float[Array, "b t d"],
    reads: Bool[Array, "b t"],
    at: Places,
    attend: Callable[[Array, Array, Array], Array],
    *,
    most_ended: int,
    most_reads: int,
    span: int,
) -> Float[Array, "b t d"]:
    """What every token for which `reads` holds reads of the pool as it stands before it; 0 for all others.

    attend(x (b, c, q, d), note (b, c, s, n+1), seen (b, c, q, s)) -> (b, c, q, d), zero where none of the s summaries
    is seen.    most_ended, most_reads: bounds for `span` tokens of a row: windows that end, readers.
    """
    b, t, _ = x.shape
    k, e = notes.table.shape[2], notes.slot.shape[1]
    spans = -(-t // span)

    def split(v: Array, fill: int = 0) -> Array:
        v = jnp.pad(v, ((0, 0), (0, spans * span - t), *((0, 0),) * (v.ndim - 2)), constant_values=fill)
        return v.reshape(b, spans, span, *v.shape[2:])

    reads, state, x = split(reads), split(notes.state), split(x)
    first = state[:, :, 0]
    segment = jnp.where(reads, split(at.segment), -1)
    order = jnp.cumsum(reads, axis=2, dtype=jnp.int32)
    if most_reads < span:  # readers side by side
        source = nth(reads, most_reads)
        live = jnp.arange(most_reads)[None, None] < order[:, :, -1:]
        state, x, segment = take(state, source), take(x, source), jnp.where(live, take(segment, source), -1)

    before = take(notes.table, first)
    fresh = first[..., None] + jnp.arange(most_ended)[None, None]
    slot = jnp.where(fresh < e, take(notes.slot, jnp.minimum(fresh, e - 1).reshape(b, -1)).reshape(fresh.shape), k)
    fresh = k + jnp.minimum(fresh, e - 1)
    keys = jnp.concatenate([before, fresh], axis=2)
    now = take(notes.table, state.reshape(b, -1)).reshape(*state.shape, k)
    holds = jnp.take_along_axis(now, jnp.minimum(slot, k - 1)[:, :, None], axis=3) == fresh[:, :, None]
    seen = jnp.concatenate([now == before[:, :, None], holds & (slot < k)[:, :, None]], axis=3)
    of = lambda v: take(v, keys.reshape(b, -1)).reshape(*keys.shape, *v.shape[2:])
    seen = seen & (of(notes.document)[:, :, None] == segment[..., None])
    y = attend(x, of(notes.note), seen)
    if most_reads < span:
        y = take(y, jnp.clip(order - 1, 0, most_reads - 1))
    return jnp.where(reads[..., None], y, 0).reshape(b, spans * span, -1)[:, :t]


def peaks(notes: Notes, at: Places) -> tuple[Float[Array, "b t n"], Bool[Array, "b t"]]:
    """The largest of each channel over the pool that a token reads, and whether it holds anything; else 0."""
    b, states, k = notes.table.shape
    document = jnp.pad(notes.document[:, k:], ((0, 0), (1, 0)))  # of each state
    of = lambda v: take(v, notes.table.reshape(b, -1)).reshape(b, states, k, *v.shape[2:])
    held = of(notes.document) == document[..., None]
    some = jnp.any(held, axis=2)
    top = jnp.max(jnp.where(held[..., None], of(notes.note[..., :-1]), -jnp.inf), axis=2)
    here = take(some, notes.state) & (take(document, notes.state) == at.segment)
    return jnp.where(here[..., None], take(jnp.where(some[..., None], top, 0), notes.state), 0), here


def completed(notes: int, window: int) -> int:
    """At most so many windows end with so many notes, the first of which may be filled but for one."""
    return (notes + window - 1) // window


def nth(mask: Bool[Array, "*b t"], size: int) -> Int[Array, "*b size"]:
    """Where the first, second, ... true entry of a row stands; 0 behind the last."""
    t = mask.shape[-1]
    index = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), mask.shape)
    first = jnp.sort(jnp.where(mask, index, t), axis=-1)[..., :size]  # a scatter would gather the batch of a mesh
    return jnp.where(first < t, first, 0)


def take(x: Array, index: Int[Array, "*b s"]) -> Array:
    """x (*b, r, *d) -> (*b, s, *d): entry `index` of every row."""
    widen = (..., *(None,) * (x.ndim - index.ndim))
    return jnp.take_along_axis(x, index[widen], axis=index.ndim - 1)
