"""Published Mamba and Mamba-2 checkpoints: what their config.json says, and their tensors under our names.

Two layouts. `original`, of the state-spaces authors: the vocabulary is not padded, and what a config leaves out is
their package's default. `hf`, of the transformers library (the "-hf" repositories): other keys, other defaults. The
tensors are the same but for the name of the embedding. Whatever a config asks for that would be computed otherwise is
refused; no tensor's layout is guessed from its shape.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


class Refused(ValueError):
    """A checkpoint that cannot be taken as it is."""


@dataclasses.dataclass(frozen=True)
class Description:
    """What a config says.

    mixer:  "Mamba" or "Mamba2".   settings: its hyper-parameters that differ from the defaults.
    vocab:  ids; the tables have as many rows as the next multiple of `multiple`.
    eps:    of every norm.         tied: one table for embeddings and logits.
    residual_float32: the sum of the residual branches is float32, whatever the rest computes in.
    embedding: the name of the table in the file.
    """

    mixer: str
    width: int
    depth: int
    vocab: int
    multiple: int
    eps: float
    tied: bool
    residual_float32: bool
    settings: dict[str, Any]
    embedding: str

    @property
    def rows(self) -> int:
        return -(-self.vocab // self.multiple) * self.multiple


def describe(config: Mapping[str, Any]) -> Description:
    """Of either layout, told apart by the key that only one has. Raises Refused."""
    if "model_type" in config:
        return _hf(config)
    if "d_model" in config:
        return _original(config)
    raise Refused("config.json has neither d_model (state-spaces) nor model_type (transformers): another kind of model")


# config.json: key -> our name. A key whose value must be the one given here stands in _FIXED.

_SSM = {
    "Mamba1": {"d_state": "N", "d_conv": "conv", "expand": "expand", "dt_rank": "dt_rank", "conv_bias": "conv_bias",
               "bias": "bias"},
    "Mamba2": {"d_state": "N", "d_conv": "conv", "expand": "expand", "headdim": "P", "ngroups": "G",
               "conv_bias": "conv_bias", "bias": "bias", "D_has_hdim": "D_per_channel", "dt_limit": "dt_limit"},
}  # fmt: skip
_SIZES = {"N", "conv", "expand", "P", "G"}
_START_OR_SPEED = {  # of how parameters start, or of how fast something runs
    "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "conv_init", "chunk_size",
    "use_fast_path", "use_mem_eff_path",
}  # fmt: skip
_SSM_FIXED = {"d_ssm": None, "rmsnorm": True, "norm_before_gate": False}
_TOP = {
    "d_model", "n_layer", "vocab_size", "ssm_cfg", "pad_vocab_size_multiple", "tie_embeddings", "residual_in_fp32",
}  # fmt: skip
_TOP_FIXED = {"d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True}
_TOP_SPEED = {"fused_add_norm"}

_HF = {
    "mamba": {"state_size": ("N", 16), "conv_kernel": ("conv", 4), "expand": ("expand", 2),
              "time_step_rank": ("dt_rank", "auto"), "use_conv_bias": ("conv_bias", True), "use_bias": ("bias", False)},
    "mamba2": {"state_size": ("N", 128), "conv_kernel": ("conv", 4), "expand": ("expand", 2), "head_dim": ("P", 64),
               "n_groups": ("G", 8), "use_conv_bias": ("conv_bias", True), "use_bias": ("bias", False),
               "time_step_limit": ("dt_limit", None)},
}  # fmt: skip
_HF_SIZES = {
    "mamba": {"hidden_size": 768, "num_hidden_layers": 32, "vocab_size": 50280, "tie_word_embeddings": True},
    "mamba2": {
        "hidden_size": 4096, "num_hidden_layers": 64, "vocab_size": 32768, "tie_word_embeddings": False,
        "num_heads": 128,
    },
}  # fmt: skip


def _original(config: Mapping[str, Any]) -> Description:
    _known(config, _TOP | _TOP_FIXED.keys() | _TOP_SPEED, "config.json")
    _held(config, _TOP_FIXED, "config.json")
    ssm = dict(config.get("ssm_cfg") or {})
    layer = ssm.pop("layer", "Mamba1")
    if layer not in _SSM:
        raise Refused(f"ssm_cfg.layer = {layer!r}: expected one of {', '.join(map(repr, _SSM))}")
    names = _SSM[layer]
    _known(ssm, names.keys() | _START_OR_SPEED | (_SSM_FIXED.keys() if layer == "Mamba2" else set()), "ssm_cfg")
    _held(ssm, _SSM_FIXED, "ssm_cfg")
    given = {names[key]: _whole(ssm, key) if names[key] in _SIZES else ssm[key] for key in ssm if key in names}
    return Description(
        mixer="Mamba" if layer == "Mamba1" else "Mamba2",
        width=_whole(config, "d_model"),
        depth=_whole(config, "n_layer"),
        vocab=_whole(config, "vocab_size"),
        multiple=_whole({"pad_vocab_size_multiple": 8, **config}, "pad_vocab_size_multiple"),
        eps=1e-5,
        tied=bool(config.get("tie_embeddings", True)),
        residual_float32=bool(config.get("residual_in_fp32", True)),
        settings=_settings(given),
        embedding="backbone.embedding.weight",
    )


def _hf(config: Mapping[str, Any]) -> Description:
    kind = config["model_type"]
    if kind not in _HF:
        raise Refused(f"model_type = {kind!r}: expected 'mamba' or 'mamba2'")
    _held(config, {"hidden_act": "silu", "rms_norm": True}, "config.json")
    config = {**_HF_SIZES[kind], **config}
    given = _settings(
        {
            ours: _whole({key: default, **config}, key) if ours in _SIZES else config.get(key, default)
            for key, (ours, default) in _HF[kind].items()
        }
    )
    width = _whole(config, "hidden_size")
    channels = given["expand"] * width
    if kind == "mamba" and config.get("intermediate_size", channels) != channels:
        raise Refused(f"intermediate_size = {config['intermediate_size']}: expected expand * hidden_size = {channels}")
    if kind == "mamba2" and (found := _whole(config, "num_heads") * given["P"]) != channels:
        raise Refused(f"num_heads * head_dim = {found}: expected {channels}, expand * hidden_size")
    return Description(
        mixer={"mamba": "Mamba", "mamba2": "Mamba2"}[kind],
        width=width,
        depth=_whole(config, "num_hidden_layers"),
        vocab=_whole(config, "vocab_size"),
        multiple=1,
        eps=float(config.get("layer_norm_epsilon", 1e-5)),
        tied=bool(config["tie_word_embeddings"]),
        residual_float32=bool(config.get("residual_in_fp32", True)),
        settings=given,
        embedding="backbone.embeddings.weight",
    )


def _known(config: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(config.keys() - known):
        raise Refused(
            f"{where} has {unknown[0]!r} = {config[unknown[0]]!r}, which is not known here: it may change the model"
        )


def _held(config: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    for key, value in fixed.items():
        found = config.get(key, value)
        if found != value and (found or value):  # null, 0, [] and {} all say: none of it
            raise Refused(f"{where}: {key} = {found!r} is not served; expected {value!r}")


def _whole(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Refused(f"config.json: {key} = {value!r}: expected a whole number of at least 1")
    return value


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """Hyper-parameters as our mixers take them."""
    if given.get("dt_rank") == "auto":
        given["dt_rank"] = None
    if "dt_limit" in given:
        bounds = given["dt_limit"] or (0.0, None)
        if not isinstance(bounds, list | tuple) or len(bounds) != 2:
            raise Refused(f"config.json: {bounds!r} are no two bounds of the step size")
        low, high = map(_number, bounds)
        given["dt_limit"] = (low or 0.0, None if high is None or math.isinf(high) else high)
    return given


def _number(bound: Any) -> float | None:
    """A bound as JSON may have it: 0.1, Infinity, null, or {"__float__": "Infinity"}."""
    if isinstance(bound, Mapping) and bound.keys() == {"__float__"}:
        bound = bound["__float__"]
    try:
        return None if bound is None else float(bound)
    except (TypeError, ValueError):
        raise Refused(f"config.json: {bound!r} is no bound of the step size") from None


# Tensors


class _Tensors:
    """The tensors of a checkpoint, each taken once, in the shape that the config gives it."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self.left = dict(tensors)

    def take(self, name: str, *shape: int) -> np.ndarray:
        if name not in self.left:
            raise Refused(f"the checkpoint lacks {name}, of shape {shape}")
        found = self.left.pop(name)
        if found.shape != shape:
            raise Refused(f"{name} has shape {found.shape}: the config makes it {shape}")
        return found

    def of_mixer(self, layer: str, name: str, *shape: int) -> np.ndarray:
        return self.take(f"{layer}.mixer.{name}", *shape)


