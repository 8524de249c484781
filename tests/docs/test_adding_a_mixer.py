"""docs/adding_a_mixer.md: its code is run as it stands there, its claims about the example are tried."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longwave.cli.main import main
from longwave.layers import contract
from longwave.layers.mixer import ROLES
from tests.tolerances import FORWARD, assert_close

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_mixer.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
MIXER, CHECK, LOOP, STREAM = BLOCKS


@pytest.fixture
def min_gru(tmp_path, monkeypatch):
    """The page's mixer as the module `min_gru` in the current folder."""
    (tmp_path / "min_gru.py").write_text(MIXER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import min_gru

    yield min_gru
    del sys.modules["min_gru"]


def test_the_mixer_keeps_the_contract(min_gru, capsys):
    exec(CHECK, {})
    assert "18 kept, 0 broken, 0 skipped" in capsys.readouterr().out


def test_the_mixer_is_the_equations_of_its_docstring(min_gru):
    from flax import nnx

    mixer = min_gru.MinGRU(4, expand=2, rngs=nnx.Rngs(0))
    mixer.b_z[...] = jnp.linspace(-1, 1, 8)
    W_z, b_z, W_h, W_o = (np.asarray(getattr(mixer, n)[...], np.float64) for n in ("W_z", "b_z", "W_h", "W_o"))
    x = np.random.default_rng(0).normal(size=(2, 9, 4))
    h, y = np.zeros((2, 8)), []
    for t in range(9):
        z = 1 / (1 + np.exp(-(x[:, t] @ W_z + b_z[None])))
        h = (1 - z) * h + z * (x[:, t] @ W_h)
        y.append(h @ W_o)
    out = jax.jit(lambda x: tuple(mixer(x)))(x.astype(np.float32))
    assert_close(out[0], np.stack(y, 1), FORWARD["float32"], "y")
    assert_close(out[1], h, FORWARD["float32"], "carry")


def test_alone_in_a_loop_of_ones_own_it_learns_and_streams(min_gru, capsys):
    namespace = {}
    exec(LOOP, namespace)
    assert namespace["value"] < 0.3, capsys.readouterr().out
    exec(STREAM, namespace)
    assert namespace["carry"].shape == (1, 32)


@pytest.mark.full
@pytest.mark.parametrize(
    ("line", "instead", "promise"),
    [
        ("x = jnp.where(ctx.valid[:, :, None], x, 0)", "pass", "garbage"),
        ("keep = jnp.where(ctx.reset[:, :, None], 0, keep)", "keep, z = cut(keep), cut(z)", "reset"),
    ],
)
def test_what_the_page_says_would_fail_fails(line, instead, promise):
    assert MIXER.count(line) == 1
    namespace = {"__name__": "broken"}
    cut = "cut = lambda a: jnp.where(ctx.reset[:, :, None], 0, a); "
    exec(MIXER.replace(line, (cut if promise == "reset" else "") + instead), namespace)
    checks = contract.examine(namespace["MinGRU"])
    assert {c.name for c in checks if not c.passed} == {promise}, contract.certificate(checks)


def test_the_command_line_of_the_page_reaches_it(min_gru, capsys):
    command = re.search(r"^\$ longwave (.*)$", PAGE.read_text(), re.MULTILINE).group(1).split()
    assert main([*command, "--set", "depth=2"]) == 2  # found and asked for its hyper-parameters
    assert "--set depth: expected one of expand" in capsys.readouterr().err


def test_a_loop_of_ones_own_needs_neither_gin_nor_data_sets(tmp_path):
    (tmp_path / "min_gru.py").write_text(MIXER)
    code = "import sys, min_gru; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "longwave.layers" in modules
    assert not {"gin", "tensorflow_datasets", "grain", "orbax.checkpoint"} & set(modules)


def test_the_page_names_every_role():
    listed = re.search(r"role \(`([^`]*)`\)", PAGE.read_text()).group(1)
    assert tuple(listed.split()) == ROLES
