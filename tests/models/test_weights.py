"""Parameters to a file and back: strict, exact, whole. Published checkpoints: configs, counts, what is refused."""

import collections
import functools
import io
import json
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longwave import layers
from longwave.models import (
    Backbone,
    LanguageModel,
    TokenEmbedding,
    Tokens,
    safetensors,
    state_spaces,
    torch_file,
    weights,
)
from longwave.models.state_spaces import Refused, convert, describe
from longwave.models.torch_file import UnsafePickle
from longwave.models.weights import WeightsMismatch
from longwave.training.state import ModelDef, split


@functools.cache
def made(depth=4, scan=False):
    """A model of two kinds of mixers, and parameters that are random numbers."""
    small = [functools.partial(mixer, N=2) for mixer in (layers.LRU, layers.Mamba)]
    sizes = {"width": 4, "depth": depth, "mixers": small, "scan": scan}
    body = lambda rngs: Backbone(Tokens(vocab=5, length=8), **sizes, rngs=rngs)
    definition = ModelDef(lambda rngs: LanguageModel(body(rngs), vocab=5, rngs=rngs))
    draw = np.random.default_rng(0).normal
    return definition, jax.tree.map(lambda p: jnp.asarray(draw(size=p.shape), p.dtype), definition.abstract_params)


def equal(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path))
        assert a.dtype == b.dtype


@pytest.mark.parametrize("scan", [False, True])
def test_a_model_comes_back_stacked_or_not(scan, tmp_path):
    """The file does not know of the scan: a pattern of two over four layers is layers 0 to 3 either way."""
    definition, params = made(scan=scan)
    weights.write(tmp_path / "w.safetensors", definition.merge(params, {}))
    equal(weights.read(tmp_path / "w.safetensors", definition.abstract_params, {}), (params, {}))
    arrays = safetensors.load(tmp_path / "w.safetensors")
    assert {name.split("/")[2] for name in arrays if "/layers/" in name} == set("0123")
    for i in range(4):
        assert ("A_log" if i % 2 else "nu_log") in {n.split("/")[-1] for n in arrays if f"/layers/{i}/" in n}
    if scan:  # a model that runs its layers one by one reads the same file
        other, _ = made(scan=False)
        flat, _ = weights.read(tmp_path / "w.safetensors", other.abstract_params, {})
        second = params["backbone"]["layers"]["1"]["mixer"]["A_log"][1]
        np.testing.assert_array_equal(flat["backbone"]["layers"]["3"]["mixer"]["A_log"], second)


class Fixed(layers.LRU):
    """Holds a number that is not learned, where its neighbours hold none."""

    def __init__(self, width, *, rngs):
        super().__init__(width, N=2, rngs=rngs)
        self.known = nnx.Variable(jnp.zeros(3))


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_no_parameter_comes_back_too(scan, tmp_path):
    """BatchNorm's statistics in every layer, and a constant in every second one."""
    small = (functools.partial(layers.LRU, N=2), Fixed)
    sizes = {"width": 4, "depth": 4, "mixers": small, "norm": layers.BatchNorm, "scan": scan}
    body = lambda rngs: Backbone(Tokens(vocab=5, length=8), **sizes, rngs=rngs)
    definition = ModelDef(lambda rngs: LanguageModel(body(rngs), vocab=5, rngs=rngs))
    abstract = jax.eval_shape(definition.init, jax.random.key(0))
    draw = np.random.default_rng(0).normal
    params, state = jax.tree.map(lambda p: jnp.asarray(draw(size=p.shape), p.dtype), abstract)
    weights.write(tmp_path / "w.safetensors", definition.merge(params, state))
    arrays = safetensors.load(tmp_path / "w.safetensors")
    assert {f"model_state/backbone/layers/{i}/norm/var" for i in range(4)} < arrays.keys()
    known = {n for n in arrays if n.endswith("/known")}
    assert known == {f"model_state/backbone/layers/{i}/mixer/known" for i in (1, 3)}
    equal(weights.read(tmp_path / "w.safetensors", *abstract), (params, state))
    with pytest.raises(WeightsMismatch, match="model_state/backbone/layers/0/norm/mean: not among the parameters"):
        weights.read(tmp_path / "w.safetensors", abstract[0], {})


