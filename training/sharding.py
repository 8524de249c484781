"""The mesh and where everything lies on it: the one file that names mesh axes.

    replica  independent runs (seeds, learning rates)        data    examples
    fsdp     examples, and parameters in shards               seq     time, inside operations
    tensor   heads and channels

Axes are Auto: XLA partitions; activations are constrained at block boundaries, operations that XLA would gather for
wrap themselves in `shard_map` by the `Axes` built here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from longwave.kernels.partition import Axes

AXES = ("replica", "data", "fsdp", "seq", "tensor")
REPLICA = "replica"
BATCH = ("data", "fsdp")

# (role, pattern of the path, spec of the trailing dimensions). Every parameter of every model matches exactly one row.
# Stacked layers lead with one more dimension, which is never split. A spec axis that does not divide its dimension
# (a vocabulary of 18 over 4 devices) is dropped for that parameter. What is small stays whole, also where it has a
# number for each channel or head: operations cut out their own.
_OUT = r"/(out|down)/kernel$|/W_o$"  # from heads, channels back into the residual stream
_SHARED = r"/to_(dt|B|C)/kernel$"  # from channels to what all channels need
_NOTES = r"/(W_n|router/kernel|low/kernel)$"  # from the residual stream to what all heads need
_INTO = f"^(?!.*({_OUT}|{_SHARED}|{_NOTES}))"  # from the residual stream into heads, channels; and a mixer's own
RULES: tuple[tuple[str, str, P], ...] = (
    ("weight", _OUT, P("tensor", "fsdp")),
    ("weight", _SHARED, P(("tensor", "fsdp"), None)),
    ("weight", _NOTES, P("fsdp", None)),
    ("weight", _INTO, P("fsdp", "tensor")),
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


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None, *, replicas: int = 1) -> Mesh:
    """A mesh with all five axes; `sizes` names some, one of them may be -1 (what is left), the others are 1.

    replicas: how many runs are trained at once; they must divide evenly over the axis of that name.
    """
    if unknown := sorted(set(sizes) - set(AXES)):
        raise ValueError(f"train.mesh names {unknown}: expected axes among {', '.join(AXES)}")
    devices = list(jax.devices() if devices is None else devices)
    shape = [sizes.get(axis, 1) for axis in AXES]
    known = int(np.prod([s for s in shape if s != -1]))
    if shape.count(-1) > 1 or any(s == 0 or s < -1 for s in shape):
        raise ValueError(f"train.mesh = {dict(sizes)}: expected positive sizes, and -1 at most once")
    shape = [len(devices) // known if s == -1 else s for s in shape]
    if int(np.prod(shape)) != len(devices):
        raise ValueError(f"train.mesh = {dict(sizes)} does not fill {len(devices)} devices exactly")
    if sizes.get(REPLICA, 1) != 1 and replicas == 1:
        raise ValueError(f"train.mesh = {dict(sizes)}: nothing splits over {REPLICA!r} without train.sweep; expected 1")
    if replicas % shape[0]:
        raise ValueError(f"train.mesh = {dict(sizes)}: {REPLICA!r} = {shape[0]} must divide the {replicas} replicas")
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


def to_global(
    local: Mapping[str, np.ndarray], specs: Mapping[str, jax.ShapeDtypeStruct], held: Sequence[Sequence[int] | None]
) -> dict[str, Array]:
    """Arrays over the mesh from what this process holds of them.

    specs: of the longest batch; the dimensions that are not split may be shorter (see `pipeline.Buckets`).
    held: of each leading dimension, the positions that `local` has, ascending; None: all of them.
    """
    arrays = {name: np.asarray(local[name], spec.dtype) for name, spec in specs.items()}
    with jax.transfer_guard("allow"):
        if all(positions is None for positions in held):
            return jax.device_put(arrays, {name: spec.sharding for name, spec in specs.items()})
        places = [None if h is None else {position: i for i, position in enumerate(h)} for h in held]

        def make(spec: jax.ShapeDtypeStruct, array: np.ndarray) -> Array:
            shape = (*spec.shape[: len(held)], *array.shape[len(held) :])
            shard = spec.sharding.shard_shape(shape)

            def block(index: Any) -> np.ndarray:
                starts = [(i.start or 0) if p is None else p[i.start or 0] for i, p in zip(index, places, strict=False)]
                return array[tuple(slice(start, start + size) for start, size in zip(starts, shard, strict=False))]

            return jax.make_array_from_callback(shape, spec.sharding, block)

        return {name: make(spec, arrays[name]) for name, spec in specs.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def replica_sharding(mesh: Mesh) -> NamedSharding:
    """Of what differs from replica to replica, and of nothing else: the first dimension is the replica."""
    return NamedSharding(mesh, P(REPLICA))


def stacked(leaf: jax.ShapeDtypeStruct, replicas: int) -> jax.ShapeDtypeStruct:
    """An array of every replica: one dimension more, split over the axis of replicas; the others as before."""
    placed = NamedSharding(leaf.sharding.mesh, P(REPLICA, *leaf.sharding.spec))
    return jax.ShapeDtypeStruct((replicas, *leaf.shape), leaf.dtype, sharding=placed)


def over_replicas(f: Callable[..., Any], in_axes: Any, out_axes: Any) -> Callable[..., Any]:
    """`f` of one replica, for all of them: vmapped over those that a device holds, and each device alone with its own.

    in_axes, out_axes: prefix trees of the arguments and of the result, as of `jax.vmap`: 0 for what has a dimension of
    replicas, None for what they share. The axis of replicas is manual, so that no operation can reach across it; within
    a replica, XLA partitions over the other axes as it does for a single run.
    """
    specs = lambda axes: jax.tree.map(lambda a: P() if a is None else P(REPLICA), axes, is_leaf=lambda a: a is None)
    return jax.shard_map(
        jax.vmap(f, in_axes, out_axes),
        in_specs=specs(in_axes),
        out_specs=specs(out_axes),
        axis_names={REPLICA},
        check_vma=False,
    )


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

    def fits(axes: str | tuple[str, ...] | None, size: int) -> bool:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return size % math.prod(mesh.shape[name] for name in names) == 0

    kept = (axes if fits(axes, size) else None for axes, size in zip(spec, shape, strict=True))
    return NamedSharding(mesh, P(*kept))
