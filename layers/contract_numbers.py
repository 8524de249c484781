"""The promises of the mixer contract that compare two ways to compute the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from longwave.layers.contract_bench import Bench, Run, Tokens
from longwave.layers.contract_gaps import Gap, Tolerances, backward, both, forward, gap, largest
from longwave.layers.mixer import Context


def causality(b: Bench, t: Tolerances) -> Iterator[Gap]:
    """No output depends on a later token, with a key and without."""
    keys = [None, jax.random.key(b.settings.seed)] if b.uses_key else [None]
    other = b.tokens(b.length, seed=4)
    forms = [(f"training form, {'no ' if key is None else ''}key", b.plain, key) for key in keys]
    if b.has("carry"):
        forms.append(("form with a carry", lambda x, key: b.stream([x], b.fresh(), key=key), None))
    for name, run, key in forms:
        past = run(b.whole, key=key)
        for now in (1, b.length // 2 + 1, b.length - 1):
            later = np.arange(b.length)[None, :, None] >= now
            changed = run(b.whole._replace(x=np.where(later, other.x, b.whole.x)), key=key)
            what = f"{name}, tokens from time {now} on changed"
            yield from forward(what, changed.before(now), past.before(now), t)
            seen = run(b.whole._replace(w=np.where(later, 0, b.whole.w)), key=key)
            what, scale = f"{name}, gradient of y before time {now}", largest([seen.dx])
            yield gap(what, seen.dx * later, np.zeros_like(seen.dx), t.gradient, floor=scale)


def chunks(b: Bench, t: Tolerances) -> Iterator[Gap]:
    """One call on a sequence = calls on ragged chunks of it, each from the last one's carry."""
    yield from forward("whole and chunks", b.splits["chunks"], b.splits["whole"], t)


def steps(b: Bench, t: Tolerances) -> Iterator[Gap]:
    """One call on a sequence = one token at a time."""
    yield from forward("whole and steps", b.splits["steps"], b.splits["whole"], t)


def gradients(b: Bench, t: Tolerances) -> Iterator[Gap]:
    """Gradients pass through carries: out of the last, between chunks and steps, into the first."""
    for name in ("chunks", "steps"):
        yield from backward(f"whole and {name}", b.splits[name], b.splits["whole"], t)


def start(b: Bench, t: Tolerances) -> Iterator[Gap]:
    """No carry = init_carry, and the carry that comes out goes on."""
    # As many valid tokens as leave room for the probe: with carry=None the returned capacity is the length.
    room = np.broadcast_to(np.arange(b.length) < b.length - b.settings.piece, b.whole.x.shape[:2])
    first = b.whole._replace(valid=room)
    none = b.stream([first._replace(reset=None), b.probe], None)
    given = b.stream([first, b.probe], b.fresh(capacity=b.length))
    yield from both("carry=None and init_carry", none, given, t, carry=False)


def reset(b: Bench, t: Tolerances) -> Iterator[Gap]:
    """A reset forgets what came before, and nothing else: as if the sequence began there."""
    begin = np.arange(b.length)[None, :] == 0
    fresh = b.stream([b.whole, b.probe], b.fresh())
    n = b.document
    old = b.tokens(n, seed=5)
    old = old._replace(w=np.zeros_like(old.w))
    for name, lengths in (("whole", [b.length]), ("chunks", b.ragged(b.length))):
        marked = b.whole._replace(reset=np.broadcast_to(begin, b.whole.valid.shape))
        after = b.stream([*old.cut(b.pieces(n)), *marked.cut(lengths), b.probe], b.fresh())
        yield from both(f"reset at the first token ({name})", after.after(n), fresh, t, carry=False)
        forgotten = after.before(n).dx
        yield gap("gradient of the tokens before a reset", forgotten, np.zeros_like(forgotten), 0.0)


def packing(b: Bench, t: Tolerances) -> Iterator[Gap]:
    """Documents packed into one row = each by itself, in outputs, gradients and the last carry."""
    n = b.document
    layouts = [(0, n, 2 * n)] + [(0, 2 * n), (2 * n,)] * b.has("carry")
    more = [b.probe] if b.has("carry") else []
    for starts in layouts:
        tokens = _with_resets(b, [starts] * b.settings.batch)
        alone = _separate(b, starts, more)
        name = f"documents at {', '.join(map(str, starts))}"
        y = b.forward(b.params, tokens.x, None, Context(reset=tokens.reset)).y
        yield gap(f"{name}, neither carry nor mask given, y", y, alone.y[:, : b.length], t.forward)
        if b.has("carry"):
            for how, lengths in (("whole", [b.length]), ("chunks", b.ragged(b.length))):
                packed = b.stream([*tokens.cut(lengths), *more], b.fresh())
                yield from both(f"{name} ({how})", packed, alone, t, carry=False)
        else:
            yield from both(name, b.stream([tokens], None), alone, t)


def padding(b: Bench, t: Tolerances) -> Iterator[Gap]:
    """Padding left and right changes nothing: valid outputs, gradients, carry; the rest is exactly zero."""
    n = b.document
    for offset, count in ((0, n), (b.settings.piece - 2, n), (b.length - n, n), (0, 0)):
        span = slice(offset, offset + count)
        padded = _pad(b, [(offset, count)] * b.settings.batch)
        name = f"{count} valid tokens at {offset}"
        inside = Tokens(*(a if a is None else a[:, span] for a in padded))
        plain = b.plain(padded)
        yield from _silent(name, plain, padded.valid)
        if count:
            want = b.alone(inside._replace(reset=None) if not b.has("carry") else inside)
            yield from both(name, _only(plain, span), want, t, carry=False)
        if b.has("carry"):
            got = b.stream([b.prefix, padded, b.probe], b.fresh())
            cut = inside.cut(b.pieces(count)) if count else []
            want = b.stream([b.prefix, *cut, b.probe], b.fresh())
            p = b.settings.piece
            slots = np.r_[0:p, p + offset : p + offset + count, p + b.length : p + b.length + p]
            yield from _silent(name, _only(got, slice(p, p + b.length)), padded.valid)
            yield from both(f"{name}, behind others", _only(got, slots), want, t)
    if b.has("carry"):
        yield from _padded_chunks(b, t)


