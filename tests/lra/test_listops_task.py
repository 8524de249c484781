"""The task: batches, loss, names, baselines and table rows."""

import logging
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longwave.lra.listops import ListOps
from longwave.lra.listops_data import baselines, tsv
from longwave.lra.listops_data.generator import Distribution, generate
from longwave.lra.listops_data.grammar import CLOSE, DIGIT, EOS, MIN, PAD, SM, Rows, evaluate
from longwave.training.classification import classification_sums
from tests.tolerances import FORWARD, assert_close

SHORT = {"max_length": 128, "min_tokens": 20, "max_tokens": 100, "sizes": (150, 20, 30), "processes": 1}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return ListOps(data_dir=str(tmp_path_factory.mktemp("data")), **SHORT)


def test_batches_are_as_specified_and_solvable(task):
    for split in ("train", "valid", "test"):
        batch = next(task.stream(split, batch_size=16))
        for name, spec in task.batch_spec(16).items():
            assert (batch[name].shape, batch[name].dtype) == (spec.shape, spec.dtype), name
        assert set(batch) == set(task.batch_spec(16))
        for tokens, length, label in zip(batch["inputs"], batch["length"], batch["label"], strict=True):
            assert evaluate(tokens[: length - 1].tolist()) == label
            assert tokens[length - 1] == EOS
            assert np.all(tokens[length:] == PAD)
            assert np.sum(tokens == CLOSE) == np.sum((tokens >= MIN) & (tokens <= SM))


def test_evaluation_sees_every_row_once(task):
    batches = list(task.stream("test", batch_size=8))
    labels = np.concatenate([b["label"][b["weight"] > 0] for b in batches])
    np.testing.assert_array_equal(labels, task._rows["test"].labels)
    assert [b["weight"].sum() for b in batches] == [8, 8, 8, 6]


def test_loss_is_the_weighted_sum():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(5, 10)), rng.integers(0, 10, 5)
    weight = np.array([1.0, 0.0, 1.0, 1.0, 0.0])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.sum(weight * np.log(p[np.arange(5), label]))
    sums = classification_sums(jnp.asarray(logits, jnp.float32), jnp.asarray(label), jnp.asarray(weight, jnp.float32))
    assert_close(sums.loss, expected, FORWARD["float32"])
    assert sums.weight == 3
    assert sums.metrics["accuracy"] == np.sum(weight * (logits.argmax(1) == label))


class Probe(nnx.Module):
    """A backbone that keeps its context and is NaN on padding: what passes the mask spoils the loss."""

    width = 4
    seen: ClassVar[list] = []

    def __call__(self, inputs, carry, ctx, train):
        self.seen.append((np.asarray(ctx.valid), ctx.key, train))
        return jnp.where(ctx.valid[..., None], jnp.ones((*inputs.shape, 4)), jnp.nan), None, (), ctx.valid


def test_padding_is_masked_and_the_key_means_training(task):
    model = task.head(Probe(), rngs=nnx.Rngs(0))
    batch = {name: jnp.asarray(value) for name, value in next(task.stream("valid", batch_size=8)).items()}
    key = jax.random.key(0)
    sums = task.loss(model, batch, key), task.loss(model, batch, None)
    assert all(np.isfinite(each.loss) and each.weight == 8 for each in sums)
    assert [(key, train) for _, key, train in Probe.seen] == [(key, True), (None, False)]
    np.testing.assert_array_equal(Probe.seen[0][0].sum(1), batch["length"])
    np.testing.assert_array_equal(Probe.seen[0][0][:, 0], True)


def test_names():
    assert ListOps().name == "listops"
    assert ListOps(sizes=(100, 10, 10)).name == "listops-2k"  # not the benchmark's sizes: never called LRA
    assert ListOps(**SHORT).name == "listops-128"
    assert ListOps(max_length=4096, max_tokens=4000).name == "listops-4k"
    assert ListOps(protocol="lra").inputs.length == 2000


def test_a_short_form_says_how_to_run_the_benchmark():
    assert ListOps().advice == ""
    assert ListOps(**SHORT).advice == (
        "This was listops-128, not Long Range Arena. The real one: "
        "uv run train.py configs/lra/listops.gin configs/lra/listops/s4.gin"
    )
    root = Path(__file__).parents[2]
    assert all((root / word).is_file() for word in ListOps(**SHORT).advice.split() if word.endswith((".py", ".gin")))


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_choose_from_the_global_batch(task, split):
    whole, part = (next(task.stream(split, batch_size=8, step=1, rows=rows)) for rows in (None, [5, 2]))
    for name in task.batch_spec(8):
        np.testing.assert_array_equal(part[name], whole[name][[5, 2]])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"max_length": 100, "max_tokens": 200, "min_tokens": 20},
            "max_tokens = 200: expected at most max_length",
        ),
        ({"sizes": (1, 2)}, "sizes"),
        ({"sizes": (0, 2, 2)}, "train = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"min_tokens": 1999}, "min_tokens = 1999"),
        ({"source": "/some/where", "seed": 3}, "seed, sizes are of generated data"),
        ({"max_length": 1, "source": "/some/where"}, "max_length = 1"),
    ],
)
def test_bad_settings(bad, message):
    with pytest.raises(ValueError, match=message):
        ListOps(**bad)


