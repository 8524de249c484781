"""Flash attention for GPUs in Pallas: one kernel forward, two backward (FlashAttention-2, arXiv:2307.08691).

Forward, a program holds a block of queries and walks through blocks of keys with a running maximum m and sum l:

    s = cap(scale q k')    m' = max(m, max s)    p = exp(s - m')    l = l exp(m - m') + sum p    o = o exp(m - m') + p v

and divides once at the end. Backward forms p = exp(s - lse) again, once by blocks of keys for dk and dv, which are
sums over queries and over the query heads that share a key head, and once by blocks of queries for dq:

    dv = p' do    ds = p * (do v' - delta) * cap'(s)    dq = scale ds k    dk = scale ds' q

The arrays stay as they are, (batch, time, heads, width): strides and masked loads serve heads, ragged ends and widths
that are no powers of two; nothing is copied or padded in memory. Which keys a query sees is found in the kernel from
positions and segments. Which blocks a program visits is found before: two runs of blocks (`_runs`), which is exact for
causal masks, windows, prefixes, documents, and sinks beside a window.

Inside kernels, exponentials are of base 2, which is what GPUs compute: scores are scaled by log2(e) as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from longwave.kernels import gpu_compat
from longwave.kernels.attention import visits
from longwave.kernels.attention.mask import Mask, tables
from longwave.kernels.attention.reference import Coordinates, Scores

LOG2E = math.log2(math.e)
HIDDEN = -1e30  # score of an invisible key
FLOOR = -1e29  # where the running maximum starts: above HIDDEN, so that exp(HIDDEN - m) is 0 even if no key is seen
NARROWEST = 16  # rows and columns of the smallest product of tensor cores


class Tile(NamedTuple):
    """Queries and keys of a block, warps that share it, stages of its pipeline."""

    q: int
    k: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    forward: Tile
    dkv: Tile
    dq: Tile


# By bytes of an element and width of a head. The fewest instructions a score on sm_90a among tiles without spills, in
# the 99 KiB of shared memory that every chip since sm_80 has; products of 64 rows a warp group run as wgmma there.
TILES = {
    (2, 64): Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    (2, 128): Tiles(Tile(128, 64, 8, 2), Tile(32, 64, 4, 2), Tile(64, 64, 4, 2)),
    (2, 256): Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 8, 1), Tile(64, 32, 4, 1)),
    (4, 64): Tiles(Tile(64, 32, 4, 2), Tile(16, 32, 4, 2), Tile(32, 32, 4, 2)),
    (4, 128): Tiles(Tile(32, 32, 4, 2), Tile(32, 16, 8, 1), Tile(16, 32, 4, 1)),
}
WASTE = 1.25  # blocks visited for one that is live: beyond, the chunked form, which visits no other, is the better


def supports(q: Any, k: Any, v: Any, q_at: Coordinates, k_at: Coordinates, scores: Scores) -> str | None:
    """Why these arrays and this mask are not for this form; None when they are."""
    dtypes = sorted({x.dtype.name for x in (q, k, v)})
    if reason := gpu_compat.missing():
        return reason
    if len(dtypes) > 1 or dtypes[0] not in ("bfloat16", "float16", "float32"):
        return f"q, k, v are {', '.join(dtypes)}, not all of one of bfloat16, float16, float32"
    widest = max(width for size, width in TILES if size == q.dtype.itemsize)
    if max(q.shape[-1], v.shape[-1]) > widest:
        return f"heads of width {max(q.shape[-1], v.shape[-1])}; registers hold {widest} of {dtypes[0]}"
    if 0 in (*q.shape, *k.shape, *v.shape):
        return "an array is empty"
    if tables(scores.mask):
        return "a mask with tables (BlockSparse)"
    if jax.tree.leaves((q_at, k_at)):
        return None  # which blocks are live is known only as the program runs
    tiles = _tiles(q, v)
    for tile, by_keys in ((tiles.forward, False), (tiles.dkv, True)):
        live = _Plan.of(q, k, v, scores, tile, False).live(q_at, k_at)
        visited = int(_runs(live.swapaxes(1, 2) if by_keys else live)[..., 3].sum())
        if visited > WASTE * live.sum():
            return f"{live.sum()} live blocks in more than two runs, which would visit {visited}"
    return None


def forward(
    q: Float[Array, "b tq h d"],
    k: Float[Array, "b tk kv d"],
    v: Float[Array, "b tk kv dv"],
    q_at: Coordinates,
    k_at: Coordinates,
    scores: Scores,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b tq h dv"], Float[Array, "b tq h"]]:
    """Output in v's dtype and float32 log-sum-exp. `interpret`: run as XLA, on any platform."""
    plan = _Plan.of(q, k, v, scores, (tiles or _tiles(q, v)).forward, interpret)
    out = (jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), v.dtype), jax.ShapeDtypeStruct(q.shape[:3], jnp.float32))
    return plan.by_queries(_forward_kernel, (q,), (k, v), q_at, k_at, out, "attention_forward")


