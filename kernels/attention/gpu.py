"""What computes attention on a GPU, and why: `choose` is the rule.

1. cuDNN, through `jax.nn.dot_product_attention`, where it does all that is asked: NVIDIA's own kernels are the fastest
   there are. It knows full, causal, and causal windowed masks over positions 0, 1, 2, ..., for bfloat16 and float16.
2. Else Pallas (`pallas_gpu`): every mask by formula, positions, segments, soft-cap, log-sum-exp, float32.
3. Else the chunked form, as on every other platform.

Only cuDNN itself says whether it is there and takes the shapes, so where JAX finds none, as on a machine that compiles
for GPUs but has none, it is not chosen.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longwave.kernels.attention import pallas_gpu
from longwave.kernels.attention.flash import Form
from longwave.kernels.attention.mask import And, Causal, Mask, Window
from longwave.kernels.attention.reference import Coordinates, Scores

PALLAS = Form(pallas_gpu.forward, pallas_gpu.backward)
CUDNN_WIDEST = 128  # on every chip with tensor cores for bfloat16; newer ones take 256, where they are slower


class Choice(NamedTuple):
    form: Literal["cudnn", "pallas", "chunked"]
    reason: str


def choose(q: Any, k: Any, v: Any, q_at: Coordinates, k_at: Coordinates, scores: Scores, *, return_lse: bool) -> Choice:
    """The form on GPUs for arrays of these shapes and dtypes; logged once with the reason (level INFO)."""
    no_cudnn = cudnn_refuses(q, k, v, q_at, k_at, scores, return_lse=return_lse)
    if no_cudnn is None:
        choice = Choice("cudnn", "it does all that is asked")
    elif (no_pallas := pallas_gpu.supports(q, k, v, q_at, k_at, scores)) is None:
        choice = Choice("pallas", f"not cudnn: {no_cudnn}")
    else:
        choice = Choice("chunked", f"not cudnn: {no_cudnn}; not pallas: {no_pallas}")
    _log(choice)
    return choice


@functools.cache
def _log(choice: Choice) -> None:
    logging.getLogger(__name__).info("attention on GPUs: %s; %s", choice.form, choice.reason)


def cudnn_refuses(
    q: Any, k: Any, v: Any, q_at: Coordinates, k_at: Coordinates, scores: Scores, *, return_lse: bool
) -> str | None:
    """Why this is not for cuDNN; None when it is."""
    dtypes = sorted({x.dtype.name for x in (q, k, v)})
    if return_lse:
        return "the log-sum-exp is asked for, which JAX gives rounded and without a gradient"
    if scores.softcap is not None:
        return "scores are capped"
    if (options := _cudnn_mask(scores.mask)) is None:
        return f"a mask that is neither full, causal nor a causal window: {scores.mask}"
    if jax.tree.leaves((q_at, k_at)):
        return "positions or segments are data"
    if options and q.shape[1] != k.shape[1]:
        return f"{q.shape[1]} queries and {k.shape[1]} keys under a mask"
    if len(dtypes) > 1 or dtypes[0] not in ("bfloat16", "float16"):
        return f"q, k, v are {', '.join(dtypes)}, not all bfloat16 or all float16"
    if q.shape[3] != v.shape[3] or q.shape[3] % 8 or q.shape[3] > CUDNN_WIDEST:
        return f"heads of width {q.shape[3]} and {v.shape[3]}, not both the same multiple of 8 up to {CUDNN_WIDEST}"
    try:
        jax.eval_shape(partial(cudnn, scores=scores), *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)))
    except (RuntimeError, ValueError) as error:  # cuDNN is absent, or too old for what is asked
        return str(error)
    return None


def _cudnn_mask(mask: Mask) -> dict[str, Any] | None:
    """How `jax.nn.dot_product_attention` is told of the mask; None: it cannot be."""
    if mask == Mask():
        return {}
    if mask == Causal():
        return {"is_causal": True}
    if isinstance(mask, And) and Causal() in (mask.a, mask.b):
        window = mask.b if mask.a == Causal() else mask.a
        if isinstance(window, Window):
            return {"is_causal": True, "local_window_size": (window.size - 1, 0)}
    return None


def cudnn(
    q: Float[Array, "b t h d"], k: Float[Array, "b s kv d"], v: Float[Array, "b s kv d"], *, scores: Scores
) -> Float[Array, "b t h d"]:
    """cuDNN's flash attention, with its own gradient, for what `cudnn_refuses` lets pass."""
    options = _cudnn_mask(scores.mask)
    return jax.nn.dot_product_attention(q, k, v, scale=scores.scale, implementation="cudnn", **(options or {}))


def with_cudnn(otherwise: Callable[..., tuple[Array, Array]], scores: Scores) -> Callable[..., tuple[Array, Array]]:
    """`otherwise(q, k, v, q_at, k_at)`, but cuDNN where the program is compiled for CUDA. There lse is not a number."""

    def on_cuda(q, k, v, q_at, k_at):
        return cudnn(q, k, v, scores=scores), jnp.full(q.shape[:3], jnp.nan)

    return lambda *args: jax.lax.platform_dependent(*args, cuda=on_cuda, default=otherwise)
