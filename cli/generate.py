"""Write text with a trained language model.

    longwave generate runs/language_modelling --prompt "ROMEO:"
    longwave generate runs/language_modelling --prompt "ROMEO:" --temperature 0.8 --top_p 0.95 --seed 1
    longwave generate WEIGHTS --file prompts.txt --tokens 100 --temperature 0

The model is a run's folder, at its best step, or a folder of weights. A prompt's text appears as it is written; with
several prompts (--prompt again, or --file with one a line) they are written together, and printed one after another.
What stands on standard output is the text, prompts included; speeds go to standard error. A row ends at the
separator of documents, unless --endless is given. Exit code: 0, 1 if a model cannot be read, 2 if an argument is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longwave.cli.usage import UsageError

if TYPE_CHECKING:
    import numpy as np

    from longwave.models.generate import Speed
    from longwave.models.sampling import Sampling
    from longwave.tasks.language_modelling.tokeniser import Tokeniser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN_OR_WEIGHTS", help="the folder of a run, or of weights")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="what is gone on from; may be given again")
    parser.add_argument("--file", metavar="FILE", help="prompts, one a line")
    parser.add_argument("--tokens", type=int, default=256, help="at most, for each prompt (default: 256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1; 0: the most probable token")
    parser.add_argument("--top_k", type=int, help="draw from the K most probable tokens")
    parser.add_argument("--top_p", type=float, help="draw from the fewest tokens of this probability together")
    parser.add_argument("--min_p", type=float, help="draw from tokens this share as probable as the most probable")
    parser.add_argument("--repetition_penalty", type=float, help="above 1: tokens that were there become less probable")
    parser.add_argument("--bare", action="store_true", help="no separator of documents before prompts")
    parser.add_argument("--endless", action="store_true", help="go on where a text ends, with another")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; each further one has the next")
    parser.add_argument("--piece", type=int, help="read prompts in pieces of so many tokens, in less memory")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json, if the model's folder has none")


def run(args: argparse.Namespace) -> int:
    prompts = _prompts(args)
    for name in ("tokens", "piece"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UsageError(f"--{name} {value}: expected at least 1")
    if not 0 <= args.seed <= 2**31 - len(prompts):
        raise UsageError(f"--seed {args.seed}: expected 0 to 2^31 less the number of prompts")
    from longwave.models.sampling import sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    try:
        choice = sampling(**{name: getattr(args, name) for name in names})
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        return _generate(args, prompts, choice)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, UsageError):
            raise
        print(f"longwave generate: {error}", file=sys.stderr)
        return 1


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.file and args.prompt:
        raise UsageError("--file and --prompt: expected one of them")
    if not args.file:
        return args.prompt or [""]
    try:
        lines = Path(args.file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--file {args.file}: expected a text file ({error})") from error
    if not lines:
        raise UsageError(f"--file {args.file}: expected a prompt a line; it is empty")
    return lines


def _generate(args: argparse.Namespace, prompts: Sequence[str], choice: Sampling) -> int:
    from longwave.cli.model import load_model
    from longwave.models.generate import generate
    from longwave.models.language_model import LanguageModel
    from longwave.models.sampling import Below

    loaded = load_model(Path(args.model), compute=True)
    if not isinstance(model := loaded.model, LanguageModel):
        raise UsageError(f"RUN_OR_WEIGHTS {args.model}: {loaded.task.name} has no language model")
    words = tokeniser_of(loaded.task, args.tokenizer)
    if words.vocab > model.vocab:
        raise UsageError(f"--tokenizer: it has {words.vocab} ids, the model {model.vocab}; expected no more")
    # Every document that was trained on begins with the separator.
    first = [] if args.bare else [words.separator]
    ids = [[*first, *words.encode(prompt.encode(errors="surrogateescape"))] for prompt in prompts]
    if not all(ids):
        raise UsageError("--bare: a prompt is empty; expected a token to go on from")
    if words.vocab < model.vocab:
        choice = dataclasses.replace(choice, transforms=(Below(words.vocab), *choice.transforms))
    told: list[Speed] = []
    blocks = generate(
        model,
        ids,
        tokens=args.tokens,
        sampling=choice,
        stop=() if args.endless else (words.separator,),
        seeds=range(args.seed, args.seed + len(prompts)),
        piece=args.piece,
        report=told.append,
    )
    # A prompt's bytes need not be text.
    _print(words, [prompt.encode(errors="surrogateescape").decode(errors="replace") for prompt in prompts], blocks)
    print(told[0], file=sys.stderr)
    return 0


def tokeniser_of(task: object, file: str | None) -> Tokeniser:
    """The one named, or the task's own."""
    from longwave.tasks.language_modelling.next_token import NextToken
    from longwave.tasks.language_modelling.tokeniser import tokeniser

    if not isinstance(task, NextToken):
        raise UsageError(f"RUN_OR_WEIGHTS: its task is {getattr(task, 'name', task)}; expected language modelling")
    if file:
        return tokeniser(file, task.separator)
    if task.tokenizer is None and task.vocab not in (None, tokeniser(None).vocab):
        raise UsageError(f"the model has {task.vocab} ids, no bytes, and no tokenizer.json: --tokenizer FILE names it")
    return task.tokeniser


def _print(words: Tokeniser, prompts: Sequence[str], blocks: Iterable[np.ndarray]) -> None:
    """One prompt's text as it comes; those of several when all are done."""
    writers = [words.writer() for _ in prompts]
    texts = list(prompts)
    say = lambda text: print(text, end="", flush=True)
    if len(prompts) == 1:
        say(prompts[0])
    for block in blocks:
        for row, new in enumerate(block):
            text = writers[row](new[new >= 0])
            texts[row] += text
            if len(prompts) == 1:
                say(text)
    for row, writer in enumerate(writers):
        rest = writer((), last=True)
        print(rest if len(prompts) == 1 else f"{'' if row == 0 else '-' * 40 + chr(10)}{texts[row]}{rest}")
