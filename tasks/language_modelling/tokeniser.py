"""Text to ids and back: bytes as they are, or a tokenizer.json of the `tokenizers` library.

Both have a `separator`: the id that stands before every document of a corpus, so that a model learns where texts end,
and can begin one from nothing.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int


class Tokeniser(Protocol):
    """vocab: how many ids.     separator: of documents.    name: what tells tokenisers apart.

    writer: a function that takes ids as they come and gives text as soon as it is whole letters; at the end, called
            with `last=True`, the rest.
    """

    vocab: int
    separator: int
    name: str

    def encode(self, text: bytes) -> Int[np.ndarray, "t"]: ...

    def decode(self, ids: Iterable[int]) -> bytes: ...

    def writer(self) -> Callable[..., str]: ...


class Bytes:
    """An id a byte, and 256 between documents. Any bytes come back as they were."""

    vocab, separator, name = 257, 256, "bytes"

    def encode(self, text: bytes) -> Int[np.ndarray, "t"]:
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> bytes:
        """Separators are left out."""
        return bytes(int(i) for i in ids if i != self.separator)

    def writer(self) -> Callable[..., str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda ids, last=False: decoder.decode(self.decode(ids), final=last)


class TokenizerFile:
    """A tokenizer.json. Texts must be UTF-8; what its normaliser changes does not come back.

    separator: the text of the token that separates documents.
    """

    def __init__(self, path: str | os.PathLike[str], *, separator: str = "<|endoftext|>"):
        import tokenizers  # only who reads such a file needs the library

        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is not there: expected a tokenizer.json")
        content = self.path.read_bytes()
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{self.path}: expected a tokenizer.json of the tokenizers library ({error})") from error
        found = self._tokenizer.token_to_id(separator)
        if found is None:
            raise ValueError(f"separator = {separator!r}: {self.path} has no such token; expected one of its own")
        self.separator: int = found
        self.vocab: int = max(self._tokenizer.get_vocab().values()) + 1  # ids may have gaps
        self.name = hashlib.sha256(content + separator.encode()).hexdigest()[:12]

    def encode(self, text: bytes) -> Int[np.ndarray, "t"]:
        try:
            decoded = text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"a text is no UTF-8, as {self.path} needs: {error}; bytes can be any") from error
        return np.array(self._tokenizer.encode(decoded, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> bytes:
        """Special tokens are left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True).encode()

    def writer(self) -> Callable[..., str]:
        from tokenizers.decoders import DecodeStream

        stream, said, had = DecodeStream(skip_special_tokens=True), [], []

        def write(ids: Iterable[int], last: bool = False) -> str:
            had.extend(int(i) for i in ids)
            new = "".join(stream.step(self._tokenizer, int(i)) or "" for i in ids)
            said.append(new)
            return new + self.decode(had).decode()[len("".join(said)) :] if last else new

        return write


@functools.lru_cache(maxsize=8)
def tokeniser(path: str | None, separator: str = "<|endoftext|>") -> Tokeniser:
    """Bytes, or the tokenizer.json at `path`."""
    return Bytes() if path is None else TokenizerFile(path, separator=separator)
