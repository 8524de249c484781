"""Softmax attention and its gradients in float64 NumPy, straight from the equations: what every form is held to.

    s = c tanh(scale q k' / c)    p = exp(s) / sum exp(s) over what is seen    o = p v    lse = log sum exp(s)

and, for the loss <do, o> + <dlse, lse>,

    dv = p' do    dp = do v'    ds = p * (dp - sum(p * dp) + dlse) * (1 - (s / c)^2)
    dq = scale ds k    dk = scale ds' q

What is seen is a matrix of bools, made by the caller without the code under test.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tests.tolerances import (
    ATTENTION_FORWARD,
    ATTENTION_GRADIENT,
    BFLOAT16_FACTOR,
    assert_close,
    relative_error,
)


class Inputs(NamedTuple):
    q: Float[Array, "b tq h d"]
    k: Float[Array, "b tk kv d"]
    v: Float[Array, "b tk kv dv"]
    do: Float[Array, "b tq h dv"]
    dlse: Float[Array, "b tq h"]


class Results(NamedTuple):
    o: Float[Array, "b tq h dv"]
    lse: Float[Array, "b tq h"]
    dq: Float[Array, "b tq h d"]
    dk: Float[Array, "b tk kv d"]
    dv: Float[Array, "b tk kv dv"]


def inputs(b: int, tq: int, tk: int, h: int, kv: int, d: int, dv: int, *, dtype="float32", seed: int = 0) -> Inputs:
    """Normal numbers; q, k and v in `dtype`, the gradients in float32."""
    draw = np.random.default_rng(seed).normal
    return Inputs(
        *(draw(size=shape).astype(jnp.dtype(dtype)) for shape in ((b, tq, h, d), (b, tk, kv, d), (b, tk, kv, dv))),
        *(np.float32(draw(size=shape)) for shape in ((b, tq, h, dv), (b, tq, h))),
    )


def seen(
    pairs: Bool[np.ndarray, "*b tq tk"],
    q_segment: Int[np.ndarray, "*b tq"] | None = None,
    k_segment: Int[np.ndarray, "*b tk"] | None = None,
) -> Bool[np.ndarray, "*b tq tk"]:
    """The mask's pairs within a segment, and no key of a negative one."""
    if q_segment is None or k_segment is None:
        return pairs
    q, k = np.asarray(q_segment)[..., :, None], np.asarray(k_segment)[..., None, :]
    return pairs & (q == k) & (k >= 0)


def attention(
    x: Inputs, see: Bool[np.ndarray, "*b tq tk"], *, scale: float, softcap: float | None = None, rounded: bool = False
) -> Results:
    """`rounded`: every array on the way is rounded to bfloat16, as plain attention in bfloat16 would have it."""
    keep = (lambda a: a.astype(jnp.bfloat16).astype(np.float64)) if rounded else (lambda a: a)
    q, k, v, do, dlse = (np.asarray(a, np.float64) for a in x)
    (b, tq, h), kv = q.shape[:3], k.shape[2]
    by_key_head = lambda a: np.moveaxis(a.reshape(b, tq, kv, h // kv, -1), 1, 3)  # (b, kv, g, tq, -1)
    q, do, dlse = map(by_key_head, (q, do, dlse))
    k, v = (np.moveaxis(a, 2, 1)[:, :, None] for a in (k, v))  # (b, kv, 1, tk, -1)
    see = np.broadcast_to(see, (b, *see.shape[-2:]))[:, None, None]

    s = keep(scale * keep(q @ k.mT))
    slope = 1.0
    if softcap is not None:
        s = keep(softcap * keep(np.tanh(s / softcap)))
        slope = keep(1 - (s / softcap) ** 2)
    s = np.where(see, s, -np.inf)
    most = s.max(-1, keepdims=True)
    most = np.where(most == -np.inf, 0.0, most)
    e = keep(np.exp(s - most))
    l = keep(e.sum(-1, keepdims=True))
    p = keep(e / np.where(l == 0, 1.0, l))
    with np.errstate(divide="ignore"):
        lse = most + np.log(l)
    dp = keep(do @ v.mT)
    ds = keep(p * (dp - keep((p * dp).sum(-1, keepdims=True)) + dlse) * slope)

    in_time = lambda a: np.moveaxis(a, 3, 1).reshape(b, tq, h, -1)
    of_keys = lambda a: np.moveaxis(keep(a.sum(2)), 1, 2)  # over the query heads that share a key head
    dq, dk, dv = keep(scale * ds @ k), scale * ds.mT @ q, p.mT @ do
    return Results(in_time(keep(p @ v)), in_time(lse)[..., 0], in_time(dq), of_keys(dk), of_keys(dv))


def compiled(form: Callable[[Array, Array, Array], tuple[Array, Array]]) -> Callable[[Inputs], Results]:
    """o, lse and gradients of a form, in one compiled call.

    The gradient that reaches an lse of -inf is not a number, on purpose: it must not spread.
    """

    @jax.jit
    def f(q, k, v, do, dlse):
        (o, lse), pull = jax.vjp(form, q, k, v)
        return o, lse, *pull((do.astype(o.dtype), jnp.where(lse == -jnp.inf, jnp.nan, dlse)))

    return lambda x: Results(*f(*x))


def run(form: Callable[[Array, Array, Array], tuple[Array, Array]], x: Inputs) -> Results:
    return compiled(form)(x)


def check(got: Results, want: Results, *, plain: Results | None = None) -> None:
    """float32 within the tolerances; with `plain`, bfloat16 within twice the error of plain bfloat16 attention."""
    blind = np.isneginf(want.lse)
    np.testing.assert_array_equal(np.isneginf(got.lse), blind)
    sighted = lambda lse: np.where(blind, 0, lse)
    got, want = got._replace(lse=sighted(got.lse)), want._replace(lse=sighted(want.lse))
    for name, x, y in zip(Results._fields, got, want, strict=True):
        allowed = (ATTENTION_FORWARD if name in ("o", "lse") else ATTENTION_GRADIENT)["float32"]
        if plain is None or name == "lse":
            assert_close(x, y, allowed, name)
            continue
        assert x.dtype == jnp.bfloat16
        assert_close(x, y, max(allowed, BFLOAT16_FACTOR * relative_error(getattr(plain, name), y)), name)
