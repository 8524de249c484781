"""How faithfully a language model keeps what it reads: ETMF and ECLMF (MemMamba, arXiv:2510.03279, Appendix A.2).

    ETMF     mean over tokens of cos(E[x_j], t_i)        t_i = sum_v softmax(logits_i / τ)_v E[v]
    ECLMF_G  mean over l of 1 - |Y - X W| / (|X| + 1e-6)     W = (X'X + λ I)^-1 X'Y,  X, Y: states of layers l and l + G

E is the table of embeddings; a state is the output of a block, one row a token. ETMF takes i = j, or i = j + Δ: how
much of a token is left Δ tokens later. As logits speak of the next token, i = j - 1 stands beside: it measures
prediction. The denominator of ECLMF is |X|, not |Y|: it may be negative, and R² (of Y around its mean) stands beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from longwave.layers.mixer import Context, Mixer, Out
from longwave.models.backbone import Backbone, Block
from longwave.models.language_model import LanguageModel

PIECE = 512  # tokens whose logits exist at a time


def fidelity(
    model: LanguageModel,
    ids: Int[np.ndarray, "b t"],
    *,
    valid: Bool[np.ndarray, "b t"] | None = None,
    distances: Sequence[int] = (8, 16, 32),
    gaps: Sequence[int] = (2, 5, 10),
    temperature: float = 1.0,
) -> dict[str, float]:
    """Every metric of a model on some text, by name: ETMF, ETMF next, ETMF 8, ..., ECLMF 2, R2 2, ...

    valid: false on padding. Distances as long as the text and gaps as deep as the model are left out.
    """
    backbone: Any = model.backbone
    states, y = _run(recorded(backbone), ids, Context(valid=None if valid is None else jnp.asarray(valid)))
    table = backbone.encoder.embedding[...]
    parts = [reconstruct(model, y[:, i : i + PIECE], table, temperature) for i in range(0, ids.shape[1], PIECE)]
    read, told = np.asarray(table[ids]), np.concatenate(parts, axis=1)
    shifts = {"ETMF": 0, "ETMF next": -1} | {f"ETMF {d}": d for d in distances if d < ids.shape[1]}
    result = {name: etmf(read, told, shift=shift, valid=valid) for name, shift in shifts.items()}
    for gap in gaps:
        if gap < len(states):
            result[f"ECLMF {gap}"], result[f"R2 {gap}"] = eclmf(states, gap=gap, valid=valid)
    return result


def etmf(
    read: Float[np.ndarray, "b t d"],
    told: Float[np.ndarray, "b t d"],
    *,
    shift: int = 0,
    valid: Bool[np.ndarray, "b t"] | None = None,
) -> float:
    """Mean of cos(read_j, told_{j + shift}) over the pairs of which both tokens are valid, in float64."""
    t = read.shape[1]
    if abs(shift) >= t:
        raise ValueError(f"shift = {shift}: expected less than the {t} tokens")
    a, b = np.asarray(read, np.float64)[:, max(-shift, 0) : t - max(shift, 0)], np.asarray(told, np.float64)
    b = b[:, max(shift, 0) : t - max(-shift, 0)]
    cos = np.sum(a * b, -1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-12)
    if valid is None:
        return float(np.mean(cos))
    both = valid[:, max(-shift, 0) : t - max(shift, 0)] & valid[:, max(shift, 0) : t - max(-shift, 0)]
    return float(np.mean(cos[both]))


def eclmf(
    states: Sequence[Float[np.ndarray, "b t d"]],
    *,
    gap: int,
    valid: Bool[np.ndarray, "b t"] | None = None,
    ridge: float = 1e-4,
) -> tuple[float, float]:
    """(ECLMF_gap, R²), each the mean over all pairs of layers so far apart, in float64."""
    if not 0 < gap < len(states):
        raise ValueError(f"gap = {gap}: expected 1 to {len(states) - 1}, as there are {len(states)} layers")
    keep = np.ones(states[0].shape[:2], bool) if valid is None else valid
    rows = lambda state: np.asarray(state, np.float64)[keep]
    norm = np.linalg.norm
    scores = []
    for lower, upper in zip(states[:-gap], states[gap:], strict=True):
        X, Y = rows(lower), rows(upper)
        left = Y - X @ np.linalg.solve(X.T @ X + ridge * np.eye(X.shape[1]), X.T @ Y)
        scores.append((1 - norm(left) / (norm(X) + 1e-6), 1 - norm(left) ** 2 / norm(Y - Y.mean(0)) ** 2))
    score, r2 = np.mean(scores, axis=0)
    return float(score), float(r2)


@jax.jit
def reconstruct(
    model: LanguageModel, y: Float[Array, "b t d"], table: Float[Array, "v d"], temperature: float = 1.0
) -> Float[Array, "b t d"]:
    """The mean embedding of what the model expects, from its backbone's result."""
    return jax.nn.softmax(model.logits(y) / temperature, axis=-1) @ table


class Recorded(nnx.Module):
    """A block whose side outputs also hold its result."""

    def __init__(self, block: Block):
        self.block = block

    @property
    def mixer(self) -> Mixer:
        return self.block.mixer

    def __call__(self, *inputs: Any) -> Out:
        out = self.block(*inputs)
        return out._replace(aux={**out.aux, "output": out.y})


def recorded(backbone: Backbone) -> Backbone:
    """The same backbone, its layers unrolled, with aux[l]["output"] the result of block l."""
    copy: Any = nnx.merge(*nnx.split(backbone))
    blocks = list(copy.layers)
    if copy.scan:
        repeats = copy.depth // len(blocks)
        blocks = [jax.tree.map(lambda v, r=r: v[r], block) for r in range(repeats) for block in blocks]
    copy.layers, copy.scan = nnx.List([Recorded(block) for block in blocks]), False
    return copy


@jax.jit
def _run(backbone: Backbone, ids: Array, ctx: Context) -> tuple[list[Array], Array]:
    y, _, aux, _ = backbone(ids, None, ctx)
    return [layer["output"] for layer in aux], y
