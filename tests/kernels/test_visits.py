"""Lists of visits, walked as a kernel walks them, against all pairs of tokens."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longwave.kernels.attention.mask import (
    Blocks,
    BlockSparse,
    Butterfly,
    Causal,
    Global,
    Mask,
    Prefix,
    Sinks,
    Window,
    tables,
)
from longwave.kernels.attention.reference import Coordinates
from longwave.kernels.attention.visits import FIRST, LAST, LIVE, MASKED, TABLE, TABLES, Split, pairs, refusal, visits
from tests.kernels import attention_oracle as oracle

TABLE_8 = BlockSparse(np.random.default_rng(2).random((4, 5)) < 0.4, 8)
CONSTANT = {
    "all": (Mask(), Split(29, 8), Split(32, 8)),
    "causal": (Causal(), Split(29, 8), Split(29, 4)),
    "more keys": (Causal(), Split(8, 8), Split(30, 4)),
    "nothing for some": (Causal(-9) & Window(12), Split(32, 4), Split(21, 4)),
    "nothing for all": (Causal(-40), Split(20, 4), Split(21, 4)),
    "window and sinks": (Causal() & (Window(6) | Sinks(2)), Split(40, 8), Split(40, 4)),
    "prefix": (Causal() | Prefix(11), Split(24, 8), Split(24, 8)),
    "butterfly": (Butterfly(4) | Global(3), Split(32, 8), Split(32, 4)),
    "table": (TABLE_8, Split(31, 8), Split(36, 4)),
    "tables": ((TABLE_8 | Causal(-3)) & (BlockSparse(np.eye(9), 4) | Window(5)), Split(31, 4), Split(33, 4)),
    "one block": (TABLE_8, Split(7, 24), Split(5, 24)),
}


def walk(steps, row, mask, see, q, k, *, by_keys):
    """The kernel's bookkeeping for one row; see (tq, tk) is what is visible of it. Returns the live blocks."""
    at, n_outer = list(zip(*(np.asarray(x[row]).tolist() for x in steps), strict=True)), (k if by_keys else q).n
    dead = next((i for i, (_, _, flags) in enumerate(at) if flags == 0), len(at))
    assert all(step == (*at[dead - 1][:2], 0) for step in at[dead:])  # the tail fetches nothing and does nothing
    order = [(j, i) if by_keys else (i, j) for i, j, _ in at[:dead]]
    assert order == sorted(set(order))  # one outer block after the other, none twice
    outer = [o for o, _ in order]
    assert [o for o, (_, _, flags) in zip(outer, at, strict=False) if flags & FIRST] == list(range(n_outer))
    assert [o for o, (_, _, flags) in zip(outer, at, strict=False) if flags & LAST] == list(range(n_outer))
    for n, (o, (_, _, flags)) in enumerate(zip(outer, at, strict=False)):
        assert bool(flags & FIRST) == (n == 0 or outer[n - 1] != o)
        assert bool(flags & LAST) == (n == dead - 1 or outer[n + 1] != o)

    live = np.zeros((q.n, k.n), bool)
    for i, j, flags in at[:dead]:
        live[i, j] = flags & LIVE
        tile = see[i * q.c : (i + 1) * q.c, j * k.c : (j + 1) * k.c]
        assert flags & MASKED or (tile.all() and (j + 1) * k.c <= k.t)  # nothing hidden, and no padding of the keys
        for m, table in enumerate(tables(mask)):
            cell = table.visible(np.array(i * q.c), np.array(j * k.c))
            assert bool(flags & (TABLE << m)) == bool(cell)
    for i, j in zip(*np.nonzero(~live), strict=True):
        assert not see[i * q.c : (i + 1) * q.c, j * k.c : (j + 1) * k.c].any()
    return live


@pytest.mark.parametrize("by_keys", [False, True], ids=["by queries", "by keys"])
@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant_list_visits_what_is_visible_and_no_more(name, by_keys):
    mask, q, k = CONSTANT[name]
    steps = visits(mask, Coordinates(), Coordinates(), q, k, by_keys=by_keys)
    assert all(isinstance(x, np.ndarray) and x.dtype == np.int32 and x.shape[0] == 1 for x in steps)
    assert (steps.flags != 0).all()
    see = np.broadcast_to(mask.visible(np.arange(q.t)[:, None], np.arange(k.t)[None, :]), (q.t, k.t))
    live = walk(steps, 0, mask, see, q, k, by_keys=by_keys)
    padded = np.pad(see, ((0, q.n * q.c - q.t), (0, k.n * k.c - k.t)))
    np.testing.assert_array_equal(live, padded.reshape(q.n, q.c, k.n, k.c).any((1, 3)))


