"""The model as a pure function of plain dicts, and the state of training as one dataclass of arrays.

The abstract form of the state (shapes, dtypes, shardings) is made once and used by initialisation, restore,
ahead-of-time compilation and tests alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from longwave.layers.mixer import Mixer, float32_parameters, parameter_roles
from longwave.training import sharding
from longwave.training.optimizer import AdamW, PlateauState, initial_plateau

Params = dict[str, Any]  # nested dicts with string keys; the path of a leaf is its keys joined by "/"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a run needs to go on.

    step: batches consumed, which is the data position too.     params, ema: float32; ema is None when unused.
    model_state: BatchNorm statistics.                           opt: the optimiser's moments.
    plateau: the factor that validation moves.                   evaluated: step of the last evaluation.
    skipped: non-finite steps passed over, all and in a row.
    """

    step: Int[Array, ""]
    params: Params
    model_state: Params
    opt: Any
    ema: Params | None
    plateau: PlateauState
    evaluated: Int[Array, ""]
    skipped: Int[Array, "2"]


class ModelDef:
    """A model without its arrays: `init(key)` makes them, `merge(params, model_state)` puts them back."""

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module]):
        self._make = make
        abstract = nnx.eval_shape(lambda: make(nnx.Rngs(params=0)))
        self.graphdef = nnx.graphdef(abstract)
        self.roles: dict[str, str] = parameter_roles(abstract)
        self.float32: frozenset[str] = float32_parameters(abstract)
        self.abstract_params: Params = split(abstract)[0]
        mixers = (module for _, module in nnx.iter_modules(abstract) if isinstance(module, Mixer))
        self.chunk = math.lcm(*(mixer.chunk for mixer in mixers))  # packed documents start at its multiples
        missing = set(paths(self.abstract_params)) ^ set(self.roles)
        if missing:
            raise ValueError(f"parameters and roles differ in {sorted(missing)}")

    def init(self, key: Array) -> tuple[Params, Params]:
        """(params, model_state) of a new model."""
        return split(self._make(nnx.Rngs(params=key)))

    def merge(self, params: Params, model_state: Params) -> nnx.Module:
        return nnx.merge(self.graphdef, _int_keys(params), _int_keys(model_state))

    def cast(self, params: Params, dtype: Any) -> Params:
        """Parameters in the compute dtype, but for those that their mixer keeps in float32."""
        return map_with_path(lambda path, p: p if path in self.float32 else p.astype(dtype), params)

    def role_tree(self) -> Params:
        """The role of every parameter, in the structure of the parameters."""
        return map_with_path(lambda path, _: self.roles[path], self.abstract_params)


def split(model: nnx.Module) -> tuple[Params, Params]:
    """(params, model_state) of a model as nested dicts with string keys."""
    _, params, rest = nnx.split(model, nnx.Param, ...)
    return _str_keys(nnx.to_pure_dict(params)), _str_keys(nnx.to_pure_dict(rest))


def new_state(model: ModelDef, optimizer: AdamW, ema: bool, key: Array) -> TrainState:
    """The state at step 0; a pure function, run under `jit` with the state's shardings."""
    params, model_state = model.init(key)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        model_state=model_state,
        opt=optimizer.transform().init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        plateau=initial_plateau(),
        evaluated=zero,
        skipped=jnp.zeros(2, jnp.int32),
    )


def abstract_state(model: ModelDef, optimizer: AdamW, ema: bool, mesh: Mesh) -> TrainState:
    """The state as ShapeDtypeStructs with shardings. Moments and averages lie where their parameter lies."""
    shapes = jax.eval_shape(lambda: new_state(model, optimizer, ema, jax.random.key(0)))

    def place(key_path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        parts = _names(key_path)
        owner = next((p for i in range(len(parts)) if (p := "/".join(parts[i:])) in model.roles), None)
        spec = (
            sharding.replicated(mesh)
            if owner is None
            else sharding.parameter_sharding(owner, model.roles[owner], leaf.shape, mesh)
        )
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spec)

    return jax.tree_util.tree_map_with_path(place, shapes)


def shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def paths(tree: Params) -> list[str]:
    """The path of every leaf, in the order of `jax.tree.leaves`."""
    return ["/".join(_names(path)) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def map_with_path(f: Callable[[str, Any], Any], tree: Params) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: f("/".join(_names(path)), leaf), tree)


def _names(key_path: Any) -> list[str]:
    return [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path]


def _str_keys(tree: Any) -> Any:
    return {str(k): _str_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _int_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdecimal() else k: _int_keys(v) for k, v in tree.items()}
