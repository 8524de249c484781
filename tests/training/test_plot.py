"""The picture and the table at the end of a run."""

import io
import json

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from longwave.training import plot


def write(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def figures(monkeypatch):
    """The figures that `curve` makes."""
    made = []
    monkeypatch.setattr(plot, "Figure", lambda *a, _make=plot.Figure, **k: made.append(_make(*a, **k)) or made[-1])
    return made


def drawn(axes):
    """label -> (x, y) of the labelled lines."""
    return {line.get_label(): np.array(line.get_data()).tolist() for line in axes.lines if line.get_label()[0] != "_"}


def test_curve(tmp_path, figures):
    train = [{"step": s, "train/loss": 1.0 / s, "train/accuracy": s / 10} for s in (1, 2, 3)]
    valid = [{"step": 2, "valid/loss": 0.75, "valid/accuracy": 0.15}, {"step": 3, "valid/accuracy": 0.2}]
    write(tmp_path, [*train, {"step": 4, "train/loss": "nan"}, *valid])
    path = plot.curve(
        tmp_path,
        test=(3, {"accuracy": 0.187, "loss": 0.9}),
        baselines={"root operator": 0.33, "majority": 0.32, "digits": 0.45},
        title="S4D",
    )
    assert path == type(path)(tmp_path) / "curve.png"
    pixels = imread(str(path))
    assert pixels.shape[:2] == (630, 1575)
    assert len(np.unique(pixels[..., 0])) > 50

    loss, accuracy = figures[0].axes
    assert drawn(loss) == {
        "train": [[1, 2, 3], [1.0, 0.5, 1 / 3]],
        "validation": [[2], [0.75]],
        "test 0.9": [[3], [0.9]],
    }
    assert drawn(accuracy)["validation"] == [[2, 3], [0.15, 0.2]]
    assert drawn(accuracy)["test 18.7%"] == [[3], [0.187]]
    labels = {text.get_text(): text.xy[1] for text in accuracy.texts}
    assert list(labels) == ["majority 32.0%", "root operator 33.0%", "digits 45.0%"]
    assert labels["majority 32.0%"] == 0.32
    assert labels["digits 45.0%"] == 0.45
    low, high = accuracy.get_ylim()
    assert labels["root operator 33.0%"] - 0.32 >= 0.05 * (high - low) * 0.99


def test_long_curves_show_their_running_mean(tmp_path, figures):
    write(tmp_path, [{"step": s, "train/loss": float(s % 2)} for s in range(1, 1001)])
    plot.curve(tmp_path, percent=False)
    raw, mean = figures[0].axes[0].lines
    assert set(raw.get_ydata()) == {0.0, 1.0}
    np.testing.assert_allclose(mean.get_ydata(), 0.5)
    np.testing.assert_allclose([mean.get_xdata()[0], mean.get_xdata()[-1]], [20.5, 980.5], atol=1)


def test_a_run_without_logs_still_gets_a_picture(tmp_path):
    write(tmp_path, [])
    assert plot.curve(tmp_path).exists()


def test_table():
    rows = [
        {"task": "listops", "model": "S4D", "test": 53.24567, "seeds": 3},
        {"task": "a|b", "paper": None, "test": 1.0},
    ]
    out = io.StringIO()
    markdown = plot.table(rows, title="Results", console=Console(file=out, width=100))
    assert markdown == (
        "| task | model | test | seeds | paper |\n"
        "| --- | --- | ---: | ---: | ---: |\n"
        "| listops | S4D | 53.25 | 3 | – |\n"
        "| a\\|b | – | 1 | – | – |\n"
    )
    shown = out.getvalue()
    assert shown.startswith("Results")
    for word in ("listops", "53.25", "a|b"):
        assert word in shown
