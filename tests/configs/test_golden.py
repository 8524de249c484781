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
from longwave.layers.mixer import parameter_roles
from tests.configs import lra_transformers
from tests.training.test_sharding import check_rules

GOLDEN = Path(__file__).parent / "golden"
LISTOPS = "configs/lra/listops.gin"
TASKS = ("text", "retrieval", "image", "pathfinder", "pathx")  # with model files of their own
RECALL = (
    "induction_lengths",
    "induction_heads_mamba",
    "selective_copying",
    "mqar_zoology",
    "mqar_based",
    "mqar_mamba2",
    "mqar_linear",
    "set_disjointness",
    "read_twice",
    "passkey",
    "documents",
    "needle",
)
SELECTIVE = ("mamba", "mamba2", "memmamba")
LINEAR = ("linear_attention", "retnet", "lightning", "gla", "deltanet", "gated_deltanet", "kda", "based", "jrt")
LANGUAGE = (*SELECTIVE, "memmamba_paper", "transformer_lm")

# What is named together on one command line.
RUNS: tuple[tuple[str, ...], ...] = (
    ("configs/demo.gin",),
    (LISTOPS, "configs/lra/listops/s4.gin"),
    (LISTOPS, "configs/lra/listops/s4d.gin"),
    (LISTOPS, "configs/models/s5.gin"),
    (LISTOPS, "configs/models/lru.gin"),
    (LISTOPS, "configs/lra/listops/long_conv.gin"),
    (LISTOPS, "configs/models/sgconv.gin"),
    (LISTOPS, "configs/models/transformer.gin"),
    (LISTOPS, "configs/lra/listops/s4_v3.gin"),
    (LISTOPS, "configs/lra/listops/s5.gin"),
    ("configs/lra/listops/cpu_hour.gin",),
    ("configs/lra/text/cpu_hour.gin",),
    ("configs/lra/pathfinder/cpu_hour.gin",),
    ("configs/lra/path256.gin", "configs/lra/path256/s4.gin"),
    ("configs/lra/path256.gin", "configs/lra/path256/s4d.gin"),
    ("configs/lra/pathx.gin", "configs/lra/pathx/nfs_transformer.gin"),
    ("configs/tasks/smnist.gin", "configs/models/s4d.gin"),
    ("configs/tasks/smnist_cpu.gin",),
    ("configs/tasks/pmnist.gin", "configs/models/s4d.gin"),
    ("configs/tasks/scifar.gin", "configs/models/s4d.gin"),
    ("configs/tasks/smnist.gin", "configs/models/lssl.gin"),
    ("configs/tasks/smnist.gin", "configs/tasks/smnist_lssl.gin"),
    ("configs/tasks/pmnist.gin", "configs/tasks/pmnist_lssl.gin"),
    ("configs/tasks/scifar.gin", "configs/tasks/scifar_lssl.gin"),
    ("configs/tasks/scifar.gin", "configs/tasks/scifar_s4.gin"),
    ("configs/tasks/sc35.gin", "configs/models/s4d.gin"),
    ("configs/tasks/sc10.gin", "configs/models/s4d.gin"),
    ("configs/tasks/sc35.gin", "configs/tasks/sc35_s4.gin"),
    ("configs/tasks/sc35.gin", "configs/tasks/sc35_s5.gin"),
    ("configs/tasks/mqar.gin",),
    ("configs/tasks/induction_heads.gin",),
    *((f"configs/tasks/{task}.gin",) for task in RECALL),
    ("configs/tasks/passkey.gin", "configs/tasks/passkey_memmamba.gin"),
    *((LISTOPS, f"configs/lra/models/{model}{both}.gin") for model in SELECTIVE for both in ("", "_bidirectional")),
    *((LISTOPS, f"configs/lra/models/{model}.gin") for model in ("mlstm", "slstm", "aaren", "rglru", "elm")),
    *((LISTOPS, f"configs/lra/models/{model}.gin") for model in LINEAR),
    *(("configs/tasks/language_modelling.gin", f"configs/models/{model}.gin") for model in LANGUAGE),
    *(
        ("configs/tasks/language_modelling.gin", f"configs/models/{model}.gin")
        for model in ("rat16", "rat64", "rat_swa")
    ),
    (LISTOPS, "configs/lra/models/rat.gin"),
    ("configs/tasks/mqar_rat.gin",),
    *(("configs/tasks/language_modelling.gin", f"configs/models/{model}.gin") for model in ("mom", "mom_1.3b")),
    (LISTOPS, "configs/lra/models/mom.gin"),
    ("configs/tasks/mqar_mom.gin",),
    ("configs/tasks/language_modelling.gin",),
)
# Pretraining: the files of task and model, and what is named behind them.
PRETRAINING = (
    *((f"configs/lra/{task}.gin", f"configs/lra/{task}/nfs_s4.gin") for task in ("listops", *TASKS)),
    *(
        (f"configs/lra/{task}.gin", f"configs/lra/{task}/nfs_{model}.gin", f"configs/lra/{task}/{kind}.gin")
        for task in ("listops", *TASKS)
        for model, kind in (("transformer", "masked"), ("s4", "causal"))
    ),
    *(
        (f"configs/lra/{task}.gin", f"configs/lra/{task}/s4_v3.gin", f"configs/lra/{task}/masked.gin")
        for task in ("retrieval", "image", "pathfinder", "pathx")
    ),
)
RECORDS = (
    tuple(
        (f"configs/lra/{task}.gin", f"configs/lra/{task}/{model}.gin")
        for task in TASKS
        for model in ("s4", "s4_v3", "s4d", "s5", "long_conv")
    )
    + tuple(lra_transformers.COUNTS)
    + PRETRAINING
)
# Parameters of the whole model where the official code publishes or implies a count.
COUNTS = {
    (LISTOPS, "configs/lra/listops/s4.gin"): 815_186,
    (LISTOPS, "configs/lra/listops/s4d.gin"): 815_162,
    (LISTOPS, "configs/lra/listops/long_conv.gin"): 4_728_330,
    ("configs/tasks/smnist.gin", "configs/tasks/smnist_lssl.gin"): 207_358,
    ("configs/tasks/pmnist.gin", "configs/tasks/pmnist_lssl.gin"): 207_358,
    ("configs/tasks/scifar.gin", "configs/tasks/scifar_lssl.gin"): 2_116_098,
    ("configs/lra/path256.gin", "configs/lra/path256/s4.gin"): 1_288_706,
    **lra_transformers.COUNTS,
} | {
    (f"configs/lra/{task}.gin", f"configs/lra/{task}/{model}.gin"): count
    for task, *counts in (
        ("text", 843_594, 843_570),
        ("retrieval", 1_096_522, 1_096_498),
        ("image", 3_564_682, 3_564_298),
        ("pathfinder", 1_288_706, 1_190_402),
        ("pathx", 1_288_706, 1_190_402),
    )
    for model, count in zip(("s4", "s4d"), counts, strict=True)
}


