"""Write a trained model as a folder of weights.

    longwave export runs/language_modelling --out weights
    longwave export runs/language_modelling --out weights --dtype bfloat16

The folder holds config.gin, which builds the model, model.safetensors with its parameters by path, layers numbered
through the depth (and under model_state/ what it holds besides, such as BatchNorm's statistics), and tokenizer.json if
the model reads tokens of one. `longwave generate` takes it as it takes a run; other programs read the parameters with
any safetensors library. It appears whole or not at all. Exit code: 0, 1 if the model cannot be read, 2 if an argument
is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from longwave.cli.usage import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN_OR_WEIGHTS", help="the folder of a run, at its best step, or of weights")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the parameters; those that mixers keep in float32 stay so (default: float32)",
    )


def run(args: argparse.Namespace) -> int:
    refuse_existing(args.out)
    import jax

    from longwave.cli.model import CONFIG, TOKENIZER, WEIGHTS, load_model
    from longwave.models import weights
    from longwave.training import state

    try:
        loaded = load_model(Path(args.model))
    except UsageError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        print(f"longwave export: {error}", file=sys.stderr)
        return 1
    params, rest = state.split(loaded.model)
    model = loaded.definition.merge(loaded.definition.cast(params, args.dtype), rest)
    with new_folder(args.out) as folder:
        (folder / CONFIG).write_text(loaded.text)
        weights.write(folder / WEIGHTS, model)
        if tokenizer := getattr(loaded.task, "tokenizer", None):
            shutil.copyfile(Path(tokenizer).expanduser(), folder / TOKENIZER)
    print(f"written {args.out}: {sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters")
    return 0


def refuse_existing(out: Path) -> None:
    if out.exists():
        raise UsageError(f"--out {out} exists: expected a folder that does not")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` in one step when all is written, and is gone if something fails."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
