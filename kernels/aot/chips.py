"""What static estimates know of each TPU chip."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

# Seconds around one call that no schedule shows: the host hands the program over. Together with `Chip.step` fitted on
# the six times of a tiled matmul on v5e that JAX's Pallas guide prints (docs/pallas/tpu/matmul). Of a program, not of a
# kernel: no `Estimate` holds it.
DISPATCH = 116e-6


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip. A core is a TensorCore; JAX's device is the whole chip.

    topology, kind: a small slice of such chips as `aot.topology` names it, and what JAX calls their kind.
    clock: bundles a second and core.   step: seconds that each step of a grid takes beside its bundles.
    side: of the square of multipliers of each of the `mxus` matrix units of a core.
    cycles: that 16 rows of bf16 operands keep a matrix unit busy. float32 operands have half as many rows a register.
    bandwidth: of HBM, bytes a second.   vmem: bytes of each core.
    """

    name: str
    topology: str
    kind: str
    clock: float
    cores: int
    mxus: int
    side: int
    cycles: int
    bandwidth: float
    vmem: int
    step: float = 0.154e-6  # fitted on v5e, see DISPATCH; the other chips take it over unmeasured

    @property
    def peak(self) -> float:
        """bf16 FLOP/s of the chip."""
        return self.clock * self.cores * self.mxus * 2 * 16 * self.side**2 / self.cycles


# cores, mxus, side, vmem, bandwidth: jax's `pltpu.get_tpu_info()` (of v5p Google's page says 2.765e12 bytes a second).
# cycles: read off schedules of compute-bound matmuls.
# clock: the published bf16 peak (197, 459 and 918 TFLOP/s: Google Cloud's pages of the chips) over the FLOPs a cycle.
_V5: Any = {"mxus": 4, "side": 128, "cycles": 16}
_V5E = Chip("v5e", "v5e:2x2", "TPU v5 lite", clock=1.5e9, cores=1, **_V5, bandwidth=8.20e11, vmem=128 << 20)
_V5P = Chip("v5p", "v5p:2x2x1", "TPU v5", clock=1.75e9, cores=2, **_V5, bandwidth=2.46e12, vmem=64 << 20)
_V6E = Chip(
    "v6e",
    "v6e:2x2",
    "TPU v6 lite",
    clock=1.75e9,
    cores=1,
    mxus=2,
    side=256,
    cycles=8,
    bandwidth=1.64e12,
    vmem=128 << 20,
)
CHIPS: Mapping[str, Chip] = {chip.name: chip for chip in (_V5E, _V5P, _V6E)}


def traced_for() -> str | None:
    """The name of the chip for which a program is being traced; None: none of CHIPS.

    It is the kind of device of the ambient mesh (compiling ahead of time sets one), else that of JAX's own devices.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return next((chip.name for chip in CHIPS.values() if chip.kind == device.device_kind), None)
