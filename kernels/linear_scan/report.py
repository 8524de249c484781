"""What `longwave report linear_scan` shows: the TPU kernel at the sizes of a wide layer, and of S5."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from longwave.kernels.aot.estimate import Case
from longwave.kernels.aot.timing import Launch
from longwave.kernels.aot.tune import Candidate, Entry
from longwave.kernels.linear_scan import linear_scan
from longwave.kernels.linear_scan.pair import Number, Pair
from longwave.kernels.linear_scan.pallas_tpu import LANES, SUBLANES, choose, grid

WIDE = (4, 4096, 4096)  # b, t, d: what a gated layer of 4096 channels scans
S5 = (32, 4096, 256)  # complex, with the same a at all times


def cases(chip: str) -> list[Entry]:
    """Values, and values with their gradient."""
    bf16, f32 = jnp.bfloat16, jnp.float32
    calls = {
        "wide bfloat16": (WIDE, bf16, bf16, False, False),
        "wide float32": (WIDE, f32, f32, False, False),
        "wide bfloat16, masks": (WIDE, bf16, bf16, False, True),
        "S5 float32": (S5, f32, None, True, False),
        "S5 bfloat16, masks": (S5, bf16, None, True, True),
    }
    entries = []
    for name, call in calls.items():
        # The schedule of S5's gradient holds loops of the compiler's own, whose trips no Launch can tell.
        for gradient in (False, True) if call[0] is WIDE else (False,):
            problem = f"{name}, {'gradient' if gradient else 'forward'}"
            entries.append(Entry(problem, "longwave", [Candidate(case(problem, chip, *call, gradient))]))
    return entries


def case(
    name: str,
    chip: str,
    size: tuple[int, int, int],
    dtype: jnp.dtype,
    a_dtype: jnp.dtype | None,
    is_complex: bool,
    masks: bool,
    gradient: bool,
) -> Case:
    """One program. a_dtype: of a (b, t, d); None: a is (d,), float32."""
    b, t, d = size
    real: Any = jax.ShapeDtypeStruct
    number = lambda *of: Pair(real(*of), real(*of)) if is_complex else real(*of)
    a = number((d,), jnp.float32) if a_dtype is None else number(size, a_dtype)
    x, state = number(size, dtype), number((b, d), jnp.float32)
    flags = [jax.ShapeDtypeStruct((b, t), bool)] * 2 if masks else [None, None]

    def forward(a: Number, x: Number, state: Number, reset, valid) -> tuple[Number, Number]:
        return linear_scan(a, x, state, reset=reset, valid=valid)

    def backward(a: Number, x: Number, state: Number, reset, valid, weights) -> tuple:
        return jax.vjp(lambda a, x, state: forward(a, x, state, reset, valid), a, x, state)[1](weights)

    def both(a: Number, x: Number, state: Number, reset, valid, weights) -> tuple:
        return forward(a, x, state, reset, valid), backward(a, x, state, reset, valid, weights)

    parts = (1 + is_complex) * jnp.dtype(dtype).itemsize
    moving_a = 0 if a_dtype is None else (1 + is_complex) * jnp.dtype(a_dtype).itemsize
    flops = b * t * d * (8 if is_complex else 2)
    launches = {"linear_scan": _launch(size, 2 * parts + moving_a, masks, flops)}
    if gradient:
        launches["linear_scan_adjoint"] = _launch(size, 3 * parts + 2 * moving_a, masks, 2 * flops)
    args = (a, x, state, *flags, *([(x, state)] if gradient else []))
    return Case(name, chip, both if gradient else forward, args, launches)


def _launch(size: tuple[int, int, int], width: int, masks: bool, flops: int) -> Launch:
    """width: as `choose` takes it."""
    blocks = choose(*size, width)
    flags = blocks.tiles * SUBLANES // LANES if masks else 1  # of 128 tokens each
    trips = (flags, blocks.tiles) if flags > 1 else (blocks.tiles,)
    return Launch(steps=math.prod(grid(*size, blocks)), trips=trips, flops=flops)
