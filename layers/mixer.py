"""The mixer contract: one call for training, prefill, streaming, decoding, packing and sequence parallelism.

    y, carry, aux = mixer(x, carry, ctx)

A sequence architecture is a function from a sequence and a carry to a sequence and a carry. `layers/contract.py`
holds every mixer to the promises written here. Shape letters used throughout Longwave:

    b batch   t time   d width   h heads   k key dim   v value dim   n state   c chunk
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from longwave.kernels.partition import Axes

Carry = Any  # a pytree of arrays of constant structure, shapes and dtypes; () for a mixer that has none

ROLES = ("A", "B", "C", "D", "dt", "kernel", "gate", "norm", "bias", "embed", "weight")
_STOCK_ROLES = {
    "kernel": "weight",
    "bias": "bias",
    "scale": "norm",
    "embedding": "embed",
}  # of flax's own layers
CAPABILITIES = frozenset({"causal", "carry", "reset"})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What travels beside x.

    reset: (b, t), true on the first token of a packed document: what came before is forgotten.
    valid: (b, t), false on padding. The true entries of a row are contiguous. None: all valid.
    key:   randomness of this call; None means evaluation: no dropout.
    below: the aux of lower blocks, given only to mixers that ask for it (`reads_below`).
    axes:  mesh axes, handed on to operations.
    """

    reset: Bool[Array, "b t"] | None = None
    valid: Bool[Array, "b t"] | None = None
    key: PRNGKeyArray | None = None
    below: tuple = ()
    axes: Axes = dataclasses.field(default=Axes(), metadata={"static": True})


class Out(NamedTuple):
    """Result of a mixer: y (b, t, d), the carry after the last valid token, and a dict of side outputs."""

    y: Float[Array, "b t d"]
    carry: Carry
    aux: dict[str, Any]


class Mixer(nnx.Module):
    """Base of every sequence mixer. Constructors take `width`, then keyword hyper-parameters, then `rngs`.

    Class attributes that a mixer may set:
      chunk:       inner chunk length; resets then fall on multiples of it (of valid tokens).
      supports:    the subset of {"causal", "carry", "reset"} that holds; the rest raises `Unsupported`.
      roles:       parameter name -> role (one of ROLES), for names that flax's own layers do not explain.
      keep_float32: names of parameters that stay float32 when the model computes in bfloat16.
      reads_below: whether it asks for `ctx.below`.
    """

    chunk: int = 1
    supports: frozenset[str] = CAPABILITIES
    roles: ClassVar[dict[str, str]] = {}
    keep_float32: ClassVar[frozenset[str]] = frozenset()
    reads_below: bool = False

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """The state before the first token. `capacity`: how many tokens to make room for, where tokens are held."""
        raise Unsupported(self, "carry", "it defines no init_carry")

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        """carry=None is the state before the first token. A call on t = 1 is the recurrent form."""
        raise TypeError(f"{type(self).__name__} defines no __call__")


class Unsupported(ValueError):
    """Raised when a mixer is asked for what its `supports` does not list."""

    def __init__(self, mixer: Mixer, what: str, why: str):
        has = ", ".join(sorted(mixer.supports)) or "none of causal, carry, reset"
        super().__init__(f"{type(mixer).__name__} does not support {what!r}: {why} (it supports: {has})")


def parameter_roles(model: nnx.Module) -> dict[str, str]:
    """Path of every parameter ("layers/0/mixer/C") -> its role, from the roles its module declares.

    Raises ValueError where a parameter has no role or an unknown one: optimiser groups and shardings need it.
    """
    roles = {}
    for prefix, module in nnx.iter_modules(model):
        declared = {**_STOCK_ROLES, **getattr(module, "roles", {})}
        for name, value in vars(module).items():
            if not isinstance(value, nnx.Param):
                continue
            path = "/".join(map(str, (*prefix, name)))
            if (role := declared.get(name)) not in ROLES:
                raise ValueError(
                    f"parameter {path} of {type(module).__name__} has role {role!r}; "
                    f"set {type(module).__name__}.roles[{name!r}] to one of {', '.join(ROLES)}"
                )
            roles[path] = role
    return roles


def float32_parameters(model: nnx.Module) -> frozenset[str]:
    """Paths of the parameters that stay float32 when the rest computes in bfloat16: what modules name in their
    `keep_float32`, by the parameter's name or its path from the module."""
    join = lambda prefix, name: "/".join(map(str, (*prefix, name)))
    modules = list(nnx.iter_modules(model))
    named = {join(prefix, name) for prefix, module in modules for name in getattr(module, "keep_float32", ())}
    there = {join(p, name) for p, m in modules for name, value in vars(m).items() if isinstance(value, nnx.Param)}
    return frozenset(named & there)
