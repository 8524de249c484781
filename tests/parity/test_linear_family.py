"""The layers on the matrix-state recurrence, and RG-LRU, against public PyTorch code, on random inputs in float32.

LONGWAVE_FLA_CHECKOUT: fla-org/flash-linear-attention. Its plain loop gets what a layer hands to the recurrence.
LONGWAVE_RECURRENTGEMMA_CHECKOUT: google-deepmind/recurrentgemma; needs torch, einops and jaxtyping.
"""

import importlib.util
import os
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longwave import layers
from longwave.layers.mixer import Context
from tests.layers.test_mamba import randomised
from tests.tolerances import FORWARD, assert_close

torch = pytest.importorskip("torch", reason="needs torch: uv run --group parity pytest -m parity")
pytestmark = pytest.mark.parity
WIDTH, LENGTH = 16, 37

# Our module and layer, its settings; their file, their function, and what it takes in which order.
RECURRENCES = {
    "linear_attention": (
        "LinearAttention", {"heads": 2, "normaliser": None, "scale": 8**-0.5},
        "linear_attn", "naive_recurrent_linear_attn", ("q", "k", "v"),
    ),
    "retnet": ("RetNet", {"heads": 2}, "retention", "naive_retention", ("q", "k", "v")),
    "gla": ("GLA", {"heads": 2}, "gla", "naive_recurrent_gla", ("q", "k", "v", "g")),
    "deltanet": ("DeltaNet", {"heads": 2}, "delta_rule", "delta_rule_recurrence", ("q", "k", "v", "beta")),
    "gated_deltanet": (
        "GatedDeltaNet", {"heads": 2, "expand_k": 1.0},
        "gated_delta_rule", "naive_recurrent_gated_delta_rule", ("q", "k", "v", "beta", "g"),
    ),
    "kda": ("KDA", {"heads": 2, "expand_v": 2.0}, "kda", "naive_recurrent_kda", ("q", "k", "v", "g", "beta")),
}  # fmt: skip
HEADS_FIRST = ("retention", "delta_rule")


def checkout(name):
    path = os.environ.get(name)
    return Path(path) if path else pytest.skip(f"{name} names no checkout")


@pytest.mark.parametrize("name", RECURRENCES)
def test_recurrence(name, monkeypatch):
    """The scale is theirs by default: it is compared too."""
    layer, settings, folder, function, order = RECURRENCES[name]
    path = checkout("LONGWAVE_FLA_CHECKOUT") / "fla" / "ops" / folder / "naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_naive_{folder}", path)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    seen = {}
    module = importlib.import_module(f"longwave.layers.{name}")
    ours = module.linear_attention

    def watched(q, k, v, g=None, **others):
        o, state = ours(q, k, v, g, **others)
        seen.update({"q": q, "k": k, "v": v, "g": g, "beta": others.get("beta"), "o": o})
        return o, state

    monkeypatch.setattr(module, "linear_attention", watched)
    x = np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
    randomised(getattr(layers, layer), WIDTH, **settings)(x)
    turn = (lambda a: a.transpose(1, 2)) if folder in HEADS_FIRST else lambda a: a
    o = getattr(theirs, function)(*(turn(torch.tensor(np.asarray(seen[key]))) for key in order))
    assert_close(seen["o"], turn(o[0] if isinstance(o, tuple) else o).numpy(), FORWARD["float32"])


def test_recurrent_block_of_griffin(monkeypatch):
    """Two packed documents in the second row; output and carry."""
    root = checkout("LONGWAVE_RECURRENTGEMMA_CHECKOUT") / "recurrentgemma"
    for name, folder in {"recurrentgemma": root, "recurrentgemma.torch": root / "torch"}.items():
        package = types.ModuleType(name)  # theirs import samplers and JAX modules, with all that these need
        package.__path__ = [str(folder)]
        monkeypatch.setitem(sys.modules, name, package)
    theirs = importlib.import_module("recurrentgemma.torch.modules").RecurrentBlock(WIDTH, 2, lru_width=24)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(0.5 * torch.randn_like(p))
        theirs.rg_lru.a_param.copy_(torch.linspace(-5, 1, 24))
    x = np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
    position = np.tile(np.arange(LENGTH), (2, 1))
    position[1, 13:] -= 13
    with torch.no_grad():
        y, carry = theirs(torch.tensor(x), torch.tensor(position))
    p = {name: v.detach().numpy() for name, v in theirs.named_parameters()}
    model = layers.RGLRU(WIDTH, channels=24, blocks=2, rngs=nnx.Rngs(0))
    for ours, name in {"in_x": "linear_x", "in_z": "linear_y", "out": "linear_out"}.items():
        getattr(model, ours).kernel[...] = p[f"{name}.weight"].T
        getattr(model, ours).bias[...] = p[f"{name}.bias"]
    for ours, name in {"a": "a_gate", "i": "input_gate"}.items():
        getattr(model, ours).kernel[...] = p[f"rg_lru.{name}.w"]
        getattr(model, ours).bias[...] = p[f"rg_lru.{name}.b"].reshape(-1)
    model.conv[...], model.conv_bias[...] = p["conv_1d.w"], p["conv_1d.b"]
    model.Lambda[...] = p["rg_lru.a_param"]
    out = jax.jit(lambda x, reset: model(x, None, Context(reset=reset)))(x, jnp.asarray(position == 0))
    assert_close(out.y, y.numpy(), FORWARD["float32"])
    assert_close(out.carry["h"], carry.rg_lru_state.numpy(), FORWARD["float32"])
    assert_close(out.carry["conv"], carry.conv1d_state.numpy(), FORWARD["float32"])
