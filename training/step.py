"""One step of training and one of evaluation, as pure functions of (state, batch, key)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float

from longwave.kernels.partition import Axes
from longwave.training.optimizer import Plateau
from longwave.training.run import Run
from longwave.training.state import ModelDef, Params, TrainState, map_with_path, split
from longwave.training.task import Sums, Task

Metrics = dict[str, Array]
StepFn = Callable[..., tuple[TrainState, Metrics]]


class Functions(NamedTuple):
    """The pure functions of a run, not yet jitted: what `Program` says of them."""

    init: Callable[..., Any]
    train_step: Callable[..., Any]
    add_sums: Callable[..., Any]
    diagnosis: Callable[..., Any]
    move_plateau: Callable[..., Any]


def make_train_step(model: ModelDef, task: Task, run: Run, axes: Axes) -> StepFn:
    """(state, batch, key, lr=None) -> (state, metrics). `key` is the run's; the step folds its number in.

    lr: a rate in place of the optimiser's global one, which may be traced; None keeps that.
    A step whose loss, gradient or update is not finite changes nothing but the counters.
    """
    optimizer, roles = run.optimizer, model.role_tree()
    transform = optimizer.transform()
    gradients = make_gradients(model, task, run, axes)

    def train_step(
        state: TrainState, batch: Any, key: Array, lr: Float[Array, ""] | None = None
    ) -> tuple[TrainState, Metrics]:
        sums, grads, model_state = gradients(state, batch, jax.random.fold_in(key, state.step))
        grad_norm = optax.tree.norm(grads)
        direction, opt = transform.update(grads, state.opt, state.params)
        factor = optimizer.schedule(state.step) * state.plateau.scale
        updates = optimizer.apply(roles, direction, state.params, factor, lr)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if run.ema is not None:
            rate = 1 - run.ema
            ema = jax.tree.map(lambda e, p: e + rate * (p - e), ema, params)

        norms = (grad_norm, optax.tree.norm(updates), optax.tree.norm(params))
        ok = jnp.isfinite(jnp.stack([sums.loss, *norms])).all()
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
        bad = (~ok).astype(jnp.int32)
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=keep(params, state.params),
            model_state=keep(model_state, state.model_state),
            opt=keep(opt, state.opt),
            ema=keep(ema, state.ema),
            skipped=jnp.stack([state.skipped[0] + bad, jnp.where(ok, 0, state.skipped[1] + 1)]),
        )
        metrics = averages(sums) | {
            "lr": factor * (optimizer.lr if lr is None else lr),
            **dict(zip(("grad_norm", "update_norm", "param_norm"), norms, strict=True)),
            "skipped": new.skipped[0].astype(jnp.float32),
            "skipped_in_a_row": new.skipped[1].astype(jnp.float32),
        }
        return new, metrics

    return train_step


def make_gradients(
    model: ModelDef, task: Task, run: Run, axes: Axes
) -> Callable[[TrainState, Any, Array], tuple[Sums, Params, Params]]:
    """(state, batch, key) -> (sums, gradient of loss / weight, model_state), over `run.accumulate` micro-batches."""

    def sum_loss(params: Params, model_state: Params, batch: Any, key: Array) -> tuple[Array, tuple[Sums, Params]]:
        module = model.merge(model.cast(params, run.compute_dtype), model_state)
        sums = _with_side_loss(task.loss(module, batch, key, axes), run)
        return sums.loss, (sums, split(module)[1])

    gradient = jax.grad(sum_loss, has_aux=True)

    def gradients(state: TrainState, batch: Any, key: Array) -> tuple[Sums, Params, Params]:
        if run.accumulate == 1:
            grads, (sums, model_state) = gradient(state.params, state.model_state, batch, key)
        else:

            def body(carry: Any, micro: Any) -> tuple[Any, None]:
                sums, grads, model_state = carry
                index, rows = micro
                g, (s, model_state) = gradient(state.params, model_state, rows, jax.random.fold_in(key, index))
                return (*jax.tree.map(jnp.add, (sums, grads), (s, g)), model_state), None

            # Micro-batch i takes every n-th row, so that each device keeps the rows that it holds.
            n = run.accumulate
            rows = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, n, *a.shape[1:]), 1, 0), batch)
            first = jax.tree.map(lambda a: a[0], rows)
            shapes = jax.eval_shape(gradient, state.params, state.model_state, first, key)
            zeros = lambda tree: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)
            start = (zeros(shapes[1][0]), zeros(shapes[0]), state.model_state)
            (sums, grads, model_state), _ = jax.lax.scan(body, start, (jnp.arange(n), rows))
        return sums, jax.tree.map(lambda g: g / sums.weight, grads), model_state

    return gradients


def _with_side_loss(sums: Sums, run: Run) -> Sums:
    """The sums without the side outputs of mixers, but with the loss that these are for, if there is one."""
    if run.side_loss is None:
        return sums._replace(aux=())
    side = run.side_loss(sums.aux) * sums.weight
    return Sums(sums.loss + side, sums.weight, {**sums.metrics, "side_loss": side})


def make_eval_step(model: ModelDef, task: Task, run: Run, axes: Axes) -> Callable[[Params, Params, Any], Sums]:
    """(params, model_state, batch) -> sums, without randomness and with the running statistics."""

    def eval_step(params: Params, model_state: Params, batch: Any) -> Sums:
        module: nnx.Module = model.merge(model.cast(params, run.compute_dtype), model_state)
        return task.loss(module, batch, None, axes)._replace(aux=())

    return eval_step


def make_add_sums(model: ModelDef, task: Task, run: Run, axes: Axes) -> Callable[..., Sums]:
    """(params, model_state, sums, batch) -> sums with those of one more batch; None counts as zero."""
    eval_step = make_eval_step(model, task, run, axes)

    def add_sums(params: Params, model_state: Params, sums: Sums | None, batch: Any) -> Sums:
        new = eval_step(params, model_state, batch)
        return new if sums is None else jax.tree.map(jnp.add, sums, new)

    return add_sums


def make_move_plateau(plateau: Plateau | None) -> Callable[[TrainState, Array], TrainState]:
    """(state, value on validation, larger is better) -> the state that knows that it was evaluated."""

    def move_plateau(state: TrainState, value: Float[Array, ""]) -> TrainState:
        moved = state.plateau if plateau is None else plateau.update(state.plateau, value)
        return dataclasses.replace(state, plateau=moved, evaluated=state.step)

    return move_plateau


def averages(sums: Sums) -> Metrics:
    """loss and metrics over the weight."""
    return {name: value / sums.weight for name, value in {"loss": sums.loss, **sums.metrics}.items()}


def make_diagnosis(model: ModelDef, task: Task, run: Run, axes: Axes) -> Callable[..., dict[str, Bool[Array, ""]]]:
    """(state, batch, key) -> which gradients are finite, by parameter: what a stopped run prints."""
    gradients = make_gradients(model, task, run, axes)

    def diagnosis(state: TrainState, batch: Any, key: Array) -> dict[str, Bool[Array, ""]]:
        _, grads, _ = gradients(state, batch, jax.random.fold_in(key, state.step))
        finite: dict[str, Array] = {}
        map_with_path(lambda path, g: finite.setdefault(path, jnp.isfinite(g).all()), grads)
        return finite

    return diagnosis
