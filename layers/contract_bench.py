"""The bench on which `layers/contract.py` examines a mixer: one compiled call, and streams of calls.

Nearly everything is asked through one jitted function, `Bench.call`: the output, the new carry and the
gradients of <w, y> + <c, new carry> for given weights w and c. A sequence that is cut into pieces is
differentiated by handing the gradient of a piece's initial carry to the piece before it: gradients across
any number of calls cost no further compilation, and test the gradients of carries by the way.

Two carries are called equal when what follows is: `probe` tokens end a stream, and no state itself is
compared.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longwave.layers.contract_below import OverACopy
from longwave.layers.mixer import Carry, Context, Mixer, Out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of an examination. The default is the short form: few shapes, compiled in a hurry.

    width, batch: of x.  length: tokens of a whole sequence.  piece: tokens of a ragged chunk.
    seed: of parameters and tokens.  optimise: False compiles for the CPU in a third of the time.
    """

    width: int = 16
    length: int = 24
    piece: int = 7
    batch: int = 3
    seed: int = 0
    optimise: bool = False

    def __post_init__(self) -> None:
        if not 1 < self.piece < self.length:
            raise ValueError(f"piece = {self.piece}: expected 1 < piece < length = {self.length}")
        if min(self.width, self.batch - 1) < 1:
            raise ValueError(f"width = {self.width}, batch = {self.batch}: expected at least 1 and 2")


LONG = Settings(length=192, piece=37, optimise=True)


class Tokens(NamedTuple):
    """Input of a call: x and its outputs' weights in the loss, (b, t, d); reset and valid, (b, t) or None."""

    x: np.ndarray
    w: np.ndarray
    reset: np.ndarray | None
    valid: np.ndarray | None

    def cut(self, lengths: Sequence[int]) -> list[Tokens]:
        """Consecutive pieces of the given lengths along time."""
        ends = np.cumsum(lengths)
        assert ends[-1] == self.x.shape[1], (lengths, self.x.shape)
        spans = [slice(end - n, end) for end, n in zip(ends, lengths, strict=True)]
        return [Tokens(*(a if a is None else a[:, s] for a in self)) for s in spans]


class Run(NamedTuple):
    """A stream's outputs, last carry and gradients: of x (b, t, d), parameters by path, the initial carry."""

    y: np.ndarray
    carry: Carry
    dx: np.ndarray
    dparams: dict[str, np.ndarray]
    dcarry: list[np.ndarray]

    def after(self, t: int) -> Run:
        """Without the first t outputs and their inputs' gradients."""
        return self._replace(y=self.y[:, t:], dx=self.dx[:, t:])

    def before(self, t: int) -> Run:
        return self._replace(y=self.y[:, :t], dx=self.dx[:, :t])