def test_fingerprint_tells_data_apart(task, tmp_path):
    assert task.fingerprint() == ListOps(data_dir=task.data_dir, **SHORT).fingerprint()
    other = ListOps(data_dir=str(tmp_path), seed=1, **SHORT)
    assert other.fingerprint()["digest"] != task.fingerprint()["digest"]
    assert task.splits == {"train": 150, "valid": 20, "test": 30}


def test_long_rows_of_official_files_are_cut_and_counted(tmp_path, caplog):
    rows = generate(Distribution(min_tokens=20, max_tokens=100), 200, seed=0, processes=1)
    for name in ("train", "val", "test"):
        tsv.write(tmp_path / f"basic_{name}.tsv", rows)
    task = ListOps(source=str(tmp_path), max_length=64, data_dir=str(tmp_path / "data"))
    assert task.name == "listops-64"
    expected = int(np.sum(rows.lengths > 63))
    assert task.cut("train") == expected > 0
    with caplog.at_level(logging.WARNING, logger="absl"):
        batches = list(task.stream("test", batch_size=50))
    assert f"{expected} of 200 rows of test are longer than 63 tokens" in caplog.text
    length = np.concatenate([batch["length"] for batch in batches])
    np.testing.assert_array_equal(length, np.minimum(rows.lengths, 63) + 1)
    assert np.all(np.concatenate([batch["inputs"][:, -1] for batch in batches])[length == 64] == EOS)
    row = task.row({"test": {"accuracy": 0.5}})
    assert (row["test rows cut"], row["data"]) == (expected, "not the release: 600 rows")


def look_ups(train, test):
    """The baselines by dictionaries and np.median, row by row."""

    def keys(rows, i):
        tokens, _ = rows[i]
        depth, own = 0, []
        for token in tokens.tolist():
            depth += (token == CLOSE) * -1 or int(token >= MIN)
            if depth == 1 and token < MIN:
                own.append(token - DIGIT)
        operate = {13: np.min, 14: np.max, 15: lambda v: int(np.median(v)), 16: lambda v: np.sum(v) % 10}
        root = int(tokens[0])
        return (), (root,), (root, *sorted(own)), (root, int(operate[root](own)) if own else None)

    tables = [{}, {}, {}, {}]
    for i in range(len(train)):
        for table, key in zip(tables, keys(train, i), strict=True):
            table.setdefault(key, np.zeros(10))[train.labels[i]] += 1
    hits = np.zeros(4)
    for i in range(len(test)):
        every = keys(test, i)
        for j in range(4):
            counts = tables[j].get(every[j], tables[1].get(every[1]))
            hits[j] += counts.argmax() == test.labels[i]
    return dict(zip(baselines.NAMES, hits / len(test), strict=True))


def test_baselines():
    rows = generate(Distribution(min_tokens=20, max_tokens=100), 2000, seed=0, processes=1)
    train, test = rows.slice(0, 1500), rows.slice(1500, 2000)
    scores = baselines.baselines(train, test)
    assert scores == pytest.approx(look_ups(train, test))
    assert scores["majority"] < scores["root operator"] < scores["root operator applied to its own digits"]


def test_table_row(task):
    row = task.row({"valid": {"accuracy": 0.6}, "test": {"accuracy": 0.9}})
    assert row["task"] == "listops-128"
    assert row["data"] == "generated, seed 0"
    assert row["test"] == 0.9
    assert set(baselines.NAMES) <= set(row)
    assert row["note"] == ""
    root = row["root operator"]
    assert task.row({"test": {"accuracy": root + 0.019}})["note"] == "root operator only"
    assert task.row({"test": {"accuracy": root - 0.019}})["note"] == "root operator only"
    assert task.row({"test": {"accuracy": root - 0.03}})["note"] == "below the root operator"


def test_rows_take_and_slice():
    rows = generate(Distribution(min_tokens=20, max_tokens=100), 10, seed=0, processes=1)
    even = rows.take(np.arange(10) % 2 == 0)
    np.testing.assert_array_equal(even.row(2), rows.row(4))
    both = Rows.concatenate([rows.slice(0, 3), rows.slice(3, 10)])
    np.testing.assert_array_equal(both.offsets, rows.offsets)


@pytest.mark.full
@pytest.mark.large
def test_the_whole_benchmark(tmp_path):
    """100,000 distinct rows, each proven while it is built; look-ups where the documentation says."""
    task = ListOps(data_dir=str(tmp_path))
    expected = {"majority": 0.17, "root operator": 0.365, "root operator and its own digits": 0.41}
    expected["root operator applied to its own digits"] = 0.475
    row = task.row({})
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=4 * np.sqrt(0.25 / 2000))
    rows = [task._rows[split].row(i).tobytes() for split, size in task.splits.items() for i in range(size)]
    assert len(set(rows)) == len(rows) == 100_000
    batch = next(task.stream("train", batch_size=32))
    assert 500 < batch["length"].min() - 1 < batch["length"].max() - 1 < 2000
