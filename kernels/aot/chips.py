"""What static estimates know of each TPU chip."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

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


# cores, mxus, side, vmem, bandwidth: jax's `pltpu.get_tpu_info()`. cycles: read off schedules of compute-bound matmuls.
# clock: the published bf16 peak (197, 459 and 918 TFLOP/s: Google Cloud's pages of the chips) over the FLOPs a cycle.
CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v5e", "v5e:2x2", "TPU v5 lite", 1.5e9, 1, 4, 128, 16, 8.2e11, 128 << 20),
        Chip("v5p", "v5p:2x2x1", "TPU v5", 1.75e9, 2, 4, 128, 16, 2.46e12, 64 << 20),
        Chip("v6e", "v6e:2x2", "TPU v6 lite", 1.75e9, 1, 2, 256, 8, 1.64e12, 128 << 20),
    )
}
