"""Turn a published Mamba or Mamba-2 checkpoint into a folder of weights.

    longwave import mamba-130m-hf --out weights
    longwave import mamba2-130m --out weights

DIR holds config.json and model.safetensors, its index and parts, or pytorch_model.bin: the layout of the state-spaces
authors, or that of the transformers library ("-hf"). The .bin is a pickle, of which tensors alone are read. Every
tensor must be used, every parameter set, every shape be that of the config; what would be computed otherwise is
refused. tokenizer.json is taken along. Exit code: 0, 1 if the checkpoint is refused, 2 if an argument is wrong.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from longwave.cli.export import new_folder, refuse_existing
from longwave.cli.usage import UsageError

if TYPE_CHECKING:
    import numpy as np

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")  # in order of preference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="the folder of the checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR2", help="a new folder")


def run(args: argparse.Namespace) -> int:
    refuse_existing(args.out)
    source: Path = args.checkpoint
    found = [source / name for name in FILES if (source / name).is_file()]
    if not (source / "config.json").is_file() or not found:
        raise UsageError(f"DIR {source}: expected config.json and one of {', '.join(FILES)}")
    from longwave.models.state_spaces import Refused
    from longwave.models.weights import WeightsMismatch

    try:
        count = convert(source, found[0], args.out)
    except (Refused, WeightsMismatch, OSError, ValueError) as error:
        print(f"longwave import: {error}", file=sys.stderr)
        return 1
    print(f"written {args.out}: {count:,} parameters")
    if not (args.out / "tokenizer.json").is_file():
        print(
            f"{source} has no tokenizer.json: put the model's beside the weights to read and write text",
            file=sys.stderr,
        )
    return 0


def convert(source: Path, file: Path, out: Path) -> int:
    """Writes the folder of weights; the number of parameters."""
    from longwave.cli.model import CONFIG, TOKENIZER, WEIGHTS, ModelAlone
    from longwave.configs import loader
    from longwave.models import safetensors, state_spaces, weights
    from longwave.training.state import ModelDef

    description = state_spaces.describe(json.loads((source / "config.json").read_text()))
    arrays = state_spaces.convert(description, _tensors(file))
    with new_folder(out) as folder:
        (folder / CONFIG).write_text(state_spaces.config_text(description, source.resolve().name))
        run = loader.load([str(folder / CONFIG)], settings=ModelAlone).run
        model = ModelDef(lambda rngs: run.task.head(run.backbone(run.task.inputs, rngs=rngs), rngs=rngs))
        weights.check(arrays, model.abstract_params, str(source))
        safetensors.save(folder / WEIGHTS, arrays)
        if (source / TOKENIZER).is_file():
            shutil.copyfile(source / TOKENIZER, folder / TOKENIZER)
    return sum(array.size for array in arrays.values())


def _tensors(file: Path) -> dict[str, np.ndarray]:
    from longwave.models import safetensors, torch_file

    return torch_file.load(file) if file.suffix == ".bin" else safetensors.load(file)
