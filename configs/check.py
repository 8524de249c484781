"""Do values fit the code that they are bound to? Signatures, type hints, near names. Knows nothing of gin."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Union

from beartype.door import is_bearable
from beartype.roar import BeartypeException

UNKNOWN = object()  # the result of a function that does not say what it returns: fits every hint


class Instance:
    """Stands for an object that is yet to be built: `isinstance` sees its class, nothing is called."""

    def __init__(self, cls: type):
        self._cls = cls

    __class__ = property(lambda self: self._cls)


def result(target: Callable[..., Any]) -> Any:
    """What stands for `target()` before it is called: an Instance, or UNKNOWN."""
    returns = target if isinstance(target, type) else _type_hints(target).get("return")
    returns = typing.get_origin(returns) or returns
    return Instance(returns) if isinstance(returns, type) and returns is not types.UnionType else UNKNOWN


def signature(target: Callable[..., Any]) -> inspect.Signature:
    """Signature of the call `target(...)`; by hand: the metaclass of flax modules hides it."""
    if not isinstance(target, type):
        return inspect.signature(target)
    make = target.__init__ if target.__init__ is not object.__init__ else target.__new__
    if make is object.__new__:
        return inspect.Signature()
    return inspect.Signature(list(inspect.signature(make).parameters.values())[1:])


@functools.cache
def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that can be bound by name, with evaluated annotations (`Any` where there is none)."""
    hints = _type_hints(target.__init__ if isinstance(target, type) else target)
    if hasattr(target, "__dataclass_fields__"):  # inherited fields resolve in the module that declares them
        hints |= _type_hints(target)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: p.replace(annotation=hints.get(name, Any))
        for name, p in signature(target).parameters.items()
        if p.kind in named
    }


def takes_any_name(target: Callable[..., Any]) -> bool:
    """Whether it has a `**kwargs`."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature(target).parameters.values())


def required(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters without a default."""
    return {name: p for name, p in parameters(target).items() if p.default is inspect.Parameter.empty}


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of type `hint`. Looks at every element (beartype samples); a bool is no number."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if value is UNKNOWN or hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if getattr(origin or hint, "_is_protocol", False):
        return not _methods(origin or hint) - set(dir(_type(value)))
    if isinstance(value, bool) and hint in (int, float):
        return False
    if hint is float and _type(value) is int:
        return True
    if args and isinstance(origin, type) and isinstance(value, tuple | list | dict):
        return isinstance(value, origin) and _elements_fit(value, origin, args)
    try:
        return is_bearable(value, hint)
    except BeartypeException:  # a hint that cannot be judged (an unresolved name): let the code itself complain
        return True


def spelled(hint: Any) -> str:
    """A type hint as a reader writes it: `int`, `tuple[int, int] | None`, `one of 'lin', 'inv'`."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return re.sub(r"\b(?:\w+\.)+(\w)", r"\1", inspect.formatannotation(hint))


def literals(hint: Any) -> list[str]:
    """The strings that a hint lists in a Literal, at any depth."""
    if typing.get_origin(hint) is Literal:
        return [arg for arg in typing.get_args(hint) if isinstance(arg, str)]
    return [name for arg in typing.get_args(hint) for name in literals(arg)]


def nearest(word: str, names: Mapping[str, str] | Iterable[str]) -> str:
    """'; did you mean X?' with the names closest to `word`, or ''. A mapping gives full spellings."""
    full = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    close = difflib.get_close_matches(word.lower(), {name.lower() for name in full}, n=2)
    found = list(dict.fromkeys(full[name] for c in close for name in full if name.lower() == c))
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _type_hints(f: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(f)
    except (
        NameError,
        TypeError,
        AttributeError,
    ):  # names imported for type checkers only, or no hints at all
        return {}


def _type(value: Any) -> type:
    return value.__class__ if type(value) is Instance else type(value)


def _methods(protocol: type) -> set[str]:
    """What an instance must have that its class already shows: methods and properties, no data attributes."""
    own = [vars(base) for base in protocol.__mro__ if getattr(base, "_is_protocol", False)]
    skip = {"__init__", "__subclasshook__", "__class_getitem__"}
    members = {name for d in own for name, m in d.items() if isinstance(m, types.FunctionType | property)}
    return members - skip


def _elements_fit(value: Any, origin: type, args: tuple[Any, ...]) -> bool:
    if isinstance(value, dict):
        key, item = args if len(args) == 2 else (args[0], Any)
        return all(fits(k, key) and fits(v, item) for k, v in value.items())
    if origin is tuple and args[-1] is not Ellipsis:
        return len(value) == len(args) and all(map(fits, value, args))
    return all(fits(v, args[0]) for v in value)
