"""Training steps of Mamba, Mamba-2, MemMamba and MoM on four chips, compiled by the TPU compiler with no TPU.

Their kernels run forward and backward under every mesh. Over the axes of examples no activation is gathered; over
those of channels and time only what is named here.
"""

import collections
import re

import pytest

from tests.test_tpu_steps import compile_step, needs_compiler

LENGTH = 320  # a multiple of 5, as no size of a parameter is
BATCH = 12  # a size that nothing else has
MESHES = {
    "examples": "{'data': 2, 'fsdp': 2}",
    "channels": "{'data': 2, 'tensor': 2}",
    "time": "{'data': 2, 'seq': 2}",
}
ANY = ("models.Backbone.width=64", "STEPS=10", f"train.batch_size={BATCH}")
TEXT = "configs/tasks/language_modelling.gin", *ANY, f"next_token.NextToken.length={LENGTH}"
REVIEWS = "configs/lra/text.gin", *ANY, f"LENGTH={LENGTH}"  # padded: rows are `valid` up to their length
MODELS = {
    "mamba": (*TEXT, "models.Backbone.depth=1"),
    "mamba2": (
        *TEXT,
        "models.Backbone.depth=1",
        "models.Backbone.mixers=(@layers.Mamba2,)",
        "layers.Mamba2.N=32",
        "layers.Mamba2.P=32",
        "next_token.NextToken.tied=False",
    ),
    "mom": (
        *(word.replace(f"={LENGTH}", f"={5 * 160}") for word in TEXT),  # where runs of 256 are worth their padding
        "models.Backbone.depth=1",
        "models.Backbone.mixers=(@layers.MoM,)",
        "layers.MoM.M=2",
        "layers.MoM.k=1",
        "layers.MoM.heads=2",
        "layers.MoM.P=32",
        "train.side_loss=@layers.BalanceLoss()",
    ),
    "memmamba": (
        *TEXT,
        "configs/models/memmamba.gin",
        "models.Backbone.depth=2",  # the second reads the first's notes
        "layers.MemMamba.p=1",
        "layers.MemMamba.k=8",
        "layers.MemMamba.window=4",
        "layers.MemMamba.summary=16",
        "layers.MemMamba.heads=2",
    ),
    "bidirectional": (
        *REVIEWS,
        "configs/lra/models/mamba_bidirectional.gin",
        "models.Backbone.depth=1",
        "models.Backbone.encoder=@models.TokenEmbedding",
        "models.TokenEmbedding.multiple=8",
    ),
}


def compiled(model, mesh):
    words = MODELS[model]
    files, overrides = ([w for w in words if w.endswith(".gin") == is_file] for is_file in (True, False))
    return compile_step("v5e:2x2", *[*files, files[0]][:2], *overrides, f"train.mesh={MESHES[mesh]}")


def kernels(report):
    """Pallas kernels of a program, by name."""
    calls = "\n".join(re.findall(".*tpu_custom_call.*", report.hlo))
    return dict(collections.Counter(re.findall(r"/(\w+)/pallas_call", calls)))


def gathered(report):
    """Sizes of all activations that are gathered."""
    sizes = [shape.dims for c in report.collectives if c.kind == "all-gather" for shape in c.results]
    return {dims for dims in sizes if any(d % 5 == 0 for d in dims)}


large = pytest.mark.large


@needs_compiler
@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        ("mamba", "examples"),
        pytest.param("mamba2", "channels", marks=pytest.mark.full),
        *(
            pytest.param(*case, marks=[pytest.mark.full, large])
            for case in (
                ("mamba", "channels"),
                ("mamba", "time"),
                ("mamba2", "examples"),
                ("mamba2", "time"),
                *((model, mesh) for model in ("memmamba", "bidirectional") for mesh in MESHES),
            )
        ),
    ],
)
def test_the_kernels_run_on_every_device(model, mesh):
    report = compiled(model, mesh)
    assert report.fits
    name = "linear_attention" if model == "mamba2" else "selective_scan"
    times = {"mamba": 1, "mamba2": 1, "memmamba": 2, "bidirectional": 2}[model]
    if name == "selective_scan" and mesh == "time":  # once more for what a device hands on
        times *= 2
    assert kernels(report) == {name: times, f"{name}_backward": times}

    found = gathered(report)
    if mesh == "channels" and model == "mamba2":  # B and C, which all heads of a group share
        assert found == {(BATCH // 2, LENGTH, 32)}
    elif (mesh, model) in (("channels", "bidirectional"), ("time", "memmamba"), ("time", "bidirectional")):
        # What is turned around in time; notes.
        assert not [dims for dims in found if BATCH in dims]
    else:
        assert not found


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize("mesh", ["examples", pytest.param("channels", marks=large)])
def test_memories_are_segments_of_the_kernels(mesh):
    report = compiled("mom", mesh)
    assert report.fits
    names = {"linear_attention_inverse": 2, "linear_attention": 1, "linear_attention_erase_backward": 1}
    assert kernels(report) == names
    assert not gathered(report)
