"""The documents of a corpus, by split: the built-in sample, a text file, a folder of texts, or PG-19's layout.

PG-19 (arXiv:1911.05507)   train/ validation/ test/ of .txt files, one book each; metadata.csv is not needed
a folder of .txt files     shares of the documents, drawn once, are held out for validation and for test
one file                   its last bytes are held out: validation, then test; cut at ends of lines
"""

from __future__ import annotations

import bz2
import hashlib
import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

SPLITS = ("train", "valid", "test")
SAMPLE = "shakespeare.txt.bz2"
_FOLDERS = {"train": "train", "valid": "validation", "test": "test"}
_SEED = 42  # of which documents are held out

Document = Callable[[], bytes]  # read when it is needed: a corpus may be larger than memory


def documents(source: Path | None, held_out: float) -> Mapping[str, Sequence[Document]]:
    """Split -> documents; source None: the sample.

    held_out: the share of validation, and that of test, where the source has no splits of its own.

    Raises FileNotFoundError, and ValueError where there is too little to split.
    """
    if source is None:
        return _parts(_sample, held_out)
    if source.is_file():
        return _parts(source.read_bytes, held_out)
    if not source.is_dir():
        raise FileNotFoundError(f"source = {str(source)!r} is not there: expected a text file or a folder of texts")
    if all((source / folder).is_dir() for folder in _FOLDERS.values()):
        found = {split: _texts(source / folder) for split, folder in _FOLDERS.items()}
        if empty := [_FOLDERS[split] for split, texts in found.items() if not texts]:
            raise ValueError(f"source = {str(source)!r}: {empty[0]}/ has no .txt file")
        return {split: [path.read_bytes for path in texts] for split, texts in found.items()}
    texts = _texts(source)
    if len(texts) < 3:
        raise ValueError(f"source = {str(source)!r} has {len(texts)} .txt files: expected 3 or more, or the one file")
    held = min(max(1, round(held_out * len(texts))), (len(texts) - 1) // 2)  # one is left to train on
    order = np.random.default_rng(_SEED).permutation(len(texts))
    chosen = {"valid": order[:held], "test": order[held : 2 * held], "train": order[2 * held :]}
    return {split: [texts[i].read_bytes for i in sorted(chosen[split])] for split in SPLITS}


def identity(source: Path | None) -> str:
    """What tells sources apart, without reading them: names, sizes and times of the files."""
    if source is None:
        return "shakespeare"
    files = [source] if source.is_file() else _texts(source)
    if not files:
        raise FileNotFoundError(f"source = {str(source)!r}: expected a text file, or a folder with .txt files")
    facts = [(str(f.relative_to(source.parent)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    stem = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in source.stem)
    return f"{stem}_{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"


def _sample() -> bytes:
    return bz2.decompress((importlib.resources.files("longwave.tasks.language_modelling") / SAMPLE).read_bytes())


def _texts(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.txt"))


def _parts(read: Document, held_out: float) -> dict[str, list[Document]]:
    """One text in three, each of whole lines."""
    text = read()
    size = len(text)
    cuts = [text.find(b"\n", int(size * (1 - share))) + 1 or size for share in (2 * held_out, held_out)]
    bounds = dict(zip(SPLITS, ((0, cuts[0]), (cuts[0], cuts[1]), (cuts[1], size)), strict=True))
    if any(start >= stop for start, stop in bounds.values()):
        raise ValueError(f"the text has {size:,} bytes and too few lines to hold out two times {held_out:.1%} of it")
    return {split: [lambda part=slice(*bound): text[part]] for split, bound in bounds.items()}