def test_bfloat16_keeps_what_stays_float32(tmp_path):
    definition, params = made(depth=2)
    low = definition.cast(params, jnp.bfloat16)
    weights.write(tmp_path / "w.safetensors", definition.merge(low, {}))
    arrays = safetensors.load(tmp_path / "w.safetensors")
    assert arrays["backbone/layers/1/mixer/A_log"].dtype == np.float32
    assert arrays["backbone/layers/1/mixer/in_x/kernel"].dtype == jnp.bfloat16
    equal(
        weights.read(tmp_path / "w.safetensors", definition.abstract_params, {})[0],
        jax.tree.map(lambda p: p.astype("float32"), low),
    )


A_LOG = "backbone/layers/1/mixer/A_log"


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop(A_LOG), f"{A_LOG}: missing, expected shape"),
        (lambda a: a.update({A_LOG: a[A_LOG].T}), f"{A_LOG}: shape"),
        (lambda a: a.update({A_LOG: a[A_LOG][:1]}), f"{A_LOG}: shape"),  # would broadcast
        (lambda a: a.update({A_LOG: a[A_LOG].astype(np.int32)}), f"{A_LOG}: int32"),
        (lambda a: a.update({"head/kernel": a[A_LOG]}), "head/kernel: not among the parameters"),
        (lambda a: a.update({"backbone/layers/4/norm/scale": a[A_LOG]}), "backbone/layers/4/"),
    ],
)
def test_what_does_not_fit_is_named(scan, change, message):
    definition, params = made(scan=scan)
    arrays = weights.named(definition.merge(params, {}))
    change(arrays)
    with pytest.raises(WeightsMismatch) as error:
        weights.fitted(arrays, definition.abstract_params)
    assert message in str(error.value)


def test_the_files_are_those_of_the_library(tmp_path):
    library = pytest.importorskip("safetensors")
    numpy = pytest.importorskip("safetensors.numpy")
    draw = np.random.default_rng(0).normal
    arrays = {"b": draw(size=(3, 2)).T, "a/x": draw(size=5).astype(np.float16), "": np.arange(4), "0": np.zeros((0, 3))}
    safetensors.save(tmp_path / "ours", arrays)
    numpy.save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, tmp_path / "theirs")
    with library.safe_open(tmp_path / "ours", framework="np") as file:
        theirs = {name: file.get_tensor(name) for name in arrays}
    for found in (theirs, safetensors.load(tmp_path / "theirs"), safetensors.load(tmp_path / "ours")):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)


def test_damaged_files_and_indexes(tmp_path):
    safetensors.save(tmp_path / "a.safetensors", {"x": np.ones(3), "y": np.ones(2)})
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "short").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="y of shape"):
        safetensors.load(tmp_path / "short")
    for content in (b"", whole[:20], b"\xff" * 64, whole[:8] + b"x" + whole[9:]):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(ValueError, match="bad"):
            safetensors.load(tmp_path / "bad")
    index = tmp_path / "model.safetensors.index.json"
    safetensors.save(tmp_path / "b.safetensors", {"z": np.zeros(1)})
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}))
    assert safetensors.load(index).keys() == {"x", "y", "z"}
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    with pytest.raises(ValueError, match="differ in y"):
        safetensors.load(index)
    for file in ("../a.safetensors", 3):
        index.write_text(json.dumps({"weight_map": {"x": file}}))
        with pytest.raises(ValueError, match="expected files beside it"):
            safetensors.load(index)
    for content in ("{}", "[]", "{"):
        index.write_text(content)
        with pytest.raises(ValueError, match="is no index of tensors"):
            safetensors.load(index)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "w.safetensors"
    safetensors.save(path, {"x": np.ones(1)})
    with pytest.raises(ValueError, match="complex"):
        safetensors.save(path, {"x": np.zeros(2), "y": np.ones(2, complex)})
    assert safetensors.load(path)["x"] == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# Pickles of torch.save, written by hand


class Global:
    """Pickles as module.name(*args)."""

    def __init__(self, module, name, *args):
        self.place, self.args = (module, name), args


