"""Which form computes a call, and why: `choose` is the rule.

    "reference"   all scores at once                     few queries or few scores, off TPUs with many keys
    "chunked"     blocks in plain JAX                    CPUs; whatever a kernel refuses
    "pallas"      the kernels of TPUs and of GPUs        where they take the call
    "auto"        the best of these, on each platform that the program may be compiled for

What a kernel refuses is logged once, with the reason (level INFO); "pallas" by name raises it instead.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from jaxtyping import Array

from longwave.kernels.attention import chunked, flash, gpu, pallas_gpu, pallas_tpu, reference, ring
from longwave.kernels.attention.flash import Form, Forms
from longwave.kernels.attention.reference import Coordinates, Scores
from longwave.kernels.partition import Axes, left_to_xla

Backend = Literal["auto", "reference", "chunked", "pallas"]
Attend = Callable[[Array, Array, Array, Coordinates, Coordinates], tuple[Array, Array]]

# Few queries (decoding) or few scores: reading keys where they lie beats laying them out in blocks. With many keys
# the TPU kernel reads the live ones alone.
FEW_QUERIES, FEW_SCORES, MANY_KEYS = 4, 32**2, 1024

TPU = Form(pallas_tpu.forward, pallas_tpu.backward)


FEW = Form(reference.attention, chunked.backward)


def choose(
    backend: Backend,
    q: Array,
    k: Array,
    v: Array,
    q_at: Coordinates,
    k_at: Coordinates,
    scores: Scores,
    *,
    return_lse: bool,
    around: ring.Ring | None,
    axes: Axes,
) -> Attend:
    """The form for arrays of these shapes and dtypes. around: the devices that time is split over."""
    if backend == "auto" and (reason := left_to_xla(axes)):
        _log(reason)
        backend = "chunked" if q.shape[1] > FEW_QUERIES else "reference"
    if around is not None:
        call = q, k, v, q_at.placed(q.shape[1]), k_at.placed(k.shape[1]), scores
        return partial(ring.attention, _forms(backend, call, return_lse=True)[0], scores, around)
    few_scores = q.shape[1] * k.shape[1] <= FEW_SCORES
    if backend == "reference" or (backend == "auto" and few_scores):
        return partial(reference.attention, scores=scores)
    forms, cudnn = _forms(backend, (q, k, v, q_at, k_at, scores), return_lse=return_lse)
    attend = partial(flash.attention, forms, scores)
    return gpu.with_cudnn(attend, scores) if cudnn else attend


def _forms(backend: Backend, call: Any, *, return_lse: bool) -> tuple[Forms, bool]:
    """The form of each platform, and whether cuDNN takes the place of that for GPUs."""
    match backend:
        case "reference":
            return Forms(default=FEW), False
        case "chunked":
            return Forms(), False
        case "pallas":
            refused = {"TPUs": pallas_tpu.supports(*call), "GPUs": pallas_gpu.supports(*call)}
            if all(refused.values()):
                reasons = "; ".join(f"on {platform}: {reason}" for platform, reason in refused.items())
                raise ValueError(f"attention: backend = 'pallas' does not take this call: {reasons}")
            tpu = None if refused["TPUs"] else TPU
            return Forms(tpu, None if refused["GPUs"] else gpu.PALLAS, default=tpu or gpu.PALLAS), False
        case "auto":
            queries, keys = call[0].shape[1], call[1].shape[1]
            few = queries <= FEW_QUERIES
            tpu = None if few and keys < MANY_KEYS else TPU
            if tpu and (reason := pallas_tpu.supports(*call)):
                _log(reason)
                tpu = None
            on_gpu = gpu.choose(*call, return_lse=return_lse).form
            cuda = gpu.PALLAS if on_gpu == "pallas" and not few else None
            return Forms(tpu, cuda, default=FEW if few else flash.CHUNKED), on_gpu == "cudnn"
        case _:
            raise ValueError(f"attention: backend = {backend!r}; expected auto, reference, chunked or pallas")


@functools.cache
def _log(reason: str) -> None:
    logging.getLogger(__name__).info("attention in plain JAX, not by a kernel: %s", reason)
