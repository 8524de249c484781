"""What `longwave report linear_attention` shows: the TPU kernels, forward and backward, bfloat16, with decay.

`heads of their own`: 32 heads, each with q and k, K = V = 128 (RetNet, simple GLA). `Mamba-2`: 24 heads of 64 that
share q and k of 128, with write gates. `gated delta rule`: 16 heads, K = V = 128, with write and erase gates, at the
size for which deltanet-tpu publishes times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from longwave.kernels.aot.chips import CHIPS
from longwave.kernels.aot.estimate import Case
from longwave.kernels.aot.timing import Launch
from longwave.kernels.aot.tune import Candidate, Entry
from longwave.kernels.linear_attention import pallas_tpu, tpu_backward, tpu_erase_inverse, tpu_forward
from longwave.kernels.linear_attention.reference import SPAN, Inputs
from longwave.kernels.linear_attention.tpu_layout import Plan

K = 128


class Problem(NamedTuple):
    """b rows of t tokens; heads of q and k, heads, V; which gates beside the decay."""

    b: int
    t: int
    shared: int
    h: int
    V: int
    write: bool
    erase: bool


PROBLEMS = {
    "heads of their own": Problem(2, 4096, 16, 16, 128, write=False, erase=False),
    "Mamba-2": Problem(4, 4096, 1, 24, 64, write=True, erase=False),
    "gated delta rule": Problem(1, 8192, 16, 16, 128, write=True, erase=True),
}
# Milliseconds that deltanet-tpu 0.3.0 publishes of its Gated DeltaNet kernels on a v6e (its authors' measurements).
PUBLISHED = {"forward": 5.63, "backward": 10.93 - 5.63}


def cases(chip: str) -> list[Entry]:
    """Of each problem the forward and the backward pass."""
    found = {"forward": forward, "backward": backward}
    return [
        Entry(
            f"{name}, {way}{_beside(name, way, chip)}",
            "longwave",
            [Candidate(make(f"{name}, {way}", chip, *problem(name)))],
        )
        for name in PROBLEMS
        for way, make in found.items()
    ]


def _beside(name: str, way: str, chip: str) -> str:
    """What the times of a problem are held against."""
    floor = arrays(name, way) / CHIPS[chip].bandwidth
    said = f" (its arrays alone take {floor * 1e6:.0f} us of HBM"
    if PROBLEMS[name].erase and chip == "v6e":
        said += f"; deltanet-tpu 0.3.0 publishes {PUBLISHED[way] * 1e3:,.0f} us, measured, of its own kernels"
    return said + ")"


def problem(name: str) -> tuple[Inputs, jax.ShapeDtypeStruct]:
    """(inputs, state), abstract."""
    x = PROBLEMS[name]
    of: Any = lambda *shape: jax.ShapeDtypeStruct((x.b, x.t, *shape), jnp.bfloat16)
    gate: Any = jax.ShapeDtypeStruct((x.b, x.t, x.h), jnp.float32)
    gates = gate, gate if x.write else None, None, None, gate if x.erase else None
    inputs = Inputs(of(x.shared, K), of(x.shared, K), of(x.h, x.V), *gates)
    return inputs, jax.ShapeDtypeStruct((x.b, x.h, K, x.V), jnp.float32)


def arrays(name: str, way: str = "forward") -> int:
    """Bytes of q, k, v, the gates and o; backward: of these and their gradients."""
    inputs, _ = problem(name)
    total = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return total((inputs, inputs.v)) if way == "forward" else total((inputs, inputs, inputs.v))


def forward(name: str, chip: str, inputs: Inputs, state: jax.ShapeDtypeStruct) -> Case:
    plan = Plan.of(inputs, 1.0, streams=pallas_tpu.STREAMS["forward"])
    chunks, slabs = plan.together(*tpu_forward.TOGETHER)
    launches = {"linear_attention": launch(plan, tpu_forward.flops(plan), plan.chunks // chunks, plan.slabs // slabs)}
    call = partial(pallas_tpu.forward, scale=1.0)
    return Case(name, chip, call, (inputs, state), launches | _inverse(plan))


def backward(name: str, chip: str, inputs: Inputs, state: jax.ShapeDtypeStruct) -> Case:
    plan = Plan.of(inputs, 1.0, streams=pallas_tpu.STREAMS["backward"])
    saved = jax.ShapeDtypeStruct((state.shape[0], -(-plan.t // SPAN), *state.shape[1:]), jnp.float32)
    call: Callable = partial(pallas_tpu.backward, scale=1.0)
    flops = 2 * tpu_forward.flops(plan)
    if plan.erase:
        launches = {"linear_attention_erase_backward": launch(plan, flops, plan.chunks // plan.each)}
    else:
        chunks, slabs = plan.together(*tpu_backward.TOGETHER)
        launches = {"linear_attention_backward": launch(plan, flops, plan.chunks // chunks, plan.slabs // slabs)}
    return Case(name, chip, call, (inputs, saved, inputs.v, state), launches | _inverse(plan))


def _inverse(plan: Plan) -> dict[str, Launch]:
    if not plan.erase:
        return {}
    trips = plan.chunks // tpu_erase_inverse.together(plan)
    return {"linear_attention_inverse": launch(plan, tpu_erase_inverse.flops(plan), trips)}


def launch(plan: Plan, flops: int, *trips: int) -> Launch:
    return Launch(steps=math.prod(plan.grid), trips=tuple(n for n in trips if n > 1), flops=flops)
