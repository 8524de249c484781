"""Files of tensors in the safetensors format, read and written without a library.

    8 bytes: n, little-endian      n bytes: JSON, {name: {"dtype", "shape", "data_offsets"}}      the tensors' bytes

Nothing in such a file is run. A large model lies in several, and `model.safetensors.index.json` says which tensor is
in which.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes, as the format's own library has it


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays under their names; the file appears whole, by a rename, or not at all."""
    header: dict[str, Any] = {"__metadata__": {"format": "np"}}
    at = 0
    for name, array in sorted(arrays.items()):
        if array.dtype not in _NAMES:
            raise ValueError(f"{name} is {array.dtype}: expected one of {', '.join(map(str, _NAMES))}")
        offsets = [at, at := at + array.nbytes]
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors lie at multiples of 8
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, array in sorted(arrays.items()):
                little = array.astype(array.dtype.newbyteorder("<"), copy=False)
                file.write(np.ascontiguousarray(little).view(np.uint8).reshape(-1).data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name, or of all files that an index (.json) names; they are mapped, not read yet.

    Raises ValueError naming what is damaged.
    """
    if path.suffix != ".json":
        return _load_one(path)
    try:
        places = dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no index of tensors: {error!r}") from error
    if strange := [name for name in places.values() if not isinstance(name, str) or Path(name).name != name]:
        raise ValueError(f"{path} names {strange[0]!r}: expected files beside it")
    arrays: dict[str, np.ndarray] = {}
    for file in sorted(set(places.values())):
        found = _load_one(path.with_name(file))
        listed = {name for name, place in places.items() if place == file}
        if wrong := sorted(listed ^ found.keys()):
            raise ValueError(f"{path} and {file} differ in {', '.join(wrong[:5])}")
        arrays.update(found)
    return arrays


def _load_one(path: Path) -> dict[str, np.ndarray]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"{path} is no safetensors file, or is cut short")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {name: (DTYPES[e["dtype"]], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: its header cannot be read: {error!r}") from error
    data = np.memmap(path, np.uint8, "r", offset=8 + length) if size > 8 + length else np.zeros(0, np.uint8)
    return {name: _array(path, name, data, *entry) for name, entry in entries.items()}


def _array(path: Path, name: str, data: np.ndarray, dtype: Any, shape: tuple, start: int, end: int) -> np.ndarray:
    dtype = np.dtype(dtype)
    if (
        not 0 <= start <= end <= data.size
        or end - start != math.prod(shape) * dtype.itemsize
        or min(shape, default=0) < 0
    ):
        raise ValueError(f"{path}: {name} of shape {shape} cannot be in bytes {start} to {end} of {data.size}")
    return np.frombuffer(data[start:end], dtype.newbyteorder("<")).reshape(shape)
