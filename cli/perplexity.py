"""What a language model's tokens cost by how much text stands before them, and perplexity at exact lengths.

    longwave perplexity runs/language_modelling
    longwave perplexity runs/language_modelling --lengths 512,1024,2048,4096
    longwave perplexity WEIGHTS --source pg19 --lengths 1000,2000,4000,10000 --last 50

Prints two tables and draws them: the costs of all tokens of a split by the number of tokens read before, in the rows of
the model's own task; and, as PG-19 is scored, the perplexity of the last tokens of windows of each length, about ten a
document; documents that are shorter drop out. Exit code: 0, 1 if a model or text cannot be read, 2 if an argument is
wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longwave.cli.usage import UsageError

if TYPE_CHECKING:
    from longwave.tasks.language_modelling.evaluation import Length, Part

_BATCH = 16384  # tokens evaluated at a time in rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN_OR_WEIGHTS", help="the folder of a run, or of weights")
    parser.add_argument("--source", metavar="PATH", help="other texts: a file, a folder, or PG-19's layout")
    parser.add_argument("--split", default="test", help="train, valid or test (default)")
    parser.add_argument("--lengths", metavar="N,N,...", help="of windows; default: 1, 2, 4, 8 times the rows' length")
    parser.add_argument("--last", type=int, default=100, help="tokens of a window that are scored (default: 100)")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json, if the model's folder has none")
    parser.add_argument("--out", metavar="FILE.png", help="default: perplexity.png in the folder")


def run(args: argparse.Namespace) -> int:
    try:
        lengths = [int(n) for n in args.lengths.split(",")] if args.lengths else []
    except ValueError:
        raise UsageError(f"--lengths {args.lengths}: expected whole numbers with commas between them") from None
    if args.last < 1 or (lengths and min(lengths) <= args.last):
        raise UsageError(f"--lengths {args.lengths} --last {args.last}: expected lengths greater than --last, above 0")
    if args.split not in ("train", "valid", "test"):
        raise UsageError(f"--split {args.split}: expected train, valid or test")
    try:
        return _measure(args, lengths)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, UsageError):
            raise
        print(f"longwave perplexity: {error}", file=sys.stderr)
        return 1


def _measure(args: argparse.Namespace, lengths: list[int]) -> int:
    from longwave.cli.generate import tokeniser_of
    from longwave.cli.model import load_model
    from longwave.models.language_model import LanguageModel
    from longwave.tasks.language_modelling import evaluation
    from longwave.training import plot

    loaded = load_model(Path(args.model), compute=True)
    tokeniser_of(loaded.task, args.tokenizer)  # says what is wrong with it
    model, task = loaded.model, loaded.task
    assert isinstance(model, LanguageModel), "the task of language modelling makes one"
    given = {"source": args.source, "tokenizer": args.tokenizer}
    task = dataclasses.replace(task, **{name: value for name, value in given.items() if value})  # ty: ignore
    lengths = lengths or [n for n in (task.length * 2**i for i in range(4)) if n > args.last]

    parts = evaluation.by_position(model, task.stream(args.split, batch_size=max(1, _BATCH // task.length)))
    title = f"{task.name}, {args.split}"
    plot.table([_part(part) for part in parts], title=title)
    stream = task.rows(args.split).stream
    documents = evaluation.split_at(stream.read(0, len(stream)), task.tokeniser.separator)
    found = []
    for line in evaluation.windows(model, documents, lengths, last=args.last):
        found.append(line)
        print(_said(line, args.last), flush=True)
    path = Path(args.out or Path(args.model) / "perplexity.png")
    _draw(path, title, parts, found, args.last)
    print(path)
    return 0


def _part(part: Part) -> dict[str, str]:
    before = f"{part.first:,}" if part.last == part.first else f"{part.first:,} to {part.last:,}"
    bits = part.nll / math.log(2)
    return {"tokens read": before, "tokens": f"{part.tokens:,}", "bits a token": f"{bits:.3f}",
            "perplexity": f"{math.exp(min(part.nll, 700)):.3f}"}  # fmt: skip


def _said(line: Length, last: int) -> str:
    if not line.windows:
        return f"length {line.length:,}: no document is as long"
    return (
        f"length {line.length:,}: perplexity {line.perplexity:.3f} of the last {last} tokens, "
        f"{line.windows:,} windows of {line.documents:,} documents"
    )


def _draw(path: Path, title: str, parts: Sequence[Part], lengths: Sequence[Length], last: int) -> None:
    from matplotlib.figure import Figure

    from longwave.training.plot import TEST

    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    left, right = figure.subplots(1, 2)
    left.plot([p.last for p in parts], [p.nll / math.log(2) for p in parts], "o-", color=TEST, markersize=4)
    left.set(xlabel="tokens of the document read", ylabel="bits a token")
    there = [line for line in lengths if line.windows]
    right.plot([line.length for line in there], [line.perplexity for line in there], "o-", color=TEST, markersize=4)
    right.set(xlabel="length of the window", ylabel=f"perplexity of its last {last} tokens")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)
