"""MemMamba in float64 NumPy, one token after the other with a pool that is a Python list: the specification in code.

`notes_and_reads` follows the equations of layers/memmamba.py for one row of tokens. What is chosen (triggers, pool
function, replacement, fusion) comes as functions of plain numbers, written here a second time.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

POOL_FNS = {
    "pool_max": lambda x: x.max(0),
    "pool_mean": lambda x: x.mean(0),
    "pool_min": lambda x: x.min(0),
    "pool_rms": lambda x: np.sqrt((x**2).mean(0) + 1e-6),
    "pool_softmax": lambda x: (np.exp(x) / np.exp(x).sum(0) * x).sum(0),
}


def fifo(pool, new, k):
    """The pool, summaries in their order, after `new`."""
    return [*pool, new][-k:]


def priority(pool, new, k):
    """Of equal scores the older one, which stands before, stays: `sorted` is stable."""
    best = sorted([*pool, new], key=lambda s: -s["score"])[:k]
    return sorted(best, key=lambda s: s["number"])


def reservoir(draw):
    """Algorithm R; draw(c) is uniform in 0 ... c."""

    def replace(pool, new, k):
        if new["number"] < k:
            return [*pool, {**new, "place": new["number"]}]
        place = draw(new["number"])
        return [{**new, "place": place} if s["place"] == place else s for s in pool]

    return replace


@dataclasses.dataclass
class Settings:
    k: int
    window: int
    heads: int
    note: Callable  # (position, score) -> bool
    read: Callable
    pool_fn: Callable  # (w, n) -> (n,)
    replace: Callable


def attention(p, prefix, x, summaries, scores, heads):
    """One token x (d,) over a list of summaries; 0 over none."""
    if not summaries:
        return np.zeros_like(x)
    S, a = np.stack(summaries), np.asarray(scores)[:, None]
    projected = x @ p[f"{prefix}/W_q"], S @ p[f"{prefix}/W_k"], (a * S) @ p[f"{prefix}/W_v"]
    out = []
    for q, keys, values in zip(*(np.split(v, heads, axis=-1) for v in projected), strict=True):
        logits = keys @ q / np.sqrt(len(q))
        weights = np.exp(logits - logits.max())
        out.append(weights @ values / weights.sum())
    return np.concatenate(out) @ p[f"{prefix}/W_o"]


def notes_and_reads(p, x, below, settings, resets=()):
    """x (t, d) -> c_tok, c_lay (t, d), the summary for upper layers (a list, None for an empty pool) and the pool.

    below: such lists of the lower layers that are read. p: parameters by path.
    """
    s, c_tok, c_lay, peaks = settings, [], [], []
    pool, noted, position, completed = [], [], 0, 0
    for t, token in enumerate(x):
        if t in resets:
            pool, noted, position, completed = [], [], 0, 0
        score = 1 / (1 + np.exp(-(token @ p["scorer/w"] + p["scorer/b"]))) if "scorer/w" in p else 1.0
        held = [entry["summary"] for entry in pool]
        reads = s.read(position, score)
        scores = [entry["score"] for entry in pool]
        c_tok.append(attention(p, "token", token, held if reads else [], scores, s.heads))
        lower = [peaks[t] for peaks in below if peaks[t] is not None]
        c_lay.append(attention(p, "layer", token, lower, [1.0] * len(lower), s.heads) if below else 0 * token)
        peaks.append(np.max(held, axis=0) if held else None)
        if s.note(position, score):
            noted.append((token @ p["W_n"], score))
            if len(noted) == s.window:
                notes, worth = zip(*noted, strict=True)
                new = {"summary": s.pool_fn(np.stack(notes)), "score": max(worth), "number": completed}
                pool, noted, completed = s.replace(pool, new, s.k), [], completed + 1
        position += 1
    return np.stack(c_tok), np.stack(c_lay), peaks, pool


FUSIONS = {
    "Weighted": lambda p, x, tok, lay: x + p["fusion/alpha_tok"] * tok + p["fusion/alpha_lay"] * lay,
    "Residual": lambda p, x, tok, lay: x + tok + lay,
    "Gated": lambda p, x, tok, lay: (
        x + (tok + lay) / (1 + np.exp(-(x @ p["fusion/gate/kernel"] + p["fusion/gate/bias"])))
    ),
    "Product": lambda p, x, tok, lay: x * (1 + tok + lay),
    "Conv1d": lambda p, x, tok, lay: x + convolved(p["fusion/w"], tok + lay),
}


def convolved(w, x):
    padded = np.concatenate([np.zeros((len(w) - 1, x.shape[1])), x])
    return np.stack([(padded[t : t + len(w)] * w).sum(0) for t in range(len(x))])
