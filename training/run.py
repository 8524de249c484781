"""All settings of a run, in one frozen dataclass. Configs bind its fields under the name `train`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Array

from longwave.training.optimizer import AdamW
from longwave.training.task import MakeBackbone, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What `train.py` needs to know.

    task: data, head, loss and metric.            backbone: makes the model's body from the task's inputs.
    optimizer: groups, schedule, clipping.        steps: optimiser steps of the whole run.
    side_loss: of the mixers' side outputs, added to the task's in training and logged, such as BalanceLoss; or None.
    batch_size: global batch, over all devices.   accumulate: micro-batches a step sums its gradients over.
    seed: initialisation, data order, dropout.    compute_dtype: float32 or bfloat16; state stays float32.
    ema: decay of the averaged parameters that evaluation uses, or None.
    initial: folder of a finished run whose backbone a new run starts from, or None.
    mesh: axis name -> size; -1 once for the rest. Axes: data, fsdp, tensor, and replica in a sweep.
    sweep: "seed" and "lr" -> values: all combinations are trained at once; lr is the optimizer's global rate.
    eval_every, save_every, log_every: steps between evaluations on validation, checkpoints, log lines.
    max_bad_steps: non-finite steps in a row (each is skipped) after which the run stops with an error.
    profile: first and last step of a profiler window, or None.      wandb_project: also log there.
    compiler_options: XLA options, the same for training and for compiling ahead.
    """

    task: Task
    backbone: MakeBackbone
    optimizer: AdamW
    steps: int
    batch_size: int
    accumulate: int = 1
    side_loss: Callable[[Any], Array] | None = None
    seed: int = 0
    compute_dtype: str = "float32"
    ema: float | None = None
    initial: str | None = None
    mesh: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"data": -1})
    sweep: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    eval_every: int = 1000
    save_every: int = 1000
    log_every: int = 50
    max_bad_steps: int = 20
    profile: tuple[int, int] | None = None
    wandb_project: str | None = None
    compiler_options: Mapping[str, str | int | float | bool] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "eval_every",
            "save_every",
            "log_every",
            "max_bad_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} = {getattr(self, name)}: expected at least 1")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train.batch_size = {self.batch_size} must be a multiple of train.accumulate = {self.accumulate}"
            )
        if self.profile is not None and not 0 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"train.profile = {self.profile}: expected (first step, last step), or None")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"train.compute_dtype = {self.compute_dtype!r}: expected 'float32' or 'bfloat16'")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"train.ema = {self.ema}: expected a decay between 0 and 1, or None")
        check_sweep(self.sweep)


def check_sweep(sweep: Mapping[str, Sequence[float]]) -> None:
    """Raises ValueError where the values cannot be meant."""
    for name, values in sweep.items():
        place = f"train.sweep[{name!r}] = {values!r}"
        if name not in ("seed", "lr"):
            raise ValueError(f"train.sweep names {name!r}: expected 'seed' or 'lr'")
        if not values:
            raise ValueError(f"{place} is empty: expected at least one value")
        if len(set(values)) < len(values):
            raise ValueError(f"{place} names a value twice")
        if name == "seed" and not all(isinstance(seed, int) and seed >= 0 for seed in values):
            raise ValueError(f"{place}: expected whole numbers of at least 0")
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise ValueError(f"{place}: expected finite numbers of at least 0")
