"""Configurable code for the loader's tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from flax import nnx

RATE = 3.0


class Task(Protocol):
    name: str

    @property
    def splits(self) -> Mapping[str, int]: ...

    def stream(self, split: str) -> Any: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits:
    length: int = 8
    name: str = "digits"

    def __post_init__(self) -> None:
        if self.length > 100:
            raise ValueError(f"Digits.length = {self.length}: at most 100")

    @property
    def splits(self) -> Mapping[str, int]:
        return {"train": 10}

    def stream(self, split: str) -> Any:
        return iter(())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sgd:
    lr: float
    schedule: Callable[[int], float] | None = None


def constant(*, factor: float = 1.0) -> Callable[[int], float]:
    return lambda step: factor


class Mixer(nnx.Module):
    pass


class Scan(Mixer):
    def __init__(self, width: int, *, N: int = 4, mode: Literal["lin", "inv"] = "lin", rngs: nnx.Rngs):
        self.width, self.N, self.mode = width, N, mode


class Window(Mixer):
    def __init__(self, width: int, *, size: int = 3, rngs: nnx.Rngs):
        self.size = size


class Body(nnx.Module):
    def __init__(self, inputs: int, *, width: int, mixers: Sequence[Callable[..., Mixer]], rngs: nnx.Rngs):
        self.width = width
        self.mixers = nnx.List([m(width, rngs=rngs) for m in mixers])
