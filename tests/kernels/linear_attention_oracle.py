"""Linear attention and its gradient in float64, token by token, straight from the equations."""

import numpy as np


def oracle(p, do=None, dfinal=None, *, scale=1.0, reset=None, valid=None, segment_ids=None):
    """(o, final state), and the gradients of <do, o> + <dfinal, final> by the names in p if these are given.

    p: q, k, v, g, w, beta (the last three may be missing) and state, (b, h, K, V) or with segments (b, s, h, K, V).
    """
    q, k, v, state = (np.asarray(p[name], np.float64) for name in ("q", "k", "v", "state"))
    (b, t, h, V), K = v.shape, q.shape[-1]
    hq, hk = q.shape[2], k.shape[2]
    g, w, beta = (None if p.get(name) is None else np.asarray(p[name], np.float64) for name in ("g", "w", "beta"))
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
                erase = np.zeros(K) if beta is None else beta[r, i, j] * np.ones(K)
                faded = decay[:, None] * before
                u = gate * v[r, i, j] - faded.T @ (erase * X)
                S[r, s, j] = faded + np.outer(X, u)
                o[r, i, j] = scale * S[r, s, j].T @ Q
                trace.append((r, i, s, j, Q, X, decay, before, S[r, s, j].copy(), gate, erase, u))
    final = S if segment_ids is not None else S[:, 0]
    if do is None:
        return (o, final), None
    dS = np.array(dfinal, np.float64) if segment_ids is not None else np.array(dfinal, np.float64)[:, None]
    for r, i, s, j, Q, X, decay, before, after, gate, erase, u in reversed(trace):
        D = np.asarray(do[r, i, j], np.float64)
        dS[r, s, j] += scale * np.outer(Q, D)
        grads["q"][r, i, j // (h // hq)] += scale * after @ D
        du = dS[r, s, j].T @ X
        faded = decay[:, None] * before
        dread = -faded @ du  # of erase * X
        grads["k"][r, i, j // (h // hk)] += dS[r, s, j] @ u + erase * dread
        grads["v"][r, i, j] = gate * du
        if w is not None:
            grads["w"][r, i, j] = du @ v[r, i, j]
        if beta is not None:
            grads["beta"][r, i, j] = X * dread if beta.ndim == 4 else X @ dread
        dfaded = dS[r, s, j] - np.outer(erase * X, du)
        if g is not None:
            dg = decay * np.sum(dfaded * before, axis=1)
            grads["g"][r, i, j] = dg if g.ndim == 4 else np.sum(dg)
        dS[r, s, j] = decay[:, None] * dfaded
    grads["state"] = dS if segment_ids is not None else dS[:, 0]
    return (o, final), grads
