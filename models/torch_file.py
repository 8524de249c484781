"""Tensors out of a file of `torch.save`, without PyTorch and without running what a pickle may ask for.

Such a file is a zip archive: `NAME/data.pkl` says how to rebuild the object from the raw bytes in `NAME/data/0`, ... A
pickle is a program. Here it may name what rebuilds tensors and ordered dicts, and nothing else: any other name raises
UnsafePickle before anything of it is called.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip


class UnsafePickle(ValueError):
    """The file asks for something that is no tensor."""


def load(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a state dict by name. Tensors that share memory in the file share it here.

    Raises UnsafePickle, and ValueError where the file is of the format before PyTorch 1.6, damaged, or no dict of
    tensors.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is no zip archive: damaged, or written by torch.save before PyTorch 1.6; load it there and save "
            "it again, as safetensors best"
        )
    with zipfile.ZipFile(path) as archive:
        places = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(places) != 1:
            raise ValueError(f"{path} holds {len(places)} data.pkl: expected the one of torch.save")
        reader = _Reader(path, archive, places[0].removesuffix("data.pkl"))
        try:
            found = reader.load()
        except UnsafePickle:
            raise
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(array, np.ndarray) for name, array in found.items()
    ):
        raise ValueError(f"{path}: expected a dict of tensors by name (a state dict)")
    return dict(found)


class _Reader(pickle.Unpickler):
    """Unpickles with a world that knows tensors alone."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, prefix: str):
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError(f"{path} is compressed: torch.save stores its bytes as they are")
        super().__init__(io.BytesIO(archive.read(prefix + "data.pkl")))
        self._path, self._archive, self._prefix = path, archive, prefix
        order = f"{prefix}byteorder"
        self._order: Literal["<", ">"] = ">" if order in archive.namelist() and archive.read(order) == b"big" else "<"
        self._storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _tensor(storage, offset, size, stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if module == "torch" and name in STORAGES:
            return _Storage(name)
        raise UnsafePickle(f"{self._path} asks for {module}.{name}: only tensors are read; nothing of it was run")

    def persistent_load(self, pid: Any) -> np.ndarray:
        """The storage that ("storage", type, key, device, count) names."""
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, _Storage):
            raise ValueError(f"{pid!r} is no storage")
        if key not in self._storages:
            raw = self._archive.read(f"{self._prefix}data/{key}")
            self._storages[key] = np.frombuffer(raw, _dtype(storage).newbyteorder(self._order))
        found = self._storages[key]
        if found.dtype.newbyteorder("=") != _dtype(storage) or found.size < count:
            raise ValueError(
                f"storage {key} holds {found.size} of {found.dtype}, {count} of {storage.name} were asked for"
            )
        return found


class _Storage:
    """Stands for torch.FloatStorage and its like. Cannot be called."""

    def __init__(self, name: str):
        self.name = name


def _dtype(storage: _Storage) -> np.dtype[Any]:
    return np.dtype(STORAGES[storage.name])


def _tensor(storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
    """A tensor's view into its storage, which it must not leave and cannot outnumber."""
    if len(size) != len(stride) or min((offset, *size, *stride)) < 0:
        raise ValueError(f"a tensor of size {size}, strides {stride} at {offset}")
    if math.prod(size) == 0:
        return np.zeros(size, storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= storage.size or math.prod(size) > storage.size:
        raise ValueError(f"a tensor of size {size}, strides {stride} at {offset} leaves its {storage.size} numbers")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)