def backward(
    q: Float[Array, "b tq h d"],
    k: Float[Array, "b tk kv d"],
    v: Float[Array, "b tk kv dv"],
    q_at: Coordinates,
    k_at: Coordinates,
    lse: Float[Array, "b tq h"],
    delta: Float[Array, "b tq h"],
    do: Float[Array, "b tq h dv"],
    scores: Scores,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b tq h d"], Float[Array, "b tk kv d"], Float[Array, "b tk kv dv"]]:
    """Gradients from lse, over these keys and any others, and delta = sum(o * do) - dlse."""
    tiles = tiles or _tiles(q, v)
    like = lambda *xs: tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs)
    queries, keys = (q, do.astype(v.dtype), lse, delta), (k, v)
    plan = _Plan.of(q, k, v, scores, tiles.dq, interpret)
    (dq,) = plan.by_queries(_dq_kernel, queries, keys, q_at, k_at, like(q), "attention_dq")
    plan = _Plan.of(q, k, v, scores, tiles.dkv, interpret)
    dk, dv = plan.by_keys(_dkv_kernel, queries, keys, q_at, k_at, like(k, v), "attention_dkv")
    return dq, dk, dv


def _tiles(q: Any, v: Any) -> Tiles:
    return TILES[q.dtype.itemsize, max(64, pl.next_power_of_2(max(q.shape[-1], v.shape[-1])))]


