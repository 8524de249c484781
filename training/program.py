"""A run's pure functions on one mesh: what training, evaluation, compiling ahead and tests all use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from longwave.training import sharding
from longwave.training.run import Run
from longwave.training.state import ModelDef, TrainState, abstract_state, new_state, shardings
from longwave.training.step import averages, make_diagnosis, make_eval_step, make_train_step
from longwave.training.task import Batch, Sums


@dataclasses.dataclass(frozen=True)
class Program:
    """Built once by `build`. Call its functions under `jax.set_mesh(program.mesh)`.

    state:  the abstract TrainState: shapes, dtypes, shardings.      batch: the abstract global batch.
    rows:   the rows of a global batch that this process's devices hold, ascending; None: all of them.
    init:   key -> TrainState.                  train_step: (state, batch, key) -> (state, metrics); donates the state.
    eval_step: (params, model_state, sums, batch) -> sums; donates the sums.
    diagnosis: (state, batch, key) -> {parameter: whether its gradient is finite}.
    move_plateau: (state, value) -> state; donates the state.
    """

    run: Run
    mesh: Mesh
    model: ModelDef
    state: TrainState
    batch: Mapping[str, jax.ShapeDtypeStruct]
    rows: Sequence[int] | None
    init: Callable[[Array], TrainState]
    train_step: Any  # jitted: compiling ahead lowers it
    eval_step: Callable[..., Sums]
    diagnosis: Callable[..., dict[str, Array]]
    move_plateau: Callable[..., TrainState]

    def stream(self, split: str, step: int = 0) -> Iterator[Batch]:
        """The task's batches from `step` on: of each, the rows that this process's devices hold."""
        run = self.run
        return run.task.stream(split, batch_size=run.batch_size, seed=run.seed, step=step, rows=self.rows)

    def global_batch(self, local: Batch) -> dict[str, Array]:
        """The rows that `stream` yields, as arrays over the mesh."""
        arrays = {name: np.asarray(local[name], spec.dtype) for name, spec in self.batch.items()}
        with jax.transfer_guard("allow"):
            if self.rows is None:
                return jax.device_put(arrays, {name: spec.sharding for name, spec in self.batch.items()})
            held = {row: i for i, row in enumerate(self.rows)}

            def place(spec: jax.ShapeDtypeStruct, rows: np.ndarray) -> Array:
                block = lambda index: rows[held[index[0].start or 0] :][: spec.sharding.shard_shape(spec.shape)[0]]
                return jax.make_array_from_callback(spec.shape, spec.sharding, block)

            return {name: place(spec, arrays[name]) for name, spec in self.batch.items()}

    def key(self) -> Array:
        """The key of the run's randomness, on every device of the mesh."""
        return jax.device_put(jax.random.key(self.run.seed), sharding.replicated(self.mesh))

    def evaluate(self, state: TrainState, split: str) -> dict[str, float]:
        """loss and metrics over every example of a split exactly once; with the averaged parameters if there are."""
        params = state.params if state.ema is None else state.ema
        shapes = jax.eval_shape(self.eval_step, params, state.model_state, None, self.batch)
        sums = jax.device_put(
            jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes), sharding.replicated(self.mesh)
        )
        for rows in self.stream(split):
            sums = self.eval_step(params, state.model_state, sums, self.global_batch(rows))
        return {name: float(value) for name, value in averages(sums).items()}

    def evaluated(self, state: TrainState, scores: Mapping[str, float]) -> TrainState:
        """The state that knows that it was evaluated: the plateau moves, and a resumed run does not evaluate again.
        The state that is passed is gone (donated)."""
        sign = 1.0 if self.run.task.larger_is_better else -1.0
        return self.move_plateau(state, np.float32(sign * scores[self.run.task.metric]))


def build(run: Run, devices: Sequence[Any] | None = None) -> Program:
    """Model, mesh and jitted functions. `devices` may be those of a TPU that is not here (compiling ahead)."""
    mesh = sharding.make_mesh(run.mesh, devices)
    axes, parts = sharding.axes_of(mesh), int(np.prod([mesh.shape[axis] for axis in sharding.BATCH]))
    if run.batch_size % (run.accumulate * parts):
        raise ValueError(
            f"train.batch_size = {run.batch_size} must be a multiple of {run.accumulate * parts}: "
            f"{run.accumulate} micro-batches over {parts} groups of devices"
        )

    def make_model(rngs: nnx.Rngs) -> nnx.Module:
        return run.task.head(run.backbone(run.task.inputs, rngs=rngs), rngs=rngs)

    model = ModelDef(make_model)
    state = abstract_state(model, run.optimizer, run.ema is not None, mesh)
    everywhere, by_row = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=by_row)
        for name, spec in run.task.batch_spec(run.batch_size).items()
    }
    places, rows = shardings(state), shardings(batch)
    options = dict(run.compiler_options) or None
    eval_step = make_eval_step(model, run.task, run, axes)

    def add_sums(params: Any, model_state: Any, sums: Sums | None, batch: Any) -> Sums:
        new = eval_step(params, model_state, batch)
        return new if sums is None else jax.tree.map(jnp.add, sums, new)

    def move_plateau(state: TrainState, value: Array) -> TrainState:
        plateau = run.optimizer.plateau
        moved = state.plateau if plateau is None else plateau.update(state.plateau, value)
        return dataclasses.replace(state, plateau=moved, evaluated=state.step)

    return Program(
        run=run,
        mesh=mesh,
        model=model,
        state=state,
        batch=batch,
        rows=None if jax.process_count() == 1 else sharding.local_rows(by_row, run.batch_size),
        init=jax.jit(lambda key: new_state(model, run.optimizer, run.ema is not None, key), out_shardings=places),
        train_step=jax.jit(
            make_train_step(model, run.task, run, axes),
            in_shardings=(places, rows, everywhere),
            out_shardings=(places, everywhere),
            donate_argnums=0,
            compiler_options=options,
        ),
        eval_step=jax.jit(
            add_sums,
            in_shardings=(places.params, places.model_state, everywhere, rows),
            out_shardings=everywhere,
            donate_argnums=2,
            compiler_options=options,
        ),
        diagnosis=jax.jit(make_diagnosis(model, run.task, run, axes), in_shardings=(places, rows, everywhere)),
        move_plateau=jax.jit(move_plateau, out_shardings=places, donate_argnums=0),
    )
