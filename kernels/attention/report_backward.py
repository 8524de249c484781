"""The part of `longwave report attention` on the backward pass: the TPU kernel, and splash_attention's.

Of splash_attention the fused kernel, whose sum over as many dq as there are blocks of keys is left to XLA and not
counted here, and the pair of dkv and dq, each at several sizes of block. Causal, bfloat16, eight heads.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from longwave.kernels.aot.estimate import Case
from longwave.kernels.aot.timing import Launch
from longwave.kernels.aot.tune import Candidate, Entry
from longwave.kernels.attention import blocks, pallas_tpu, tpu_backward
from longwave.kernels.attention.mask import Causal
from longwave.kernels.attention.reference import Coordinates, Scores
from longwave.kernels.attention.tpu_layout import Layout
from longwave.kernels.attention.tpu_plan import Plan
from longwave.kernels.attention.visits import MASKED

HEADS, DIMENSIONS, LENGTHS = 8, (64, 128, 256), (1024, 4096, 16384)
SIZES = ((512, 512, 512), (1024, 1024, 512))  # of splash: queries, keys, keys at a time


def cases(chip: str) -> list[Entry]:
    entries = []
    for d in DIMENSIONS:
        for n in LENGTHS:
            problem = f"backward causal t={n} d={d}"
            entries.append(Entry(problem, "longwave", [Candidate(_ours(problem, chip, n, d))]))
            for fused in (True, False):
                rivals = [_splash(problem, chip, n, d, size, fused) for size in SIZES]
                entries.append(
                    Entry(problem, f"jax splash_attention, {'fused' if fused else 'dkv + dq'}", rivals, peer=True)
                )
    return entries


def _flops(n: int, d: int) -> float:
    """Of the five matmuls, over what a causal mask shows."""
    return 5 * 2 * HEADS * n * n / 2 * d


def _ours(problem: str, chip: str, n: int, d: int) -> Case:
    x, row = jax.ShapeDtypeStruct((1, n, HEADS, d), jnp.bfloat16), jax.ShapeDtypeStruct((1, n, HEADS), jnp.float32)
    at, scores, layout = Coordinates(), Scores(Causal(), d**-0.5), Layout.of(x, x, x)
    cut = blocks.backward(layout, n, n, x.dtype.itemsize, scores.mask)
    plan = Plan.of(x, x, x, at, at, scores, cut)
    walk = tpu_backward.Walk.of(plan, cut, at, at)
    masked = float(np.mean(walk.flags & MASKED != 0))
    steps = layout.blocks * (walk.start.shape[1] - 1)
    visits = walk.q.shape[1] / (walk.start.shape[1] - 1)
    loops = (visits, plan.q.n) if plan.q.n > 1 else (visits,)
    launch = Launch(steps, regions=(1 - masked, masked), trips=loops, flops=_flops(n, d))
    call = lambda q, k, v, lse, delta, do: pallas_tpu.backward(q, k, v, at, at, lse, delta, do, scores)
    return Case(problem, chip, call, (x, x, x, row, row, x), {"attention_backward": launch})


def _splash(problem: str, chip: str, n: int, d: int, size: tuple[int, int, int], fused: bool) -> Candidate:
    bq, bk, compute = size
    sizes = splash.BlockSizes(
        block_q=bq,
        block_kv=bk,
        block_q_dkv=bq,
        block_kv_dkv=bk,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else bq,
        block_kv_dq=None if fused else bk,
        use_fused_bwd_kernel=fused,
    )
    x, row = jax.ShapeDtypeStruct((HEADS, n, d), jnp.bfloat16), jax.ShapeDtypeStruct((HEADS, n), jnp.float32)

    def call(q, k, v, o, lse, do):
        mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((n, n))] * HEADS)
        kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)
        known = (False, splash.DEFAULT_MASK_VALUE, False, sizes, None, kernel.kwargs["mask_function"], None, False)
        kept = (q, k, v, None, None, o, lse, kernel.dq_mask_info, kernel.dkv_mask_info)
        return splash._splash_attention_bwd(*known, kept, do)[3:6]

    grid = n // bq, n // bk
    live = sum(i * bq + bq > j * bk for i in range(grid[0]) for j in range(grid[1])) / (grid[0] * grid[1])
    launch = partial(Launch, HEADS * grid[0] * grid[1], regions=(live,))
    launches = {"splash_mha_dkv_no_residuals": launch(flops=_flops(n, d) * (1.0 if fused else 0.8))}
    if not fused:
        launches["splash_mha_dq_no_residuals"] = launch(flops=_flops(n, d) * 0.2)
    return Candidate(Case(problem, chip, call, (x, x, x, x, row, x), launches), {"q": bq, "k": bk, "compute": compute})
