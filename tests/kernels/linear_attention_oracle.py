"""Linear attention and its gradient in float64, token by token, straight from the equations."""

import numpy as np


def oracle(p, do=None, dfinal=None, *, scale=1.0, reset=None, valid=None, segment_ids=None):
    """(o, final state), and the gradients of <do, o> + <dfinal, final> by the names in p if these are given.

    p: q, k, v, g, w (the last two may be missing) and state, (b, h, K, V) or with segments (b, s, h, K, V).
    """
    q, k, v, state = (np.asarray(p[name], np.float64) for name in ("q", "k", "v", "state"))
    (b, t, h, V), K = v.shape, q.shape[-1]
    hq, hk = q.shape[2], k.shape[2]
    g, w = (None if p.get(name) is None else np.asarray(p[name], np.float64) for name in ("g", "w"))
    S = state.copy() if segment_ids is not None else state[:, None].copy()
    o = np.zeros((b, t, h, V))
    grads = {name: np.zeros(np.shape(x)) for name, x in p.items() if x is not None}
    trace = []
    for r in range(b):
        for i in range(t):
            if valid is not None and not valid[r, i]:
                continue
            s = 0 if segment_ids is None else segment_ids[r, i]
            if s < 0:
                continue
            for j in range(h):
                Q, X = q[r, i, j // (h // hq)], k[r, i, j // (h // hk)]
                decay = np.ones(K) if g is None else np.exp(g[r, i, j]) * np.ones(K)
                decay = 0 * decay if reset is not None and reset[r, i] else decay
                before = S[r, s, j].copy()
                gate = 1.0 if w is None else w[r, i, j]
                S[r, s, j] = decay[:, None] * before + np.outer(X, gate * v[r, i, j])
                o[r, i, j] = scale * S[r, s, j].T @ Q
                trace.append((r, i, s, j, Q, X, decay, before, S[r, s, j].copy(), gate))
    final = S if segment_ids is not None else S[:, 0]
    if do is None:
        return (o, final), None
    dS = np.array(dfinal, np.float64) if segment_ids is not None else np.array(dfinal, np.float64)[:, None]
    for r, i, s, j, Q, X, decay, before, after, gate in reversed(trace):
        D = np.asarray(do[r, i, j], np.float64)
        dS[r, s, j] += scale * np.outer(Q, D)
        grads["q"][r, i, j // (h // hq)] += scale * after @ D
        grads["k"][r, i, j // (h // hk)] += dS[r, s, j] @ (gate * v[r, i, j])
        du = dS[r, s, j].T @ X
        grads["v"][r, i, j] = gate * du
        if w is not None:
            grads["w"][r, i, j] = du @ v[r, i, j]
        if g is not None:
            dg = decay * np.sum(dS[r, s, j] * before, axis=1)
            grads["g"][r, i, j] = dg if g.ndim == 4 else np.sum(dg)
        dS[r, s, j] *= decay[:, None]
    grads["state"] = dS if segment_ids is not None else dS[:, 0]
    return (o, final), grads
