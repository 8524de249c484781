"""TPU slices that are not here: their devices, described by the TPU compiler itself, and meshes over them.

Compile-only devices hold no memory and run nothing; `jax.devices()` stays what it was beside them.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

# Read once, when libtpu is loaded: without them it looks for the metadata server of a TPU VM, and a second
# process that loads it aborts on a lock file. The accelerator type only silences a warning.
VARIABLES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
REQUIRED = ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD")

# Chip -> how many sides a slice of them has.
GENERATIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
EXAMPLES = ("v5e:2x4", "v5e:16x16", "v6e:4x4", "v5p:2x2x1", "v5p:4x4x4", "v4:2x2x2", "tpu7x:2x2x1")


def environment() -> None:
    """Prepares this process for the TPU compiler; called by `topology`, harmless when called again.

    What is set already is kept. JAX runs on the CPU unless the user or the environment chose a platform.

    Raises:
      RuntimeError: libtpu is already loaded and was not prepared for.
    """
    missing = [name for name in REQUIRED if name not in os.environ]
    if missing and _libtpu_is_loaded():
        raise RuntimeError(
            f"libtpu was loaded before {' and '.join(missing)} could be set; call "
            "longwave.kernels.aot.environment() before anything else that loads it, or set them in the shell"
        )
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    if not jax.config.jax_platforms:  # ty: ignore[missing-attribute]: jax adds its settings when it runs
        jax.config.update("jax_platforms", "cpu")


def _libtpu_is_loaded() -> bool:
    maps = Path("/proc/self/maps")  # libtpu exists for Linux only
    return maps.exists() and "libtpu.so" in maps.read_text()


def missing() -> str | None:
    """Why nothing can be compiled for a TPU here, and what to do about it; None when all is well."""
    if importlib.util.find_spec("libtpu") is None:
        return (
            "libtpu, the TPU compiler, is not installed: `uv sync --group aot` in a checkout, else "
            "`pip install 'jax[tpu]'` (Linux x86-64 only, 684 MB)"
        )
    return None


def topology(name: str) -> tuple[jax.Device, ...]:
    """The compile-only devices of a slice such as "v5e:16x16": `chip:sides`, in chips.

    A tpu7x chip is two devices, any other one. For a program on one chip take the first of them.

    Raises:
      ValueError: a name that no slice has.
      ModuleNotFoundError: libtpu is not installed.
    """
    chip, _, layout = name.partition(":")
    sides = [int(n) for n in layout.split("x")] if re.fullmatch(r"\d+(x\d+)*", layout) else []
    hint = f"expected {', '.join(GENERATIONS)}, a colon and the sides of the slice: {', '.join(EXAMPLES)}"
    if chip not in GENERATIONS:
        raise ValueError(f"topology {name!r}: no chip {chip!r}; {hint}")
    if len(sides) != GENERATIONS[chip]:
        raise ValueError(f"topology {name!r}: a {chip} slice has {GENERATIONS[chip]} sides; {hint}")
    if reason := missing():
        raise ModuleNotFoundError(reason, name="libtpu")
    environment()
    config = {"chip_config_name": "megacore"} if chip == "v4" else {}  # a device a chip, as JAX runs it
    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name, **config).devices)
    except jax.errors.JaxRuntimeError as error:  # sides that no slice has
        raise ValueError(f"topology {name!r}: {error}; {hint}") from error


def mesh(devices: Sequence[jax.Device], axes: Mapping[str, int]) -> Mesh:
    """A mesh over compile-only (or any) devices: axis name -> size, -1 at most once for what is left.

    Axes are laid along the sides of the torus as well as they fit; a side is split only where it must be.
    """
    sizes = list(axes.values())
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = len(devices) // max(1, -math.prod(sizes))
    if any(size < 1 for size in sizes) or math.prod(sizes) != len(devices):
        raise ValueError(f"mesh {dict(axes)}: expected sizes whose product is {len(devices)}, the devices")
    grid = mesh_utils.create_device_mesh(sizes, list(devices), allow_split_physical_axes=True)
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(sizes))
