"""The two kinds of model input: what a task declares and an encoder reads."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Integer tokens: ids in [0, vocab), at most `length` of them; arrays are (b, length)."""

    vocab: int
    length: int


@dataclasses.dataclass(frozen=True)
class Features:
    """Real vectors; arrays are (b, length, channels)."""

    channels: int
    length: int


Inputs = Tokens | Features
