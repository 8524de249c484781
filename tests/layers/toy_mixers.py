"""Small honest mixers that the contract suite is tried on, in parts that a test can break one at a time."""

import jax
import jax.numpy as jnp
from flax import nnx

from longwave.layers.align import frame_length, from_frame, to_frame
from longwave.layers.mixer import Context, Mixer, Out, Unsupported


def flags(x, ctx):
    """reset and valid as (b, t) arrays, whether given or not."""
    no = jnp.zeros(x.shape[:2], bool)
    return (no if ctx.reset is None else ctx.reset), (~no if ctx.valid is None else ctx.valid)


class Leaky(Mixer):
    """h_t = a_t h_{t-1} + B x_t with a_t = sigmoid(G x_t), y_t = C tanh(h_t) + D x_t."""

    roles = {"B": "B", "G": "gate", "C": "C", "D": "D"}

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(width**-0.5)
        self.width = width
        self.B = nnx.Param(normal(rngs.params(), (width, width)))
        self.G = nnx.Param(normal(rngs.params(), (width, width)))
        self.C = nnx.Param(normal(rngs.params(), (width, width)))
        self.D = nnx.Param(jnp.ones(width))

    def init_carry(self, batch, *, capacity=None):
        return jnp.zeros((batch, self.width), jnp.float32)

    def inputs(self, x, valid):
        return jnp.where(valid[..., None], x, 0)

    def step(self, h, inputs):
        """One token: a, u (b, d) are the gate and the input, reset and valid (b,)."""
        a, u, reset, valid = inputs
        new = jnp.where(reset[:, None], 0, a * h) + u
        return self.write(h, new, valid)

    def write(self, h, new, valid):
        h = jnp.where(valid[:, None], new, h)
        return h, h

    def mix(self, x, h0, reset, valid):
        a = jax.nn.sigmoid(x @ self.G[...]).astype(jnp.float32)
        u = (x @ self.B[...]).astype(jnp.float32)
        over_time = jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), (a, u, reset, valid))
        h, hs = jax.lax.scan(self.step, h0, over_time)
        return h, jnp.swapaxes(hs, 0, 1)

    def outputs(self, h, x, valid):
        y = jnp.tanh(h).astype(x.dtype) @ self.C[...] + x * self.D[...][None, None, :]
        return jnp.where(valid[..., None], y, 0)

    def __call__(self, x, carry=None, ctx=Context()):
        reset, valid = flags(x, ctx)
        x = self.inputs(x, valid)
        h, hs = self.mix(x, self.init_carry(x.shape[0]) if carry is None else carry, reset, valid)
        return Out(self.outputs(hs, x, valid), h, {})


class ChunkMemory(Mixer):
    """Every chunk of c tokens reads what the chunks before it left: y_t = S_{k-1} C + x_t D in chunk k.

    S_k = a S_{k-1} + mean of chunk k, written when the chunk is full. The carry holds S, the tokens of the
    unfinished chunk and their number, per row.
    """

    chunk = 4
    roles = {"a": "A", "C": "C", "D": "weight"}

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(width**-0.5)
        self.width = width
        self.a = nnx.Param(jnp.full(width, 0.7))
        self.C = nnx.Param(normal(rngs.params(), (width, width)))
        self.D = nnx.Param(normal(rngs.params(), (width, width)))

    def init_carry(self, batch, *, capacity=None):
        zeros = lambda *shape: jnp.zeros((batch, *shape), jnp.float32)
        return {
            "S": zeros(self.width),
            "open": zeros(self.chunk, self.width),
            "count": jnp.zeros(batch, jnp.int32),
        }

    def __call__(self, x, carry=None, ctx=Context()):
        b, t, d = x.shape
        c = self.chunk
        carry = self.init_carry(b) if carry is None else carry
        reset, valid = flags(x, ctx)
        count, length = carry["count"], frame_length(t, c)
        frame, _ = to_frame(x.astype(jnp.float32), valid, count, length)
        frame = frame.at[:, :c].add(carry["open"])  # slots from count on are zero there
        resets, _ = to_frame(reset, valid, count, length)
        chunks = frame.reshape(b, length // c, c, d)
        forget = resets.reshape(b, length // c, c)[:, :, 0]
        total = count + jnp.sum(valid, axis=1, dtype=jnp.int32)
        full = (jnp.arange(length // c)[None, :] + 1) * c <= total[:, None]

        def step(S, inputs):
            chunk, forget, full = inputs
            S = jnp.where(forget[:, None], 0, S)
            new = self.a[...].astype(jnp.float32)[None, :] * S + jnp.mean(chunk, axis=1)
            return jnp.where(full[:, None], new, S), S

        S, read = jax.lax.scan(step, carry["S"], jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), (chunks, forget, full)))
        slots = jnp.repeat(jnp.swapaxes(read, 0, 1), c, axis=1)
        memory = from_frame(slots, valid, count, t).astype(x.dtype)
        x = jnp.where(valid[..., None], x, 0)
        y = memory @ self.C[...] + x @ self.D[...]
        last = jnp.minimum(total // c, length // c - 1)[:, None, None, None]
        left = (total % c)[:, None, None] > jnp.arange(c)[None, :, None]
        unfinished = jnp.where(left, jnp.take_along_axis(chunks, last, axis=1)[:, 0], 0)
        return Out(y, {"S": S, "open": unfinished, "count": total % c}, {})


class Smoother(Mixer):
    """Not causal: the mean over the valid tokens of the document, gated by the token. Supports packing."""

    supports = frozenset({"reset"})
    roles = {"C": "C"}

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.C = nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (width, width)))

    def __call__(self, x, carry=None, ctx=Context()):
        if carry is not None:
            raise Unsupported(self, "carry", "it reads later tokens")
        reset, valid = flags(x, ctx)
        x = jnp.where(valid[..., None], x, 0)
        document = jnp.cumsum(reset, axis=1)
        same = (document[:, :, None] == document[:, None, :]) & valid[:, None, :] & valid[:, :, None]
        mean = same / jnp.maximum(jnp.sum(same, axis=2, keepdims=True), 1)
        y = jnp.tanh(mean.astype(x.dtype) @ x) @ self.C[...] * jax.nn.sigmoid(x)
        return Out(y, (), {})
