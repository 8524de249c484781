"""A trained model from where it lies: the folder of a run, at its best step, or a folder of weights.

A folder of weights holds config.gin (which binds train.task and train.backbone, as a run's does), model.safetensors,
and tokenizer.json where the model reads no bytes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from longwave.cli.usage import UsageError
from longwave.configs import loader
from longwave.training import checkpoint, differences
from longwave.training.run import Run
from longwave.training.state import ModelDef
from longwave.training.task import Task

CONFIG, WEIGHTS, TOKENIZER, CHECKPOINTS = "config.gin", "model.safetensors", "tokenizer.json", "checkpoints"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelAlone(Run):
    """Settings that say what the model is; the rest may be there too."""

    optimizer: Any = None
    steps: int = 1
    batch_size: int = 1


@dataclasses.dataclass(frozen=True)
class Loaded:
    """model: with its parameters.    task: its own.    definition: the model without arrays, and what is said of them.
    step: the best of a run; None of weights.    text: the config."""

    model: nnx.Module
    task: Task
    definition: ModelDef
    step: int | None
    text: str


def load_model(path: Path, *, compute: bool = False) -> Loaded:
    """compute: parameters in the config's `train.compute_dtype`, as the run evaluates; else in float32, as stored.

    Raises UsageError where the folder is neither, FileNotFoundError without a scored checkpoint, StateMismatch and
    DamagedCheckpoint as checkpoints do.
    """
    is_run, has_weights = (path / CHECKPOINTS).is_dir(), (path / WEIGHTS).is_file()
    if not (path / CONFIG).is_file() or not (is_run or has_weights):
        raise UsageError(
            f"RUN_OR_WEIGHTS {path}: expected the folder of a run ({CONFIG} and {CHECKPOINTS}/), or of weights "
            f"({CONFIG} and {WEIGHTS})"
        )
    config = loader.load([str(path / CONFIG)], settings=ModelAlone)
    run, task = config.run, config.run.task
    if run.sweep:
        raise UsageError(f"RUN_OR_WEIGHTS {path}: a sweep has a best model for each replica; expected a single run")
    if (path / TOKENIZER).is_file() and hasattr(task, "tokenizer"):
        task = dataclasses.replace(task, tokenizer=str(path / TOKENIZER))
    definition = ModelDef(lambda rngs: task.head(run.backbone(task.inputs, rngs=rngs), rngs=rngs))
    if is_run:
        step, params, state = _of_run(path / CHECKPOINTS, definition, task)
    else:
        from longwave.models import weights

        step, abstract = None, jax.eval_shape(definition.init, jax.random.key(0))
        params, state = weights.read(path / WEIGHTS, *abstract)
    if compute:
        params = definition.cast(params, run.compute_dtype)
    return Loaded(definition.merge(params, state), task, definition, step, config.text)


def _of_run(folder: Path, definition: ModelDef, task: Task) -> tuple[int, Any, Any]:
    """(best step, parameters that its evaluation used, statistics)."""
    records = checkpoint.Checkpoints(
        folder, None, metadata={}, metric=task.metric, larger_is_better=task.larger_is_better, writable=False
    )
    if (best := records.best()) is None:
        raise FileNotFoundError(f"{folder} has no checkpoint with validation scores yet")
    parts = ("params/", "ema/", "model_state/")
    arrays = checkpoint.read_arrays(epath.Path(folder), best[0], lambda name: name.startswith(parts))
    averaged = {name.replace("ema/", "params/", 1): array for name, array in arrays.items() if name.startswith("ema/")}
    arrays = {name: array for name, array in arrays.items() if not name.startswith("ema/")} | averaged
    params, state = jax.eval_shape(definition.init, jax.random.key(0))
    expected = differences.leaf_paths({"params": params, "model_state": state})
    if lines := differences.state_differences(arrays, expected):
        raise checkpoint.StateMismatch(f"{folder} holds another model than its config builds:\n  " + "\n  ".join(lines))
    tree = _nested(arrays)
    return best[0], tree["params"], tree.get("model_state", {})


def _nested(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}, on the device."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *above, last = name.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = jax.numpy.asarray(array)
    return tree
