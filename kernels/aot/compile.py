"""Compiles a sharded step for devices that are not here, and reports what it will take."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from longwave.kernels.aot.hlo import collectives
from longwave.kernels.aot.report import GIB, HBM_GIB, Memory, Report

# The two ways in which the compiler says it: "... temporaries (19.46G) exceeds available HBM (15.75G)" and
# "Used 19.46G of 15.75G hbm". Other memories that run out (vmem) are errors of a kernel, not a verdict.
_OUT_OF_HBM = re.compile(
    r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)|Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm"
)
_FLOAT64 = re.compile(r"^.*[x<]f64>.*$", re.MULTILINE)
_UNIT = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compile(
    fn: Callable[..., Any],
    *args: Any,
    mesh: Mesh,
    parameters: Any = (),
    compiler_options: Mapping[str, str | int | float | bool] | None = None,
) -> Report:
    """Lowers and compiles `fn` (jitted, or a function) for the devices of `mesh`, on this machine's CPU.

    args: pytrees of `jax.ShapeDtypeStruct`. Their shardings, or `fn`'s `in_shardings`, must lie on `mesh`.
    parameters: a pytree (of arrays or their abstract form) whose elements the report counts.

    While tracing, the mesh is ambient in its abstract form: code that reads it works, and constants are made
    on the CPU as ever (under `jax.set_mesh` of compile-only devices the creation of any array fails).

    Raises:
      TypeError: `fn` computes in float64: no TPU has it, and the compiler may abort the process on it.
      ValueError: `fn` would not run on the devices of `mesh`.
    """
    jitted: Any = fn if hasattr(fn, "lower") else jax.jit(fn)
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jitted.lower(*args)
    lowering = time.perf_counter() - start
    device = mesh.devices.flat[0]
    if device.platform == "tpu" and (match := _FLOAT64.search(lowered.as_text())):
        raise TypeError(f"a TPU has no 64-bit floating point; first met in: {match[0].strip()[:200]}")

    start, compiled, needed = time.perf_counter(), None, 0
    capacity = int(HBM_GIB[device.device_kind] * GIB) if device.device_kind in HBM_GIB else None
    try:
        compiled = lowered.compile(compiler_options=dict(compiler_options or {}))
    except jax.errors.JaxRuntimeError as error:
        if not (match := _OUT_OF_HBM.search(str(error))):
            raise
        needed, capacity = (int(float(size[:-1]) * _UNIT[size[-1]]) for size in match.groups() if size)
    common: dict[str, Any] = {
        "device_kind": device.device_kind,
        "mesh": dict(mesh.shape),
        "devices": mesh.size,
        "seconds": (lowering, time.perf_counter() - start),
        "parameters": sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(parameters)),
        "capacity": capacity,
    }
    if compiled is None:
        return Report(**common, needed=needed)
    _check_devices(compiled, mesh)
    memory, hlo = _memory(compiled), compiled.as_text()
    flops = (compiled.cost_analysis() or {}).get("flops")
    found = tuple(collectives(hlo))
    return Report(**common, needed=memory.total, memory=memory, collectives=found, flops=flops, hlo=hlo)


def _memory(compiled: jax.stages.Compiled) -> Memory:
    m: Any = compiled.memory_analysis()
    return Memory(
        arguments=m.argument_size_in_bytes,
        outputs=m.output_size_in_bytes,
        aliased=m.alias_size_in_bytes,
        temporaries=m.temp_size_in_bytes,
        generated_code=m.generated_code_size_in_bytes,
    )


def _check_devices(compiled: jax.stages.Compiled, mesh: Mesh) -> None:
    """A function with no sharding on the mesh compiles for the default device, in silence."""
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    devices = set().union(*(s.device_set for s in shardings))
    if devices != set(mesh.devices.flat):
        kinds = ", ".join(sorted({d.device_kind for d in devices})) or "no device"
        raise ValueError(
            f"the function was compiled for {len(devices)} x {kinds}, not for the {mesh.size} devices of the "
            "mesh: give its arguments (or jax.jit's in_shardings) shardings on that mesh"
        )
