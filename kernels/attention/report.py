"""What `longwave report attention` shows: the TPU kernels beside those of JAX, and what the tuner tries.

Of bfloat16, one row and 8 heads. Peers stand at the best of their block sizes: with their defaults, 128, they are ten
times slower.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from longwave.kernels.aot.estimate import Case
from longwave.kernels.aot.timing import Launch
from longwave.kernels.aot.tune import Candidate, Entry
from longwave.kernels.attention import blocks, pallas_tpu, report_backward, tpu_forward
from longwave.kernels.attention.blocks import Cut
from longwave.kernels.attention.mask import Causal, Mask, Window
from longwave.kernels.attention.reference import Coordinates, Scores
from longwave.kernels.attention.tpu_plan import BITS, Plan
from longwave.kernels.attention.visits import FIRST

HEADS = 8
AT = Coordinates(), Coordinates()
PEERS = ((1024, 1024, 512), (2048, 2048, 1024))  # queries, keys, keys at a time: the best of many on some chip
CUTS = (  # of ours, that the tuner compares with those of the rule
    Cut(2048, 2048, (1024, 2048), (256, 256)),
    Cut(2048, 2048, (1024, 1024), (256, 256)),
    Cut(2048, 2048, (1024, 2048), (512, 512)),
)
NARROW = (Cut(2048, 2048, (2048, 2048), (256, 256)), Cut(4096, 2048, (2048, 2048), (256, 256)))  # for windows
# What is found serves any length that it divides.
TUNED = (
    *((Causal(), 4096, d, CUTS) for d in (64, 128, 256)),
    (Causal() & Window(512), 16384, 128, NARROW),
)


def cases(chip: str) -> list[Entry]:
    """Causal at three widths and three lengths, and a window; and the backward pass."""
    entries = []
    for d in (64, 128, 256):
        for t in (1024, 4096, 16384):
            problem = f"forward causal t={t} d={d}"
            entries.append(Entry(problem, "longwave", [Candidate(ours(problem, chip, t, d, Causal()))]))
            sizes = [size for size in PEERS if t % size[0] == t % size[1] == 0]
            for name, peer in (("jax flash_attention", by_flash), ("jax splash_attention", by_splash)):
                found = [_candidate(peer(problem, chip, t, d, *size), size) for size in sizes]
                entries.append(Entry(problem, name, found, peer=True))
    problem = "forward causal window=512 t=16384 d=128"
    entries.append(Entry(problem, "longwave", [Candidate(ours(problem, chip, 16384, 128, Causal() & Window(512)))]))
    return [*entries, *report_backward.cases(chip)]


def candidates(chip: str) -> list[Entry]:
    """Blocks of the forward kernel: those of the rule, and others."""
    entries = []
    for mask, t, d, cuts in TUNED:
        q = jax.ShapeDtypeStruct((1, t, HEADS, d), jnp.bfloat16)
        name, ruled = blocks.problem(q, q, mask), blocks.rule(q, q, q, mask)
        found = [Candidate(ours(name, chip, t, d, mask, cut), cut.row) for cut in dict.fromkeys((ruled, *cuts))]
        entries.append(Entry(name, "longwave", found))
    return entries


def ours(name: str, chip: str, t: int, d: int, mask: Mask, cut: Cut | None = None) -> Case:
    """The forward kernel, with blocks of its choice or others."""
    q = jax.ShapeDtypeStruct((1, t, HEADS, d), jnp.bfloat16)
    scores = Scores(mask, d**-0.5)
    cut = cut or blocks.forward(q, q, q, mask, chip)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return pallas_tpu.forward(q, k, v, *AT, scores, cut=cut)

    return Case(name, chip, forward, (q, q, q), {"attention_forward": launch(Plan.of(q, q, q, *AT, scores, cut))})


def launch(plan: Plan) -> Launch:
    """What the forward kernel says of itself, of one row of the batch."""
    steps, patterns = plan.steps(*AT)
    n, pieces, fold = steps.flags.size, int(np.prod(plan.pieces)), plan.layout.fold
    codes = steps.patterns[0][:, None] >> (BITS * np.arange(pieces))[None] & (1 << BITS) - 1
    looped = fold > tpu_forward.UNROLLED  # over heads: one pattern after the other, and at the end
    rows = lambda q: jnp.arange(q, min(q + 512, plan.q.t))[:, None]
    stripe = lambda q: plan.scores.mask.visible(rows(q), jnp.arange(plan.k.t)[None])
    seen = sum(int(jnp.sum(stripe(q))) for q in range(0, plan.q.t, 512))  # of a mask that hides something
    return Launch(
        steps=plan.layout.blocks * n,
        regions=tuple(float((codes == 1 + i).mean()) for i in range(len(patterns))),
        prefetch=tuple(steps),
        trips=(pieces,) * (pieces > 1) + (fold,) * (len(patterns) + 1) * looped,
        flops=2 * plan.layout.h * seen * (plan.layout.d + plan.layout.dv),
        ends=float((steps.patterns == 0 if plan.single else steps.flags & FIRST != 0).mean()),
    )


def by_flash(name: str, chip: str, t: int, d: int, block_q: int, block_k: int, compute: int) -> Case:
    sizes = flash.BlockSizes(block_q=block_q, block_k_major=block_k, block_k=min(compute, block_k), block_b=1)
    forward = partial(flash.flash_attention, causal=True, block_sizes=sizes)
    return _peer(name, chip, t, d, forward, "flash_attention", block_q, block_k)


def by_splash(name: str, chip: str, t: int, d: int, block_q: int, block_k: int, compute: int) -> Case:
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((t, t))] * HEADS)
    sizes = splash.BlockSizes(block_q=block_q, block_kv=block_k, block_kv_compute=min(compute, block_k))
    forward = jax.vmap(splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes))
    return _peer(name, chip, t, d, forward, "splash_mha_fwd_no_residuals", block_q, block_k)


def _peer(name: str, chip: str, t: int, d: int, forward, kernel: str, block_q: int, block_k: int) -> Case:
    nq, nk = t // block_q, t // block_k
    live = (np.arange(nk)[None] * block_k < (1 + np.arange(nq)[:, None]) * block_q).mean()
    q = jax.ShapeDtypeStruct((1, HEADS, t, d), jnp.bfloat16)
    flops = 2 * HEADS * t * (t + 1) * d
    regions = () if kernel == "flash_attention" and t == block_k else (float(live),)
    return Case(name, chip, forward, (q, q, q), {kernel: Launch(HEADS * nq * nk, regions=regions, flops=flops)})


def _candidate(case: Case, size: tuple[int, int, int]) -> Candidate:
    return Candidate(case, dict(zip(("q", "k", "compute"), size, strict=True)))
