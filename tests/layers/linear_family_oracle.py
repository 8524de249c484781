"""The layers on the matrix-state recurrence in float64 NumPy, token by token, from their papers' equations.

An oracle is a function (parameters by path, x (b, t, d)) -> (y, the state after the last token).
"""

import numpy as np


def silu(x):
    return x * sigmoid(x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.logaddexp(0, x)


def recurrence(q, k, v, g=0.0, erase=0.0, write=1.0, scale=1.0):
    """(b, t, h, .) -> o, S. g, erase and write: numbers, or arrays that broadcast to k, k and v."""
    (b, t, h, K), V = k.shape, v.shape[3]
    g, erase = (np.broadcast_to(np.asarray(m, float), k.shape) for m in (g, erase))
    write = np.broadcast_to(np.asarray(write, float), v.shape)
    S, o = np.zeros((b, h, K, V)), np.zeros((b, t, h, V))
    for i in range(t):
        S = np.exp(g[:, i])[..., None] * S
        held = np.einsum("bhkv,bhk->bhv", S, erase[:, i] * k[:, i])
        S = S + np.einsum("bhk,bhv->bhkv", k[:, i], write[:, i] * v[:, i] - held)
        o[:, i] = scale * np.einsum("bhkv,bhk->bhv", S, q[:, i])
    return o, S


def normalised(q, k, v, eps, scale=1.0):
    """o_t = scale sum_i (q_t.k_i) v_i / (scale sum_i q_t.k_i + eps), by sums; S with the sum of keys as a column."""
    weight = scale * np.einsum("bihk,bjhk->bhij", q, k) * np.tri(q.shape[1])
    o = np.einsum("bhij,bjhv->bihv", weight, v) / (np.einsum("bhij->bih", weight) + eps)[..., None]
    S = np.concatenate([np.einsum("bthk,bthv->bhkv", k, v), np.einsum("bthk->bhk", k)[..., None]], -1)
    return o, S


def heads(p, name, x, count):
    y = x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0.0)
    return y.reshape(*y.shape[:2], count, -1)


def flat(x):
    return x.reshape(*x.shape[:2], -1)


def rms(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * scale


def low_rank(p, name, x):
    return x @ p[f"{name}/low/kernel"] @ p[f"{name}/up/kernel"] + p.get(f"{name}/up/bias", 0.0)


def convolved_heads(p, x, count):
    """q, k, v behind their convolutions, and the last inputs of those."""
    out, last = [], {}
    for name in "qkv":
        taps, y = p[f"qkv/conv_{name}"], x @ p[f"qkv/{name}/kernel"]
        seen = np.concatenate([np.zeros((len(y), len(taps) - 1, y.shape[2])), y], axis=1)
        z = silu(sum(taps[j] * seen[:, j : j + x.shape[1]] for j in range(len(taps))))
        z = z.reshape(*z.shape[:2], count, -1)
        out.append(z if name == "v" else z / np.sqrt(np.sum(z**2, -1, keepdims=True) + 1e-6))
        last[name] = seen[:, x.shape[1] :]
    return out, last


def linear_attention(p, x, *, count, eps=1e-6, scale=1.0):
    q, k, v = (heads(p, name, x, count) for name in "qkv")
    q, k = (np.where(m > 0, m + 1, np.exp(np.minimum(m, 0))) for m in (q, k))
    if eps is None:
        o, S = recurrence(q, k, v, scale=scale)
    else:
        o, S = normalised(q, k, v, eps, scale)
    return flat(o) @ p["out/kernel"], S


def taylor(x):
    d = x.shape[-1]
    outer = np.einsum("...i,...j->...ij", x, x).reshape(*x.shape[:-1], -1)
    return np.concatenate([np.ones_like(x[..., :1]), x / d**0.25, outer / (np.sqrt(2) * np.sqrt(d))], -1)


def based(p, x, *, count):
    q, k, v = (heads(p, name, x, count) for name in "qkv")
    o, S = normalised(taylor(q), taylor(k), v, 1e-12)
    return flat(o) @ p["out/kernel"], S


def jrt(p, x, *, count, prefix):
    """Sums over pairs of tokens: of all up to the query, and of the encoder's over the prefix."""
    q, k, v = (heads(p, name, x, count) for name in "qkv")
    k_e, v_e = heads(p, "k_e", x, count), heads(p, "v_e", x, count)
    q, k, k_e = taylor(q), taylor(k), taylor(k_e)
    causal = np.einsum("bihk,bjhk->bhij", q, k) * np.tri(x.shape[1])
    encoder = np.einsum("bihk,bjhk->bhij", q, k_e) * (np.arange(x.shape[1]) < prefix)
    o = np.einsum("bhij,bjhv->bihv", causal, v) + np.einsum("bhij,bjhv->bihv", encoder, v_e)
    o = o / np.einsum("bhij->bih", causal + encoder)[..., None]
    column = lambda v: np.concatenate([v, np.ones_like(v[..., :1])], -1)
    S = np.einsum("bthk,bthv->bhkv", k, column(v))
    S = S + np.einsum("bthk,bthv->bhkv", k_e[:, :prefix], column(v_e[:, :prefix]))
    return flat(o) @ p["out/kernel"], S


def turned(x, base=10_000.0):
    """Component i and i + d/2 as a complex number, times e^(i n theta)."""
    half = x.shape[-1] // 2
    theta = base ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.arange(x.shape[1])[:, None, None] * theta)
    return np.concatenate([z.real, z.imag], -1)


