"""RAT's training steps, compiled by the TPU compiler with no TPU: kernels on every device, and the paper's 1.3B."""

import pytest

from tests.test_tpu_language_steps import TEXT, gathered, kernels
from tests.test_tpu_steps import compile_step, needs_compiler

LENGTH, BATCH = 320, 12  # those of TEXT
SMALL = "models.Backbone.depth=1", "layers.RAT.H=4", "layers.RAT.L=16", "models.Backbone.mixers=(@layers.RAT,)"
MESHES = {
    "examples": "{'data': 2, 'fsdp': 2}",
    "heads": "{'data': 2, 'tensor': 2}",
    "time": "{'data': 2, 'seq': 2}",
}


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize("resets", [pytest.param(False, marks=pytest.mark.large), True], ids=["plain", "packed"])
@pytest.mark.parametrize("mesh", [pytest.param(m, marks=[pytest.mark.large] * (m != "time")) for m in MESHES])
def test_the_kernels_run_on_every_device(mesh, resets):
    """Attention over summaries, and two averages: forward, and the adjoint of each. No sequence is gathered."""
    words = *TEXT[1:], *SMALL, f"next_token.NextToken.resets={resets}", f"train.mesh={MESHES[mesh]}"
    report = compile_step("v5e:2x2", TEXT[0], TEXT[0], *words)
    assert report.fits
    scans = {"linear_scan": 2, "linear_scan_adjoint": 2, **({"linear_scan_map": 4} if mesh == "time" else {})}
    assert kernels(report) == {"attention_forward": 1, "attention_backward": 1, **scans}
    shared = {(BATCH // 2, LENGTH, 2, 16), (BATCH // 2, LENGTH, 32)}  # queries and keys of a group, for all its heads
    assert gathered(report) <= (shared if mesh == "heads" else set())


@needs_compiler
@pytest.mark.full
@pytest.mark.large
def test_the_language_model_of_the_paper_fits_on_sixteen_chips():
    """1.3B parameters, 4,096 tokens a row, a row a chip and micro-batch, parameters in shards over all of them."""
    report = compile_step(
        "v5p:2x2x4",
        TEXT[0],
        "configs/models/rat16.gin",
        "next_token.NextToken.length=4096",
        "next_token.NextToken.vocab=32000",
        "STEPS=47684",
        "train.batch_size=512",
        "train.accumulate=4",
        "train.mesh={'fsdp': 16}",
    )
    assert report.fits
