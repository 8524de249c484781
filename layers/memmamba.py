"""MemMamba: a recurrent mixer that takes notes (Wang, Chen, Yan, Lu and Sun, 2025, "MemMamba: Rethinking Memory
Patterns in State Space Model", arXiv:2510.03279).

    s_t = W_n x_t                                      noted where `note` says so; w of them make a window   (Eqs. 5, 8)
    S_t = replace(S_{t-1}, pool_fn(window))            when a window is complete; k slots                       (Eq. 9)
    c_tok = Attention(x_t, S_{t-1})                    where `read` says so                                    (Eq. 10)
    c_lay = Attention(x_t, (max S^{l-1}_{t-1}, ..., max S^{l-g}_{t-1}))         in layers l = p, 2p, ...       (Eq. 11)
    y = mixer(fusion(x, c_tok, c_lay))                                                                         (Eq. 12)
    Attention(x, S) = W_o concat_h softmax((W_q x)_h (W_k S)_h' / sqrt(d)) (W_v a S)_h      a: scores of the summaries

The paper leaves much open; docs/memmamba.md lists what is its and what is our choice. Notes are taken of the input and
not of the state, so nothing feeds back from the mixer, and all tokens of a call are computed side by side.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from longwave.layers.attention import places
from longwave.layers.fusion import Fusion, Weighted
from longwave.layers.linear import torch_uniform
from longwave.layers.mamba import Mamba
from longwave.layers.mixer import Carry, Context, Mixer, Out
from longwave.layers.note_choices import FIFO, Every, Learned, Periodic, Priority, Replacement, Trigger, pool_max
from longwave.layers.note_pool import SPAN, completed, empty_pool, peaks, read_notes, take_notes


class SlotAttention(nnx.Module):
    """Attention of tokens to a few summaries each. Summaries are never projected: W_k and W_v act on the heads' queries
    and results instead, which are what keys of `summary` numbers, the same for all heads, ask for."""

    roles: ClassVar[dict[str, str]] = {"W_q": "weight", "W_k": "weight", "W_v": "weight", "W_o": "weight"}

    def __init__(self, width: int, *, summary: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        draw = lambda rows: nnx.Param(torch_uniform(rngs.params(), (rows, width), fan_in=rows))
        self.W_q, self.W_k, self.W_v, self.W_o = draw(width), draw(summary), draw(summary), draw(width)

    def __call__(
        self,
        x: Float[Array, "*b q d"],
        note: Float[Array, "*b s n+1"],
        seen: Bool[Array, "*b q s"],
    ) -> Float[Array, "*b q d"]:
        """In the dtype of x, softmax in float32; 0 for a token that sees nothing. A note's last number is its score."""
        note, score = note[..., :-1], note[..., -1]
        W_q, W_k, W_v, W_o = (W[...].astype(x.dtype) for W in (self.W_q, self.W_k, self.W_v, self.W_o))
        heads = lambda v: rearrange(v, "... (h d) -> ... h d", h=self.heads)
        q = jnp.einsum("...qhd,nhd->...qhn", heads(x @ W_q), heads(W_k)) / math.sqrt(W_q.shape[1] // self.heads)
        logits = jnp.einsum("...qhn,...sn->...hqs", q.astype(jnp.float32), note)
        seen = seen[..., None, :, :]
        top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, where=seen, initial=-1e30))
        weight = jnp.where(seen, jnp.exp(jnp.where(seen, logits - top, 0)), 0)
        total = jnp.sum(weight, axis=-1, keepdims=True)
        weight = weight / jnp.where(total > 0, total, 1)
        read = jnp.einsum("...hqs,...sn->...qhn", weight * score[..., None, None, :], note).astype(x.dtype)
        return rearrange(jnp.einsum("...qhn,nhd->...qhd", read, heads(W_v)), "... h d -> ... (h d)") @ W_o


