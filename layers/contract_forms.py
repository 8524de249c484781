"""The promises of the mixer contract about types, claims, roles, numerics, devices and compilation."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from longwave.kernels.partition import Axes
from longwave.layers.contract_bench import Bench, Run, Tokens, by_path, shapes
from longwave.layers.contract_gaps import Gap, Tolerances, both, fact
from longwave.layers.mixer import CAPABILITIES, Context, Unsupported, float32_parameters, parameter_roles


class NotHere(Exception):
    """This machine cannot ask the question."""


def supports(b: Bench, t: Tolerances) -> Iterator[Gap]:
    """What `supports` lists works; what it lacks raises Unsupported."""
    alien = sorted(set(b.supports) - CAPABILITIES)
    yield fact("supports", not alien, f"{alien} is not among {sorted(CAPABILITIES)}")
    yield fact("supports", b.has("causal") or not b.has("carry"), "a carry without being causal")
    reset = Context(reset=np.zeros(b.whole.x.shape[:2], bool))
    foreign = (np.zeros((b.settings.batch, b.settings.width), np.float32),)
    calls = {
        "reset": [("a call with reset", lambda: _trace(b, None, reset))],
        "carry": [("init_carry", lambda: b.mixer.init_carry(b.settings.batch, capacity=b.length))],
    }
    if not b.has("carry"):
        calls["carry"].append(("a call with a carry", lambda: _trace(b, foreign, Context())))
    for capability, attempts in calls.items():
        for what, attempt in attempts:
            raised = _raised(attempt)
            if b.has(capability):
                yield fact(what, raised is None, f"claims {capability!r}, but {what} raised {raised!r}")
            else:
                right = isinstance(raised, Unsupported)
                result = f"raised {raised!r}" if raised else "went through"
                yield fact(what, right, f"{capability!r} is not claimed: expected Unsupported, but it {result}")


def roles(b: Bench, t: Tolerances) -> Iterator[Gap]:
    """Every parameter has a role, and the names kept in float32 exist."""
    declared, stored = set(parameter_roles(b.mixer)), set(by_path(b.params))
    yield fact("roles", declared == stored, f"parameters without a role: {sorted(stored - declared)}")
    for _, module in nnx.iter_modules(b.mixer):
        for name in getattr(module, "keep_float32", ()):
            where = f"{type(module).__name__}.keep_float32"
            yield fact(where, hasattr(module, name), f"{where} names {name!r}, which does not exist")


def types(b: Bench, t: Tolerances) -> Iterator[Gap]:
    """y has the shape and dtype of x; carry and aux are constant for any length: `lax.scan` takes them."""
    for params, dtype in ((b.params, np.float32), (_bfloat16(b), jnp.bfloat16)):
        call = lambda n, params=params, dtype=dtype, **given: _outputs(b, n, params, dtype, **given)
        long = call(b.length)
        yield _same(f"y of {dtype.__name__} x", shapes(long.y), shapes(_x(b, b.length, dtype)))
        if not b.has("carry"):
            continue
        cast = nnx.merge(b.graphdef, params, b.rest)
        init = lambda n, cast=cast: jax.eval_shape(lambda: cast.init_carry(b.settings.batch, capacity=n))
        yield _same("carry of a call without one", shapes(long.carry), shapes(init(b.length)))
        fresh = jax.tree.leaves(cast.init_carry(b.settings.batch, capacity=b.length))
        buffers = {x.unsafe_buffer_pointer() for x in fresh if x.size}
        once = len(buffers) == sum(x.size > 0 for x in fresh)
        yield fact("buffers of a new carry", once, "two of its arrays share one, so that it cannot be donated")
        carry = init(2 * b.length)
        for n in (b.length, 1):
            out = call(n, carry=carry)
            yield _same(f"carry after {n} tokens", shapes(out.carry), shapes(carry))
            yield _same(f"aux of {n} tokens", _structure(out.aux), _structure(long.aux))
        body = lambda c, x, params=params: tuple(b.apply(params, x, c, Context())[i] for i in (1, 0))
        steps = jax.ShapeDtypeStruct((2, *_x(b, 1, dtype).shape), dtype)
        jax.eval_shape(functools.partial(jax.lax.scan, body), carry, steps)
    if not b.has("carry"):
        yield _same("aux of 2 tokens", _structure(call(2).aux), _structure(long.aux))


def finite(b: Bench, t: Tolerances) -> Iterator[Gap]:
    """Outputs and gradients are finite: x of 1e4, zeros, one token repeated, rows without a valid token."""
    x = b.whole.x
    empty = b.whole.valid.copy()
    empty[1:] = False
    cases = {
        "x of 1e4": b.whole._replace(x=1e4 * x),
        "x of zeros": b.whole._replace(x=np.zeros_like(x)),
        "one token repeated": b.whole._replace(x=np.repeat(x[:, :1], b.length, axis=1)),
        "one large token repeated": b.whole._replace(x=1e4 * np.repeat(x[:, :1], b.length, axis=1)),
        "rows without a valid token": b.whole._replace(valid=empty),
    }
    for name, tokens in cases.items():
        runs = {"training form": b.plain(tokens)}
        if b.has("carry"):
            runs["form with a carry"] = b.stream([tokens, b.probe], b.fresh())
        for form, run in runs.items():
            for what, array in _named(run):
                yield fact(f"{name}, {form}", bool(np.all(np.isfinite(array))), f"{what} is not finite")


def bfloat16(b: Bench, t: Tolerances) -> Iterator[Gap]:
    """mixer(x).y in bfloat16 errs little more than rounding parameters, x and y to it."""
    call = lambda params, x: np.asarray(b.forward(params, x, None, Context()).y, np.float32)
    rms = lambda a: float(np.sqrt(np.mean(np.square(a, dtype=np.float64))))
    low = _bfloat16(b)
    exact = b.plain(b.whole).y
    tokens = b.whole._replace(x=_round(b.whole.x), reset=None)
    rounded = b.stream([tokens], None, params=jax.tree.map(_float32, low)).y
    error = rms(call(low, jnp.asarray(b.whole.x, jnp.bfloat16)) - exact)
    baseline = rms(rounded - exact) + rms(_round(exact) - exact)
    ratio = error / baseline if baseline else float(error > 0)
    yield Gap("y", ratio, t.bfloat16, f"rms error {error:.1e}, of rounding alone {baseline:.1e}")


def repeatable(b: Bench, t: Tolerances) -> Iterator[Gap]:
    """The same call gives the same bits."""
    keys = [None, jax.random.key(b.settings.seed)] if b.uses_key else [None]
    for key in keys:
        first, again = (b.plain(b.whole, key=key) for _ in range(2))
        for (what, one), (_, two) in zip(_named(first), _named(again), strict=True):
            yield fact("two calls", np.array_equal(one, two, equal_nan=True), f"{what} differs in bits")


def compilation(b: Bench, t: Tolerances) -> Iterator[Gap]:
    """One trace a shape, and builds with other seeds share it."""
    make = lambda seed: b.make(b.settings.width, rngs=nnx.Rngs(seed))
    one, two = (nnx.graphdef(nnx.eval_shape(lambda seed=seed: make(seed))) for seed in (0, 1))
    yield fact("graphdef", one == two and hash(one) == hash(two), "two builds differ in more than parameters")
    for (structure, leaves), times in Counter(b.traces).items():
        detail = f"{times} times for {_words((structure, leaves))}: is a weak type in the carry?"
        yield fact("traced", times == 1, detail)


DATA, TENSOR = 4, 2
PRIME = 11  # a factor that no dimension but the batch has marks the arrays that hold it


def sharding(b: Bench, t: Tolerances) -> Iterator[Gap]:
    """Sharded over 4 x 2 devices = unsharded, and no activation crosses the batch axis."""
    mesh = _mesh()
    size = b.settings.batch
    tokens = b.tokens(b.length, seed=7, batch=size * DATA * PRIME)
    rows = [slice(i, i + size) for i in range(0, len(tokens.x), size)]
    runs = [b.plain(Tokens(tokens.x[r], tokens.w[r], None, tokens.valid[r])) for r in rows]
    total = {name: sum(run.dparams[name] for run in runs) for name in runs[0].dparams}
    want = Run(np.concatenate([r.y for r in runs]), None, np.concatenate([r.dx for r in runs]), total, [])
    place = lambda a: jax.device_put(a, NamedSharding(mesh, P("data")))
    ctx = Context(valid=place(tokens.valid), axes=Axes(batch="data", heads="tensor"))
    params = jax.device_put(b.params, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        c = b.no_gradient(tokens.x, None)
        inputs = (params, place(tokens.x), None, ctx, place(tokens.w), c)
        compiled = b.call.lower(*inputs).compile()
        y, _, (dparams, dx, _) = compiled(*inputs)
    got = Run(np.asarray(y), None, np.asarray(dx), by_path(dparams), [])
    yield from both("sharded and unsharded", got, want, t)
    moved = crossing(compiled.as_text(), DATA, TENSOR)
    yield fact("compiled step", not moved, f"an activation crosses the batch axis: {'; '.join(moved[:3])}")


_GATHER = re.compile(r"= (.*?) all-gather(?:-start)?\(.*?replica_groups=(.*?), (?:dimensions|use_global|channel)")


def crossing(text: str, data: int, tensor: int) -> list[str]:
    """All-gathers of arrays that hold the batch, across the data axis of a (data, tensor) mesh."""
    found = []
    for result, groups in _GATHER.findall(text):
        shapes = [[int(n) for n in s.split(",") if n] for s in re.findall(r"\w+\[([\d,]*)\]", result)]
        shape = next((s for s in shapes if int(np.prod(s)) % PRIME == 0), None)
        if shape and any(len({i // tensor for i in group}) > 1 for group in _groups(groups, data * tensor)):
            found.append(f"all-gather to {shape} over {groups}")
    return found


def _groups(text: str, devices: int) -> list[list[int]]:
    """Device numbers of the groups of a collective, from any of the notations that XLA prints."""
    ints = lambda s: [int(i) for i in s.split(",")]
    if text.startswith("mesh["):  # mesh['a'=4,'b'=2] {'a'}: groups along the axes in braces, maybe split: 'a':(1)2
        axes, along = text.rsplit("{", 1)
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", axes)}
        inside = [i for i, name in enumerate(sizes) if name in re.findall(r"'(\w+)'", along)]
        ids = np.moveaxis(np.arange(devices).reshape(*sizes.values()), inside, range(-len(inside), 0))
        return ids.reshape(-1, int(np.prod([list(sizes.values())[i] for i in inside]))).tolist()
    if iota := re.match(r"\[([\d,]*)\]<=\[([\d,]*)\](?:T\(([\d,]*)\))?", text):  # [groups,size]<=[dims]T(order)
        shape, dims, order = iota.groups()
        ids = np.arange(devices).reshape(ints(dims))
        return (ids.transpose(ints(order)) if order else ids).reshape(ints(shape)).tolist()
    return [ints(group) for group in re.findall(r"\{([\d,]+)\}", text)] or [list(range(devices))]


def _mesh() -> jax.sharding.Mesh:
    kinds = [jax.devices(), jax.devices("cpu")]
    devices = next((d for d in kinds if len(d) >= DATA * TENSOR), None)
    if devices is None:
        raise NotHere(f"needs {DATA * TENSOR} devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    auto = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((DATA, TENSOR), ("data", "tensor"), axis_types=auto, devices=devices[: DATA * TENSOR])


def _x(b: Bench, n: int, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((b.settings.batch, n, b.settings.width), dtype)


def _outputs(b: Bench, n: int, params: Any, dtype: Any, carry: Any = None) -> Any:
    return jax.eval_shape(lambda c, x: b.apply(params, x, c, Context()), carry, _x(b, n, dtype))


def _trace(b: Bench, carry: Any, ctx: Context) -> Any:
    return jax.eval_shape(lambda x: b.apply(b.params, x, carry, ctx), b.whole.x)


def _raised(attempt: Any) -> Exception | None:
    try:
        attempt()
    except Exception as error:
        return error
    return None


def _same(what: str, got: Any, want: Any) -> Gap:
    return fact(what, got == want, f"{_words(got)}, expected {_words(want)}")


def _words(signature: Any) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for shape, dtype in signature[1]) or str(signature[0])


def _structure(aux: Any) -> Any:
    return jax.tree.structure(aux), ()


def _named(run: Run) -> list[tuple[str, np.ndarray]]:
    gradients = [(f"the gradient of {name}", g) for name, g in run.dparams.items()]
    return [("y", run.y), ("the gradient of x", run.dx), *gradients]


def _float32(a: Any) -> np.ndarray:
    return np.asarray(a, np.float32)


def _round(a: Any) -> np.ndarray:
    return _float32(jnp.asarray(a, jnp.bfloat16))


def _bfloat16(b: Bench) -> Any:
    """The parameters as a model that computes in bfloat16 hands them over."""
    kept = float32_parameters(b.mixer)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    cast = lambda path, p: p if name(path) in kept else jnp.asarray(p, jnp.bfloat16)
    return jax.tree.map_with_path(cast, b.params)
