"""The mesh and where everything lies on it: the one file that names mesh axes.

    replica  independent runs (seeds, learning rates)        data    examples
    fsdp     examples, and parameters in shards               seq     time, inside operations
    tensor   heads and channels

Axes are Auto: XLA partitions; activations are constrained at block boundaries, operations that XLA would gather for
wrap themselves in `shard_map` by the `Axes` built here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longwave.kernels.partition import Axes

AXES = ("replica", "data", "fsdp", "seq", "tensor")
BATCH = ("data", "fsdp")
UNUSED = ("replica", "seq")  # named in the plan of the mesh, refused until an operation splits over them

# (role, pattern of the path, spec of the trailing dimensions). Every parameter of every model matches exactly one row.
# Stacked layers lead with one more dimension, which is never split. A spec axis that does not divide its dimension
# (a vocabulary of 18 over 4 devices) is dropped for that parameter.
RULES: tuple[tuple[str, str, P], ...] = (
    ("weight", r"/(out|down)/kernel$", P("tensor", "fsdp")),  # back into the residual stream
    (
        "weight",
        r"(?<!/out)(?<!/down)/kernel$",
        P("fsdp", "tensor"),
    ),  # from the residual stream into heads, channels
    ("weight", r"(?<!/kernel)$", P("fsdp", "tensor")),  # a mixer's own matrices (in, out)
    ("embed", r"embedding$", P("tensor", "fsdp")),  # (vocabulary, width)
    ("embed", r"(?<!embedding)$", P()),  # single learned vectors
    ("kernel", r"", P()),
    ("gate", r"", P()),
    ("norm", r"", P()),
    ("bias", r"", P()),
    ("A", r"", P()),
    ("B", r"", P()),
    ("C", r"", P()),
    ("D", r"", P()),
    ("dt", r"", P()),
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with all five axes; `sizes` names some, one of them may be -1 (what is left), the others are 1."""
    if unknown := sorted(set(sizes) - set(AXES)):
        raise ValueError(f"train.mesh names {unknown}: expected axes among {', '.join(AXES)}")
    for axis in UNUSED:
        if sizes.get(axis, 1) != 1:
            raise ValueError(f"train.mesh = {dict(sizes)}: nothing splits over {axis!r} yet; expected size 1")
    devices = list(jax.devices() if devices is None else devices)
    shape = [sizes.get(axis, 1) for axis in AXES]
    known = int(np.prod([s for s in shape if s != -1]))
    if shape.count(-1) > 1 or any(s == 0 or s < -1 for s in shape):
        raise ValueError(f"train.mesh = {dict(sizes)}: expected positive sizes, and -1 at most once")
    shape = [len(devices) // known if s == -1 else s for s in shape]
    if int(np.prod(shape)) != len(devices):
        raise ValueError(f"train.mesh = {dict(sizes)} does not fill {len(devices)} devices exactly")
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axes_of(mesh: Mesh) -> Axes:
    """What operations are told: axes of size 1 are left out, so that one device runs unwrapped."""
    batch = tuple(axis for axis in BATCH if mesh.shape[axis] > 1)
    return Axes(
        batch=batch or None,
        heads="tensor" if mesh.shape["tensor"] > 1 else None,
        seq="seq" if mesh.shape["seq"] > 1 else None,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every array of a batch: the first dimension is the example."""
    return NamedSharding(mesh, P(BATCH))


def local_rows(rows: NamedSharding, batch_size: int) -> list[int]:
    """The rows of a batch that the devices of this process hold, ascending; several processes may hold the same."""
    blocks = (index[0] for index in rows.addressable_devices_indices_map((batch_size,)).values())
    return sorted({row for block in blocks for row in range(batch_size)[block]})


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def rule_of(path: str, role: str) -> P:
    """The one row of RULES that a parameter matches. Raises ValueError for none or several."""
    rows = [spec for r, pattern, spec in RULES if r == role and re.search(pattern, "/" + path)]
    if len(rows) != 1:
        raise ValueError(f"parameter {path} (role {role}) matches {len(rows)} sharding rules: expected exactly one")
    return rows[0]


def parameter_sharding(path: str, role: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Applies the rule to the trailing dimensions; drops axes that do not divide theirs."""
    rule = tuple(rule_of(path, role))[-len(shape) :] if shape else ()
    spec = (None,) * (len(shape) - len(rule)) + rule
    fits = lambda axis, size: axis if axis and size % mesh.shape[axis] == 0 else None
    return NamedSharding(mesh, P(*(fits(axis, size) for axis, size in zip(spec, shape, strict=True))))
