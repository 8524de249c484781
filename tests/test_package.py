"""What `pip install longwave` gives: a wheel whose mixers and kernels need no checkout and no data set."""

import re
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UV = shutil.which("uv")

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(UV is None, reason="uv is not on the PATH: `pip install uv`"),
]

# Of the extra `train`; optax, orbax, rich and absl are left out, since flax itself brings them.
TRAIN_ONLY = {
    "array-record",
    "gin-config",
    "grain",
    "tensorflow-datasets",
    "tensorboardx",
    "matplotlib",
    "beartype",
}

USE = """
import sys
import jax, numpy as np
from flax import nnx
from longwave.layers import S4D
import longwave.kernels.aot, longwave.models

mixer = S4D(8, rngs=nnx.Rngs(0))
x = jax.random.normal(jax.random.key(1), (2, 16, 8))
y, carry, aux = mixer(x)
first = mixer(x[:, :10])
second = mixer(x[:, 10:], first.carry)
assert y.shape == x.shape and bool(np.isfinite(y).all())
np.testing.assert_allclose(np.concatenate([first.y, second.y], 1), y, rtol=1e-4, atol=1e-5)
assert not {"gin", "grain", "tensorflow_datasets", "matplotlib"} & set(sys.modules)
print(__import__("longwave.layers").layers.__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what the wheel holds: a build folder left in the checkout would slip into it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    rooms = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values()
    for room in rooms:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(UV, "build", "--wheel", "--out-dir", out, source, cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment that holds the wheel and what it asks for, nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    run(UV, "venv", "--no-project", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(UV, "pip", "install", "--python", python, wheel, cwd=folder)
    return python


def test_the_wheel_holds_every_module_and_config(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    rooms = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values()
    expected = {
        f"longwave/{path.relative_to(ROOT)}"
        for room in rooms
        for pattern in ("*.py", "*.gin", "*.toml", "*.json")
        for path in (ROOT / room).rglob(pattern)
    }
    assert expected - names == set()
    assert any(name.startswith("longwave/configs/") and name.endswith(".gin") for name in names)
    assert not any(name.startswith(("tests/", "longwave/tests/")) for name in names)


def test_mixers_run_in_a_bare_environment(bare, tmp_path):
    location = run(bare, "-c", USE, cwd=tmp_path)
    assert Path(location.strip()).is_relative_to(bare.parents[1])


def test_the_bare_environment_holds_nothing_of_the_training_extra(bare, tmp_path):
    listed = run(UV, "pip", "list", "--python", bare, "--format", "freeze", cwd=tmp_path)
    installed = {re.split("[=@ ]", line)[0].lower() for line in listed.splitlines()}
    assert {"longwave", "jax", "flax"} <= installed
    assert installed & TRAIN_ONLY == set()
