"""The loss that keeps a router from sending all tokens to one place, of all layers together: Switch Transformer's
(Fedus et al., 2021, arXiv:2101.03961, equation 4) for k choices instead of one.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Balance(NamedTuple):
    """What a layer tells of its router, sums over its valid tokens: they add, over devices and layers.

    routed: tokens that went to each of M places; probability: what the router gave it; tokens: how many there were.
    """

    routed: Float[Array, " M"]
    probability: Float[Array, " M"]
    tokens: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class BalanceLoss:
    """coefficient M sum_m f_m P_m over the tokens of all layers: f_m, the share of them that went to place m, P_m, what
    the router gave it on average. It is k coefficient where all places are used alike, and more where they are not.
    """

    coefficient: float = 0.01

    def __call__(self, aux: Any) -> Float[Array, ""]:
        """aux: the side outputs of all layers, however nested. Raises ValueError where none has a `Balance`."""
        is_balance = lambda node: isinstance(node, Balance)
        layers = [node for node in jax.tree.leaves(aux, is_leaf=is_balance) if is_balance(node)]
        sizes = {layer.routed.shape[-1] for layer in layers}
        if len(sizes) != 1:
            what = f"layers that choose among {sorted(sizes)} memories" if sizes else "no layer that has a router"
            raise ValueError(f"BalanceLoss: {what}; expected layers such as MoM, with one number M of memories")
        (M,) = sizes
        total = lambda name: sum(getattr(layer, name).reshape(-1, M).sum(0) for layer in layers)
        tokens = jnp.maximum(sum(layer.tokens.sum() for layer in layers), 1.0)
        return self.coefficient * M * jnp.sum(total("routed") * total("probability")) / jnp.square(tokens)