class MemMamba(Mixer):
    """Notes, attention to them, and a mixer behind. The defaults are the paper's profile, `memmamba_long` is ours.

    mixer:   constructor of what is wrapped: causal, with a carry.
    k:       slots of the pool.     summary: width of a note.     window: noted tokens that make one summary.
    note, read: triggers: which tokens are noted, which read the pool.
    pool_fn: what a window becomes.     replace: what leaves a full pool.     fusion: constructor.
    scorer:  constructor of what a token is worth: a summary's score is the largest of its window, and scales what
             is read of it, so that the scorer learns. None: all 1.
    p:       layers l = p, 2p, ... (counted from 0) also read the summaries of lower layers; None: this one never does.
    g:       of how many.
    heads:   of both attentions; None: width / 64, at least 1.

    aux: `summary` (b, t, summary), the largest of each channel over the pool that a token reads, and `noted` (b, t),
    whether there is anything in it: what upper layers read; and what the mixer hands out. Triggers, scores and
    replacement count by documents. Axes of time are not used: the notes of a row stay together.
    """

    roles: ClassVar[dict[str, str]] = {"W_n": "weight"}

    def __init__(
        self,
        width: int,
        *,
        mixer: Callable[..., Mixer] = Mamba,
        k: int = 50,
        summary: int = 64,
        window: int = 1,
        note: Trigger = Periodic(),
        read: Trigger = Periodic(),
        pool_fn: Callable[[Array], Array] = pool_max,
        scorer: Callable[..., nnx.Module] | None = None,
        replace: Replacement = FIFO(),
        fusion: Callable[..., Fusion] = Weighted,
        p: int | None = 4,
        g: int = 4,
        heads: int | None = None,
        rngs: nnx.Rngs,
    ):
        heads = max(1, width // 64) if heads is None else heads
        if min(k, summary, window, g, heads, 1 if p is None else p) < 1:
            raise ValueError(
                f"MemMamba.k = {k}, summary = {summary}, window = {window}, p = {p}, g = {g}, heads = {heads}: "
                "expected at least 1 (p: or None)"
            )
        if width % heads:
            raise ValueError(f"MemMamba.heads = {heads} must divide width = {width}")
        for name, value in {"note": note, "read": read, "replace": replace}.items():
            if scorer is None and getattr(value, "needs_score", False):
                raise ValueError(f"MemMamba.{name} = {value} needs a scorer")
        self.mixer = mixer(width, rngs=rngs)
        if not self.mixer.supports >= {"causal", "carry"}:
            raise ValueError(f"MemMamba.mixer = {type(self.mixer).__name__} must be causal and have a carry")
        self.supports, self.chunk = self.mixer.supports, self.mixer.chunk
        self.k, self.summary, self.window, self.p, self.g = k, summary, window, p, g
        self.note, self.read, self.pool_fn, self.replace = note, read, pool_fn, replace
        self.W_n = nnx.Param(torch_uniform(rngs.params(), (width, summary), fan_in=width))
        self.scorer = None if scorer is None else scorer(width, rngs=rngs)
        self.token = SlotAttention(width, summary=summary, heads=heads, rngs=rngs)
        self.layer = None if p is None else SlotAttention(width, summary=summary, heads=heads, rngs=rngs)
        self.fusion = fusion(width, rngs=rngs)

    @property
    def reads_below(self) -> bool:  # ty: ignore[incompatible-property-override]: of a layer, not the class
        return self.p is not None or self.mixer.reads_below

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """An empty pool; the fusion's and the mixer's own. `capacity` is the mixer's."""
        pool = empty_pool(batch, window=self.window, slots=self.k, width=self.summary)
        mixer = self.mixer.init_carry(batch, capacity=capacity)
        return {"pool": pool, "fusion": self.fusion.init_carry(batch), "mixer": mixer}

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        b, t, _ = x.shape
        start: dict[str, Any] = carry or {
            "pool": empty_pool(b, window=self.window, slots=self.k, width=self.summary),
            "fusion": self.fusion.init_carry(b),
            "mixer": None,
        }
        at = places(start["pool"]["position"], t, ctx)
        live = at.segment >= 0
        x = jnp.where(live[..., None], x, 0)
        score = jnp.ones((b, t)) if self.scorer is None else self.scorer(x, self.mixer)
        most = lambda trigger, t: trigger.most(t) if ctx.reset is None else t  # documents may begin anywhere
        notes, pool = take_notes(
            start["pool"],
            jnp.matmul(x, self.W_n[...].astype(x.dtype), preferred_element_type=jnp.float32),
            score,
            self.note(at.position, score) & live,
            at,
            most=most(self.note, t),
            pool_fn=self.pool_fn,
            replace=self.replace,
        )
        span = min(SPAN, t)
        reads = self.read(at.position, score) & live
        ended = completed(most(self.note, span), self.window)
        bounds = {"span": span, "most_ended": ended, "most_reads": most(self.read, span)}
        c_tok = read_notes(notes, x, reads, at, self.token, **bounds)
        u, fusion = self.fusion(x, c_tok, self._lower(x, ctx), start["fusion"], ctx)
        out = self.mixer(u, start["mixer"], ctx)
        summary, noted = peaks(notes, at)
        aux = {**out.aux, "summary": summary, "noted": noted}
        return Out(out.y, {"pool": pool, "fusion": fusion, "mixer": out.carry}, aux)

    def _lower(self, x: Array, ctx: Context) -> Array:
        """c_lay. The number of this layer is the number of those below."""
        below = [aux for aux in ctx.below[-self.g :] if "summary" in aux]
        if self.layer is None or self.p is None or len(ctx.below) % self.p or not below:
            return jnp.zeros_like(x)
        note, seen = (jnp.stack([aux[name] for aux in below], axis=2) for name in ("summary", "noted"))
        note = jnp.pad(note, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1)  # the score
        return self.layer(x[:, :, None], note, seen[:, :, None])[:, :, 0]


# The second profile: windows, and a pool that keeps what scores highest, for as long as the document lasts.
memmamba_long = functools.partial(
    MemMamba, window=32, note=Every(), read=Every(), scorer=Learned, replace=Priority(),
)  # fmt: skip
