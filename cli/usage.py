"""What subcommands share: errors in how they were called, and hyper-parameters given on the command line."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any


class UsageError(ValueError):
    """A wrong argument: the message names it, what was given and what is allowed."""


def nearest(name: str, names: Iterable[str]) -> str:
    """ ", did you mean 'x'?" where a name is close, else an empty string."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def assignments(items: Sequence[str], argument: str) -> dict[str, Any]:
    """["N=8", "method=lin"] -> {"N": 8, "method": "lin"}: Python literals, and anything else is a string."""
    given = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"{argument} {item!r}: expected NAME=VALUE, e.g. {argument} N=8")
        try:
            given[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            given[name] = text
    return given


def check_accepts(function: Callable[..., Any], names: Iterable[str], argument: str) -> None:
    """Raises UsageError for a name that is not a keyword of `function`, with the nearest that is."""
    function = function.__init__ if isinstance(function, type) else function  # nnx hides it behind *args
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    allowed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "rngs"]
    for name in names:
        if name not in allowed:
            listed = f"expected one of {', '.join(allowed)}" if allowed else "there is none to set"
            raise UsageError(f"{argument} {name}: {listed}{nearest(name, allowed)}")
