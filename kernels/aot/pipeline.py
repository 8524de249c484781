"""What a `pallas_call` says of itself before it is compiled: its grid, and the blocks that the grid's pipeline moves.

Reads the equation of the traced program, of which JAX promises nothing: all that is read of it is read in this file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

LANES = 128


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel as it is called.

    grid: steps along each axis, the last one innermost.   parallel: its steps may be shared by the cores of a chip.
    bytes: moved between HBM and VMEM by the pipeline.   exact: False where `bytes` is not the whole truth: block
        indices are read from tables that are not known here, or the kernel copies from and to HBM by itself.
    vmem: bytes of the windows, doubled where the pipeline doubles them, and of the scratch.
    """

    name: str
    grid: tuple[int, ...]
    parallel: bool
    bytes: int
    exact: bool
    vmem: int

    @property
    def steps(self) -> int:
        return math.prod(self.grid)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every `pallas_call` of a traced program, in all its functions and branches, that may be meant for a TPU."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            backend = type(equation.params["compiler_params"]).__module__
            if "triton" not in backend and "mosaic_gpu" not in backend:
                yield equation
            continue
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def signature(equation: Any) -> str:
    """What tells a kernel's pipeline from another's."""
    mapping = equation.params["grid_mapping"]
    return f"{mapping} {[str(block.index_map_jaxpr) for block in mapping.block_mappings]}"


def read(equation: Any, prefetch: Sequence[np.ndarray] = ()) -> Kernel:
    """The kernel of a `pallas_call`. prefetch: its scalar-prefetch operands, concrete, that block indices depend on.

    Raises:
      ValueError: the grid is dynamic, or `prefetch` does not fit the kernel's operands.
    """
    mapping, name = equation.params["grid_mapping"], equation.params["name"]
    if any(not isinstance(size, int) for size in mapping.grid):
        raise ValueError(f"kernel {name}: its grid {mapping.grid} is dynamic; an estimate needs a static one")
    tables = [np.asarray(table, np.int32) for table in prefetch]
    wanted = [tuple(aval.shape) for aval in mapping.index_map_avals[len(mapping.grid) :]]
    if tables and [table.shape for table in tables] != wanted:
        raise ValueError(f"kernel {name}: prefetch has shapes {[t.shape for t in tables]}, its operands have {wanted}")
    windows = [block for block in mapping.block_mappings if _space(block.transformed_block_aval) in ("default", "vmem")]
    moved, exact = _moved(mapping.grid, windows, tables, wanted)
    by_hand = {"any", "hbm"} & {_space(block.transformed_block_aval) for block in mapping.block_mappings}
    scratch = [aval for aval in mapping.scratch_avals if _space(aval) == "vmem"]
    vmem = sum(_buffers(block, mapping.grid) * _window_bytes(block, _sizes(block)) for block in windows)
    semantics = getattr(equation.params["compiler_params"], "dimension_semantics", None) or ()
    return Kernel(
        name=name,
        grid=tuple(mapping.grid),
        parallel=any("parallel" in str(axis).lower() for axis in semantics),
        bytes=moved + sum(4 * math.prod(shape) for shape in wanted),
        exact=exact and not by_hand,
        vmem=int(vmem) + sum(int(_tiled(aval.shape)) * aval.dtype.itemsize for aval in scratch),
    )


def _space(aval: Any) -> str:
    return str(aval.memory_space).lower().rpartition(".")[2] if aval.memory_space is not None else "default"


def _sizes(block: Any) -> list[int]:
    """Elements of a window along each axis of the array (a squeezed axis has one)."""
    return [getattr(dim, "block_size", dim) if not _squeezed(dim) else 1 for dim in block.block_shape]


def _squeezed(dim: Any) -> bool:
    return dim is None or type(dim).__name__ == "Squeezed"


def _buffers(block: Any, grid: tuple[int, ...]) -> int:
    if block.pipeline_mode is not None:
        return block.pipeline_mode.buffer_count
    return 2 if math.prod(grid) > 1 else 1


def _window_bytes(block: Any, sizes: Sequence[Any]) -> Any:
    return _tiled(sizes) * block.array_aval.dtype.itemsize


def _tiled(sizes: Sequence[Any]) -> Any:
    """Elements of windows of these sizes (numbers or arrays of them) as they lie in memory: in tiles of 8 x 128."""
    *outer, rows, lanes = np.broadcast_arrays(1, 1, *sizes)
    rows = np.where(rows < 8, np.array([0, 1, 2, 4, 4, 8, 8, 8, 8])[np.minimum(rows, 8)], -(-rows // 8) * 8)
    return np.prod([*outer, rows, -(-lanes // LANES) * LANES], axis=0)


def _moved(grid: tuple[int, ...], windows: list[Any], tables: list[np.ndarray], wanted: list[Any]) -> tuple[int, bool]:
    """Bytes of all windows over the whole grid: one is moved where it is another than in the step before.

    A window whose index depends on tables that are not known counts as moved in every step.
    """
    steps, exact, total = math.prod(grid), True, 0
    known = []
    for block in windows:
        if wanted and not tables and _reads_tables(block, len(grid)):
            total, exact = total + steps * int(_window_bytes(block, _sizes(block))), False
        else:
            known.append(block)
    tables = tables or [np.zeros(shape, np.int32) for shape in wanted]
    for block, starts in zip(known, _starts(grid, known, tables), strict=True):
        fetched = np.r_[True, (np.diff(starts, axis=1) != 0).any(0)]
        sizes = [
            np.clip(length - start, 0, size)  # what lies over the edge of the array is not moved
            for length, size, start in zip(block.array_aval.shape, _sizes(block), starts[:, fetched], strict=True)
        ]
        total += int(np.sum(_window_bytes(block, sizes)))
    return total, exact


def _reads_tables(block: Any, axes: int) -> bool:
    jaxpr = block.index_map_jaxpr.jaxpr
    return bool(set(jaxpr.invars[axes:]) & {v for eqn in jaxpr.eqns for v in eqn.invars if not hasattr(v, "val")})


def _starts(grid: tuple[int, ...], windows: list[Any], tables: list[np.ndarray]) -> list[Int[np.ndarray, "axes steps"]]:
    """Of every window the element at which it starts along each axis of the array, in every step."""
    steps = math.prod(grid)
    index = np.stack(np.unravel_index(np.arange(steps), grid or (1,))).astype(np.int32)[: len(grid)]

    @jax.jit
    def starts(index: Any, tables: Any) -> Any:
        one = lambda i: [block.compute_start_indices_interpret(tuple(i), *tables) for block in windows]
        return jax.vmap(one, in_axes=1, axis_size=steps)(index) if grid else one(())

    found = starts(index, tables)
    return [np.stack([np.broadcast_to(axis, steps) for axis in block]).reshape(-1, steps) for block in found]
