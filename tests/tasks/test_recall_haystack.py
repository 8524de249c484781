"""Selective copying, passkey, documents and needles, read back row by row by a reader that knows only their form."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from longwave import layers
from longwave.models import Backbone
from longwave.tasks.recall import published
from longwave.tasks.recall.documents import DocumentRetrieval
from longwave.tasks.recall.haystack import essay, hide, noise
from longwave.tasks.recall.induction_heads import InductionHeads
from longwave.tasks.recall.needle import Code, Needle, number, uuid, word
from longwave.tasks.recall.passkey import Passkey
from longwave.tasks.recall.selective_copying import SelectiveCopying
from longwave.tasks.recall.streaming import streamed_logits
from tests.models.decay import Decay
from tests.tolerances import FORWARD, assert_close

RNG, FULL = np.random.default_rng, pytest.mark.full


def rows_of(batch):
    """Lists of plain numbers: tokens, position, label, cell of each row."""
    return [tuple(np.asarray(x).tolist() for x in row) for row in zip(*batch.values(), strict=True)]


def drawn(task, rows=60):
    batch = task.draw_cells(RNG(0), rows)
    assert list(batch) == ["inputs", "position", "label", "cell"]
    assert {array.dtype.name for array in batch.values()} == {"int32"}
    assert batch["inputs"].shape == (rows, task.inputs.length)
    assert batch["position"].shape == batch["label"].shape == (rows, task.questions)
    assert 0 <= batch["inputs"].min() <= batch["inputs"].max() < task.inputs.vocab
    return rows_of(batch)


def test_selective_copying_rows():
    task, first, seen = SelectiveCopying(vocab=8, length=20, tokens=4), set(), set()
    for tokens, position, label, _ in drawn(task, 300):
        read, asked = tokens[:24], tokens[24:]
        assert [token for token in read if token] == label
        assert asked == [7] * 4
        assert position == [24, 25, 26, 27]
        first.add(min(i for i, token in enumerate(read) if token))
        seen.update(label)
    assert seen == set(range(1, 7))
    assert {0, 1, 5, 10} <= first


def test_hide_puts_pieces_in_order_of_depth():
    filler = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    pieces = np.array([[[10, 11], [20, 21]]] * 2)
    context, start = hide(filler, pieces, np.array([[1.0, 0.0], [0.5, 0.5]]))
    assert context.tolist() == [[20, 21, 1, 2, 3, 4, 10, 11], [5, 6, 10, 11, 20, 21, 7, 8]]
    assert start.tolist() == [[6, 0], [2, 4]]


def test_fillers():
    assert noise(RNG(0), 2, 7, 10, 13).tolist() == [[10, 11, 12, 10, 11, 12, 10]] * 2
    share = np.bincount(essay(RNG(0), 100, 400, 5, 9).ravel(), minlength=9)[5:] / 40_000
    np.testing.assert_allclose(share, np.array([12, 6, 4, 3]) / 25, atol=0.0125)  # five standard errors


def test_passkey_rows():
    task = Passkey(vocab=40, length=71, digits=3)
    for tokens, position, label, cell in drawn(task):
        at = tokens.index(10)
        assert tokens[at + 1 : at + 4] == label
        assert abs(at / 64 - cell / 4) <= 0.1 + 0.5 / 64
        assert tokens[68:] == [11, *label[:2]]
        assert position == [68, 69, 70]
        rest = tokens[:at] + tokens[at + 4 : 68]
        assert len(rest) == 64
        assert min(rest) >= 12


def test_document_rows():
    task, places = DocumentRetrieval(vocab=80, ids=20, noise=9, words=8, query=3), set()
    for tokens, position, label, cell in drawn(task, 200):
        documents = np.reshape(tokens[:-1], (10, 14)).tolist()
        query, ids = documents[0][1:4], [document[5] for document in documents]
        assert len(set(query)) == 3
        assert len(set(ids)) == 10
        golden = []
        for i, document in enumerate(documents):
            assert (document[0], document[1:4], document[4]) == (0, query, 1)
            assert 3 <= document[5] < 23 <= min(document[6:])
            texts = [document[j : j + 3] for j in range(6, 12)]
            golden += [i] * (query in texts)
        assert [ids[i] for i in golden] == label
        assert golden[0] * 5 // 10 == cell
        assert (tokens[-1], position) == (2, [140])
        places.add(golden[0])
    assert places == set(range(10))


def read_needles(tokens, key, value):
    """(keys -> values in order of the text, the rest) of a context."""
    found, rest, i, width = {}, [], 0, key.tokens + value.tokens + 2
    while i < len(tokens):
        if tokens[i] == 0:
            assert tokens[i + 1 + key.tokens] == 1
            name = tuple(tokens[i + 1 : i + 1 + key.tokens])
            found.setdefault(name, []).append(tokens[i + 2 + key.tokens : i + width])
            i += width
        else:
            rest.append(tokens[i])
            i += 1
    return found, rest


FORMS = {
    "single 1": Needle(length=64, filler=noise),
    "single 2": Needle(length=64),
    "single 3": Needle(length=160, value=uuid()),
    "multi-key 1": Needle(length=96, keys=4),
    "multi-key 2": Needle(length=128, keys=None),
    "multi-key 3": Needle(length=512, key=uuid(), value=uuid(), keys=None),
    "multi-value": Needle(length=128, values=4),
    "multi-query": Needle(length=160, keys=4, queries=4),
}


@pytest.mark.parametrize("task", FORMS.values(), ids=FORMS)
def test_needle_rows(task):
    key, value, most = task.key, task.value, 0
    for tokens, position, label, _ in drawn(task, 20):
        context = tokens[: tokens.index(2)]
        found, rest = read_needles(context, key, value)
        asked, labels, i = [], [], len(context)
        full = [*tokens, label[-1]]  # the last answer token is no input
        for _ in range(task.queries):
            assert (full[i], full[i + 1 + key.tokens]) == (2, 1)
            name = tuple(full[i + 1 : i + 1 + key.tokens])
            start, i = i + 2 + key.tokens, i + 2 + key.tokens + task.values * value.tokens
            asked += range(start - 1, i - 1)
            labels += [token for code in found[name] for token in code]
            assert full[start:i] == labels[-(i - start) :]
        assert i == len(full)
        assert (position, label) == (asked, labels)
        assert {len(values) for values in found.values()} == {task.values}
        assert len(found) == task.keys or task.keys is None
        if task.keys is None:
            assert len(rest) < key.tokens + value.tokens + 2
        assert not rest or min(rest) >= 19 + (512 - 19) // 2
        symbols = {token for values in found.values() for code in values for token in code}
        assert symbols <= set(range(3, 3 + value.symbols))
        most = max(most, *symbols)
    assert most == 2 + value.symbols


def test_needles_by_depth():
    assert FORMS["multi-query"].cells == FORMS["multi-value"].cells == ("",)
    for tokens, _, _, cell in drawn(dataclasses.replace(FORMS["multi-key 2"], length=1000), 50):
        end = tokens.index(2)
        needle = [0, tokens[end + 1], 1]
        at = next(i for i in range(end) if tokens[i : i + 3] == needle) / (end - 10)
        assert abs(at - cell / 4) < 0.3  # its neighbours stand at random depths
    hits = Needle(length=4096, sizes=(5, 50)).draw(RNG(0), 50)["inputs"]
    depth = (hits == 0).argmax(1) / (4096 - 19)
    assert np.all(np.abs(depth - np.resize([0, 0.25, 0.5, 0.75, 1], 50)) <= 0.101)


def test_codes_in_a_row_differ():
    task = Needle(vocab=40, key=Code(3, 2), value=number(1), keys=9, length=64)
    for tokens, *_ in drawn(task, 30):
        assert len(read_needles(tokens[: tokens.index(2)], task.key, task.value)[0]) == 9
    assert (word(), number(), uuid()) == ((0, 1), (10, 7), (16, 32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelectiveCopying(vocab=3), "vocab = 3"),
        (lambda: Passkey(length=10, digits=5), "length = 10, digits = 5"),
        (lambda: Passkey(depths=(0.0, 1.5), sizes=(2, 2)), "depths"),
        (lambda: DocumentRetrieval(noise=5, ids=5), "noise = 5, ids = 5"),
        (lambda: DocumentRetrieval(query=9, words=8), "words = 8, query = 9"),
        (lambda: Needle(length=12), "length = 12"),
        (lambda: Needle(keys=2, queries=3), "keys = 2, values = 1, queries = 3"),
        (lambda: Needle(length=9000, keys=247), "at least 247 different keys"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_baselines_by_hand():
    task = SelectiveCopying(length=30, tokens=5, sizes=(200, 300))
    test = task.draw(RNG((2, 0)), 300)
    hits = []
    for tokens, _, label in rows_of(test):
        best = max(range(1, 15), key=lambda token: tokens.count(token))
        hits += [token == best for token in label]
    assert task.baselines["most frequent in the row"] == pytest.approx(np.mean(hits))
    assert FORMS["multi-key 1"].baselines["a value of the row"] == 0.25
    assert set(FORMS["single 1"].baselines) == {"majority"}  # the only value in the row is the answer
    assert DocumentRetrieval(sizes=(5, 5)).baselines["a document of the row"] == 1 / 12


ATTENTION = functools.partial(layers.Attention, heads=2)


@pytest.mark.parametrize(
    ("mixer", "length"),  # whole chunks, and a rest
    [(Decay, 24), (Decay, 29), pytest.param(layers.Mamba, 29, marks=FULL), pytest.param(ATTENTION, 29, marks=FULL)],
)
def test_streamed_is_at_once(mixer, length):
    """The same logits whatever the chunk, at questions in every part of the row."""
    task = InductionHeads(length=length, chunk=8)
    backbone = Backbone(task.inputs, width=8, depth=1, mixers=(mixer,), rngs=nnx.Rngs(0))
    model = task.head(backbone, rngs=nnx.Rngs(1))
    batch = dict(next(task.stream("test", batch_size=3))) | {"position": np.array([[0, 7, 8, length - 1]] * 3)}
    at_once = jax.jit(lambda x: model(x["inputs"], position=x["position"])[0])(batch)
    streamed = jax.jit(lambda x: streamed_logits(model, x["inputs"], x["position"], chunk=8))(batch)
    assert_close(streamed, at_once, FORWARD["float32"])


def test_evaluation_streams_and_training_does_not():
    task, rows = InductionHeads(length=64, chunk=16), next(InductionHeads(length=64).stream("test", batch_size=2))
    backbone = Backbone(task.inputs, width=8, depth=1, mixers=(Decay,), rngs=nnx.Rngs(0))
    model = task.head(backbone, rngs=nnx.Rngs(1))
    loss = lambda task, key: str(jax.make_jaxpr(lambda batch: task.loss(model, batch, key))(dict(rows)))
    widest = lambda text: "[2,64,8]" in text  # an activation of the whole row
    key = jax.random.key(0)
    assert not widest(loss(task, None))
    assert widest(loss(task, key))
    assert widest(loss(dataclasses.replace(task, chunk=None), None))


def test_published_numbers():
    """The file is sound; some of its numbers typed in again."""
    rows = {(row.task, row.model): row for row in published.load()}
    assert rows["induction heads", "H3"].scores["1048576"] == 7.4
    assert rows["induction heads", "MHA, RoPE"].scores["65536"] is None
    assert rows["selective copying", "Mamba block"].scores == {"S4": 56.4, "Hyena": 28.4, "S6": 99.8}
    assert rows["MQAR", "RWKV"].scores["256, 16, d=256"] == 68
    assert rows["MQAR, mixed", "Mamba-2"].scores["33000"] == 78.5
    assert {row.grade for row in rows.values() if row.task.startswith("MQAR")} == {"read off a figure"}
    assert rows["passkey", "Mamba-130M"].scores["16384"] == 80
    assert rows["document retrieval", "DeciMamba-130M"].scores["160"] == 19
    assert len(rows) == 30


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('grade = "sure"', "grade = 'sure'"),
        ('grade = "read off a figure"\nscores.a = 101', "a = 101"),
        ('grade = "read off a figure"\nscore.a = 1', "unknown key 'score'"),
        ('grade = "read off a figure"', "scores is missing"),
    ],
)
def test_faults_of_published_numbers_are_named(tmp_path, line, fault):
    (tmp_path / "p.toml").write_text(f'[[row]]\ntask = "t"\nmodel = "m"\nsource = "s"\n{line}\n')
    with pytest.raises(ValueError, match=f"t, m: {fault}"):
        published.load(tmp_path / "p.toml")
