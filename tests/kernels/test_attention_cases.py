"""Every form of attention against the float64 oracle: each pair of lengths, widths, heads, masks and options."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longwave.kernels.attention import flash, pallas_tpu
from longwave.kernels.attention.mask import (
    Blocks,
    BlockSparse,
    Butterfly,
    Causal,
    ChunkSummary,
    Global,
    Mask,
    Prefix,
    Sinks,
    Window,
)
from longwave.kernels.attention.reference import Coordinates, Scores
from tests.kernels import attention_oracle as oracle

TPU = flash.Form(pallas_tpu.forward, pallas_tpu.backward)  # interpreted on a CPU
FORMS = {"chunked": flash.Forms(), "pallas_tpu": flash.Forms(default=TPU)}
LAYOUT = np.random.default_rng(3).random((9, 9)) < 0.5
LAYOUT[0, 0] = True
one_bit = lambda x: np.isin(x, [0, *(1 << np.arange(20))])

# Name -> family, mask, and what a query at i sees at j, by other means.
MASKS = {
    "all": ("all", Mask(), lambda i, j: i == i),
    "causal": ("causal", Causal(), lambda i, j: j <= i),
    "causal, behind": ("causal", Causal(-3), lambda i, j: i - j >= 3),
    "chunks before": ("causal", ChunkSummary(3), lambda i, j: j < i // 3),
    "window": ("window", Causal() & Window(40), lambda i, j: (i - j >= 0) & (i - j < 40)),
    "two-sided window": ("window", Window(9, 30), lambda i, j: (i - j <= 8) & (j - i <= 30)),
    "window and sinks": (
        "window",
        Causal() & (Window(50) | Sinks(4)),
        lambda i, j: (j <= i) & ((i - j < 50) | (j < 4)),
    ),
    "prefix": ("prefix", Causal() | Prefix(20), lambda i, j: (j <= i) | (j < 20)),
    "blocks": ("blocks", Causal() & Blocks(48), lambda i, j: (j <= i) & (i // 48 == j // 48)),
    "table": ("blocks", BlockSparse(LAYOUT, 128), lambda i, j: LAYOUT[i // 128, j // 128]),
    "table or causal window": (
        "blocks",
        BlockSparse(LAYOUT, 128) & Causal() | Window(9),
        lambda i, j: (LAYOUT[i // 128, j // 128] & (j <= i)) | (abs(i - j) < 9),
    ),
    "butterfly": ("blocks", Butterfly(32), lambda i, j: one_bit(i // 32 ^ j // 32)),
    "butterfly, global": (
        "blocks",
        Butterfly(16, 2) | Global(10),
        lambda i, j: np.isin(i // 16 ^ j // 16, [0, 1, 2]) | (i < 10) | (j < 10),
    ),
}


class Case(NamedTuple):
    """heads: query heads of a key head. at: where tokens stand; see `places`."""

    tq: int
    tk: int
    d: int
    dv: int
    heads: int
    mask: str
    softcap: float | None
    at: str
    dlse: bool
    dtype: str

    def __str__(self):
        return "-".join(map(str, self))


# fmt: off
CASES = [
    Case(1, 7, 8, 16, 1, "all", None, "", True, "float32"),
    Case(1, 1000, 64, 64, 4, "causal", 2.0, "cache", False, "bfloat16"),
    Case(1, 1, 80, 40, 8, "window", 2.0, "documents", False, "float32"),
    Case(1, 129, 128, 128, 4, "prefix", None, "documents", True, "bfloat16"),
    Case(1, 1, 256, 256, 1, "butterfly", None, "cache", True, "float32"),
    Case(7, 127, 8, 8, 8, "causal, behind", 2.0, "", False, "bfloat16"),
    Case(7, 1, 64, 32, 8, "two-sided window", None, "cache", True, "float32"),
    Case(7, 7, 80, 64, 1, "prefix", 2.0, "", True, "bfloat16"),
    Case(7, 1, 128, 64, 4, "table", 2.0, "documents", False, "float32"),
    Case(7, 1, 256, 256, 1, "all", 2.0, "documents", False, "bfloat16"),
    Case(127, 1000, 8, 8, 4, "window and sinks", None, "cache", False, "bfloat16"),
    Case(127, 7, 64, 128, 4, "prefix", 2.0, "", False, "float32"),
    Case(127, 128, 80, 80, 1, "blocks", None, "", True, "bfloat16"),
    Case(127, 127, 128, 256, 8, "all", 2.0, "cache", True, "float32"),
    Case(127, 129, 256, 128, 4, "causal", None, "documents", True, "float32"),
    Case(128, 128, 8, 24, 4, "prefix", 2.0, "documents", False, "bfloat16"),
    Case(128, 1000, 64, 64, 1, "table or causal window", None, "", True, "float32"),
    Case(128, 127, 80, 128, 4, "all", None, "cache", True, "bfloat16"),
    Case(128, 128, 128, 128, 1, "chunks before", 2.0, "", False, "bfloat16"),
    Case(128, 7, 256, 256, 8, "two-sided window", None, "", False, "bfloat16"),
    Case(129, 128, 8, 8, 8, "butterfly, global", 2.0, "documents", True, "float32"),
    Case(129, 129, 64, 80, 1, "all", None, "", True, "bfloat16"),
    Case(129, 129, 80, 80, 4, "causal", None, "cache", False, "bfloat16"),
    Case(129, 1000, 128, 128, 1, "window", 2.0, "cache", False, "float32"),
    Case(129, 256, 256, 256, 8, "prefix", 2.0, "cache", False, "float32"),
    Case(1000, 127, 8, 16, 8, "all", None, "", False, "bfloat16"),
    Case(1000, 1000, 64, 64, 1, "causal", 2.0, "documents", True, "float32"),
    Case(1000, 1027, 80, 80, 4, "window and sinks", 2.0, "cache", False, "bfloat16"),
    Case(1000, 129, 128, 64, 1, "prefix", None, "", True, "bfloat16"),
    Case(1000, 129, 256, 256, 1, "table", 2.0, "documents", False, "bfloat16"),
]
# fmt: on
SOON = (12, 20, 23)  # of the default suite


def kinds(case: Case) -> dict[str, object]:
    """What the cover counts: in the table these stand as numbers."""
    return case._asdict() | {
        "tk": case.tk == case.tq,
        "dv": case.dv == case.d,
        "mask": MASKS[case.mask][0],
        "softcap": case.softcap is None,
    }


def test_the_cases_cover_each_pair_of_kinds():
    rows = [kinds(case) for case in CASES]
    for x, y in itertools.combinations(rows[0], 2):
        found = {(row[x], row[y]) for row in rows}
        wanted = set(itertools.product(*({row[name] for row in rows} for name in (x, y))))
        assert found == wanted, f"{x} and {y} never meet as {wanted - found}"
    assert {row["tq"] for row in rows} == {1, 7, 127, 128, 129, 1000}
    assert {row["d"] for row in rows} == {8, 64, 80, 128, 256}
    assert {row["heads"] for row in rows} == {1, 4, 8}
    assert {case.mask for case in CASES} == MASKS.keys()


def places(at: str, b: int, tq: int, tk: int) -> tuple[Coordinates, Coordinates]:
    """documents: three in a row, the first rows padded left, the others right. cache: keys in any order, some empty."""
    if at == "documents":
        ids = lambda t: (3 * np.arange(t) // t * np.ones((b, 1), int), np.arange(t) < t // 10)
        (q, q_pad), (k, k_pad) = ids(tq), ids(tk)
        q[0, q_pad], k[0, k_pad], q[1:, q_pad[::-1]], k[1:, k_pad[::-1]] = -1, -1, -1, -1
        return Coordinates(None, q), Coordinates(None, k)
    if at == "cache":
        position = np.stack([np.random.default_rng(row).permutation(tk) for row in range(b)])
        start = tk // 2 * np.ones((b, 1), int) // (1 + np.arange(b)[:, None])
        held = Coordinates(position, np.where(position < tk // 2 + 1, 0, -1))
        return Coordinates(start + np.arange(tq), np.zeros((b, tq), int)), held
    return Coordinates(), Coordinates()


def marks(i):
    """Some soon, of the others every second one with the long group."""
    return [] if i in SOON else [pytest.mark.full, *[pytest.mark.large] * (i % 2)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=marks(i)) for i, case in enumerate(CASES)],
)
def test_form_equals_the_oracle(case, form):
    b, kv = (1 if case.tq * case.tk > 2**17 else 2), (2 if case.heads == 1 else 1)
    x = oracle.inputs(b, case.tq, case.tk, case.heads * kv, kv, case.d, case.dv, dtype=case.dtype)
    if not case.dlse:
        x = x._replace(dlse=np.zeros_like(x.dlse))
    q_at, k_at = places(case.at, b, case.tq, case.tk)
    _, mask, sees = MASKS[case.mask]
    i, j = q_at.placed(case.tq).position, k_at.placed(case.tk).position
    see = oracle.seen(sees(np.asarray(i)[..., :, None], np.asarray(j)[..., None, :]), q_at.segment, k_at.segment)

    scores = Scores(mask, case.d**-0.5, case.softcap)
    at = jax.tree.map(jnp.asarray, (q_at, k_at))
    got = oracle.run(lambda q, k, v: flash.attention(FORMS[form], scores, q, k, v, *at), x)
    known = {"scale": scores.scale, "softcap": scores.softcap}
    plain = oracle.attention(x, see, **known, rounded=True) if case.dtype == "bfloat16" else None
    oracle.check(got, oracle.attention(x, see, **known), plain=plain)


def test_the_oracle_differentiates_itself():
    """Its gradients are those of its own o and lse, by central differences."""
    x = oracle.Inputs(*(np.asarray(a, np.float64) for a in oracle.inputs(2, 3, 4, 4, 2, 2, 3)))
    see = np.random.default_rng(1).random((2, 3, 4)) < 0.7
    see[0, 1] = False
    f = lambda x: oracle.attention(x, see, scale=0.7, softcap=1.3)

    def loss(x):
        o, lse = f(x)[:2]
        return np.sum(o * x.do) + np.sum(np.where(see.any(-1)[..., None], lse * x.dlse, 0))

    for name in ("q", "k", "v"):
        a, gradient = getattr(x, name), getattr(f(x), "d" + name)
        for at in np.ndindex(a.shape):
            step = np.zeros_like(a)
            step[at] = 1e-5
            up, down = (loss(x._replace(**{name: a + sign * step})) for sign in (1, -1))
            np.testing.assert_allclose(gradient[at], (up - down) / 2e-5, rtol=1e-6, atol=1e-8)
