"""A model's parameters as named arrays, one file, and back: every array used, every parameter set, exact shapes.

A name is the parameter's path, "backbone/layers/0/mixer/A_log"; of what a model holds besides (BatchNorm's statistics,
fixed step sizes), the path behind "model_state/". Layers are numbered through the depth, whether the model runs them
one by one or stacked in a scan: the file does not know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longwave.models import safetensors
from longwave.models.backbone import Backbone

Params = dict[str, Any]  # nested dicts with string keys; leaves are arrays or abstract ones
_FLOATS = {np.dtype(dtype) for dtype in (np.float32, np.float16, jnp.bfloat16)}
STATE = "model_state"
_LAYER = re.compile(rf"^({STATE}/)?((?:.*/)?layers)/(\d+)/(.+)$")  # of a backbone: (its layers, number, the rest)


class WeightsMismatch(ValueError):
    """The arrays are those of another model."""


def write(path: Path, model: nnx.Module) -> None:
    """All that the model holds, each array in its own dtype. The file appears whole or not at all."""
    safetensors.save(path, named(model))


def read(path: Path, params: Params, state: Params) -> tuple[Params, Params]:
    """What a file holds, in the structures and the dtypes of the abstract (params, state). Raises WeightsMismatch."""
    found = fitted(safetensors.load(path), params | ({STATE: state} if state else {}), str(path))
    return {name: found[name] for name in params}, found.get(STATE, {})


def named(model: nnx.Module) -> dict[str, np.ndarray]:
    """Name -> array, on the host, stacked layers taken apart."""
    stacked = {
        "/".join((*map(str, prefix), "layers")): len(module.layers)
        for prefix, module in nnx.iter_modules(model)
        if isinstance(module, Backbone) and module.scan
    }
    arrays = {}
    for keys, value in nnx.to_flat_state(nnx.state(model)):
        first = () if isinstance(value, nnx.Param) else (STATE,)
        path, array = "/".join((*first, *map(str, keys))), np.asarray(value[...])
        match = _LAYER.match(path)
        if match is None or match[2] not in stacked:
            arrays[path] = array
            continue
        for repeat, part in enumerate(array):
            arrays[_numbered(match, repeat * stacked[match[2]] + int(match[3]))] = part
    return arrays


def fitted(arrays: Mapping[str, np.ndarray], abstract: Params, source: str = "the arrays") -> Params:
    """The arrays as parameters: stacked where `abstract` is, in its dtypes.

    float16, bfloat16 and float32 are taken, and no other dtype. Raises WeightsMismatch with all that does not fit.
    """
    check(arrays, abstract, source)
    leaves = {}
    for path, names, leaf in _plan(arrays, abstract):
        parts = [np.asarray(arrays[name]).astype(leaf.dtype) for name in names]
        leaves[path] = parts[0] if names == [path] else np.stack(parts)
    return jax.tree_util.tree_map_with_path(lambda keys, _: jnp.asarray(leaves[_path(keys)]), abstract)


def check(arrays: Mapping[str, np.ndarray], abstract: Params, source: str = "the arrays") -> None:
    """Raises WeightsMismatch with all that `fitted` could not use, set or fit; copies nothing."""
    plan = _plan(arrays, abstract)
    used = {name for _, names, _ in plan for name in names}
    wrong = [f"{name}: not among the parameters" for name in sorted(arrays.keys() - used)]
    for path, names, leaf in plan:
        shape = leaf.shape if names == [path] else leaf.shape[1:]
        wrong += [problem for name in names if (problem := _problem(name, arrays.get(name), shape))]
    if wrong:
        shown = [*wrong[:20], *([f"and {len(wrong) - 20} more"] if len(wrong) > 20 else [])]
        raise WeightsMismatch("\n  ".join([f"{source} and the model differ:", *shown]))


def _plan(arrays: Mapping[str, Any], abstract: Params) -> list[tuple[str, list[str], Any]]:
    """Of every parameter: its path, the names of its arrays (several where it is stacked), the abstract array.

    Layers are stacked where all their parameters lead with the same number and the file has not as many layers as the
    tree.
    """
    tree, file = _layers(_leaves(abstract)), _layers((name, None) for name in arrays)
    plan = []
    for path, leaf in _leaves(abstract):
        names = [path]
        if match := _LAYER.match(path):
            pattern, leads = tree[match[2]]
            if len(leads) == 1 and leads != {0} and file.get(match[2], (pattern,))[0] != pattern:
                numbers = range(int(match[3]), leaf.shape[0] * len(pattern), len(pattern))
                names = [_numbered(match, n) for n in numbers]
        plan.append((path, names, leaf))
    return plan


def _numbered(match: re.Match[str], number: int) -> str:
    return f"{match[1] or ''}{match[2]}/{number}/{match[4]}"


def _layers(leaves: Iterable[tuple[str, Any]]) -> dict[str, tuple[set[str], set[int]]]:
    """Of each backbone: the numbers of its layers, and the first dimensions of their parameters (0: it has none)."""
    found: dict[str, tuple[set[str], set[int]]] = {}
    for path, leaf in leaves:
        if match := _LAYER.match(path):
            numbers, leads = found.setdefault(match[2], (set(), set()))
            numbers.add(match[3])
            leads.add(leaf.shape[0] if getattr(leaf, "ndim", 0) else 0)
    return found


def _problem(name: str, array: np.ndarray | None, shape: tuple[int, ...]) -> str:
    if array is None:
        return f"{name}: missing, expected shape {shape}"
    if array.shape != shape:
        return f"{name}: shape {array.shape}, expected {shape}"
    if array.dtype.newbyteorder("=") not in _FLOATS:
        return f"{name}: {array.dtype}, expected float32, float16 or bfloat16"
    return ""


def _leaves(tree: Params) -> Iterator[tuple[str, Any]]:
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield _path(keys), leaf


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")