def _padded_chunks(b: Bench, t: Tolerances) -> Iterator[Gap]:
    """Chunks and steps that are partly or wholly padding, between whole ones."""
    p, half = b.settings.piece, b.settings.piece // 2
    tokens = b.tokens(p, seed=6)
    want = b.stream([b.prefix, tokens, b.probe], b.fresh())
    nothing = b.tokens(1, seed=8)._replace(valid=np.zeros((b.settings.batch, 1), bool))
    at = np.arange(p)[None, :]
    left, right = (
        tokens._replace(valid=np.broadcast_to(where, tokens.valid.shape)) for where in (at >= half, at < half)
    )
    got = b.stream([b.prefix, right, nothing, left, b.probe], b.fresh())
    kept = np.r_[0 : p + half, 2 * p + 1 + half : 4 * p + 1]
    yield from both("a chunk in two padded halves", _only(got, kept), want, t)


def garbage(b: Bench, t: Tolerances) -> Iterator[Gap]:
    """Whatever stands at invalid positions (NaN, inf, 1e30) reaches no output, carry or gradient."""
    spans = [(b.settings.piece - 2, b.document)] * b.settings.batch
    padded = _pad(b, spans)
    valid = padded.valid[..., None]
    clean = padded._replace(x=np.where(valid, padded.x, 0))
    forms = {"training form": b.plain}
    if b.has("carry"):
        forms["form with a carry"] = lambda x: b.stream([x, b.probe], b.fresh())
    for name, run in forms.items():
        want = run(clean)
        for value in (np.nan, np.inf, 1e30):
            dirty = padded._replace(x=np.where(valid, padded.x, np.float32(value)))
            yield from both(f"{value} in the padding, {name}", run(dirty), want, t)


def rows(b: Bench, t: Tolerances) -> Iterator[Gap]:
    """Rows of a batch know nothing of each other, whatever their lengths and documents."""
    n, size = b.document, b.settings.batch
    spans = [((0, b.length), (b.settings.piece - 2, n), (0, 0))[i % 3] for i in range(size)]
    starts = [((0, n), (), ())[i % 3] for i in range(size)]
    mixed = _pad(b, spans)._replace(reset=_with_resets(b, starts).reset)
    forms = {"training form": b.plain}
    if b.has("carry"):
        forms["form with a carry"] = lambda x: b.stream([x, b.probe], b.fresh())
    elif b.has("reset"):
        forms["packed form"] = lambda x: b.stream([x], None)
    for name, run in forms.items():
        got = run(mixed)
        for row in range(size):  # every row laid out, and filled, as this one
            one = slice(row, row + 1)
            want = run(Tokens(*(a if a is None else np.broadcast_to(a[one], a.shape) for a in mixed)))
            scale = largest([want.dx])
            yield gap(f"{name}, y of row {row}", got.y[one], want.y[one], t.forward)
            yield gap(f"{name}, gradient of row {row}", got.dx[one], want.dx[one], t.gradient, floor=scale)


def _with_resets(b: Bench, starts: Sequence[Sequence[int]]) -> Tokens:
    """The whole sequence with resets at the given times of each row."""
    if not b.has("reset"):
        return b.whole
    return b.whole._replace(reset=np.array([np.isin(np.arange(b.length), s) for s in starts]))


def _separate(b: Bench, starts: Sequence[int], more: Sequence[Tokens]) -> Run:
    """Each document by itself, the last followed by `more`, put together as one run."""
    ends = [*starts[1:], b.length]
    begins = starts if starts[0] == 0 else [0, *starts]
    ends = ends if starts[0] == 0 else [starts[0], *ends]
    parts = b.whole._replace(reset=None if not b.has("carry") else b.whole.reset)
    documents = parts.cut([end - begin for begin, end in zip(begins, ends, strict=True)])
    runs = [b.alone(d, *(more if d is documents[-1] else ())) for d in documents]
    total = {name: sum(r.dparams[name] for r in runs) for name in runs[0].dparams}
    y, dx = (np.concatenate([getattr(r, what) for r in runs], axis=1) for what in ("y", "dx"))
    return Run(y, runs[-1].carry, dx, total, [])


def _pad(b: Bench, spans: Sequence[tuple[int, int]]) -> Tokens:
    """The whole sequence, of which (first, count) positions of each row are valid."""
    time = np.arange(b.length)
    valid = np.array([(time >= first) & (time < first + count) for first, count in spans])
    return b.whole._replace(valid=valid)


def _only(run: Run, slots: slice | np.ndarray) -> Run:
    return run._replace(y=run.y[:, slots], dx=run.dx[:, slots])


def _silent(name: str, run: Run, valid: np.ndarray) -> Iterator[Gap]:
    """Outputs of invalid positions, and gradients of their inputs, are exactly zero."""
    for what, array in (("y", run.y), ("gradient of x", run.dx)):
        unread = np.where(valid[..., None], 0, array)
        yield gap(f"{name}, {what} at invalid positions", unread, np.zeros_like(unread), 0.0)
