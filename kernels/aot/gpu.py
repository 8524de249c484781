"""Compiling ahead of time for NVIDIA GPUs, with no GPU: PTX for sm_90a, and what each kernel takes of a chip.

    program = gpu.compile(jitted_step, abstract_state, mesh=aot.mesh(gpu.topology(8), {"data": 8}))
    print(program.table())

XLA's GPU compiler, which JAX's CUDA plugin holds, is told of the chip in a text (`Gpu.target_config`). It leaves
behind the program's launches and their PTX; ptxas assembles that and says what each kernel uses. Nothing has run:
every number is a static estimate, and no time is claimed but the floor that bytes over bandwidth set.

Needs the CUDA plugin and ptxas (`uv sync --group aot-gpu`), which work on any Linux machine.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from longwave.kernels.aot import ptx
from longwave.kernels.aot.compile import compile as compile_ahead
from longwave.kernels.aot.report import Report

INSTALL = "`uv sync --group aot-gpu` in a checkout, else `pip install {}` (Linux only)"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A chip: limits of one multiprocessor (SM) and of one block of threads, bytes and bytes a second."""

    name: str
    capability: tuple[int, int]
    sms: int
    registers: int  # of an SM
    threads: int  # of an SM
    shared: int  # of an SM
    shared_per_block: int
    bandwidth: float
    memory: int
    cache: int  # of the second level
    clock: float  # GHz

    def target_config(self) -> str:
        """What XLA asks of a GPU, in the text form of its GpuTargetConfigProto."""
        major, minor = self.capability
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 10 }}
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: ACCELERATED_FEATURES }}
              core_count: {self.sms}  fpus_per_core: 128
              threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: {self.threads}
              block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
              registers_per_core_limit: {self.registers}  registers_per_block_limit: 65536
              shared_memory_per_block: 49152  shared_memory_per_block_optin: {self.shared_per_block}
              shared_memory_per_core: {self.shared}
              memory_bandwidth: {self.bandwidth:.0f}  device_memory_size: {self.memory}
              l2_cache_size: {self.cache}  clock_rate_ghz: {self.clock}
            }}"""


# NVIDIA's H100 SXM5 data sheet, and the description of this chip that XLA publishes (its target configs).
H100 = Gpu(
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    sms=132,
    registers=65_536,
    threads=2_048,
    shared=233_472,
    shared_per_block=232_448,
    bandwidth=3.352e12,
    memory=84_978_434_048,
    cache=52_428_800,
    clock=1.98,
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, as assembled.

    launches:   of it in the program; those in a loop's body count once.
    registers:  a thread;  spills: bytes a thread stores to and loads from local memory for want of registers.
    shared:     bytes a block, static and dynamic;  barriers: a block.
    tensor:     tensor-core instructions (wgmma, mma) in its text; those in a loop's body count once.
    bytes:      of a launch if operands are read once and results written once.
    """

    name: str
    launches: int
    grid: tuple[int, int, int]
    threads: int
    registers: int
    spills: int
    shared: int
    barriers: int
    tensor: int
    bytes: int

    def blocks(self, chip: Gpu) -> int:
        """Blocks that one SM holds at once: a warp takes registers by 256, a block 1 KiB of shared memory more."""
        warps = math.ceil(self.threads / 32)
        registers = warps * math.ceil(self.registers * 32 / 256) * 256
        return min(32, chip.threads // (warps * 32), chip.registers // registers, chip.shared // (self.shared + 1024))

    def floor(self, chip: Gpu) -> float:
        """Seconds that a launch's bytes take at the chip's bandwidth: a static lower bound, not a time."""
        return self.bytes / chip.bandwidth


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: its kernels, and the report (memory, collectives, HLO) of the whole."""

    chip: Gpu
    kernels: tuple[Kernel, ...]
    report: Report
    assembler: str

    def __getitem__(self, name: str) -> Kernel:
        """The kernel of that name."""
        for kernel in self.kernels:
            if kernel.name == name:
                return kernel
        raise KeyError(f"no kernel {name!r}; there are {', '.join(k.name for k in self.kernels)}")

    def table(self) -> str:
        """For people: kernels first, then the program."""
        head = f"{'kernel':<34}{'launches':>9}{'blocks':>9}{'threads':>9}{'regs':>6}{'spills':>8}{'shared':>9}"
        rows = [
            f"static estimates for {self.chip.name}, {self.assembler}",
            f"{head}{'a SM':>6}{'MMAs':>6}{'floor us':>10}",
        ]
        for k in self.kernels:
            rows.append(
                f"{k.name[:33]:<34}{k.launches:>9}{math.prod(k.grid):>9}{k.threads:>9}{k.registers:>6}{k.spills:>8}"
                f"{k.shared:>9}{k.blocks(self.chip):>6}{k.tensor:>6}{k.floor(self.chip) * 1e6:>10.2f}"
            )
        return "\n".join([*rows, "", self.report.table()])


def missing() -> str | None:
    """Why nothing can be compiled for a GPU here, and what to do about it; None when all is well."""
    if not any(_installed(f"jax_plugins.xla_cuda{version}") for version in (12, 13)):
        plugin = f"jax-cuda13-plugin=={jax.__version__}"
        return f"XLA's GPU compiler, JAX's CUDA plugin, is not installed: {INSTALL.format(plugin)}"
    if _ptxas() is None:
        return f"ptxas, the assembler of PTX, is not installed: {INSTALL.format('nvidia-cuda-nvcc')}"
    return None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that would hold it
        return False


def _ptxas() -> str | None:
    """The assembler beside the plugin, which is as new as the PTX that it writes, else the one on the path."""
    nvidia = importlib.util.find_spec("nvidia") if _installed("nvidia") else None
    folders = nvidia.submodule_search_locations or () if nvidia else ()
    found = [
        str(p) for folder in folders for kit in ("cu13", "cuda_nvcc") if (p := Path(folder, kit, "bin/ptxas")).exists()
    ]
    return found[0] if found else shutil.which("ptxas")


def topology(devices: int = 1, chip: Gpu = H100) -> tuple[jax.Device, ...]:
    """Compile-only devices: that many GPUs of one host. `jax.devices()` stays what it was beside them.

    Raises:
      ModuleNotFoundError: the plugin or ptxas is not installed.
    """
    if reason := missing():
        raise ModuleNotFoundError(reason, name="jax_plugins.xla_cuda13")
    return tuple(
        topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=chip.target_config(), topology=f"1x1x{devices}"
        ).devices
    )


def compile(fn: Callable[..., Any], *args: Any, mesh: Mesh | None = None, chip: Gpu = H100) -> Program:
    """Lowers `fn` for the devices of `mesh` (None: one chip), compiles it and assembles its kernels.

    args: pytrees of `jax.ShapeDtypeStruct`; those without a sharding are whole on every device of the mesh.

    Raises:
      DumpFormatError: this compiler writes its launches or resources in another form.
    """
    if mesh is None:
        mesh = Mesh(np.array(topology(1, chip)), ("device",))
    whole = NamedSharding(mesh, PartitionSpec())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or whole)
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_emitter_re": ".*"}  # the second: PTX too, which jax 0.12 leaves out
        report = compile_ahead(fn, *jax.tree.map(place, args), mesh=mesh, compiler_options=dump)
        kernels = tuple(_kernels(Path(folder), report.hlo))
    return Program(chip, kernels, report, _assembler())


def _kernels(dump: Path, hlo: str) -> Iterator[Kernel]:
    """One for each name, in the order of first launch."""
    launches: dict[str, list[ptx.Launch]] = {}
    for launch in ptx.launches(_text(dump, "*.thunk_sequence.txt")):
        launches.setdefault(launch.kernel, []).append(launch)
    instructions, moved = ptx.instructions(_text(dump, "*.thunk_metadata.txt")), ptx.traffic(hlo)
    assembled = {name: used for file in sorted(dump.glob("*.ptx")) for name, used in _assemble(file)}
    for name, (first, *others) in launches.items():
        instruction = instructions.get(first.thunk)
        if name not in assembled or instruction not in moved:
            where = f"HLO (as {instruction})" if name in assembled else "PTX"
            raise ptx.DumpFormatError(f"kernel {name} is launched, but is not in the program's {where}")
        used, tensor = assembled[name]
        yield Kernel(
            name,
            launches=1 + len(others),
            grid=first.grid,
            threads=first.threads,
            registers=used.registers,
            spills=used.spills,
            shared=used.shared + first.dynamic,
            barriers=used.barriers,
            tensor=tensor,
            bytes=moved[instruction],
        )


def _text(folder: Path, pattern: str) -> str:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ptx.DumpFormatError(f"expected one {pattern} in XLA's dump, found {[p.name for p in found]}")
    return found[0].read_text()


def _assemble(file: Path) -> Iterator[tuple[str, tuple[ptx.Resources, int]]]:
    """Each kernel of a PTX file: its resources and tensor-core instructions."""
    if (listing := ptx.listing(file.read_text())) is None:
        return
    command = [str(_ptxas()), "-v", f"-arch={listing.target}", str(file), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        kernels = ", ".join(listing.tensor)
        raise RuntimeError(f"{command[0]} does not assemble {kernels}: {done.stderr.strip()[-500:]}")
    resources = ptx.resources(done.stderr)
    if resources.keys() != listing.tensor.keys():
        raise ptx.DumpFormatError(f"ptxas speaks of {sorted(resources)}, the PTX holds {sorted(listing.tensor)}")
    yield from ((name, (used, listing.tensor[name])) for name, used in resources.items())


def _assembler() -> str:
    """Which ptxas it is: another one allots other registers."""
    done = subprocess.run([str(_ptxas()), "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"V([\d.]+)", done.stdout)
    return f"ptxas {version[1]}" if version else "ptxas of unknown version"
