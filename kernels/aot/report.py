"""What compiling ahead finds out: memory per device and whether it fits, collectives, FLOPs, time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from longwave.kernels.aot.hlo import KINDS, Collective

GIB = 2**30

# GiB of HBM that a program may use on one device, to a few MiB (libtpu 0.0.42; newer ones say 0.01 less).
HBM_GIB = {"TPU v4": 30.75, "TPU v5 lite": 15.75, "TPU v5": 95.74, "TPU v6 lite": 31.25, "TPU7x": 94.75}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device. `aliased` is what outputs share with donated arguments: it is in both."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    generated_code: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.generated_code


@dataclasses.dataclass(frozen=True)
class Report:
    """One compiled program. Where the compiler refused it for want of HBM, `memory` is None and `hlo` empty.

    needed, capacity: bytes of HBM on one device (capacity None: not known for this kind of device).
    flops: of one device; the body of a scan counts once.   seconds: wall time, (lowering, compiling).
    """

    device_kind: str
    mesh: Mapping[str, int]
    devices: int
    seconds: tuple[float, float]
    parameters: int
    needed: int
    capacity: int | None
    memory: Memory | None = None
    collectives: tuple[Collective, ...] = ()
    flops: float | None = None
    hlo: str = dataclasses.field(default="", repr=False)

    @property
    def fits(self) -> bool:
        return self.memory is not None

    @property
    def verdict(self) -> str:
        if self.capacity is None:
            return f"needs {_size(self.needed)} per device"
        sizes = f"needs {_size(self.needed)} of {_size(self.capacity)} per device"
        return f"fits: {sizes}" if self.fits else f"does not fit: {sizes}"

    def table(self) -> str:
        """The report as text, for people."""
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.items() if size > 1) or "one device"
        rows = [
            ("compiled for", f"{self.devices} x {self.device_kind}, mesh {axes}"),
            ("seconds", f"{self.seconds[0]:.1f} lowering, {self.seconds[1]:.1f} compiling"),
        ]
        if self.parameters:
            rows.append(("parameters", f"{self.parameters:,}"))
        if self.memory:
            rows.append(("memory", "per device"))
            sizes = dataclasses.asdict(self.memory)
            rows += [(f"  {kind.replace('_', ' ')}", _size(size)) for kind, size in sizes.items()]
        if self.fits:
            rows.append(("collectives", "in the program, a loop's body counted once; bytes on one device"))
            rows += [(f"  {kind}", _collective(self.collectives, kind)) for kind in self._kinds()]
        if self.flops:
            rows.append(("FLOPs", f"{self.flops:.3g} per device, a loop's body counted once"))
        rows.append(("verdict", self.verdict))
        return "\n".join(f"{name:<22}{value}" for name, value in rows)

    def _kinds(self) -> list[str]:
        return [kind for kind in KINDS if any(c.kind == kind for c in self.collectives)]


def _collective(found: tuple[Collective, ...], kind: str) -> str:
    sizes = [c.bytes for c in found if c.kind == kind]
    return f"{len(sizes):>4}  {_size(sum(sizes))}"


def _size(n: int) -> str:
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= 0.1 * scale:
            return f"{n / scale:.2f} {unit}"
    return f"{n} B"
