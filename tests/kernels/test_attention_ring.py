"""Time split over devices equals attention in one place: values, gradients, balance, and no gathered keys."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from longwave.kernels.attention import Causal, Mask, Window, attention
from longwave.kernels.attention.mask import Blocks
from longwave.kernels.attention.reference import Coordinates
from longwave.kernels.attention.ring import Ring, _stretches, ring
from longwave.kernels.partition import Axes
from tests.kernels import attention_oracle as oracle

B, T, H, KV, D, DV = 2, 64, 4, 2, 8, 6
AT = Coordinates()


I, J = np.arange(T)[:, None], np.arange(T)[None, :]
CASES = {
    "full": (Mask(), J <= T),
    "causal": (Causal(), J <= I),
    "window": (Causal() & Window(9), (J <= I) & (I - J < 9)),
    "two-sided window": (Window(5), abs(I - J) < 5),
    "documents": (Causal(), J <= I),
    "documents at positions of their own": (Causal(), J <= I),
}


@pytest.mark.parametrize(("name", "backend"), [*((name, "auto") for name in CASES), ("causal", "reference")])
def test_ring_equals_the_oracle(name, backend):
    mask, see = CASES[name]
    x, ids = oracle.inputs(B, T, T, H, KV, D, DV), {}
    if name.startswith("documents"):  # the second row ends in padding
        segment = np.array([[0] * 30 + [1] * 34, [0] * 7 + [1] * 48 + [-1] * 9])
        see, ids["segment_ids"] = oracle.seen(see, segment, segment), jnp.asarray(segment)
    if name.endswith("their own"):
        ids["positions"] = jnp.asarray(np.stack([np.r_[:30, :34], np.r_[:7, :57]]))
    axes = Axes(batch="rows", seq="time")
    form = partial(attention, mask=mask, return_lse=True, axes=axes, backend=backend, **ids)

    @jax.jit
    def run(q, k, v, do, dlse):
        out, pull = jax.vjp(form, q, k, v)
        return *out, *pull((do, dlse))

    with jax.set_mesh(jax.make_mesh((2, 4), ("rows", "time"), axis_types=(AxisType.Auto,) * 2)):
        compiled = run.lower(*x).compile()
        got = oracle.Results(*compiled(*x))
    oracle.check(got, oracle.attention(x, see, scale=D**-0.5))
    assert "all-gather(" not in compiled.as_text()


@pytest.mark.parametrize(
    ("mask", "start", "steps", "zigzag"),
    [
        (Mask(), 0, 8, False),
        (Causal(), 0, 8, True),
        (Causal() & Window(9), 0, 2, False),  # one's own share, and the one before
        (Causal() & Window(10), 0, 3, False),  # a share is 8 tokens: the first sees 9 back, into the second before
        (Window(9), 7, 3, False),  # and the one behind
        (Blocks(8), 0, 1, False),
    ],
    ids=str,
)
def test_steps_in_which_nobody_sees_anything_are_left_out(mask, start, steps, zigzag):
    assert ring("t", 8, mask, AT, AT, 64, 64)[2:] == (start, steps, zigzag)


def test_lengths_that_devices_do_not_divide_are_named():
    mesh = jax.make_mesh((8,), ("time",), axis_types=(AxisType.Auto,))
    x = jnp.zeros((1, 36, 1, 8))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="8 devices along 'time' must divide 36 queries and 36"):
        attention(x, x, x, axes=Axes(seq="time"))


@pytest.mark.parametrize("n", [2, 4, 7])
def test_every_device_has_the_same_causal_work_in_every_step(n):
    """Stretches as they are traded, one token each: visible pairs of each device and step differ by one at most."""
    owner = {2 * i + half: j for half, pairs in enumerate(_stretches(Ring("t", n, 0, n, True))) for i, j in pairs}
    held = [[c for c in owner if owner[c] == i] for i in range(n)]
    assert all(len(stretches) == 2 for stretches in held)
    work = [[sum(k <= q for q in held[i] for k in held[(i - s) % n]) for s in range(n)] for i in range(n)]
    assert np.ptp(np.array(work)[:, 1:]) == 0
    assert {row[0] for row in work} == {3}  # its own: one stretch whole and both diagonals
    contiguous = [
        [sum(k <= q for q in (2 * i, 2 * i + 1) for k in (2 * j, 2 * j + 1)) for j in range(n)] for i in range(n)
    ]
    assert np.ptp(contiguous) == 4
