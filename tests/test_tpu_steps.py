"""Whole training steps of the S4 family, compiled by the TPU compiler with no TPU."""

import math
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from longwave.configs import loader
from longwave.kernels import aot
from longwave.training.program import build

SMALL = (
    "models.Backbone.width=64",
    "models.Backbone.depth=2",
    "LENGTH=256",
    "train.batch_size=8",
    "train.mesh={'data': 2, 'fsdp': 2}",
)

needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=aot.missing() or "")


def compile_step(slice_of, task_file, model_file, *overrides):
    """The report on the step of a config of record."""
    run = loader.load((task_file, model_file), overrides).run
    program = build(run, aot.topology(slice_of)[: math.prod(run.mesh.values())])
    arguments = program.state, program.batch, jax.eval_shape(lambda: jax.random.key(0))
    return aot.compile(program.train_step, *arguments, mesh=program.mesh, parameters=program.state.params)


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "slice_of"),
    [
        ("s4", "v5e:2x2"),
        *(pytest.param("s4", slice_of, marks=pytest.mark.large) for slice_of in ("v5p:2x2x1", "v6e:2x2")),
        *(pytest.param(model, "v5e:2x2", marks=pytest.mark.large) for model in ("s4d", "s5")),
    ],
)
def test_a_small_sharded_step_compiles_and_gathers_no_activation(model, slice_of):
    small = [o for o in SMALL if model != "s5" or "width" not in o]
    small += ["S5.P=64", "S5.J=2", "models.Backbone.width=64"] if model == "s5" else [f"{model.upper()}.N=16"]
    report = compile_step(
        slice_of, "tests/configs/stand_ins/pathfinder.gin", f"configs/lra/pathfinder/{model}.gin", *small
    )
    assert report.fits
    gathered = [shape for c in report.collectives if c.kind == "all-gather" for shape in c.results]
    assert not [shape for shape in gathered if 256 in shape.dims]  # the length: only parameters have it not


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param("{'data': 16}", id="data"),
        pytest.param("{'data': 4, 'seq': 4}", id="ring", marks=pytest.mark.large),
    ],
)
@pytest.mark.parametrize(
    ("length", "width"), [(512, 128), pytest.param(1024, 512, marks=pytest.mark.large)], ids=["small", "of record"]
)
def test_a_transformer_on_16_chips_runs_the_attention_kernels(length, width, mesh):
    """One layer: forward and backward kernels in the step, and no gathered sequence."""
    files = "tests/configs/stand_ins/pathfinder.gin", "configs/models/transformer.gin"
    small = (
        "models.Backbone.depth=1",
        f"models.Backbone.width={width}",
        f"LENGTH={length}",
        "STEPS=10",
        "train.batch_size=32",
    )
    report = compile_step("v5e:4x4", *files, *small, f"train.mesh={mesh}")
    assert report.fits
    assert aot.custom_calls(report.hlo)["tpu_custom_call"] == 2
    gathered = [shape for c in report.collectives if c.kind == "all-gather" for shape in c.results]
    assert not [shape for shape in gathered if length in shape.dims]


@needs_compiler
@pytest.mark.full
@pytest.mark.large
def test_path_x_fits_one_v5e_chip(capsys):
    """16,384 steps, 6 x 256, batch 16, rematerialised: forward, backward and update on one chip."""
    report = compile_step(
        "v5e:2x2",
        "configs/lra/pathx.gin",
        "configs/lra/pathx/s4.gin",
        "models.Backbone.remat=True",
        "train.mesh={'data': 1}",
    )
    with capsys.disabled():
        print(report.table())
    assert report.fits


# A batch of 50 does not divide among 16 chips.
WHOLE = {"image": ("train.batch_size=64",)}


@needs_compiler
@pytest.mark.full
@pytest.mark.large
@pytest.mark.parametrize("task", ["listops", "text", "retrieval", "image", "pathfinder", "pathx", "path256"])
def test_every_task_compiles_for_16_v5e_chips_and_fits(task, capsys):
    """As a user asks for it; the exit code says whether it fits. A process of its own: the compiler may abort."""
    command = [
        sys.executable,
        "train.py",
        f"configs/lra/{task}.gin",
        f"configs/lra/{task}/s4.gin",
        *WHOLE.get(task, ()),
    ]
    start = time.monotonic()
    result = subprocess.run(
        [*command, "--compile_only", "v5e:4x4"], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:] or result.stdout[-2000:]
    (fits,) = re.findall(r".*fits: needs.*", result.stdout)
    with capsys.disabled():
        print(f"\n{task}: {fits.strip()}, compiled in {time.monotonic() - start:.0f} s")
