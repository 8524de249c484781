"""`longwave import` and `longwave export`: whole folders, exit codes, errors that name the file."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longwave.cli.main import main
from longwave.cli.model import load_model
from longwave.models import safetensors
from tests.models.test_weights import checkpoint, original

WIDTH = 16


@pytest.fixture
def source(tmp_path):
    """A checkpoint of one Mamba layer in the original layout, its tensors in safetensors."""
    folder = tmp_path / "mamba-tiny"
    folder.mkdir()
    ssm = {"expand": 1, "d_state": 3, "dt_rank": 2}
    (folder / "config.json").write_text(json.dumps(original("mamba", 1, WIDTH, vocab_size=13, ssm_cfg=ssm)))
    safetensors.save(folder / "model.safetensors", checkpoint(WIDTH)[1])
    return folder


def test_a_checkpoint_becomes_weights_and_weights_come_back(source, tmp_path, capsys):
    """import, then export in both dtypes: every parameter as it was, or rounded."""
    (source / "tokenizer.json").write_text("{}")
    out, low = tmp_path / "weights", tmp_path / "low"
    assert main(["import", str(source), "--out", str(out)]) == 0
    assert "written" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["config.gin", "model.safetensors", "tokenizer.json"]
    (out / "tokenizer.json").unlink()  # it says nothing, which only reading text would find out
    assert main(["export", str(out), "--out", str(low), "--dtype", "bfloat16"]) == 0
    assert main(["export", str(out), "--out", str(tmp_path / "again")]) == 0
    first, again = (safetensors.load(f / "model.safetensors") for f in (out, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[k], again[k]) for k in first)
    stored = safetensors.load(low / "model.safetensors")
    kept = {name for name, array in stored.items() if array.dtype == np.float32}
    assert {name.rpartition("/")[2] for name in kept} == {"A_log", "D", "dt_bias"}
    for name, array in first.items():
        np.testing.assert_array_equal(stored[name], array if name in kept else array.astype(jnp.bfloat16))
    loaded = load_model(low)
    assert loaded.model.backbone.residual_float32, "what config.json leaves out is the authors' default"
    assert loaded.model.backbone.layers[0].mixer.out.kernel[...].dtype == jnp.float32  # as training stores it
    ids = np.arange(10).reshape(2, 5)
    logits = jax.jit(lambda model, ids: model(ids).logits)(loaded.model, ids)
    assert logits.shape == (2, 5, 16)
    assert np.all(logits[..., 13:] < -1e38)
    assert np.all(np.isfinite(logits))


@pytest.mark.full
def test_no_text_of_ids_that_its_tokenizer_does_not_know(source, tmp_path, capsys):
    """13 of 64 ids are letters or the end of a text: nearly all of what a new model would draw is none."""
    ssm = {"expand": 1, "d_state": 3, "dt_rank": 2}
    config = original("mamba", 1, WIDTH, vocab_size=64, ssm_cfg=ssm, residual_in_fp32=False)
    (source / "config.json").write_text(json.dumps(config))
    tensors = dict(safetensors.load(source / "model.safetensors"))
    table = 0.01 * np.random.default_rng(0).normal(size=(64, WIDTH)).astype(np.float32)
    safetensors.save(source / "model.safetensors", tensors | {"backbone.embedding.weight": table})
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {letter: i for i, letter in enumerate(["<|endoftext|>", *"abcdefghijkl"])}
    words = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    words.decoder = tokenizers.decoders.ByteLevel()
    words.add_special_tokens(["<|endoftext|>"])
    words.save(str(source / "tokenizer.json"))
    out = tmp_path / "weights"
    assert main(["import", str(source), "--out", str(out)]) == 0
    assert not load_model(out).model.backbone.residual_float32
    capsys.readouterr()
    assert main(["generate", str(out), "--prompt", "abc", "--tokens", "60", "--endless"]) == 0
    text = capsys.readouterr().out.strip()
    assert set(text) <= set("abcdefghijkl")
    assert len(text) >= 3 + 45, "ids that are no tokens decode to nothing"


def test_a_refused_checkpoint_leaves_nothing(source, tmp_path, capsys):
    tensors = dict(safetensors.load(source / "model.safetensors"))
    tensors["backbone.norm_f.weight"] = np.ones(3, np.float32)
    safetensors.save(source / "model.safetensors", tensors)
    assert main(["import", str(source), "--out", str(tmp_path / "weights")]) == 1
    assert "backbone.norm_f.weight has shape (3,)" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [source.name]
    tensors["backbone.norm_f.weight"] = np.ones(WIDTH, np.int32)  # found by the model, not by the layout
    safetensors.save(source / "model.safetensors", tensors)
    assert main(["import", str(source), "--out", str(tmp_path / "weights")]) == 1
    assert "backbone/norm/scale: int32" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [source.name]


def test_wrong_folders(source, tmp_path, capsys):
    assert main(["import", str(source), "--out", str(tmp_path)]) == 2
    assert "expected a folder that does not" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "of weights" in capsys.readouterr().err
    (source / "model.safetensors").unlink()
    assert main(["import", str(source), "--out", str(tmp_path / "x")]) == 2
    assert "pytorch_model.bin" in capsys.readouterr().err
    shutil.rmtree(source)
    assert main(["import", str(source), "--out", str(tmp_path / "x")]) == 2


def test_an_old_pickle_is_refused_in_words(source, tmp_path, capsys):
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    assert main(["import", str(source), "--out", str(tmp_path / "x")]) == 1
    assert "before PyTorch 1.6" in capsys.readouterr().err
