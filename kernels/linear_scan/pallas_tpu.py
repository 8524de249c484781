"""One pass over memory on a TPU: time streams through VMEM while the state stays where it is.

In HBM an array (b, t, d) lies in tiles of 8 tokens x 128 channels. `_tiled` gives these dimensions of their own,
(b, t / 8, d / 16, 128), which moves nothing: to the compiler it is another name. The grid walks (rows, channels, time),
time last and in the direction of the sweep; `tpu_kernel.py` is a step of it. What is no whole tile is padded.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from longwave.kernels.linear_scan.chunked import pad
from longwave.kernels.linear_scan.pair import Number, float32, one_like, shape
from longwave.kernels.linear_scan.reference import Sweep, Tokens
from longwave.kernels.linear_scan.tpu_kernel import (
    HANDED,
    LANES,
    NOTHING,
    RESET,
    SUBLANES,
    VALID,
    Blocks,
    Desks,
    Kernel,
    Reads,
    Writes,
)

VMEM, VMEM_LIMIT = 20 * 2**20, 48 * 2**20  # of all streams, each buffered twice; what the compiler may use in all
CHAINS = 4  # recurrences that a grid step advances side by side, so that none waits for its own last step


def refusal(tokens: Tokens) -> str | None:
    """Why the kernel does not serve this call; None: it does."""
    others = {leaf.dtype.name for leaf in jax.tree.leaves((tokens.a, tokens.x))} - {"float32", "bfloat16"}
    return f"a or x is {' and '.join(sorted(others))}, it takes float32 and bfloat16" if others else None


def sweep_tokens(tokens: Tokens, state: Number, sweep: Sweep) -> tuple[Number, Number]:
    """(out (b, t, d) in the dtype of x, what the last token hands on (b, d))."""
    out, last, _ = _run(tokens, float32(state), sweep)
    return out, last


def compose(tokens: Tokens, sweep: Sweep) -> tuple[Number, Number]:
    """The map of all tokens, (P, S): what they are handed -> P handed + S. Reads once and writes nothing else."""
    b, _, d = shape(tokens.x)
    zeros = jax.tree.map(lambda v: jnp.zeros((b, d), jnp.float32), tokens.x)
    return _run(tokens, (one_like(zeros), zeros), sweep, puts_out=False)[1]


def adjoint(tokens: Tokens, state: Number, h: Number, handed: Number, sweep: Sweep) -> tuple[Number, Number, Number]:
    """`sweep_tokens` of an adjoint, and the gradient of a: (out, last, da).

    h, handed: what the sweep the other way put out (b, t, d), and what it was handed (b, d).
    da: (b, t, d) in the dtype of a; for a of shape (d,) its sums over time (b, d), float32.
    """
    return _run(tokens, float32(state), sweep, h=h, handed=float32(handed))


def choose(b: int, t: int, d: int, width: int) -> Blocks:
    """Blocks of whole tiles. width: bytes of one token of one channel, in all arrays that stream through."""
    all_lanes = -(-d // LANES)
    registers = max(1, min(CHAINS, VMEM // (2 * width * LANES * SUBLANES * LANES)))  # that leave room for 128 tokens
    parts = -(-all_lanes // (SUBLANES * registers))
    lanes = all_lanes if parts == 1 else SUBLANES * -(-all_lanes // (SUBLANES * parts))
    most = min(b if parts > 1 else max(1, b // 2), SUBLANES * registers // lanes)  # work for two cores, if there are
    rows = -(-b // -(-b // most))
    t = -(-t // SUBLANES) * SUBLANES
    most = max(LANES, VMEM // (2 * width * rows * lanes * LANES) // LANES * LANES)
    whole = [tokens for tokens in range(LANES, most + 1, LANES) if t % tokens == 0]
    return Blocks(rows, min(t, max(whole, default=most)) // SUBLANES, lanes)


def grid(b: int, t: int, d: int, size: Blocks) -> tuple[int, int, int]:
    """How many blocks of rows, channels and time there are; the last of each may stick out."""
    return pl.cdiv(b, size.rows), pl.cdiv(pl.cdiv(d, LANES), size.lanes), pl.cdiv(pl.cdiv(t, SUBLANES), size.tiles)


def _run(
    tokens: Tokens,
    state: Any,
    sweep: Sweep,
    *,
    puts_out: bool = True,
    h: Number | None = None,
    handed: Number | None = None,
) -> tuple[Any, Any, Any]:
    """(out, last, da), each None where not asked for."""
    b, t, d = shape(tokens.x)
    whole = -(-t // SUBLANES) * SUBLANES
    if whole > t:
        tokens, h = pad(tokens, whole), h if h is None else pad(Tokens(h, h, None, None), whole).x
    tiled, still = (lambda number, to=to: jax.tree.map(to, number) for to in (_tiled, _still))
    constant = len(shape(tokens.a)) == 1
    reads = Reads(_flags(tokens, sweep), (still if constant else tiled)(tokens.a), tiled(tokens.x), still(state))
    if h is not None:
        reads = reads._replace(h=tiled(h), edge=tiled(h), handed=still(handed))
    gradient = None if h is None else reads.handed if constant else reads.a
    writes = Writes(reads.x if puts_out else None, reads.state, gradient)
    streams = [leaf for leaf in jax.tree.leaves((reads._replace(edge=None), writes)) if leaf.ndim == 4]
    size = choose(b, t, d, sum(leaf.dtype.itemsize for leaf in streams))
    steps = grid(b, t, d, size)
    specs = _specs(size, steps, whole // SUBLANES, sweep)
    out, last, da = pl.pallas_call(
        Kernel(sweep, size, whole // SUBLANES, tokens.reset is not None, tokens.valid is not None),
        grid=steps,
        in_specs=(Reads(*(specs(number, name) for name, number in zip(Reads._fields, reads, strict=True))),),
        out_specs=tuple(specs(number) for number in writes),
        out_shape=jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), tuple(writes)),
        scratch_shapes=(Desks.of(reads, writes, size),),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * sum(leaf.size for leaf in streams),
            bytes_accessed=sum(leaf.size * leaf.dtype.itemsize for leaf in streams),
            transcendentals=0,
        ),
        name="linear_scan_map" if not puts_out else "linear_scan" if h is None else "linear_scan_adjoint",
    )(reads)
    back = lambda v: _untiled(v)[:, :t, :d] if v.ndim == 4 else v.reshape(b, -1)[:, :d]
    return jax.tree.map(back, (out, last, da))


def _specs(size: Blocks, steps: tuple[int, int, int], tiles: int, sweep: Sweep) -> Any:
    """(arrays, name) -> their blocks. tiles: of all time."""
    wide = SUBLANES * size.lanes

    def when(k: Array) -> Array:
        return steps[2] - 1 - k if sweep.reverse else k

    def beside(k: Array) -> Array:
        return jnp.maximum(k * size.tiles - 1, 0) if sweep.reverse else jnp.minimum((k + 1) * size.tiles, tiles - 1)

    by_rank = {
        2: pl.BlockSpec((size.lanes, LANES), lambda i, j, k: (j, 0)),
        3: pl.BlockSpec((size.rows, size.lanes, LANES), lambda i, j, k: (i, j, 0)),
        4: pl.BlockSpec((size.rows, size.tiles, wide, LANES), lambda i, j, k: (i, when(k), j, 0)),
    }
    flags = -(-SUBLANES * size.tiles // LANES) * LANES
    by_name = {
        "flags": pl.BlockSpec((size.rows, 1, flags), lambda i, j, k: (i, 0, when(k))),
        "edge": pl.BlockSpec((size.rows, 1, wide, LANES), lambda i, j, k: (i, beside(when(k)), j, 0)),
    }
    return lambda number, name="": jax.tree.map(lambda v: by_name.get(name) or by_rank[v.ndim], number)


def _flags(tokens: Tokens, sweep: Sweep) -> Int[Array, "b 1 t"] | None:
    """RESET and VALID as given; for the gradient of a, whether NOTHING, or what was HANDED in, stood for h."""
    if tokens.reset is None and tokens.valid is None:
        return None
    yes = jnp.ones(shape(tokens.x)[:2], bool)
    reset = ~yes if tokens.reset is None else tokens.reset[..., 0]
    valid = yes if tokens.valid is None else tokens.valid[..., 0]
    edge = yes[:, :1]
    if sweep.reverse:  # h came from the token before
        real, cut = jnp.concatenate((edge, valid[:, :-1]), 1), reset
    else:
        real = jnp.concatenate((valid[:, 1:], edge), 1)
        cut = jnp.concatenate((reset[:, 1:], ~edge), 1) & real
    bits = ((reset, RESET), (valid, VALID), (cut | ~valid, NOTHING), (~real, HANDED))
    flags = sum(mask.astype(jnp.int32) * bit for mask, bit in bits)[:, None]
    return jnp.pad(flags, ((0, 0), (0, 0), (0, -flags.shape[2] % LANES)))


def _whole(x: Float[Array, "... d"]) -> Float[Array, "... D"]:
    """Zeros behind the last channel, up to whole tiles."""
    extra = -x.shape[-1] % LANES
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, extra),)) if extra else x


def _still(x: Float[Array, "... d"]) -> Float[Array, "... d/128 128"]:
    return _whole(x).reshape(*x.shape[:-1], -1, LANES)


def _tiled(x: Float[Array, "b t d"]) -> Float[Array, "b t/8 d/16 128"]:
    x = _whole(x)
    b, t, d = x.shape
    x = x.reshape(b, t // SUBLANES, SUBLANES, d // LANES, LANES).swapaxes(2, 3)
    return x.reshape(b, t // SUBLANES, d // LANES * SUBLANES, LANES)


def _untiled(x: Float[Array, "b t/8 d/16 128"]) -> Float[Array, "b t d"]:
    b, tiles, rows, _ = x.shape
    x = x.reshape(b, tiles, rows // SUBLANES, SUBLANES, LANES).swapaxes(2, 3)
    return x.reshape(b, tiles * SUBLANES, rows // SUBLANES * LANES)
