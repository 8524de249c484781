"""Mesh axes of operations: which named axes an array's batch, heads (or channels) and time are split over.

Operations are pure functions of local arrays. Under a mesh, XLA gathers the whole batch for an FFT and cannot
split a Pallas kernel at all, so every operation that needs it wraps itself in `jax.shard_map` through `sharded`.
Nothing here knows a mesh axis by name: `Axes` is built in `training/sharding.py` and travels in the `Context`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

Names = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Axes:
    """Names of the mesh axes that split batch, heads or channels, and time. All None: no mesh, run as is."""

    batch: Names = None
    heads: Names = None
    seq: Names = None

    def __bool__(self) -> bool:
        return any((self.batch, self.heads, self.seq))

    def spec(self, dims: str) -> P:
        """The PartitionSpec of an array whose dimensions are named by letters: b batch, h heads, t time, . none."""
        return P(*({"b": self.batch, "h": self.heads, "t": self.seq, ".": None}[d] for d in dims))

    def for_heads(self, heads: int) -> Axes:
        """These axes, without those of heads where they do not divide `heads`, which then stay whole."""
        return self if heads % parts(self.heads) == 0 else dataclasses.replace(self, heads=None)


def parts(names: Names) -> int:
    """Into how many parts the ambient mesh (`jax.set_mesh`) splits a dimension over these axes."""
    names = (names,) if isinstance(names, str) else names or ()
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in names)


def left_to_xla(axes: Axes = Axes()) -> str | None:
    """Why no kernel may run here: arrays of several devices whose axes nobody named, and XLA cannot split a kernel.

    None: `axes` are given, or there is one device, or this already runs on each device's own shard.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    if axes or all(size == 1 or kind == AxisType.Manual for size, kind in sizes):
        return None
    return f"a mesh of {mesh.size} devices and no `axes`: XLA cannot split a kernel among them"


def sharded(f: Callable[..., Any], axes: Axes, in_dims: Any, out_dims: Any) -> Callable[..., Any]:
    """`f` run on local shards: in_dims and out_dims are pytrees of dimension strings ("bth", "h.", ...).

    None among the arguments is passed through. With no axes, `f` itself.
    """
    if not axes:
        return f
    to_specs = lambda dims: jax.tree.map(axes.spec, dims)
    return jax.shard_map(f, in_specs=to_specs(in_dims), out_specs=to_specs(out_dims), check_vma=False)