def retnet(p, x, *, count):
    q, k, v = (heads(p, name, x, count) for name in "qkv")
    gamma = 1 - 2.0 ** (-5 - np.arange(count))
    o, S = recurrence(turned(q), turned(k), v, g=np.log(gamma)[:, None], scale=q.shape[-1] ** -0.5)
    o = (o - o.mean(-1, keepdims=True)) / np.sqrt(o.var(-1, keepdims=True) + 1e-5)
    o = flat(o * p["norm/scale"] + p["norm/bias"])
    return (silu(x @ p["gate/kernel"]) * o) @ p["out/kernel"], {"S": S, "position": np.full(len(x), x.shape[1])}


def lightning(p, x, *, count, slopes, depth, silu_v):
    q, k, v = (heads(p, name, x, count) for name in "qkv")
    o, S = recurrence(silu(q), silu(k), silu(v) if silu_v else v, g=-np.asarray(slopes)[:, None] * depth)
    y = rms(flat(o), p["norm/scale"], 1e-6) * sigmoid(low_rank(p, "gate", x))
    return y @ p["out/kernel"], S


def gla(p, x, *, count, tau=16.0):
    q, k, v = (heads(p, name, x, count) for name in "qkv")
    g = -softplus(-low_rank(p, "decay", x)).reshape(k.shape) / tau
    o, S = recurrence(q, k, v, g, scale=q.shape[-1] ** -0.5)
    return (flat(rms(o, p["norm/scale"], 1e-5)) * silu(x @ p["gate/kernel"])) @ p["out/kernel"], S


def delta_rule(p, x, count, g, most):
    (q, k, v), conv = convolved_heads(p, x, count)
    beta = most * sigmoid(x @ p["beta/kernel"])[..., None]
    o, S = recurrence(q, k, v, g, beta, beta, q.shape[-1] ** -0.5)
    return flat(rms(o, p["norm/scale"], 1e-5)), {"conv": conv, "S": S}


def deltanet(p, x, *, count, most=1):
    o, carry = delta_rule(p, x, count, 0.0, most)
    return o @ p["out/kernel"], carry


def gated_deltanet(p, x, *, count, most=1):
    g = -np.exp(p["decay/A_log"]) * softplus(x @ p["a/kernel"] + p["decay/dt_bias"])
    o, carry = delta_rule(p, x, count, g[..., None], most)
    return (o * silu(x @ p["gate/kernel"])) @ p["out/kernel"], carry


def kda(p, x, *, count, most=1):
    a = low_rank(p, "a", x).reshape(*x.shape[:2], count, -1)
    g = -np.exp(p["decay/A_log"])[:, None] * softplus(a + p["decay/dt_bias"])
    o, carry = delta_rule(p, x, count, g, most)
    return (o * sigmoid(low_rank(p, "gate", x))) @ p["out/kernel"], carry


def short_conv(p, x):
    taps = p["taps"]
    seen = np.concatenate([np.zeros((len(x), len(taps) - 1, x.shape[2])), x], axis=1)
    y = sum(taps[j] * seen[:, j : j + x.shape[1]] for j in range(len(taps)))
    gate = x @ p["gate/kernel"] + p["gate/bias"] if "gate/kernel" in p else 1.0
    return gate * y, seen[:, x.shape[1] :]
