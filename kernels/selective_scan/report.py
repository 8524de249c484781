"""What `longwave report selective_scan` shows: the TPU kernels at the sizes of Mamba's layers.

    longwave report selective_scan --chip v5e v5p v6e
    python -m longwave.kernels.selective_scan.report [CHIP]      # bytes, beside those of XLA's associative scan

The second compares what programs move through HBM by the compiler's own count, which knows nothing of time.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from longwave.kernels.aot.chips import CHIPS
from longwave.kernels.aot.estimate import Case
from longwave.kernels.aot.timing import Launch
from longwave.kernels.aot.topology import topology
from longwave.kernels.aot.tune import Candidate, Entry
from longwave.kernels.selective_scan import pallas_tpu, tpu_backward, tpu_forward
from longwave.kernels.selective_scan.reference import SPAN, Inputs, step_size
from longwave.kernels.selective_scan.tpu_layout import Plan

WIDE = (2, 4096, 4096, 16)  # b, t, d, n: the inner width of a Mamba of 1.4e9 parameters
SMALL = (4, 2048, 1536, 16)  # of 1.3e8
CALLS = {
    "wide bfloat16": (WIDE, jnp.bfloat16, False),
    "wide bfloat16, masks": (WIDE, jnp.bfloat16, True),
    "small float32": (SMALL, jnp.float32, False),
    "small bfloat16, n=64": ((4, 2048, 1536, 64), jnp.bfloat16, False),
}
FLOPS = {"forward": 7, "backward": 23}  # of a state of a channel and token, exponentials among them: see `floor`


def cases(chip: str) -> list[Entry]:
    """Forward and backward."""
    entries = []
    for name, call in CALLS.items():
        for way in FLOPS:
            problem = f"{way} {name}"
            entries.append(Entry(problem, "longwave", [Candidate(case(problem, chip, way, *call))]))
    return entries


def case(name: str, chip: str, way: str, size: tuple[int, int, int, int], dtype: Any, masks: bool) -> Case:
    """One pass, with everything that there is to fuse."""
    b, t, d, n = size
    inputs, state = arguments(size, dtype, masks)
    forward = way == "forward"
    plan = Plan.of(*size, (tpu_forward if forward else tpu_backward).MOST)
    tokens, groups = plan.trips
    loops = (tokens, *(groups,) * (groups > 1), *(tokens,) * (2 if forward else 5))
    launch = Launch(steps=math.prod(plan.grid), trips=loops, flops=FLOPS[way] * math.prod(size))
    fn = partial(pallas_tpu.forward if forward else pallas_tpu.backward, softplus=True)
    saved = jax.ShapeDtypeStruct((b, -(-t // SPAN), n, d), jnp.float32)
    args = (inputs, state) if forward else (inputs, saved, inputs.x, state)
    return Case(name, chip, fn, args, {tpu_forward.NAME if forward else tpu_backward.NAME: launch})


def arguments(size: tuple[int, int, int, int], dtype: Any, masks: bool) -> tuple[Inputs, jax.ShapeDtypeStruct]:
    """(inputs, state), as shapes."""
    b, t, d, n = size
    tokens, narrow = jax.ShapeDtypeStruct((b, t, d), dtype), jax.ShapeDtypeStruct((b, t, n), dtype)
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    mask = jax.ShapeDtypeStruct((b, t), bool) if masks else None
    inputs = Inputs(tokens, tokens, float32(d, n), narrow, narrow, float32(d), tokens, float32(d), mask, mask)
    return inputs, float32(b, n, d)


def floor(way: str, chip: str) -> float:
    """Seconds for WIDE that the vector unit of a chip needs at least, the count of `pallas_tpu`'s docstring.

    Backward: delta A, exp2, a h, B u, + again; C h; then C dy, +, h dy, +, g u, +, g B, delta A, exp2, a g, w, w A,
    w delta, + and three sums over states.
    """
    operations = FLOPS[way] * math.prod(WIDE)
    return operations / (4 * 1024 * CHIPS[chip].clock * CHIPS[chip].cores)


def associative(inputs: Inputs, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(y, the state after the last token) by `lax.associative_scan`, as XLA is mostly asked for it. Without masks."""
    x, B, C = (v.astype(jnp.float32) for v in (inputs.x, inputs.B, inputs.C))
    delta = step_size(inputs.dt, inputs.dt_bias, True)
    a = jnp.exp(delta[:, :, None] * inputs.A.T[None, None])
    u = B[..., None] * (delta * x)[:, :, None]
    u = u.at[:, 0].add(a[:, 0] * state)
    then = lambda p, q: (q[0] * p[0], q[0] * p[1] + q[1])
    h = jax.lax.associative_scan(then, (a, u), axis=1)[1]
    y = jnp.einsum("btn,btnd->btd", C, h) + inputs.D[None, None] * x
    return (y * jax.nn.silu(inputs.z.astype(jnp.float32))).astype(inputs.x.dtype), h[:, -1]


def moved(fn: Any, chip: str, size: tuple[int, int, int, int]) -> float:
    """Bytes that a compiled program of bfloat16 arrays moves, as the compiler counts them."""
    place = SingleDeviceSharding(topology(CHIPS[chip].topology)[0])
    on_chip = lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place)
    args = jax.tree.map(on_chip, arguments(size, jnp.bfloat16, masks=False))
    analysis = jax.jit(fn).lower(*args).compile().cost_analysis() or {}
    return analysis["bytes accessed"]


def main() -> None:
    chip, size = (*sys.argv[1:2], "v5e")[0], (1, 1024, 1024, 16)
    kernel = moved(partial(pallas_tpu.forward, softplus=True), chip, size)
    plain = moved(associative, chip, size)
    b, t, d, n = size
    print(f"forward on {chip}, b={b} t={t} d={d} n={n} bfloat16, bytes by the compiler's count: static estimates")
    print(f"  kernel            {kernel / 2**20:10,.1f} MiB")
    print(f"  associative_scan  {plain / 2**20:10,.1f} MiB, {plain / kernel:.0f} x")


if __name__ == "__main__":
    main()