def convert(description: Description, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint as the parameters of a LanguageModel, by path. Raises Refused unless all are used."""
    d, t = description, _Tensors(tensors)
    arrays = _tables(d, t)
    arrays["backbone/norm/scale"] = t.take("backbone.norm_f.weight", d.width)
    mixer = _mamba if d.mixer == "Mamba" else _mamba2
    for i in range(d.depth):
        theirs, ours = f"backbone.layers.{i}", f"backbone/layers/{i}"
        arrays[f"{ours}/norm/scale"] = t.take(f"{theirs}.norm.weight", d.width)
        found = mixer(d, functools.partial(t.of_mixer, theirs))
        arrays |= {f"{ours}/mixer/{name}": array for name, array in found.items()}
    if t.left:
        raise Refused(f"tensors that the config gives no place: {', '.join(sorted(t.left)[:5])}")
    return arrays


def _tables(d: Description, t: _Tensors) -> dict[str, np.ndarray]:
    """A tied checkpoint may hold its table under either name, or under both."""
    embedding, head = d.embedding, "lm_head.weight"
    if not d.tied:
        return {
            "backbone/encoder/embedding": t.take(embedding, d.rows, d.width),
            "head/kernel": t.take(head, d.rows, d.width).T,
        }
    found = [t.take(name, d.rows, d.width) for name in (embedding, head) if name in t.left]
    if not found:
        raise Refused(f"the checkpoint lacks {embedding}, of shape {(d.rows, d.width)}")
    if len(found) == 2 and not np.array_equal(found[0], found[1]):
        raise Refused(f"{embedding} and {head} differ, but the config ties them")
    return {"backbone/encoder/embedding": found[0]}


def _linear(take: Any, name: str, width_in: int, slices: Mapping[str, int], bias: bool) -> dict[str, np.ndarray]:
    """A projection (out, in), its outputs in slices, each as a kernel (in, out) of its own."""
    total, ends = sum(slices.values()), np.cumsum([*slices.values()])[:-1]
    parts = dict(zip(slices, np.split(take(f"{name}.weight", total, width_in), ends), strict=True))
    arrays = {f"{ours}/kernel": part.T for ours, part in parts.items()}
    if bias:
        parts = zip(slices, np.split(take(f"{name}.bias", total), ends), strict=True)
        arrays |= {f"{ours}/bias": part for ours, part in parts}
    return arrays


def _mamba(d: Description, take: Any) -> dict[str, np.ndarray]:
    own = {"N": 16, "conv": 4, "expand": 2, "dt_rank": None, "conv_bias": True, "bias": False, **d.settings}
    channels, N, bias = own["expand"] * d.width, own["N"], own["bias"]
    rank = own["dt_rank"] or math.ceil(d.width / 16)
    arrays = _linear(take, "in_proj", d.width, {"in_x": channels, "in_z": channels}, bias)
    arrays["conv"] = take("conv1d.weight", channels, 1, own["conv"])[:, 0].T
    if own["conv_bias"]:
        arrays["conv_bias"] = take("conv1d.bias", channels)
    arrays |= _linear(take, "x_proj", channels, {"to_dt": rank, "to_B": N, "to_C": N}, False)
    arrays |= _linear(take, "dt_proj", rank, {"dt": channels}, False)
    arrays["dt_bias"] = take("dt_proj.bias", channels)
    arrays["A_log"], arrays["D"] = take("A_log", channels, N), take("D", channels)
    return arrays | _linear(take, "out_proj", channels, {"out": d.width}, bias)


def _mamba2(d: Description, take: Any) -> dict[str, np.ndarray]:
    own = {"N": 128, "P": 64, "G": 1, "conv": 4, "expand": 2, "conv_bias": True, "bias": False, **d.settings}
    channels, maps, bias = own["expand"] * d.width, own["G"] * own["N"], own["bias"]
    heads = channels // own["P"]
    convolved = {"x": channels, "B": maps, "C": maps}
    slices = {"in_z": channels, **{f"in_{name}": size for name, size in convolved.items()}, "in_dt": heads}
    arrays = _linear(take, "in_proj", d.width, slices, bias)
    ends = np.cumsum([*convolved.values()])[:-1]
    taps = np.split(take("conv1d.weight", channels + 2 * maps, 1, own["conv"])[:, 0], ends)
    arrays |= {f"conv_{name}": part.T for name, part in zip(convolved, taps, strict=True)}
    if own["conv_bias"]:
        parts = np.split(take("conv1d.bias", channels + 2 * maps), ends)
        arrays |= {f"conv_{name}_bias": part for name, part in zip(convolved, parts, strict=True)}
    arrays["dt_bias"], arrays["A_log"] = take("dt_bias", heads), take("A_log", heads)
    arrays["D"] = take("D", channels if own.get("D_per_channel") else heads)
    arrays["norm/scale"] = take("norm.weight", channels)
    return arrays | _linear(take, "out_proj", channels, {"out": d.width}, bias)


def config_text(d: Description, name: str) -> str:
    """The config that builds the model, as gin reads it."""
    mixer = f"layers.{d.mixer}"
    settings = dict(d.settings) | ({"norm_eps": d.eps} if d.mixer == "Mamba2" else {})
    lines = [
        f"# {name}, imported",
        "from __gin__ import dynamic_registration",
        "from longwave import layers",
        "from longwave import models",
        "from longwave.tasks.language_modelling import next_token",
        "from longwave.training import run",
        "",
        "train.task = @next_token.NextToken()",
        f"next_token.NextToken.vocab = {d.vocab}",
        f"next_token.NextToken.tied = {d.tied}",
        "train.backbone = @models.Backbone",
        f"models.Backbone.width = {d.width}",
        f"models.Backbone.depth = {d.depth}",
        f"models.Backbone.mixers = (@{mixer},)",
        "models.Backbone.norm = @layers.RMSNorm",
        f"layers.RMSNorm.eps = {d.eps!r}",
        "models.Backbone.encoder = @models.TokenEmbedding",
        f"models.TokenEmbedding.multiple = {d.multiple}",
        f"models.Backbone.residual_float32 = {d.residual_float32}",
        *(f"{mixer}.{key} = {value!r}" for key, value in settings.items()),
    ]
    return "\n".join(lines) + "\n"
