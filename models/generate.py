"""Text from a language model: the prompt in one pass or in pieces, then token by token with the mixers' own carries.

    session = start(model, batch, capacity=..., seeds=...)
    session = read(model, session, ids, valid)               the prompt: padding on the left
    session, tokens = write(model, session, 8)               (b, 8); -1 from a row's end on; again for the next 8

These are pure functions of arrays, to be jitted; `generate` is the loop around them. A recurrent mixer's step costs the
same after any number of tokens. Mixers that hold tokens need room for them: `capacity`, prompt and new ones together.
Each row goes on from its own last token, and draws from a key of its own, so that its text does not depend on what else
is in the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from longwave.layers.mixer import Carry, Context
from longwave.models.language_model import LanguageModel
from longwave.models.sampling import Sampling

NOTHING = -1  # in place of a token where a row has ended


class Session(NamedTuple):
    """What goes on: the mixers' carry, the next token's logits, what a row has seen, how many it drew, and its key."""

    carry: Carry
    logits: Float[Array, "b v"]
    seen: Bool[Array, "b v"]
    drawn: Int[Array, "b"]
    done: Bool[Array, "b"]
    keys: PRNGKeyArray


def start(model: LanguageModel, batch: int, *, capacity: int, seeds: Int[Array, "b"]) -> Session:
    """Before the first token. Raises what a mixer raises that has no carry."""
    body = model.backbone
    rows = body.encoder.embedding.shape[0]  # ty: ignore[missing-attribute]: LanguageModel has seen it
    return Session(
        carry=body.init_carry(batch, capacity=capacity),  # ty: ignore[missing-attribute]: a backbone's
        logits=jnp.zeros((batch, rows), jnp.float32),
        seen=jnp.zeros((batch, rows), bool),
        drawn=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        keys=jax.vmap(jax.random.key)(seeds),
    )


def read(
    model: LanguageModel, session: Session, ids: Int[Array, "b t"], valid: Bool[Array, "b t"] | None = None
) -> Session:
    """The session after more tokens. `valid`: padding is on the left, so that the last column is every row's last
    token; in all pieces of a long text but the last, a row may also be all padding."""
    out = model.last(ids, session.carry, Context(valid=valid))
    real = jnp.ones(ids.shape, bool) if valid is None else valid
    seen = session.seen.at[jnp.arange(ids.shape[0])[:, None], ids].max(real)
    return session._replace(carry=out.carry, logits=out.logits[:, 0], seen=seen)


def write(
    model: LanguageModel, session: Session, count: int, sampling: Sampling = Sampling(), stop: Sequence[int] = ()
) -> tuple[Session, Int[Array, "b count"]]:
    """`count` more tokens of every row, fewer where it comes to a token of `stop`, which is not given out."""
    batch = session.done.shape[0]

    def body(state: tuple[Array, Session, Array]) -> tuple[Array, Session, Array]:
        i, session, tokens = state
        token = sampling(session.logits, session.seen, session.keys, session.drawn)
        done = session.done | jnp.isin(token, jnp.array(stop, jnp.int32)) if stop else session.done
        tokens = tokens.at[:, i].set(jnp.where(done, NOTHING, token))
        session = read(model, session, token[:, None], ~done[:, None] if stop else None)
        return i + 1, session._replace(drawn=session.drawn + ~done, done=done), tokens

    goes_on = lambda state: (state[0] < count) & ~state[1].done.all()
    first = jnp.zeros((), jnp.int32), session, jnp.full((batch, count), NOTHING, jnp.int32)
    _, session, tokens = jax.lax.while_loop(goes_on, body, first)
    return session, tokens


# Compiled once for each shape and choice, however often `generate` is called.
_start = jax.jit(start, static_argnums=1, static_argnames="capacity")
_read = jax.jit(read, donate_argnums=1)
_write = jax.jit(write, static_argnums=2, static_argnames=("sampling", "stop"), donate_argnums=1)


class Speed(NamedTuple):
    """Seconds, without those of compiling; tokens of the prompts, and tokens given out."""

    compiling: float
    prompt: int
    reading: float
    written: int
    writing: float

    def __str__(self) -> str:
        return (
            f"prompt {self.prompt:,} tokens, {self.prompt / max(self.reading, 1e-9):,.0f} tokens/s; "
            f"text {self.written:,} tokens, {self.written / max(self.writing, 1e-9):,.0f} tokens/s; "
            f"compiled in {self.compiling:.1f} s"
        )


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    sampling: Sampling = Sampling(),
    stop: Sequence[int] = (),
    seeds: Sequence[int] | None = None,
    piece: int | None = None,
    block: int = 8,
    report: Callable[[Speed], None] = lambda speed: None,
) -> Iterator[Int[np.ndarray, "b n"]]:
    """Blocks of new tokens as they come: (prompts, up to `block`) ids, NOTHING where a row has ended.

    tokens: how many at most for each prompt.      seeds: one a prompt; None: 0, 1, 2, ...
    piece: prompts are read in pieces of so many tokens, in memory that does not grow; None: in one pass.
    report: is told the speed at the end.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1:
        raise ValueError(f"prompts have {lengths} tokens: expected at least one prompt, and a token in each")
    if strange := [id for prompt in prompts for id in prompt if not 0 <= id < model.vocab]:
        raise ValueError(f"a prompt has the id {strange[0]}: expected 0 to {model.vocab - 1}")
    if tokens < 1 or block < 1 or (piece is not None and piece < 1):
        raise ValueError(f"tokens = {tokens}, block = {block}, piece = {piece}: expected at least 1 of each")
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise ValueError(f"seeds are {len(seeds)}, prompts {len(prompts)}: expected as many")
    piece = max(lengths) if piece is None else min(piece, max(lengths))  # a mixer may have no room for more
    ids, valid = left_padded(prompts, piece)
    full = bool(valid.all())

    # Compiled ahead, so that times are of running alone: two functions, whatever the lengths.
    began = time.perf_counter()
    room = max(lengths) + -(-tokens // block) * block
    session = _start(model, len(prompts), capacity=room, seeds=jnp.array(seeds, jnp.int32))
    part = lambda i: (jnp.asarray(ids[:, i : i + piece]), None if full else jnp.asarray(valid[:, i : i + piece]))
    reader = _read.lower(model, session, *part(0)).compile()
    writer = _write.lower(model, session, block, sampling=sampling, stop=tuple(stop)).compile()
    compiling, began = time.perf_counter() - began, time.perf_counter()
    for i in range(0, ids.shape[1], piece):
        session = reader(model, session, *part(i))
    jax.block_until_ready(session)
    reading, began, written = time.perf_counter() - began, time.perf_counter(), 0
    for done in range(0, tokens, block):
        session, new = writer(model, session)
        new = np.asarray(new)[:, : tokens - done]
        written += int((new != NOTHING).sum())
        yield new
        if np.asarray(session.done).all():
            break
    report(Speed(compiling, sum(lengths), reading, written, time.perf_counter() - began))


def left_padded(
    prompts: Sequence[Sequence[int]], multiple: int = 1
) -> tuple[Int[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
    """Rows of one length, a multiple of `multiple`, with padding on the left; and which tokens are none."""
    longest = -(-max(map(len, prompts)) // multiple) * multiple
    ids, valid = np.zeros((len(prompts), longest), np.int32), np.zeros((len(prompts), longest), bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], valid[row, longest - len(prompt) :] = prompt, True
    return ids, valid
