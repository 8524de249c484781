"""MoM, mixture of memories (Du et al., 2025, "MoM: Linear Sequence Modeling with Mixture-of-Memories",
arXiv:2502.13685).

M memories, each a matrix a head. A router sends every token to k of them; what the others hold stays as it is, without
decay, so that memories do not overwrite each other. One more memory that sees every token is shared. Of an input x_t:

    p = softmax(W_g x_t)        T = the k memories of largest p        w_m = p_m / sum_{n in T} p_n
    q, k, v = silu(conv(W_q x)), silu(conv(W_k^m x)), silu(conv(W_v^m x))           over the tokens of memory m alone
    S_m <- rule(S_m; k, v, gates^m(x_t))        o_m = scale S_m' q                  for m in T
    out = W_o (norm(sum_{m in T} w_m o_m + o_shared) silu(W_z x_t))                 the norm of each head

(Section 3 of the paper, and its authors' code for what it leaves open.) W_q, the convolutions, the norm, W_z, W_o and
what a rule shares serve all memories; W_k, W_v and the maps of the gates are each memory's own. To a memory its tokens
are one contiguous sequence, and the convolutions are no exception. The shared memory is number M, and its weight is 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from longwave.kernels.linear_attention import linear_attention
from longwave.kernels.partition import Axes, sharded
from longwave.kernels.short_conv import short_conv
from longwave.layers.balance import Balance
from longwave.layers.heads import HeadNorm, join, split
from longwave.layers.linear import torch_uniform
from longwave.layers.mamba import at_least_one, unpadded
from longwave.layers.memory_rules import GatedDelta, Written, small_xavier
from longwave.layers.mixer import Carry, Context, Mixer, Out
from longwave.layers.mom_routing import Frame, lay_out, run_chunk

SLICES = ("q", "k", "v")  # that are convolved


class MoM(Mixer):
    """Mixture of memories.

    M, k:   memories that are routed to; how many of them a token goes to.
    shared: one more memory that sees every token.
    heads, P: of each memory; key dimensions of a head.      expand_v: value dimensions of a head for each of these.
    rule:   how a memory is written, a constructor of memory_rules.
    single_kv_proj: one W_k, W_v and set of gates for all memories, the shared one too.
    conv:   taps of the convolutions, the token itself included; at least 2.
    norm_eps: of the norm before the gate.

    The carry is float32: "conv", the last inputs of the convolutions, (b, memories, conv - 1, ...) each of "q", "k" and
    "v", and "S" (b, memories, heads, P, expand_v P); the shared memory is the last of M + 1. A document leaves nothing
    in memories that it did not visit.

    aux: "balance", a `Balance`.
    """

    roles: ClassVar[dict[str, str]] = {"W_k": "weight", "W_v": "weight", **{f"conv_{s}": "kernel" for s in SLICES}}

    def __init__(
        self,
        width: int,
        *,
        M: int = 4,
        k: int = 2,
        shared: bool = True,
        heads: int = 4,
        P: int = 256,
        expand_v: float = 1,
        rule: Callable[..., Any] = GatedDelta,
        single_kv_proj: bool = False,
        conv: int = 4,
        norm_eps: float = 1e-5,
        rngs: nnx.Rngs,
    ):
        at_least_one(self, M=M, k=k, heads=heads, P=P)
        if k > M:
            raise ValueError(f"MoM.k = {k} must be at most MoM.M = {M}")
        if conv < 2:
            raise ValueError(f"MoM.conv = {conv} must be at least 2")
        V = round(expand_v * P)
        if V < 1 or expand_v * P != V:
            raise ValueError(f"MoM.expand_v = {expand_v} times MoM.P = {P} must be a whole number of at least 1")
        self.M, self.k, self.shared, self.heads, self.P, self.V, self.taps = M, k, shared, heads, P, V, conv
        sets = 1 if single_kv_proj else self.memories
        self.router = _linear(width, M, rngs=rngs)
        self.W_q = _linear(width, heads * P, rngs=rngs)
        self.W_k = nnx.Param(small_xavier(rngs, sets, width, heads * P))
        self.W_v = nnx.Param(small_xavier(rngs, sets, width, heads * V))
        for name, size in self._widths.items():
            setattr(self, f"conv_{name}", nnx.Param(torch_uniform(rngs.params(), (conv, size), fan_in=conv)))
        self.rule = rule(width, heads=heads, P=P, sets=sets, rngs=rngs)
        self.W_z = _linear(width, heads * V, rngs=rngs)
        self.norm = HeadNorm(V, eps=norm_eps)
        self.out = _linear(heads * V, width, rngs=rngs)

    @property
    def memories(self) -> int:
        """The shared one included."""
        return self.M + self.shared

    @property
    def _widths(self) -> dict[str, int]:
        return {"q": self.heads * self.P, "k": self.heads * self.P, "v": self.heads * self.V}

    def init_carry(self, batch: int, *, capacity: int | None = None) -> Carry:
        """Zeros. Nothing depends on capacity."""
        zeros = lambda *shape: jnp.zeros((batch, self.memories, *shape), jnp.float32)
        return {
            "conv": {name: zeros(self.taps - 1, size) for name, size in self._widths.items()},
            "S": zeros(self.heads, self.P, self.V),
        }

    def __call__(self, x: Float[Array, "b t d"], carry: Carry | None = None, ctx: Context = Context()) -> Out:
        u = unpadded(x, ctx)
        axes = dataclasses.replace(ctx.axes, seq=None)  # memories put tokens in another order than that of time
        ways, weight, balance = self.route(u, ctx.valid, axes)
        W = {"k": self.W_k[...], "v": self.W_v[...]}
        # All memories' maps of all tokens: matmuls without a mask, which split over devices as any other does. Of q
        # there is one a token, and not one for each of its memories.
        slices = {"q": self.W_q(u), **{s: jnp.einsum("btd,sdf->btsf", u, W[s]) for s in W}}
        mix = self._mix_token if x.shape[1] == 1 else self._mix_frame
        o, carry = mix(slices, self.rule.gates(u), ways, weight, carry, ctx, axes)
        y = self.out(join(self.norm(o)) * jax.nn.silu(self.W_z(u)))
        return Out(unpadded(y, ctx), carry, {"balance": balance})

    def route(
        self, x: Float[Array, "b t d"], valid: Bool[Array, "b t"] | None, axes: Axes = Axes()
    ) -> tuple[Int[Array, "b t k"], Float[Array, "b t m"], Balance]:
        """(the memories of every token, the shared one last; the weight of each memory, 0 where a token does not go;
        sums for the balance loss). Of equal probabilities the memory of lower number is taken."""
        W = self.router.kernel[...].astype(jnp.float32)
        p = jax.nn.softmax(jnp.einsum("btd,dm->btm", x.astype(jnp.float32), W, precision="highest"))
        # XLA itself would gather the batch for it.
        ways = sharded(lambda p: jax.lax.top_k(p, self.k)[1], axes, ("bt.",), "bt.")(p)
        goes = (ways[..., None] == jnp.arange(self.M)[None, None, None]).any(2)
        weight = jnp.where(goes, p, 0)
        weight = weight / weight.sum(-1, keepdims=True)
        counted = jnp.ones(x.shape[:2]) if valid is None else valid.astype(jnp.float32)
        over_tokens = lambda v: jnp.einsum("btm,bt->m", v.astype(jnp.float32), counted, precision="highest")
        balance = Balance(over_tokens(goes), over_tokens(p), counted.sum())
        if self.shared:
            ways = jnp.pad(ways, ((0, 0), (0, 0), (0, 1)), constant_values=self.M)
            weight = jnp.pad(weight, ((0, 0), (0, 0), (0, 1)), constant_values=1.0)
        return ways, weight, balance

    def _mix_frame(
        self,
        slices: dict[str, Array],
        gates: Sequence[Array],
        ways: Int[Array, "b t k"],
        weight: Float[Array, "b t m"],
        carry: Carry | None,
        ctx: Context,
        axes: Axes,
    ) -> tuple[Float[Array, "b t h v"], Carry]:
        """A memory's tokens side by side."""
        chunk = run_chunk(ways.shape[1], ways.shape[2], self.memories)
        frame = lay_out(ways, self.memories, tail=self.taps - 1, chunk=chunk, reset=ctx.reset, valid=ctx.valid)
        tails: dict[str, Any] = dict.fromkeys(SLICES) if carry is None else carry["conv"]
        rows = {s: _in_frame(frame, x, tails[s]) for s, x in slices.items()}
        # Padding is zero, and what the taps make of it is not read.
        q, k, v = self._convolved(rows, dict.fromkeys(SLICES), axes, reset=frame.reset)[0]
        written = self.rule(q, k, *(_in_frame(frame, gate) for gate in gates))
        state = self.init_carry(len(ways))["S"] if carry is None else carry["S"]
        o, S = self._recurred(
            written, v, state, axes, reset=frame.reset, valid=frame.valid, segment_ids=frame.memory, chunk=chunk
        )
        o = (o * frame.of_pairs(weight[..., None])[..., None]).astype(o.dtype)
        o = split(frame.summed(join(o)), self.heads)
        if (forgotten := frame.forgotten()) is not None:
            S = jnp.where(forgotten[..., None, None, None], 0, S)
        conv = {s: frame.tails(x).astype(jnp.float32) for s, x in rows.items()}
        return o, {"conv": conv, "S": S}

    def _mix_token(
        self,
        slices: dict[str, Array],
        gates: Sequence[Array],
        ways: Int[Array, "b 1 k"],
        weight: Float[Array, "b 1 m"],
        carry: Carry | None,
        ctx: Context,
        axes: Axes,
    ) -> tuple[Float[Array, "b 1 h v"], Carry]:
        """The memories of one token as rows of a batch."""
        (b, _, n), ways = ways.shape, ways[:, 0]
        carry = self.init_carry(b) if carry is None else carry
        if ctx.reset is not None:
            restart = ctx.reset if ctx.valid is None else ctx.reset & ctx.valid
            carry = jax.tree.map(lambda c: jnp.where(restart.reshape(b, *(1,) * (c.ndim - 1)), 0, c), carry)
        chosen = lambda x: jax.vmap(lambda x, i: x[i])(x, ways).reshape(b * n, *x.shape[2:])
        repeated = lambda x: jnp.repeat(x, n, axis=0)
        of_memory = lambda x: repeated(x.reshape(b, 1, -1)) if _once(x) else chosen(x[:, 0])[:, None]
        masks = {"valid": None if ctx.valid is None else repeated(ctx.valid)}
        rows = {s: of_memory(x) for s, x in slices.items()}
        (q, k, v), conv = self._convolved(rows, jax.tree.map(chosen, carry["conv"]), axes, **masks)
        written = self.rule(q, k, *map(of_memory, gates))
        o, S = self._recurred(written, v, chosen(carry["S"]), axes, **masks)
        o = (o * chosen(weight[:, 0])[:, None, None, None]).reshape(b, n, self.heads, self.V).sum(1, keepdims=True)
        put = jax.vmap(lambda c, i, new: c.at[i].set(new))
        new = jax.tree.map(lambda c, r: put(c, ways, r.reshape(b, n, *c.shape[2:])), carry, {"conv": conv, "S": S})
        return o.astype(v.dtype), new

    def _convolved(
        self, rows: dict[str, Float[Array, "b t f"]], states: dict[str, Array | None], axes: Axes, **masks: Any
    ) -> tuple[list[Float[Array, "b t h p"]], dict[str, Array]]:
        """q, k and v by heads, and the last inputs of their convolutions."""
        heads, last = [], {}
        for s in SLICES:
            y, last[s] = short_conv(rows[s], getattr(self, f"conv_{s}")[...], state=states[s], axes=axes, **masks)
            heads.append(split(jax.nn.silu(y), self.heads))
        return heads, last

    def _recurred(
        self, x: Written, v: Float[Array, "b t h v"], state: Array, axes: Axes, **runs: Any
    ) -> tuple[Float[Array, "b t h v"], Array]:
        return linear_attention(
            x.q, x.k, v, x.g, w=x.w, beta=x.beta, scale=self.rule.scale, state=state, axes=axes, **runs
        )


def _in_frame(frame: Frame, x: Float[Array, "b t *m f"], tails: Array | None = None) -> Float[Array, "b s f"]:
    """What a token has once, or by memory, in its slots."""
    return frame.of_tokens(x.reshape(*x.shape[:2], -1), tails) if _once(x) else frame.of_pairs(x, tails)


def _once(x: Float[Array, "b t *m f"]) -> bool:
    return x.ndim == 3 or x.shape[2] == 1


def _linear(width_in: int, width_out: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    init = lambda key, *_, **__: small_xavier(nnx.Rngs(key), 1, width_in, width_out)[0]
    return nnx.Linear(width_in, width_out, use_bias=False, kernel_init=init, rngs=rngs)
