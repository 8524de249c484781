"""`longwave generate` and `longwave perplexity`: from a run's best step and from weights; what is wrong is said."""

import dataclasses

import jax
import numpy as np
import pytest

from longwave.cli.generate import tokeniser_of
from longwave.cli.main import main
from longwave.cli.model import load_model
from longwave.cli.usage import UsageError
from longwave.configs import loader
from longwave.models import weights
from longwave.tasks.language_modelling.next_token import NextToken
from longwave.training.checkpoint import Checkpoints
from longwave.training.program import build
from longwave.training.state import ModelDef

CONFIG = """
from __gin__ import dynamic_registration
from longwave import layers
from longwave import models
from longwave.tasks.language_modelling import next_token
from longwave.training import optimizer
from longwave.training import run

train.task = @next_token.NextToken()
next_token.NextToken.length = 32
train.backbone = @models.Backbone
models.Backbone.width = 8
models.Backbone.depth = 1
models.Backbone.mixers = (@layers.LRU,)
layers.LRU.N = 4
train.optimizer = @optimizer.AdamW()
optimizer.AdamW.lr = 0.1
train.steps = 3
train.batch_size = 8
"""


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGWAVE_DATA", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of which step 2 was the best, without training: every step's parameters are those of another seed."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    (folder / "config.gin").write_text(CONFIG)
    program = build(loader.load([str(folder / "config.gin")], ["train.ema=0.9"]).run)
    task = program.run.task
    options = {"metric": task.metric, "larger_is_better": task.larger_is_better}
    with Checkpoints(folder / "checkpoints", program.state, metadata={}, **options) as checkpoints:
        for step, score in ((1, 4.0), (2, 3.0), (3, 5.0)):
            state = program.init(jax.random.key(step))
            averaged = jax.tree.map(lambda a: a + 1, state.ema)
            checkpoints.save(step, dataclasses.replace(state, ema=averaged), scores={"bits_per_byte": score})
    (folder / "config.gin").write_text(CONFIG + "train.ema = 0.9\n")
    return folder


