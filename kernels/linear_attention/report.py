"""What `longwave report linear_attention` shows: the TPU kernels, forward and backward, bfloat16, with decay.

`heads of their own`: 32 heads, each with q and k, K = V = 128 (RetNet, simple GLA). `Mamba-2`: 24 heads of 64 that
share q and k of 128, with write gates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from longwave.kernels.aot.estimate import Case
from longwave.kernels.aot.timing import Launch
from longwave.kernels.aot.tune import Candidate, Entry
from longwave.kernels.linear_attention import pallas_tpu, tpu_backward, tpu_forward
from longwave.kernels.linear_attention.reference import SPAN, Inputs
from longwave.kernels.linear_attention.tpu_layout import Plan

T, K = 4096, 128
PROBLEMS = {  # b, heads of q and k, heads, V, write gates
    "heads of their own": (2, 16, 16, 128, False),
    "Mamba-2": (4, 1, 24, 64, True),
}


def cases(chip: str) -> list[Entry]:
    """Of each problem the forward and the backward kernel."""
    found = {"forward": forward, "backward": backward}
    return [
        Entry(f"{name}, {way}", "longwave", [Candidate(make(f"{name}, {way}", chip, *problem(name)))])
        for name in PROBLEMS
        for way, make in found.items()
    ]


def problem(name: str) -> tuple[Inputs, jax.ShapeDtypeStruct]:
    """(inputs, state), abstract."""
    b, shared, h, V, write = PROBLEMS[name]
    of: Any = lambda *shape: jax.ShapeDtypeStruct((b, T, *shape), jnp.bfloat16)
    gate: Any = jax.ShapeDtypeStruct((b, T, h), jnp.float32)
    inputs = Inputs(of(shared, K), of(shared, K), of(h, V), gate, gate if write else None, None, None)
    return inputs, jax.ShapeDtypeStruct((b, h, K, V), jnp.float32)


def arrays(name: str) -> int:
    """Bytes of q, k, v, the gates and o: what the forward pass cannot do without."""
    inputs, _ = problem(name)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((inputs, inputs.v)))


def forward(name: str, chip: str, inputs: Inputs, state: jax.ShapeDtypeStruct) -> Case:
    plan = Plan.of(inputs, 1.0, streams=pallas_tpu.STREAMS["forward"])
    call = partial(pallas_tpu.forward, scale=1.0)
    return Case(
        name,
        chip,
        call,
        (inputs, state),
        {"linear_attention": launch(plan, tpu_forward.flops(plan), tpu_forward.TOGETHER)},
    )


def backward(name: str, chip: str, inputs: Inputs, state: jax.ShapeDtypeStruct) -> Case:
    plan = Plan.of(inputs, 1.0, streams=pallas_tpu.STREAMS["backward"])
    saved = jax.ShapeDtypeStruct((state.shape[0], T // SPAN, *state.shape[1:]), jnp.float32)
    call: Callable = partial(pallas_tpu.backward, scale=1.0)
    launches = {"linear_attention_backward": launch(plan, 2 * tpu_forward.flops(plan), tpu_backward.TOGETHER)}
    return Case(name, chip, call, (inputs, saved, inputs.v, state), launches)


def launch(plan: Plan, flops: int, together: tuple[int, int]) -> Launch:
    chunks, slabs = plan.together(*together)
    trips = tuple(n for n in (plan.chunks // chunks, plan.slabs // slabs) if n > 1)
    return Launch(steps=math.prod(plan.grid), trips=trips, flops=flops)