class Bench:
    """One mixer, built by `make(width, rngs=...)`, its compiled call, and the tokens that it is shown."""

    def __init__(self, make: Callable[..., Mixer], settings: Settings = Settings()):
        self.settings = settings
        options = None if settings.optimise else _hurried()
        # Made as training makes it, in one compiled function; eagerly every operation would be compiled by itself.
        new = lambda: self.make(settings.width, rngs=nnx.Rngs(settings.seed))
        self.make = make
        if (abstract := nnx.eval_shape(new)).reads_below:
            self.make = functools.partial(OverACopy, mixer=make)
            abstract = nnx.eval_shape(new)
        self.graphdef = nnx.graphdef(abstract)
        state = jax.jit(lambda: nnx.state(new()), compiler_options=options)()
        self.mixer = nnx.merge(self.graphdef, state)
        _, params, rest = nnx.split(self.mixer, nnx.Param, ...)
        strong = lambda state: jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, nnx.to_pure_dict(state)))
        self.params, self.rest = (
            strong(params),
            strong(rest),
        )  # a weak type, as of jnp.full(n, 0.7), traces anew
        self.supports, chunk = self.mixer.supports, self.mixer.chunk
        self.document = max(chunk, settings.length // 3 // chunk * chunk)  # resets fall on multiples of chunk
        self.length = max(settings.length, 3 * self.document)
        self.traces: list[Any] = []
        self.call = jax.jit(self._call, compiler_options=options)
        self.forward = jax.jit(self.apply, compiler_options=options)
        self._zeros: dict[Any, list[np.ndarray]] = {}

    def has(self, *capabilities: str) -> bool:
        return self.supports.issuperset(capabilities)

    # Tokens

    def tokens(self, n: int, seed: int, *, batch: int | None = None) -> Tokens:
        """n random tokens, all valid, no reset, with random weights in the loss."""
        draw = np.random.default_rng((self.settings.seed, seed)).normal
        size = (batch or self.settings.batch, n, self.settings.width)
        x, w = (draw(size=size).astype(np.float32) for _ in range(2))
        flags = np.zeros(size[:2], bool)
        return Tokens(x, w, flags if self.has("reset") else None, ~flags)

    def pieces(self, n: int) -> list[int]:
        """n in lengths that the other checks compile too: `piece` as often as it fits, then ones."""
        return [self.settings.piece] * (n // self.settings.piece) + [1] * (n % self.settings.piece)

    def ragged(self, n: int) -> list[int]:
        """n in uneven lengths: piece, 1, piece, 1, ..."""
        pair = self.settings.piece + 1
        return [self.settings.piece, 1] * (n // pair) + self.pieces(n % pair)

    # Calls

    def apply(self, params: Any, x: Any, carry: Carry | None, ctx: Context) -> Out:
        return nnx.merge(self.graphdef, params, self.rest)(x, carry, ctx)

    def _call(self, params: Any, x: Any, carry: Carry | None, ctx: Context, w: Any, c: list[Any]) -> Any:
        self.traces.append(shapes((x, carry, ctx)))
        differentiable, rebuild = _partition(carry)

        def outputs(params, x, differentiable):
            y, out, _ = self.apply(params, x, rebuild(differentiable), ctx)
            return (y, _partition(out)[0]), out

        (y, _), pull, out = jax.vjp(outputs, params, x, differentiable, has_aux=True)
        return y, out, pull((w.astype(y.dtype), c))

    def no_gradient(self, x: np.ndarray, carry: Carry | None) -> list[np.ndarray]:
        """Zeros for the gradient of the carry that a call on x from `carry` returns."""
        if carry is None:
            key = x.shape
            if key not in self._zeros:
                valid = np.ones(x.shape[:2], bool)
                out = jax.eval_shape(self.apply, self.params, x, None, Context(valid=valid)).carry
                self._zeros[key] = _zeros_like(out)
            return self._zeros[key]
        return _zeros_like(carry)

    def stream(self, segments: Sequence[Tokens], carry: Carry | None, *, key: Any = None, params: Any = None) -> Run:
        """Calls on one segment after the other, each from the last one's carry; then gradients, backwards."""
        params = self.params if params is None else params
        contexts = [Context(reset=s.reset, valid=s.valid, key=key) for s in segments]
        carries = [carry]
        for s, ctx in zip(segments[:-1], contexts, strict=False):
            zeros = self.no_gradient(s.x, carries[-1])
            carries.append(self.call(params, s.x, carries[-1], ctx, s.w, zeros)[1])
        c = self.no_gradient(segments[-1].x, carries[-1])
        ys, dxs, dparams, last = [], [], [], None
        for s, ctx, start in zip(segments[::-1], contexts[::-1], carries[::-1], strict=True):
            y, out, (dp, dx, c) = self.call(params, s.x, start, ctx, s.w, c)
            last = out if last is None else last
            ys.append(y), dxs.append(dx), dparams.append(by_path(dp))
        join = lambda arrays: np.concatenate([np.asarray(a) for a in arrays[::-1]], axis=1)
        total = {name: np.sum([d[name] for d in dparams], axis=0) for name in dparams[0]}
        return Run(join(ys), last, join(dxs), total, [np.asarray(g) for g in c])

    def fresh(self, capacity: int | None = None) -> Carry:
        """The carry before the first token, with room for two whole sequences."""
        return self.mixer.init_carry(self.settings.batch, capacity=capacity or 2 * self.length)

    def plain(self, tokens: Tokens, *, key: Any = None) -> Run:
        """The training form: from no carry, without resets."""
        return self.stream([tokens._replace(reset=None)], None, key=key)

    def alone(self, tokens: Tokens, *more: Tokens) -> Run:
        """A document by itself (and what follows it, given a carry): what other forms must agree with."""
        if not self.has("carry"):
            return self.plain(tokens)
        return self.stream([*tokens.cut(self.pieces(tokens.x.shape[1])), *more], self.fresh())

    # Streams that several checks look at

    @functools.cached_property
    def prefix(self) -> Tokens:
        return self.tokens(self.settings.piece, seed=1)

    @functools.cached_property
    def whole(self) -> Tokens:
        return self.tokens(self.length, seed=2)

    @functools.cached_property
    def probe(self) -> Tokens:
        return self.tokens(self.settings.piece, seed=3)

    @functools.cached_property
    def splits(self) -> dict[str, Run]:
        """The same tokens, behind the same prefix, before the same probe: whole, in chunks, one by one."""
        ways = {"whole": [self.length], "chunks": self.ragged(self.length), "steps": [1] * self.length}
        run = lambda n: self.stream([self.prefix, *self.whole.cut(n), self.probe], self.fresh())
        return {name: run(lengths) for name, lengths in ways.items()}

    @functools.cached_property
    def uses_key(self) -> bool:
        """Whether randomness reaches any operation of the mixer."""
        run = lambda key: self.apply(self.params, self.whole.x, None, Context(key=key))[0]
        jaxpr = jax.make_jaxpr(run)(jax.random.key(0)).jaxpr
        return any(v is jaxpr.invars[0] for equation in jaxpr.eqns for v in equation.invars)


@functools.cache
def _hurried() -> dict[str, int | bool] | None:
    """XLA options that compile for the CPU in a third of the time; those that this version knows."""
    if jax.default_backend() != "cpu":
        return None
    wanted = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    for options in (wanted, {"xla_backend_optimization_level": 0}):
        try:
            jax.jit(lambda x: x + 1, compiler_options=options).lower(0.0).compile()
            return options
        except Exception:  # "No such compile option", of a type that belongs to XLA
            continue
    return None


def by_path(tree: Any) -> dict[str, np.ndarray]:
    """Leaves of a nested dict by "path/of/names"."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def shapes(tree: Any) -> Any:
    """Structure, shapes and dtypes: what has to stay constant, without what compilers may know beyond."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)


def _partition(carry: Carry) -> tuple[list[Any], Callable[[list[Any]], Carry]]:
    """The leaves that have gradients (positions and flags do not), and how to put others in their place."""
    leaves, structure = jax.tree.flatten(carry)
    moves = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def rebuild(new: list[Any]) -> Carry:
        new = iter(new)
        return structure.unflatten([next(new) if m else old for m, old in zip(moves, leaves, strict=True)])

    return [leaf for m, leaf in zip(moves, leaves, strict=True) if m], rebuild


def _zeros_like(carry: Carry) -> list[np.ndarray]:
    return [np.zeros(leaf.shape, leaf.dtype) for leaf in _partition(carry)[0]]
