"""The operative config of every run in `configs/`, as text: no default changes unseen.

UPDATE_GOLDEN=1 pytest tests/configs/test_golden.py writes the texts anew; read the diff before committing it.
"""

import math
import os
from pathlib import Path

import jax
import pytest
from flax import nnx

from longwave.configs import loader, names

GOLDEN = Path(__file__).parent / "golden"
# What is named together on one command line.
RUNS: tuple[tuple[str, ...], ...] = (
    ("configs/demo.gin",),
    ("configs/lra/listops.gin", "configs/models/s4d.gin"),
    ("configs/lra/listops.gin", "configs/models/transformer.gin"),
)
# Parameters of the whole model where the official code publishes or implies a count.
COUNTS = {("configs/lra/listops.gin", "configs/models/s4d.gin"): 815_162}


def golden(run: tuple[str, ...]) -> Path:
    parts = [f.removeprefix("configs/").removesuffix(".gin").replace("/", "_") for f in run]
    return GOLDEN / f"{'+'.join(parts)}.txt"


@pytest.mark.parametrize("run", RUNS, ids=lambda run: golden(run).stem)
def test_operative_config(run):
    config = loader.load(run)
    task, backbone = config.run.task, config.run.backbone
    model = nnx.eval_shape(lambda: task.head(backbone(task.inputs, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == COUNTS.get(run, count)
    config.check_used()
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        golden(run).write_text(config.operative)
    assert config.operative == golden(run).read_text(), "UPDATE_GOLDEN=1 writes it anew"


def test_every_config_is_in_a_run_and_every_text_has_one():
    configs = {name: (names.HERE.parent / name).read_text() for name in names.known_files()}
    named = {file for run in RUNS for file in run}
    included = {name for name in configs if any(f"include '{name}'" in text for text in configs.values())}
    assert set(configs) == named | included
    assert {p.name for p in GOLDEN.glob("*.txt")} == {golden(run).name for run in RUNS}
