"""Every form of the operations compiles, with its gradient, for every TPU generation: training, and with a carry."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from longwave import layers
from longwave.kernels import aot
from longwave.layers.mixer import Context

partial = functools.partial
MIXERS = {
    "S4": partial(layers.S4, N=8, l_max=128),
    "S4D": partial(layers.S4D, N=8),
    "S5": partial(layers.S5, P=8),
    "LRU": partial(layers.LRU, N=8),
    "LSSL": partial(layers.LSSL, N=8),
    "LMU": partial(layers.LMU, order=8),
    "LongConv": partial(layers.LongConv, l_max=128),
    "SGConv": partial(layers.SGConv, l_max=128),
    "Attention": partial(layers.Attention, heads=2),
}
EVERYWHERE = ("S4", "S4D", "Attention")  # of the others' operations there are tests for every generation


@pytest.mark.full
@pytest.mark.skipif(aot.missing() is not None, reason=aot.missing() or "")
@pytest.mark.parametrize(
    ("name", "slice_of"),
    [
        pytest.param(name, slice_of, marks=[pytest.mark.large] * ("v5e" not in slice_of and name not in EVERYWHERE))
        for name in MIXERS
        for slice_of in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
    ],
)
def test_carry_resets_and_padding_compile_with_gradient(name, slice_of):
    graphdef, params = nnx.split(MIXERS[name](16, rngs=nnx.Rngs(0)))

    def loss(params, x, carry, reset, valid):
        mixer = nnx.merge(graphdef, params)
        reset = reset if "reset" in mixer.supports else None
        y, carry, _ = mixer(x, carry, Context(reset=reset, valid=valid))
        return y.sum() + sum(leaf.sum() for leaf in jax.tree.leaves(carry))

    mesh = aot.mesh(aot.topology(slice_of)[:1], {"data": 1})  # one chip: where there is a kernel, it runs
    carry = nnx.merge(graphdef, params).init_carry(2, capacity=128)
    flags = jnp.zeros((2, 96), bool)
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    arguments = jax.tree.map(place, (params, jnp.zeros((2, 96, 16)), carry, flags, flags))
    assert aot.compile(jax.grad(loss, argnums=(0, 1)), *arguments, mesh=mesh).fits
