"""mLSTM: linear attention with exponential gates, whose memory is kept in units of its running maximum.

One token is `reference.step`; more of them run in chunks. The gradient keeps the inputs and the state before every
chunk. The softmax over all earlier tokens of a fixed query (Aaren) is its case q = k = 1, f = None, `plain`.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Bool, Float

from longwave.kernels.mlstm import chunked, reference
from longwave.kernels.mlstm.reference import Inputs, Read, State, empty
from longwave.kernels.partition import Axes, parts, sharded

__all__ = ["State", "empty", "mlstm"]


def mlstm(
    q: Float[Array, "b t h K"],
    k: Float[Array, "b t h K"],
    v: Float[Array, "b t h V"],
    i: Float[Array, "b t h"],
    f: Float[Array, "b t h"] | None = None,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    plain: bool = False,
    state: State | None = None,
    reset: Bool[Array, "b t"] | None = None,
    valid: Bool[Array, "b t"] | None = None,
    axes: Axes = Axes(),
) -> tuple[Float[Array, "b t h V"], State]:
    """(o in the dtype of v, final state in float32) of the xLSTM paper's matrix memory (arXiv:2405.04517, 2.3).

        C_t = sigmoid(f_t) C_{t-1} + exp(i_t) k_t v_t'        n_t = sigmoid(f_t) n_{t-1} + exp(i_t) k_t
        o_t = scale C_t' q_t / max(|scale n_t' q_t|, 1)

    i: what the input gate is the exponential of, any number or -inf (nothing is written).
    f: what the forget gate is the sigmoid of. None: nothing is forgotten. log sigmoid(f) counts as -65536 below that.
    scale: None: K^-0.5.
    eps: added to the denominator in units of exp(m), m the running maximum of the gates. At least 1e-12, as gradients
        divide by its square.
    plain: o_t = C_t' q_t / n_t' q_t, where nothing holds the denominator away from 0 (there, exactly, o is 0).
    state: before the first token; None is `empty`.
    reset: true on the first token of a document: nothing passes between it and the token before.
    valid: false on padding, which neither writes nor is read; there o is 0.
    axes: mesh axes that split batch, heads and time. Devices along those of time exchange a state each.
    """
    inputs = Inputs(q, k, v, i, f, reset, valid)
    if not (plain or eps >= 1e-12):
        raise ValueError(f"mlstm: eps = {eps}; it must be at least 1e-12")
    _check(inputs, state, axes)
    (b, t, h, V), K = v.shape, q.shape[-1]
    read = Read(K**-0.5 if scale is None else scale, eps, plain)
    state = empty(b, h, K, V) if state is None else State(*(x.astype("float32") for x in state))
    if t == 1:
        state, o = reference.step(state, jax.tree.map(lambda x: x[:, 0], inputs), read)
        return o[:, None].astype(v.dtype), state
    axes = axes.for_heads(h)

    def run(inputs: Inputs, state: State) -> tuple[Array, State]:
        if not axes.seq:
            return chunked.attend(inputs, state, read)
        before, final = chunked.handed(inputs, state, axes.seq)
        return chunked.attend(inputs, before, read)[0], final

    by_time = jax.tree.map(lambda x: "bth."[: x.ndim], inputs)
    by_head = jax.tree.map(lambda x: "bh.."[: x.ndim], state)
    return sharded(run, axes, (by_time, by_head), ("bth.", by_head))(inputs, state)


def _check(x: Inputs, state: State | None, axes: Axes) -> None:
    def refuse(field: str, value: object, allowed: object) -> None:
        raise ValueError(f"mlstm: {field} = {value}; it must be {allowed}")

    (b, t, h, V), K = x.v.shape, x.q.shape[-1]
    if t < 1:
        refuse("v.shape", x.v.shape, "of at least one token")
    shapes = {"q": (b, t, h, K), "k": (b, t, h, K), "i": (b, t, h), "f": (b, t, h), "reset": (b, t), "valid": (b, t)}
    for name, shape in shapes.items():
        if (given := getattr(x, name)) is not None and given.shape != shape:
            refuse(f"{name}.shape", given.shape, shape)
    if state is not None:
        for name, shape in {"C": (b, h, K, V), "n": (b, h, K), "m": (b, h)}.items():
            if (given := getattr(state, name)).shape != shape:
                refuse(f"state.{name}.shape", given.shape, shape)
    if t > 1 and t % parts(axes.seq):
        refuse("t", t, f"a multiple of the {parts(axes.seq)} devices along axes.seq = {axes.seq!r}")