def golden(run: tuple[str, ...]) -> Path:
    run = [f for f in run if not f.startswith("tests/")]
    parts = [f.removeprefix("configs/").removesuffix(".gin").replace("/", "_") for f in run]
    return GOLDEN / f"{'+'.join(parts)}.txt"


SLOWER = [r for r in lra_transformers.COUNTS if "local" in r[-1] or "path256" in r[-1] or "pathx" in r[-1]]
LATER = {r for r in RECORDS if r not in COUNTS or r in SLOWER}
LATER |= {(LISTOPS, f"configs/lra/models/{m}.gin") for m in LINEAR if m not in ("lightning", "based")}  # all alike
ALL = [pytest.param(r, marks=pytest.mark.full if r in LATER else ()) for r in RUNS + RECORDS]


@pytest.mark.parametrize("run", ALL, ids=lambda run: golden(run).stem)
def test_operative_config(run):
    config = loader.load(run)
    task, backbone = config.run.task, config.run.backbone
    model = nnx.eval_shape(lambda: task.head(backbone(task.inputs, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == COUNTS.get(run, count)
    check_rules(parameter_roles(model), golden(run).stem)
    config.check_used()
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        golden(run).write_text(config.operative)
    assert config.operative == golden(run).read_text(), "UPDATE_GOLDEN=1 writes it anew"


def test_every_config_is_in_a_run_and_every_text_has_one():
    configs = {name: (names.HERE.parent / name).read_text() for name in names.known_files()}
    named = {file for run in RUNS + RECORDS for file in run if not file.startswith("tests/")}
    included = {name for name in configs if any(f"include '{name}'" in text for text in configs.values())}
    assert set(configs) == named | included
    assert {p.name for p in GOLDEN.glob("*.txt")} == {golden(run).name for run in RUNS + RECORDS}