def documents(t):
    """Rows: padded left, two documents, padded right, all padding."""
    segment = np.zeros((4, t), np.int32)
    segment[0, :9], segment[1, t // 2 :], segment[2, t - 7 :], segment[3] = -1, 1, -1, -1
    return segment


draw = np.random.default_rng(0)
SHUFFLED = draw.permutation(30).astype(np.int32)
CACHE = np.stack([np.arange(30), SHUFFLED, np.arange(30) // 9 * 9, np.arange(30) + 100]).astype(np.int32)
DATA = {  # of queries and of keys: positions, segments; 24 queries, 30 keys
    "documents": (Causal() & Window(11), None, documents(24), None, documents(30)),
    "one row of segments": (TABLE_8 | Window(3), None, documents(24)[1], None, documents(30)[1]),
    "shuffled": (Causal() & (Window(5) | Sinks(2)), np.arange(3, 27), None, SHUFFLED, None),
    "cache": (Causal() & Window(12), CACHE[:, 6:], documents(24), CACHE, documents(30)),
    "keys alone": (Butterfly(8) & Blocks(16), None, None, CACHE, None),
}


@pytest.mark.parametrize("name", DATA)
def test_a_list_made_as_the_program_runs_visits_what_is_visible(name):
    mask, *at = DATA[name]
    q, k = Split(24, 8), Split(30, 4)

    @jax.jit
    def lists(at):
        at = Coordinates(*at[:2]), Coordinates(*at[2:])
        return [visits(mask, *at, q, k, by_keys=by_keys) for by_keys in (False, True)]

    i, j = (np.arange(t) if x is None else x for x, t in ((at[0], q.t), (at[2], k.t)))
    see = oracle.seen(np.asarray(mask.visible(i[..., :, None], j[..., None, :])), at[1], at[3])
    rows = max([1, *(len(x) for x in at if x is not None and x.ndim == 2)])
    for by_keys, steps in zip((False, True), lists(at), strict=True):
        assert {x.shape[0] for x in steps} == {rows}
        for row, seen in enumerate(np.broadcast_to(see, (rows, q.t, k.t))):
            live = walk(steps, row, mask, seen, q, k, by_keys=by_keys)
            assert name != "documents" or live.sum() < 12  # of 24: documents and window are not visited whole


def test_what_segments_say_of_blocks():
    """A block of one document sees its like whole; padding is never whole, and blocks of other documents are dead."""
    ids = jnp.asarray([[0, 0, 0, 0, 1, 1, 1, -1]])
    of = lambda at: pairs(Mask(), at, at, Split(8, 4), Split(8, 4))
    live, whole = jax.jit(of)(Coordinates(None, ids))
    np.testing.assert_array_equal(live[0], [[True, False], [False, True]])
    np.testing.assert_array_equal(whole[0], [[True, False], [False, False]])


def test_tables_that_cannot_be_looked_up_are_refused():
    at, q = Coordinates(), Split(32, 8)
    ask = partial(refusal, TABLE_8)
    assert ask(at, at, q, Split(64, 4)) is None
    assert ask(at, at, q, Split(8, 128)) is None  # in one cell, whatever the block
    assert "blocks of 16 keys do not divide" in ask(at, at, q, Split(64, 16))
    assert "blocks of 9 queries do not divide" in ask(at, at, Split(9, 9), q)
    assert "positions that are data" in ask(at, Coordinates(jnp.arange(32)), q, q)
    assert refusal(Causal(), at, Coordinates(jnp.arange(32)), q, Split(64, 16)) is None
    many = TABLE_8
    for n in range(TABLES):
        many = many | BlockSparse(np.arange(20).reshape(4, 5) == n % 20, 8 * (1 + n // 20))
    assert f"{TABLES + 1} tables" in refusal(many, at, at, q, q)
    with pytest.raises(ValueError, match="attention: a table"):
        visits(TABLE_8, at, at, q, Split(64, 16))


@pytest.mark.parametrize("mask", [Causal() & Window(1024), Butterfly(128) | Global(64)], ids=str)
def test_lists_for_64k_tokens_are_made_at_once(mask):
    start = time.process_time()
    steps = visits(mask, Coordinates(), Coordinates(), Split(2**16, 128), Split(2**16, 128))
    assert time.process_time() - start < 1
    assert steps.q.shape[1] < 512 * 16