@pytest.fixture(scope="module")
def weights_dir(run_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    (folder / "config.gin").write_text(CONFIG)
    weights.write(folder / "model.safetensors", load_model(run_dir).model)
    return folder


def generated(capsys, folder, *arguments):
    assert main(["generate", str(folder), *arguments]) == 0
    out = capsys.readouterr()
    assert "tokens/s" in out.err
    return out.out


def test_a_run_is_read_at_its_best_step_with_the_averaged_parameters(run_dir):
    loaded = load_model(run_dir)
    assert loaded.step == 2
    run = loader.load([str(run_dir / "config.gin")]).run
    definition = ModelDef(lambda rngs: run.task.head(run.backbone(run.task.inputs, rngs=rngs), rngs=rngs))
    params, _ = definition.init(jax.random.key(2))
    np.testing.assert_allclose(
        loaded.model.backbone.layers[0].mixer.B[...], params["backbone"]["layers"]["0"]["mixer"]["B"] + 1, rtol=1e-6
    )
    (half := run_dir.parent / "half").mkdir()
    (half / "checkpoints").symlink_to(run_dir / "checkpoints")
    (half / "config.gin").write_text(CONFIG + "train.ema = 0.9\ntrain.compute_dtype = 'bfloat16'\n")
    assert load_model(half, compute=True).model.backbone.encoder.embedding.dtype == jax.numpy.bfloat16
    assert load_model(half).model.backbone.encoder.embedding.dtype == jax.numpy.float32


def test_text_of_a_run_and_of_its_weights(run_dir, weights_dir, capsys, tmp_path):
    text = generated(capsys, run_dir, "--prompt", "ROMEO:", "--tokens", "11", "--seed", "4", "--endless")
    assert text.startswith("ROMEO:")
    assert len(text) > len("ROMEO:\n")
    (tmp_path / "prompts.txt").write_text("JULIET:\nROMEO:\n")
    both = generated(
        capsys, weights_dir, "--file", str(tmp_path / "prompts.txt"), "--tokens", "11", "--seed", "3", "--endless"
    )
    first, second = both.split("-" * 40 + "\n")
    assert first.startswith("JULIET:")
    assert second == text, "a prompt's text depends on its seed alone"


@pytest.mark.full
def test_the_most_probable_text_needs_no_seed(weights_dir, capsys):
    chosen = ("--prompt", "A", "--tokens", "9", "--temperature", "0", "--repetition_penalty", "1.2", "--piece", "1")
    assert generated(capsys, weights_dir, *chosen) == generated(capsys, weights_dir, *chosen, "--seed", "8")
    broken = b"\xe2\x82".decode(errors="surrogateescape")  # as Python gives an argument that is no UTF-8
    assert generated(capsys, weights_dir, "--prompt", broken, "--tokens", "1").startswith("\ufffd")
    assert generated(capsys, weights_dir, *chosen, "--bare") != generated(capsys, weights_dir, *chosen)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "0"], "--tokens 0: expected at least 1"),
        (["--piece", "0"], "--piece 0: expected at least 1"),
        (["--bare"], "--bare: a prompt is empty"),
        (["--seed", "-1"], "--seed -1: expected 0 to 2^31"),
        (["--seed", "2147483648"], "--seed 2147483648: expected 0 to 2^31"),
        (["--top_p", "2"], "TopP.p = 2.0: expected more than 0, at most 1"),
        (["--temperature", "0", "--top_k", "3"], "temperature = 0 with top_k = 3"),
        (["--prompt", "a", "--file", "b"], "--file and --prompt: expected one of them"),
        (["--file", "not there"], "--file not there: expected a text file"),
    ],
)
def test_wrong_arguments(run_dir, arguments, said, capsys):
    assert main(["generate", str(run_dir), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_what_is_no_model_is_refused(run_dir, tmp_path, capsys):
    assert main(["generate", str(tmp_path)]) == 2
    assert "expected the folder of a run (config.gin and checkpoints/)" in capsys.readouterr().err
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.gin").write_text(CONFIG)
    assert main(["generate", str(tmp_path)]) == 1
    assert "no checkpoint with validation scores" in capsys.readouterr().err
    (tmp_path / "config.gin").write_text(CONFIG + "train.sweep = {'seed': (0, 1)}\n")
    assert main(["generate", str(tmp_path)]) == 2
    assert "expected a single run" in capsys.readouterr().err
    (other := tmp_path / "other").mkdir()
    (other / "checkpoints").symlink_to(run_dir / "checkpoints")
    (other / "config.gin").write_text(CONFIG.replace("width = 8", "width = 6"))
    assert main(["generate", str(other)]) == 1
    assert "holds another model than its config builds" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"the model has 5000 ids, no bytes, and no tokenizer\.json"):
        tokeniser_of(NextToken(vocab=5000), None)
    with pytest.raises(UsageError, match="expected language modelling"):
        tokeniser_of(object(), None)


@pytest.mark.full
def test_perplexity_of_a_run_on_other_texts(run_dir, tmp_path, capsys):
    (texts := tmp_path / "texts").mkdir()
    for i in range(4):
        (texts / f"{i}.txt").write_text(f"Text {i}: to be or not to be\n" * (i + 1))
    out = tmp_path / "plots" / "p.png"
    arguments = ["--source", str(texts), "--lengths", "20,100,1000", "--last", "5", "--out", str(out)]
    assert main(["perplexity", str(run_dir), *arguments]) == 0
    said = capsys.readouterr().out
    assert "17 to 32" in said
    assert "length 20: perplexity " in said
    assert "length 1,000: no document is as long" in said
    assert out.read_bytes().startswith(b"\x89PNG")
    for arguments, wrong in (
        (["--lengths", "1k"], "--lengths 1k: expected whole numbers"),
        (["--lengths", "50"], "expected lengths greater than --last"),
        (["--split", "all"], "--split all: expected train, valid or test"),
    ):
        assert main(["perplexity", str(run_dir), *arguments]) == 2
        assert wrong in capsys.readouterr().err
    assert main(["perplexity", str(run_dir), "--source", "not there"]) == 1
    assert "source = 'not there' is not there" in capsys.readouterr().err
