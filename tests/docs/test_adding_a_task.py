"""The two tasks of docs/adding_a_task.md, word for word: they learn, and beat their baselines."""

import csv
import importlib
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from longwave.configs.loader import load
from longwave.training.program import build

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_task.md"


@pytest.fixture
def code(tmp_path, monkeypatch):
    """name -> module, from the blocks of the page, each of which begins with its file name."""
    names = []
    for name, source in re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE.read_text(), re.DOTALL):
        (tmp_path / f"{name}.py").write_text(source)
        names.append(name)
    monkeypatch.syspath_prepend(tmp_path)
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)  # another test's folder is gone
    return {name: importlib.import_module(name) for name in names}


def test_the_page_has_these_blocks_and_no_other(code):
    assert list(code) == ["csv_task", "npy_task", "few_steps"]
    assert PAGE.read_text().count("```python") == 3


def test_classification_from_csv(code, tmp_path):
    rng = np.random.default_rng(0)
    for split, rows in (("train", 400), ("valid", 50), ("test", 50)):
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for _ in range(rows):
                text = rng.choice(["a", "b"], size=rng.integers(3, 8) * 2 + 1)
                writer.writerow(["".join(text), "b" if np.mean(text == "b") > 0.5 else "a"])
    task = code["csv_task"].CsvText(tmp_path, length=20)
    row = code["few_steps"].train(task, steps=40)
    assert row["test"] > 0.9 > row["majority"]
    assert task.fingerprint()["splits"] == {"train": 400, "valid": 50, "test": 50}


def test_regression_from_npy(code, tmp_path):
    rng = np.random.default_rng(0)
    for split, rows in (("train", 400), ("valid", 50), ("test", 50)):
        x = rng.normal(size=(rows, 16, 2)) + rng.normal(size=(rows, 1, 2))
        np.save(tmp_path / f"x_{split}.npy", x)
        np.save(tmp_path / f"y_{split}.npy", x[:, :, 0].mean(1))
    task = code["npy_task"].NpyRegression(tmp_path)
    row = code["few_steps"].train(task, steps=60)
    assert row["test"] < 0.2 * row["best constant"]


def test_the_config_and_the_command(code, tmp_path, monkeypatch):
    """What the page prints, up to the jitted step: the config is complete, and every value of it is used."""
    for split in ("train", "valid", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.csv").write_text("text,label\naab,a\nabb,b\n")
    page = PAGE.read_text()
    config = re.search(r"(    from __gin__ .*?)\n\nThis trains", page, re.DOTALL)[1]
    (files,) = re.findall(r"^    uv run train.py (.*)$", page, re.MULTILINE)
    (tmp_path / "my.gin").write_text(textwrap.dedent(config))
    monkeypatch.chdir(tmp_path)
    config = load(files.split())
    program = build(config.run)
    config.check_used()
    assert config.run.task.splits == {"train": 2, "valid": 2, "test": 2}
    assert program.batch["inputs"].shape == (config.run.batch_size, 64)
    assert config.run.steps > config.run.eval_every
