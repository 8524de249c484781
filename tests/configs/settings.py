"""Settings of a run of toys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

from flax import nnx

from tests.configs.toy import Sgd, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy:
    """Settings.

    task: the data.            body: what makes the model.
    steps, warmup: how many.
    mesh: axis name -> size,
        -1 for the rest.
    """

    task: Task
    body: Callable[..., nnx.Module]
    optimizer: Sgd
    steps: int
    warmup: int | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    mesh: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"data": -1})
    kind: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"train.steps = {self.steps}: expected at least 1")
