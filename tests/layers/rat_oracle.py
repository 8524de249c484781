"""RAT in float64 NumPy, token by token from the paper's definition: every key is turned, every softmax is whole."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def turned(x, chunk, base):
    """Each head of x (..., P): component i < P / 2 and i + P / 2 as one complex number, by chunk * base^(-2 i / P)."""
    if base is None:
        return x
    half = x.shape[-1] // 2
    number = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * chunk * base ** (-2 * np.arange(half) / x.shape[-1]))
    return np.concatenate([number.real, number.imag], -1)


def document(p, x, *, L, H, G=2, rope=10_000.0):
    """(y (t, D), carry) of one document x (t, D) in chunks of L; None: in one. p: parameters by path."""
    t, D = x.shape
    P = D // H
    z, v = sigmoid(x @ p["in_z/kernel"]), x @ p["in_v/kernel"]
    g = sigmoid(x @ p["in_g/kernel"] + p["b_g"])
    if L is None:
        q = k = np.zeros((t, G * P))
    else:
        q, k = x @ p["in_q/kernel"], x @ p["in_k/kernel"]
    of_head = lambda a, h: a[h % G * P : (h % G + 1) * P]
    q, k = (np.array([[of_head(row, h) for h in range(H)] for row in a]).reshape(t, H, P) for a in (q, k))
    v, g = v.reshape(t, H, P), g.reshape(t, H, P)
    keys, values, y = [], [], np.zeros_like(x)
    k_running, v_running = np.zeros((H, P)), np.zeros((H, P))
    for i in range(t):
        chunk, place = (0, i) if L is None else divmod(i, L)
        if place == 0:
            k_running, v_running = np.zeros((H, P)), np.zeros((H, P))
        k_running = g[i] * k_running + (1 - g[i]) * k[i]
        v_running = g[i] * v_running + (1 - g[i]) * v[i]
        o = np.zeros((H, P))
        for h in range(H):
            K = np.array([a[h] for a in keys] + [turned(k_running[h], chunk, rope)])
            s = K @ turned(q[i, h], chunk, rope) / np.sqrt(P)
            e = np.exp(s - s.max())
            o[h] = e @ np.array([a[h] for a in values] + [v_running[h]]) / e.sum()
        y[i] = (z[i] * o.reshape(D)) @ p["out/kernel"]
        if L is not None and place == L - 1:
            keys.append(turned(k_running, chunk, rope))
            values.append(v_running)
    if L is None:
        return y, {"running_v": v_running.reshape(D)}
    stacked = lambda entries: np.array(entries).reshape(len(entries), H, P)
    running = {"running_k": k_running.reshape(D), "running_v": v_running.reshape(D)}
    return y, {"k": stacked(keys), "v": stacked(values), **running, "position": np.array(t)}


def rows(p, x, **form):
    """The same of whole rows (b, t, D)."""
    ys, carries = zip(*(document(p, row, **form) for row in x), strict=True)
    return np.array(ys), {name: np.array([carry[name] for carry in carries]) for name in carries[0]}