class TorchPickler(pickle._Pickler):  # the Python one: it can be taught
    """What torch.save writes for names, storages and tensors, without torch."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            module, name = obj.place
            self.write(b"c" + f"{module}\n{name}\n".encode())
            if obj.args:
                super().save(obj.args[0])
                self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)

    def persistent_id(self, obj):
        return obj if isinstance(obj, tuple) and obj[:1] == ("storage",) else None


def storage(key, count, kind="FloatStorage"):
    return ("storage", Global("torch", kind), key, "cpu", count)


def tensor(key, count, offset, size, stride, kind="FloatStorage"):
    args = (storage(key, count, kind), offset, size, stride, False, collections.OrderedDict())
    return Global("torch._utils", "_rebuild_tensor_v2", args)


def torch_save(path, obj, data, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    TorchPickler(file, protocol=2).dump(obj)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", file.getvalue())
        archive.writestr("archive/byteorder", "little")
        for key, array in data.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return path


def test_tensors_of_a_pickle(tmp_path):
    data, low = np.arange(12, dtype=np.float32), np.arange(4).astype(jnp.bfloat16)
    state = {
        "whole": tensor("0", 12, 0, (3, 4), (4, 1)),
        "transposed": tensor("0", 12, 0, (4, 3), (1, 4)),
        "part": tensor("0", 12, 5, (2,), (3,)),
        "low": tensor("1", 4, 0, (4,), (1,), "BFloat16Storage"),
        "scalar": tensor("0", 12, 7, (), ()),
        "parameter": Global("torch._utils", "_rebuild_parameter", (tensor("0", 12, 0, (2,), (1,)), True, {})),
    }
    found = torch_file.load(torch_save(tmp_path / "x.bin", state, {"0": data, "1": low}))
    assert found.keys() == state.keys()
    np.testing.assert_array_equal(found["whole"], data.reshape(3, 4))
    np.testing.assert_array_equal(found["transposed"], data.reshape(3, 4).T)
    np.testing.assert_array_equal(found["part"], [5, 8])
    np.testing.assert_array_equal(found["low"], low)
    assert found["scalar"] == 7
    assert found["low"].dtype == jnp.bfloat16
    assert len(found["parameter"]) == 2


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch", "FloatStorage.__init__"),
        ("numpy", "ndarray"),
    ],
)
def test_a_pickle_cannot_name_anything_else(module, name, tmp_path):
    path = torch_save(tmp_path / "x.bin", {"x": Global(module, name, ("touch " + str(tmp_path / "run"),))}, {})
    with pytest.raises(UnsafePickle, match=f"{module}.{name}"):
        torch_file.load(path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ({"x": tensor("0", 12, 0, (13,), (1,))}, "leaves its 12 numbers"),
        ({"x": tensor("0", 12, 4, (3, 4), (4, 1))}, "leaves its 12 numbers"),
        ({"x": tensor("0", 12, 0, (1 << 40,), (0,))}, "leaves its 12 numbers"),  # one number, a terabyte long
        ({"x": tensor("0", 12, 4, (2,), (-1,))}, "strides"),
        ({"x": tensor("0", 99, 0, (2,), (1,))}, "99 of FloatStorage"),
        ({"x": Global("torch", "FloatStorage", (3,))}, "damaged"),  # stands for a type, cannot be called
        ({"x": 3}, "state dict"),
        ([tensor("0", 12, 0, (2,), (1,))], "state dict"),
    ],
)
def test_pickles_that_are_no_state_dict(obj, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        torch_file.load(torch_save(tmp_path / "x.bin", obj, {"0": np.zeros(12, np.float32)}))


def test_other_archives_are_refused(tmp_path):
    old = tmp_path / "old.bin"
    old.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2))
    with pytest.raises(ValueError, match=r"before PyTorch 1\.6"):
        torch_file.load(old)
    with pytest.raises(ValueError, match="compressed"):
        torch_file.load(torch_save(tmp_path / "x.bin", {}, {"0": np.zeros(99)}, zipfile.ZIP_DEFLATED))


# Published checkpoints

SIZES = {  # parameters of the published models, from the shapes of their files
    "mamba": {(24, 768): 129_135_360, (48, 1024): 371_516_416, (48, 1536): 793_204_224, (48, 2048): 1_372_178_432,
              (64, 2560): 2_768_345_600},
    "mamba2": {(24, 768): 128_989_632, (48, 1024): 368_346_624, (48, 1536): 780_161_280, (48, 2048): 1_343_757_312,
               (64, 2560): 2_702_599_680},
}  # fmt: skip


def original(kind, depth, width, **more):
    config = {"d_model": width, "n_layer": depth, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True}
    config |= {"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    if kind == "mamba2":
        config |= {"ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16, "d_intermediate": 0}
        config |= {"attn_layer_idx": [], "attn_cfg": {}, "tie_embeddings": True}
    return config | more


def hf(kind, depth, width, **more):
    config = {"model_type": kind, "hidden_size": width, "num_hidden_layers": depth, "vocab_size": 50280}
    if kind == "mamba2":
        config |= {"vocab_size": 50288, "n_groups": 1, "num_heads": 2 * width // 64, "tie_word_embeddings": True}
    return config | more


def abstract(d):
    mixer = getattr(layers, d.mixer)
    make = lambda width, rngs: mixer(width, rngs=rngs, **d.settings)
    encoder = lambda inputs, width, rngs: TokenEmbedding(inputs, width, multiple=d.multiple, rngs=rngs)
    sizes = {"width": d.width, "depth": d.depth, "mixers": (make,), "norm": layers.RMSNorm, "encoder": encoder}
    body = lambda rngs: Backbone(Tokens(vocab=d.vocab, length=8), **sizes, rngs=rngs)
    return nnx.eval_shape(lambda: LanguageModel(body(nnx.Rngs(0)), vocab=d.vocab, tied=d.tied, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("layout", [original, hf])
@pytest.mark.parametrize("kind", SIZES)
def test_published_models_have_their_number_of_parameters(kind, layout):
    for (depth, width), count in SIZES[kind].items():
        params, _ = split(abstract(describe(layout(kind, depth, width))))
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


INFINITY = [{"__float__": "Infinity"}, float("inf"), None]


@pytest.mark.parametrize("bound", INFINITY)
def test_no_upper_limit_in_its_three_spellings(bound):
    assert describe(hf("mamba2", 2, 64, time_step_limit=[0.0, bound])).settings["dt_limit"] == (0.0, None)
    assert describe(hf("mamba2", 2, 64, time_step_limit=[0.01, 0.5])).settings["dt_limit"] == (0.01, 0.5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (original("mamba2", 2, 64, attn_layer_idx=[9]), "attn_layer_idx"),
        (original("mamba2", 2, 64, d_intermediate=128), "d_intermediate"),
        (original("mamba", 2, 64, rms_norm=False), "rms_norm"),
        (original("mamba", 2, 64, ssm_cfg={"d_stat": 8}), "d_stat"),
        (original("mamba", 2, 64, ssm_cfg={"headdim": 8}), "headdim"),
        (original("mamba", 2, 64, ssm_cfg={"layer": "Mamba3"}), "Mamba3"),
        (original("mamba2", 2, 64, ssm_cfg={"layer": "Mamba2", "norm_before_gate": True}), "norm_before_gate"),
        (original("mamba", 2, 64, moe=True), "moe"),
        (original("mamba", 2, 64, n_layer="two"), "n_layer"),
        (hf("falcon_mamba", 2, 64), "falcon_mamba"),
        (hf("mamba", 2, 64, hidden_act="gelu"), "hidden_act"),
        (hf("mamba", 2, 64, intermediate_size=100), "intermediate_size"),
        (hf("mamba2", 2, 64, num_heads=3), "num_heads"),
        (hf("mamba2", 2, 64, num_heads=None), "num_heads = None"),
        (hf("mamba2", 2, 64, n_groups=None), "n_groups = None"),
        (hf("mamba", 2, 64, expand=1.5), "expand = 1.5"),
        (original("mamba", 2, 64, ssm_cfg={"d_state": None}), "d_state = None"),
        (hf("mamba2", 2, 64, time_step_limit=[0.0, "high"]), "bound of the step size"),
        (hf("mamba2", 2, 64, time_step_limit=0.1), "0.1 are no two bounds"),
        ({"architectures": ["GPT2"]}, "neither d_model"),
    ],
)
def test_configs_that_mean_another_model_are_refused(config, message):
    with pytest.raises(Refused, match=message):
        describe(config)


def checkpoint(width=16):
    """A small square one, in which a wrong transpose fits every shape: W_x, W_z and W_out of expand 1."""
    draw = np.random.default_rng(0).normal
    config = original("mamba", 1, width, vocab_size=13, ssm_cfg={"expand": 1, "d_state": 3, "dt_rank": 2})
    shapes = {
        "in_proj.weight": (2 * width, width), "conv1d.weight": (width, 1, 4), "conv1d.bias": (width,),
        "x_proj.weight": (8, width), "dt_proj.weight": (width, 2), "dt_proj.bias": (width,), "A_log": (width, 3),
        "D": (width,), "out_proj.weight": (width, width),
    }  # fmt: skip
    names = {f"backbone.layers.0.mixer.{name}": shape for name, shape in shapes.items()}
    names |= {"backbone.layers.0.norm.weight": (width,), "backbone.norm_f.weight": (width,)}
    names |= {"backbone.embedding.weight": (16, width)}
    return describe(config), {name: draw(size=shape).astype(np.float32) for name, shape in names.items()}


def test_tensors_are_read_as_the_layout_says():
    d, tensors = checkpoint()
    arrays = convert(d, tensors)
    u = np.random.default_rng(1).normal(size=16).astype(np.float32)
    xz = tensors["backbone.layers.0.mixer.in_proj.weight"] @ u
    np.testing.assert_allclose(u @ arrays["backbone/layers/0/mixer/in_x/kernel"], xz[:16], rtol=1e-5)
    np.testing.assert_allclose(u @ arrays["backbone/layers/0/mixer/in_z/kernel"], xz[16:], rtol=1e-5)
    out = tensors["backbone.layers.0.mixer.out_proj.weight"] @ u
    np.testing.assert_allclose(u @ arrays["backbone/layers/0/mixer/out/kernel"], out, rtol=1e-5)
    weights.check(arrays, split(abstract(d))[0])


EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"


def test_a_tied_table_under_either_name_or_both():
    d, tensors = checkpoint()
    table = tensors.pop(EMBEDDING)
    for found in ({EMBEDDING: table}, {HEAD: table}, {EMBEDDING: table, HEAD: table.copy()}):
        assert np.array_equal(convert(d, tensors | found)["backbone/encoder/embedding"], table)
    with pytest.raises(Refused, match="differ, but the config ties"):
        convert(d, tensors | {EMBEDDING: table, HEAD: table + 1})
    with pytest.raises(Refused, match=r"lacks backbone\.embedding\.weight"):
        convert(d, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("backbone.norm_f.weight"), "lacks backbone.norm_f.weight"),
        (lambda t: t.update({"backbone.layers.1.norm.weight": np.ones(16)}), "no place: backbone.layers.1"),
        (lambda t: t.update({EMBEDDING: t[EMBEDDING][:13]}), r"has shape \(13, 16\): the config makes it \(16, 16\)"),
        (lambda t: t.update({"backbone.norm_f.weight": np.ones(1)}), r"has shape \(1,\)"),
    ],
)
def test_every_tensor_is_used_once_in_its_shape(change, message):
    d, tensors = checkpoint()
    change(tensors)
    with pytest.raises(Refused, match=message):
        convert(d, tensors)


def test_mamba2_slices_in_their_order():
    """z, x, B, C, dt in the projection; x, B, C in the convolution."""
    ssm = {"layer": "Mamba2", "d_state": 2, "headdim": 4, "ngroups": 2, "conv_bias": False}
    d = describe(original("mamba2", 1, 8, vocab_size=16, ssm_cfg=ssm))
    numbered = lambda n, *rest: np.broadcast_to(np.arange(n, dtype=np.float32)[(..., *[None] * len(rest))], (n, *rest))
    names = {
        "in_proj.weight": numbered(44, 8), "conv1d.weight": numbered(24, 1, 4), "dt_bias": np.ones(4),
        "A_log": np.ones(4), "D": np.ones(4), "norm.weight": np.ones(16), "out_proj.weight": np.ones((8, 16)),
    }  # fmt: skip
    tensors = {f"backbone.layers.0.mixer.{name}": array for name, array in names.items()}
    tensors |= {EMBEDDING: np.ones((16, 8)), "backbone.norm_f.weight": np.ones(8)}
    arrays = convert(d, tensors | {"backbone.layers.0.norm.weight": np.ones(8)})
    found = {name.rpartition("mixer/")[2]: array for name, array in arrays.items()}
    first = 0
    for name, size in {"in_z": 16, "in_x": 16, "in_B": 4, "in_C": 4, "in_dt": 4}.items():
        np.testing.assert_array_equal(found[f"{name}/kernel"][0], np.arange(first, first := first + size))
    first = 0
    for name, size in {"conv_x": 16, "conv_B": 4, "conv_C": 4}.items():
        np.testing.assert_array_equal(found[name][0], np.arange(first, first := first + size))
    assert state_spaces.config_text(d, "toy").count("layers.Mamba2.G = 2") == 1
