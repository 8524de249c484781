"""Static estimates of Pallas TPU kernels: how long they should take, from the compiler's own schedule, with no TPU.

    seconds = max(bundles * steps / clock + steps * overhead, bytes / bandwidth)

Bundles are counted in the final schedule (`schedule.py`), each region of it weighed by how often it runs; bytes come
from the block indices of the whole grid (`pipeline.py`). Left out: waits for memory within a step, contention for HBM,
what lies before and behind the loop over the grid, and the dispatch of a program (`chips.DISPATCH`). The overhead of a
step is fitted on v5e alone, and not shared between the cores of a chip. docs/proving_ground.md says what the model has
been held against.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from longwave.kernels.aot.chips import CHIPS, Chip
from longwave.kernels.aot.pipeline import Kernel
from longwave.kernels.aot.schedule import UNITS, Region, Schedule


class LaunchError(ValueError):
    """What a `Launch` says of a kernel is not what the traced program or the schedule shows."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """What a kernel says of itself, so that its schedule can be weighed.

    steps: of its grid.
    regions: for each innermost predicated region that holds matmuls, in program order, the fraction of steps on which
        it runs. (The test of the grid's pipeline is none of them; that before a loop which may run zero times is one.)
    prefetch: the scalar-prefetch operands, concrete: windows whose index depends on them are then counted exactly.
    trips: how often each loop inside a step runs, in program order, where the compiler kept any.
    flops: useful ones of the whole call.
    bytes: what the kernel moves by its own copies, None where it makes none or does not know.
    ends: the fraction of steps on which predicated regions without matmuls run: those that initialise and finish.
        None: once every walk along the last axis of the grid.
    """

    steps: int
    regions: tuple[float, ...] = ()
    prefetch: tuple[Any, ...] = ()
    trips: tuple[float, ...] = ()
    flops: float = 0
    bytes: int | None = None
    ends: float | None = None


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One kernel on one chip: a static estimate.

    steps: of the grid.   bundles: issued a step, on average; empty ones count.   code: bundles of the whole program.
    mxu: fraction of time that the matrix units are busy.   valu, eup, xlu, load, store: fractions of their slots.
    spills: registers spilled and reloaded, a step.
    compute, dma: seconds of the call, without the overhead of its steps.
    bytes: moved between HBM and VMEM; bytes_exact False: an estimate of that too.
    flops: useful ones, as the kernel's `Launch` gives them.   vmem: bytes of windows and scratch.
    """

    kernel: str
    chip: str
    steps: int
    bundles: float
    mxu: float
    valu: float
    eup: float
    xlu: float
    load: float
    store: float
    spills: float
    compute: float
    dma: float
    bytes: int
    bytes_exact: bool
    flops: float
    code: int
    vmem: int

    @property
    def busy(self) -> float:
        """Seconds of computing with the overhead of its steps."""
        return self.compute + self.steps * CHIPS[self.chip].step

    @property
    def time(self) -> float:
        """Seconds, without the dispatch of the program."""
        return max(self.busy, self.dma)

    @property
    def peak(self) -> float:
        """Useful FLOP/s as a fraction of the chip's."""
        return self.flops / self.time / CHIPS[self.chip].peak

    @property
    def bound(self) -> Literal["compute", "memory"]:
        return "compute" if self.busy >= self.dma else "memory"


def weigh(schedule: Schedule, kernel: Kernel, launch: Launch, chip: Chip) -> Estimate:
    """The estimate of a kernel from its schedule.

    Raises:
      LaunchError: the schedule has other regions, loops or steps than `launch` says.
    """
    if kernel.steps != launch.steps:
        raise LaunchError(f"kernel {kernel.name}: Launch.steps is {launch.steps}, its grid is {kernel.grid}")
    cores = chip.cores if kernel.parallel and schedule.grid else 1
    per_core = math.ceil(launch.steps / cores)
    if schedule.grid and not 0 <= schedule.iterations - per_core <= 2:
        raise LaunchError(
            f"kernel {kernel.name}: {launch.steps} steps on {cores} cores, but the compiled loop runs "
            f"{schedule.iterations} times (its steps and at most 2 more were expected)"
        )
    weight = _weights(schedule, kernel, launch)
    bundles = float(weight.sum())
    slots = dict(zip(UNITS, (weight @ schedule.use).tolist(), strict=True))
    used = {unit: slots[unit] / bundles / size for unit, size in zip(UNITS, schedule.capacity.tolist(), strict=True)}
    # float32 has half as many rows a register. "lmr" stands twice as dense in schedules bound by matmuls: half, too.
    cycles = sum(
        float(weight @ count) * chip.cycles * (1.0 if dtype == "bf16" else 0.5)
        for dtype, count in schedule.matmuls.items()
    )
    moved = kernel.bytes + (launch.bytes or 0)
    return Estimate(
        kernel=kernel.name,
        chip=chip.name,
        steps=launch.steps,
        bundles=bundles,
        mxu=cycles / chip.mxus / bundles,
        valu=used["VALU"],
        eup=used["EUP"],
        xlu=used["XLU"],
        load=used["VLOAD"],
        store=used["VSTORE"],
        spills=slots["VLOAD:FILL"] + slots["VSTORE:SPILL"],
        compute=bundles * per_core / chip.clock,
        dma=moved / chip.bandwidth,
        bytes=moved,
        bytes_exact=kernel.exact or launch.bytes is not None,
        flops=launch.flops,
        code=schedule.bundles,
        vmem=kernel.vmem,
    )


def _weights(schedule: Schedule, kernel: Kernel, launch: Launch) -> Float[np.ndarray, " bundles"]:
    """How often each bundle is issued in a step, on average. What lies outside the loop over the grid is left out."""
    body = schedule.grid or schedule.root
    leaves = [region for region in body.tree() if _is_leaf(schedule, region)]
    loops = [region for region in body.tree() if region.kind == "loop" and region is not body]
    _check(kernel, "regions", "innermost predicated regions with matmuls", leaves, launch.regions, schedule)
    _check(kernel, "trips", "loops inside a step", loops, launch.trips, schedule)
    runs = dict(zip(map(id, leaves), launch.regions, strict=True))
    trips = dict(zip(map(id, loops), launch.trips, strict=True))
    ends = 1 / (kernel.grid or (1,))[-1] if launch.ends is None else launch.ends
    weight = np.zeros(schedule.bundles)

    def fraction(region: Region, around: float) -> float:
        if region.kind != "predicated" or region.stage:
            return around
        if not schedule.matmul_count(region):
            return min(around, ends)
        # Around several that exclude each other their sum; around others that is too much, at most a step's whole.
        return min(around, sum(runs[id(leaf)] for leaf in region.tree() if id(leaf) in runs))

    def visit(region: Region, around: float, times: float) -> None:
        around = fraction(region, around)
        times *= trips.get(id(region), 1)
        weight[region.start : region.end] = around * times
        for child in region.children:
            visit(child, around, times)

    visit(body, 1.0, 1.0)
    return weight


def _is_leaf(schedule: Schedule, region: Region) -> bool:
    holds = lambda r: r.kind == "predicated" and not r.stage and schedule.matmul_count(r) > 0
    return holds(region) and not any(holds(inner) for inner in region.tree() if inner is not region)


def _check(
    kernel: Kernel, field: str, what: str, found: list[Region], given: Sequence[float], schedule: Schedule
) -> None:
    if len(found) != len(given):
        places = [f"bundles {r.start:#x} to {r.end:#x} ({schedule.matmul_count(r)} matmuls)" for r in found]
        raise LaunchError(
            f"kernel {kernel.name}: its schedule has {len(found)} {what} ({'; '.join(places) or 'none'}), "
            f"Launch.{field} names {len(given)}: {tuple(given)}"
        )
