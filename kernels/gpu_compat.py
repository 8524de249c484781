"""How Pallas kernels reach a GPU: the one module that changes where JAX changes that.

JAX has two ways. Through Triton, kernels are written in plain Pallas and jax.numpy, as everywhere else; JAX 0.11
deprecated this way, which 0.12 still takes, and will remove it. Mosaic GPU, which stays, wants kernels written for
one generation of chips (its copies, barriers and warp groups), in terms that change with every release. A library
that must run on JAX 0.10.2 and on newer ones therefore takes Triton while it is there; once it is not, `missing` says
so, and operations fall back to what XLA makes of their chunked form. Kernels use Pallas itself and the names below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

try:
    from jax.experimental.pallas import triton
except ImportError:
    triton = None


def missing() -> str | None:
    """Why Pallas kernels cannot be compiled for a GPU; None where they can."""
    return None if triton is not None else f"jax {jax.__version__} has no Triton lowering of Pallas"


def call(kernel: Callable[..., None], *, warps: int, stages: int, **how: Any) -> Callable[..., Any]:
    """`pl.pallas_call` for a GPU: warps of 32 threads a block, stages of the software pipeline of its loops."""
    params = None if triton is None else triton.CompilerParams(num_warps=warps, num_stages=stages)
    return pl.pallas_call(kernel, compiler_params=params, **how)


def load(ref: Any, mask: Bool[Array, "..."] | None = None) -> Array:
    """What `ref` (or `ref.at[...]`) holds; 0 where the mask is false, which may lie outside of the array."""
    return triton.load(ref) if mask is None else triton.load(ref, mask=mask, other=0)


def store(ref: Any, x: Array, mask: Bool[Array, "..."] | None = None) -> None:
    """Writes x, but not where the mask is false."""
    triton.store(ref, x, mask=mask)


def dot(a: Float[Array, "..."], b: Float[Array, "..."], contract: tuple[int, int], interpret: bool) -> Array:
    """Product over axis contract[0] of a and contract[1] of b, on tensor cores, accumulated in float32.

    Operands of float32 are split in three products of tensorfloat32, as exact as float32; XLA on a CPU, which runs
    kernels that are interpreted, knows no such split and needs none.
    """
    exact = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    precision = exact if a.dtype.itemsize == 4 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type="float32")