class _Plan(NamedTuple):
    """What a kernel knows at compile time, and how it is laid over a grid."""

    scores: Scores
    queries: visits.Split
    keys: visits.Split
    group: int  # query heads that share a key head
    width: int  # d
    depth: int  # dv
    tile: Tile
    interpret: bool

    @classmethod
    def of(cls, q: Any, k: Any, v: Any, scores: Scores, tile: Tile, interpret: bool) -> _Plan:
        split = lambda t, c: visits.Split(t, min(c, _padded(t)))
        group = q.shape[2] // k.shape[2]
        queries, keys = split(q.shape[1], tile.q), split(k.shape[1], tile.k)
        return cls(scores, queries, keys, group, q.shape[3], v.shape[3], tile, interpret)

    def live(self, q_at: Coordinates, k_at: Coordinates) -> Bool[Array, "rows nq nk"]:
        """Which pairs of blocks may have something visible between them; NumPy where it is constant."""
        return visits.pairs(self.scores.mask, q_at, k_at, self.queries, self.keys)[0]

    def by_queries(self, kernel: Callable, queries: Any, keys: Any, q_at: Any, k_at: Any, out: Any, name: str) -> Any:
        """A program for each block of queries of each head, which walks through the keys of its key head."""
        own = partial(_spec, size=self.queries.c, at=lambda i, h: (i, h))
        other = partial(_spec, size=self.keys.n * self.keys.c, at=lambda i, h: (0, h // self.group))
        runs = _runs(self.live(q_at, k_at))
        return self._call(kernel, runs, queries[0], (queries, keys, q_at, k_at), (own, other) * 2, own, out, name)

    def by_keys(self, kernel: Callable, queries: Any, keys: Any, q_at: Any, k_at: Any, out: Any, name: str) -> Any:
        """A program for each block of keys of each key head, which walks through the queries of all its heads."""
        own = partial(_spec, size=self.keys.c, at=lambda i, h: (i, h))
        other = partial(_spec, size=self.queries.n * self.queries.c, at=lambda i, h: (0, h), heads=self.group)
        runs = _runs(self.live(q_at, k_at).swapaxes(1, 2))
        return self._call(kernel, runs, keys[0], (queries, keys, q_at, k_at), (other, own) * 2, own, out, name)

    def _call(self, kernel, runs, x: Array, arrays: Any, cuts: Any, cut: Callable, out: Any, name: str) -> Any:
        """The kernel on arrays, cut by cuts, over (blocks, heads, batch) of x, for results `out`, cut by cut."""
        rows, n, _ = runs.shape
        runs_spec = pl.BlockSpec((None, None, 4), lambda i, h, b: (b if rows > 1 else 0, i, 0))
        return gpu_compat.call(
            partial(kernel, self),
            warps=self.tile.warps,
            stages=self.tile.stages,
            grid=(n, x.shape[2], x.shape[0]),
            in_specs=(runs_spec, *map(jax.tree.map, cuts, arrays)),
            out_specs=jax.tree.map(cut, out),
            out_shape=out,
            interpret=self.interpret,
            name=name,
        )(runs, *arrays)

    def scores_of(self, products: Float[Array, "..."], see: Bool[Array, "..."] | bool) -> tuple[Array, Array | None]:
        """Scores in base 2, HIDDEN where nothing is seen, and the slope of the cap (None: 1)."""
        scale, softcap = self.scores.scale, self.scores.softcap
        if softcap is None:
            s, slope = products * (scale * LOG2E), None
        else:
            t = jnp.tanh(products * (scale / softcap))
            s, slope = t * (softcap * LOG2E), 1 - t * t
        return s if see is True else jnp.where(see, s, HIDDEN), slope

    def dot(self, a: Array, b: Array, contract: tuple[int, int]) -> Float[Array, "..."]:
        return gpu_compat.dot(a, b, contract, self.interpret)


def _spec(x: Any, *, size: int, at: Callable[..., tuple], heads: int | None = None) -> pl.BlockSpec:
    """`size` tokens of x (b, t, h, d), (b, t, h), (b, t) or (t,), of one head or of some."""
    if x.ndim == 1:
        return pl.BlockSpec((size,), lambda i, h, b: at(i, h)[:1])
    if x.ndim == 2:
        return pl.BlockSpec((None, size), lambda i, h, b: (b, at(i, h)[0]))
    widths = tuple(_padded(n) for n in x.shape[3:])
    return pl.BlockSpec((None, size, heads, *widths), lambda i, h, b: (b, *at(i, h), *(0 for _ in widths)))


def _padded(n: int) -> int:
    """The size in which a kernel holds n."""
    return max(NARROWEST, pl.next_power_of_2(n))


def _runs(live: Bool[Any, "rows n m"]) -> Int[Any, "rows n 4"]:
    """The live blocks of each outer block as two runs: up to the first gap, and from behind it to the last.

    The i-th block of a walk of n is i + (first if i < short else shift): (first, short, shift, n).
    NumPy where `live` is.
    """
    xp = np if isinstance(live, np.ndarray) else jnp
    m = live.shape[-1]
    index = xp.broadcast_to(xp.arange(m), live.shape)
    least = lambda x: xp.min(index, -1, where=x, initial=m)
    first = least(live)
    gap = least(~live & (index > first[..., None]))
    again = least(live & (index > gap[..., None]))
    end = xp.max(index + 1, -1, where=live, initial=0)
    short = xp.minimum(gap, end) - xp.minimum(first, end)
    return xp.stack([first, short, again - short, short + xp.maximum(end - again, 0)], -1).astype(np.int32)


def _walk(runs_ref: Any, visit: Callable[..., Any], state: Any) -> Any:
    """State after visit(block, state) of every block of the two runs."""
    first, short, shift, n = (runs_ref[x] for x in range(4))
    return lax.fori_loop(0, n, lambda i, state: visit(i + jnp.where(i < short, first, shift), state), state)


class _Rows(NamedTuple):
    """Tokens of a block: which they are, and where they stand in a reference that holds their sequence or just them."""

    index: Int[Array, "c"]
    here: Any
    split: visits.Split

    @classmethod
    def own(cls, split: visits.Split) -> _Rows:
        return cls(split.c * pl.program_id(0) + jnp.arange(split.c), slice(None), split)

    @classmethod
    def other(cls, j: Int[Array, ""], split: visits.Split) -> _Rows:
        return cls(split.c * j + jnp.arange(split.c), pl.ds(split.c * j, split.c), split)

    @property
    def ragged(self) -> bool:
        return self.split.n * self.split.c > self.split.t

    def places(self, at: Coordinates) -> Coordinates:
        position, segment = (None if ref is None else self.read(ref) for ref in at)
        return Coordinates(self.index if position is None else position, segment)

    def read(self, ref: Any, width: int | None = None, *head: Any) -> Array:
        """Rows of `width` (None: scalars), of a head where the reference holds several; 0 beyond the array."""
        return gpu_compat.load(ref.at[(self.here, *head)], self._inside(width))

    def write(self, ref: Any, x: Array, width: int | None = None) -> None:
        gpu_compat.store(ref.at[self.here], x.astype(ref.dtype), self._inside(width))

    def _inside(self, width: int | None) -> Bool[Array, "..."] | None:
        rows = self.index < self.split.t
        if width is None:
            return rows if self.ragged else None
        if not self.ragged and width == _padded(width):
            return None
        return rows[:, None] & (jnp.arange(_padded(width)) < width)[None, :]


def _visible(mask: Mask, q: _Rows, q_at: Coordinates, k: _Rows, k_at: Coordinates, *, by_keys: bool = False) -> Any:
    """Which query of a block sees which key, as (queries, keys), or by_keys the other way round."""
    queries, keys = (slice(None), None), (None, slice(None))
    if by_keys:
        queries, keys = keys, queries
    see = mask.visible(q_at.position[queries], k_at.position[keys])
    if k_at.segment is not None and q_at.segment is not None:
        segment = k_at.segment[keys]
        see = see & (q_at.segment[queries] == segment) & (segment >= 0)
    return see & (k.index < k.split.t)[keys] if k.ragged else see


def _forward_kernel(plan: _Plan, runs, queries, keys, q_at, k_at, *outputs):
    (q_ref,), (k_ref, v_ref), (o_ref, lse_ref) = queries, keys, outputs
    rows = _Rows.own(plan.queries)
    q, q_at = rows.read(q_ref, plan.width), rows.places(q_at)

    def visit(j, state):
        o, m, l = state
        others = _Rows.other(j, plan.keys)
        k, v = others.read(k_ref, plan.width), others.read(v_ref, plan.depth)
        see = _visible(plan.scores.mask, rows, q_at, others, others.places(k_at))
        s, _ = plan.scores_of(plan.dot(q, k, (1, 1)), see)
        m_new = jnp.maximum(m, jnp.max(s, 1))
        p = jnp.exp2(s - m_new[:, None])
        fade = jnp.exp2(m - m_new)
        o = o * fade[:, None] + plan.dot(p.astype(v.dtype), v, (1, 0))
        return o, m_new, l * fade + jnp.sum(p, 1)

    zeros = jnp.zeros(plan.queries.c)
    start = jnp.zeros((plan.queries.c, _padded(plan.depth))), zeros + FLOOR, zeros
    o, m, l = _walk(runs, visit, start)
    blind = l == 0
    l = jnp.where(blind, 1.0, l)
    rows.write(o_ref, o / l[:, None], plan.depth)
    rows.write(lse_ref, jnp.where(blind, -jnp.inf, m / LOG2E + jnp.log(l)))


def _dq_kernel(plan: _Plan, runs, queries, keys, q_at, k_at, *outputs):
    (q_ref, do_ref, lse_ref, delta_ref), (k_ref, v_ref), (dq_ref,) = queries, keys, outputs
    rows = _Rows.own(plan.queries)
    q, do, q_at = rows.read(q_ref, plan.width), rows.read(do_ref, plan.depth), rows.places(q_at)
    lse, delta = _base_2(rows.read(lse_ref)), rows.read(delta_ref)

    def visit(j, dq):
        others = _Rows.other(j, plan.keys)
        k, v = others.read(k_ref, plan.width), others.read(v_ref, plan.depth)
        see = _visible(plan.scores.mask, rows, q_at, others, others.places(k_at))
        s, slope = plan.scores_of(plan.dot(q, k, (1, 1)), see)
        ds = jnp.exp2(s - lse[:, None]) * (plan.dot(do, v, (1, 1)) - delta[:, None])
        ds = ds if slope is None else ds * slope
        return dq + plan.dot(ds.astype(k.dtype), k, (1, 0))

    dq = _walk(runs, visit, jnp.zeros((plan.queries.c, _padded(plan.width))))
    rows.write(dq_ref, plan.scores.scale * dq, plan.width)


def _dkv_kernel(plan: _Plan, runs, queries, keys, q_at, k_at, *outputs):
    (q_ref, do_ref, lse_ref, delta_ref), (k_ref, v_ref), (dk_ref, dv_ref) = queries, keys, outputs
    rows = _Rows.own(plan.keys)
    k, v, k_at = rows.read(k_ref, plan.width), rows.read(v_ref, plan.depth), rows.places(k_at)

    def visit(head, j, sums):
        dk, dv = sums
        others = _Rows.other(j, plan.queries)
        q, do = others.read(q_ref, plan.width, head), others.read(do_ref, plan.depth, head)
        lse, delta = _base_2(others.read(lse_ref, None, head)), others.read(delta_ref, None, head)
        see = _visible(plan.scores.mask, others, others.places(q_at), rows, k_at, by_keys=True)
        s, slope = plan.scores_of(plan.dot(k, q, (1, 1)), see)
        p = jnp.exp2(s - lse[None, :])
        dv = dv + plan.dot(p.astype(do.dtype), do, (1, 0))
        ds = p * (plan.dot(v, do, (1, 1)) - delta[None, :])
        ds = ds if slope is None else ds * slope
        return dk + plan.dot(ds.astype(q.dtype), q, (1, 0)), dv

    sums = tuple(jnp.zeros((plan.keys.c, _padded(n))) for n in (plan.width, plan.depth))
    dk, dv = lax.fori_loop(0, plan.group, lambda head, sums: _walk(runs, partial(visit, head), sums), sums)
    rows.write(dk_ref, plan.scores.scale * dk, plan.width)
    rows.write(dv_ref, dv, plan.depth)


def _base_2(lse: Float[Array, "c"]) -> Float[Array, "c"]:
    """0 for a query that sees nothing: exp(HIDDEN - 0) is 0, and so is its gradient."""
    return jnp.where(lse == -jnp.inf, 0.0, lse) * LOG2E
