"""MoM token by token in float64 NumPy: a dict of memories, each made when a token first goes to it.

Straight from Section 3 of arXiv:2502.13685 and layers/mom.py's docstring, from the raw parameters by their paths.
"""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(0, x)


def unit(x):
    return x / np.sqrt(np.sum(x**2, -1, keepdims=True) + 1e-6)


# Rules: (parameters, number of the set of maps, x, q (h, P), k (h, P), v (h, V), S (h, P, V)) -> S, o (h, V)


def decay(p, dt):
    return np.exp(-np.exp(p["rule/decay/A_log"]) * softplus(dt + p["rule/decay/dt_bias"]))


def read(S, q):
    return np.einsum("hpv,hp->hv", S, q)


def write(S, k, v):
    return S + np.einsum("hp,hv->hpv", k, v)


def delta_rule(S, q, k, v, beta):
    q, k = unit(q), unit(k)
    S = write(S, k, beta[:, None] * (v - read(S, k)))
    return S, read(S, q) * q.shape[1] ** -0.5


def gated_delta(p, m, x, q, k, v, S):
    S = decay(p, x @ p["rule/W_a"][m])[:, None, None] * S
    return delta_rule(S, q, k, v, sigmoid(x @ p["rule/W_b"][m]))


def delta(p, m, x, q, k, v, S):
    return delta_rule(S, q, k, v, sigmoid(x @ p["rule/W_b"][m]))


def gla(p, m, x, q, k, v, S):
    gate = x @ p["rule/W_1"][m] @ p["rule/W_2"][m] + p["rule/b"][m]
    S = write(sigmoid(gate).reshape(k.shape)[..., None] ** (1 / 16) * S, k, v)
    return S, read(S, q) * q.shape[1] ** -0.5


def linear(p, m, x, q, k, v, S):
    S = write(S, k, v)
    return S, read(S, q) * q.shape[1] ** -0.5


def retention(p, m, x, q, k, v, S):
    S = write((1 - 2.0 ** (-5 - np.arange(len(k))))[:, None, None] * S, k, v)
    return S, read(S, q) * q.shape[1] ** -0.5


def mamba2(p, m, x, q, k, v, S):
    dt = x @ p["rule/W_dt"][m]
    S = write(decay(p, dt)[:, None, None] * S, k, softplus(dt + p["rule/decay/dt_bias"])[:, None] * v)
    return S, read(S, q)


class Memory:
    def __init__(self, p, heads):
        self.seen = {s: [np.zeros(p[f"conv_{s}"].shape[1])] * (len(p[f"conv_{s}"]) - 1) for s in "qkv"}
        self.S = np.zeros((heads, p["conv_q"].shape[1] // heads, p["conv_v"].shape[1] // heads))

    def convolved(self, p, s, x):
        w = p[f"conv_{s}"]
        window = [*self.seen[s], x]
        self.seen[s] = window[1:]
        return silu(sum(w[j] * window[j] for j in range(len(w)))).reshape(len(self.S), -1)


def oracle_of(rule, *, heads, k, shared=True):
    """(parameters, x (b, t, d), reset, valid) -> y, and the carry behind it."""

    def row(p, u, reset, valid):
        y, memories = np.zeros((len(u), p["out/kernel"].shape[1])), {}
        for t, x in enumerate(u):
            if not valid[t]:
                continue
            if reset[t]:
                memories = {}
            scores = np.exp(x @ p["router/kernel"])
            scores = scores / scores.sum()
            chosen = sorted(range(len(scores)), key=lambda m: (-scores[m], m))[:k]
            weights = {m: scores[m] / sum(scores[n] for n in chosen) for m in chosen}
            if shared:
                weights[len(scores)] = 1.0
            o = 0
            for m, weight in weights.items():
                memory = memories.setdefault(m, Memory(p, heads))
                own = m if len(p["W_k"]) > 1 else 0
                q = memory.convolved(p, "q", x @ p["W_q/kernel"])
                key, v = (memory.convolved(p, s, x @ p[f"W_{s}"][own]) for s in "kv")
                memory.S, read = rule(p, own, x, q, key, v, memory.S)
                o = o + weight * read
            o = o / np.sqrt(np.mean(o**2, -1, keepdims=True) + 1e-5) * p["norm/scale"]
            y[t] = (o.ravel() * silu(x @ p["W_z/kernel"])) @ p["out/kernel"]
        count = p["router/kernel"].shape[1] + shared
        memories = [memories.get(m, Memory(p, heads)) for m in range(count)]
        conv = {s: np.array([memory.seen[s] for memory in memories]) for s in "qkv"}
        return y, conv, np.array([memory.S for memory in memories])

    def oracle(p, u, reset=None, valid=None):
        no = np.zeros(u.shape[:2], bool)
        rows = [
            row(p, *given)
            for given in zip(u, no if reset is None else reset, ~no if valid is None else valid, strict=True)
        ]
        y, conv, S = zip(*rows, strict=True)
        return np.array(y), {"conv": {s: np.array([c[s] for c in conv]) for s in "qkv"}, "S": np.array(S)}

    return oracle
