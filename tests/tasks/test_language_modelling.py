"""Tokenisers, corpora, rows, baselines and perplexities, against counting by hand."""

import bz2
import collections
import math
import shutil
from importlib.resources import files

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longwave import models
from longwave.layers.mixer import Mixer, Out
from longwave.tasks.language_modelling import baselines, corpus, evaluation
from longwave.tasks.language_modelling.documents import documents
from longwave.tasks.language_modelling.next_token import NextToken
from longwave.tasks.language_modelling.tokeniser import Bytes, TokenizerFile
from tests.tolerances import FORWARD, assert_close

TEXTS = [f"Book {i}: é and ünïcode {'ab' * (3 * i % 7)}.\n".encode() for i in range(20)]


@pytest.fixture(scope="module")
def word_tokenizer(tmp_path_factory):
    """A tokenizer.json: words and spaces, and a token a byte for what it does not know."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=made.pre_tokenizer.alphabet()
    )
    made.train_from_iterator([text.decode() for text in TEXTS], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i, text in enumerate(TEXTS):
        (folder / f"{i:02}.txt").write_bytes(text)
    return folder


def task(tmp_path, **kwargs):
    return NextToken(**{"length": 16, "data_dir": str(tmp_path / "data"), **kwargs})


def test_any_bytes_come_back():
    everything = bytes(range(256)) * 2
    words = Bytes()
    ids = words.encode(everything)
    assert ids.max() < words.separator < words.vocab
    assert words.decode([words.separator, *ids, words.separator]) == everything


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_text_comes_as_whole_letters(kind, word_tokenizer):
    words = Bytes() if kind == "bytes" else TokenizerFile(word_tokenizer)
    text = "naïve 日本 🙂 Book 3"
    ids = words.encode(text.encode())
    assert words.decode(ids).decode() == text
    write = words.writer()
    parts = [write(ids[i : i + 1]) for i in range(len(ids))]
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) + write((), last=True) == text
    cut = words.writer()
    said = cut(words.encode("a🙂".encode())[:-1]) + cut((), last=True)
    assert said.startswith("a")
    assert "\ufffd" in said, "half a letter is shown at the end"


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, word_tokenizer):
    with pytest.raises(FileNotFoundError, match=r"expected a tokenizer\.json"):
        TokenizerFile(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"expected a tokenizer\.json of the tokenizers library"):
        TokenizerFile(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="separator = '<end>'"):
        TokenizerFile(word_tokenizer, separator="<end>")
    with pytest.raises(ValueError, match="is no UTF-8"):
        TokenizerFile(word_tokenizer).encode(b"\xff")
    with pytest.raises(ValueError, match=r"vocab = 12: the tokeniser has 257 ids"):
        _ = NextToken(vocab=12).tokeniser


def test_sources_are_split_into_documents(folder, tmp_path):
    read = lambda found: {split: [document() for document in texts] for split, texts in found.items()}
    sample = read(documents(None, 0.05))
    packed = bz2.decompress((files("longwave.tasks.language_modelling") / "shakespeare.txt.bz2").read_bytes())
    assert b"".join(sample[split][0] for split in ("train", "valid", "test")) == packed
    assert all(sample[split][0].endswith(b"\n") for split in sample)
    assert [round(len(sample[split][0]) / len(packed), 2) for split in ("train", "valid", "test")] == [0.9, 0.05, 0.05]

    books = read(documents(folder, 0.1))
    assert {split: len(texts) for split, texts in books.items()} == {"train": 16, "valid": 2, "test": 2}
    assert sorted(text for texts in books.values() for text in texts) == sorted(TEXTS)
    (few := tmp_path / "few").mkdir()
    for i in range(4):
        (few / f"{i}.txt").write_text("a\n")
    assert {split: len(texts) for split, texts in documents(few, 0.49).items()} == {"train": 2, "valid": 1, "test": 1}
    shutil.rmtree(few)

    for name, text in (("train", b"a\n"), ("validation", b"b\n"), ("test", b"c\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.txt").write_bytes(text)
    (tmp_path / "metadata.csv").write_text("1,title,1900,url\n")
    assert read(documents(tmp_path, 0.1)) == {"train": [b"a\n"], "valid": [b"b\n"], "test": [b"c\n"]}
    (tmp_path / "test" / "1.txt").unlink()
    with pytest.raises(ValueError, match=r"test/ has no \.txt file"):
        documents(tmp_path, 0.1)
    with pytest.raises(ValueError, match=r"has 1 \.txt files: expected 3 or more"):
        documents(tmp_path / "train", 0.1)
    with pytest.raises(ValueError, match="too few lines"):
        documents(tmp_path / "train" / "1.txt", 0.1)
    with pytest.raises(FileNotFoundError, match="expected a text file or a folder"):
        documents(tmp_path / "none", 0.1)


def stream_of(words, texts):
    return np.concatenate([np.concatenate([[words.separator], words.encode(text)]) for text in texts])


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_rows_are_the_stream_and_every_id_is_asked_for_once(kind, folder, tmp_path, word_tokenizer, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK", 32)  # so that rows run across blocks
    made = task(tmp_path, source=str(folder), tokenizer=None if kind == "bytes" else str(word_tokenizer), held_out=0.2)
    texts = {split: [document() for document in found] for split, found in documents(folder, 0.2).items()}
    words = made.tokeniser
    for split in ("train", "valid", "test"):
        stream = stream_of(words, texts[split])
        rows = made.rows(split)
        assert len(rows.stream) == len(stream)
        batches = list(made.stream(split, batch_size=3)) if split != "train" else [_all(rows)]
        real = np.concatenate([batch["weight"] for batch in batches]) > 0
        whole = lambda name, parts=batches, real=real: np.concatenate([part[name] for part in parts])[real]
        inputs, target, reset = whole("inputs"), whole("target"), whole("reset")
        asked = target[target >= 0]
        np.testing.assert_array_equal(asked, stream[1 : len(asked) + 1])
        np.testing.assert_array_equal(inputs[target >= 0], stream[: len(asked)])
        np.testing.assert_array_equal(reset, inputs == words.separator)
        missing = len(stream) - 1 - len(asked)
        assert 0 <= missing < made.length if split == "train" else missing == 0
        per_byte = (len(stream) - 1) / sum(map(len, texts[split]))
        assert_close(batches[0]["ids_per_byte"], np.full(len(batches[0]["ids_per_byte"]), per_byte), FORWARD["float32"])
        spec = made.batch_spec(len(batches[0]["weight"]))
        form = lambda arrays: {name: (array.shape, array.dtype) for name, array in arrays.items()}
        assert form(batches[0]) == form(spec)


def _all(rows):
    stacked = {name: np.stack([rows[i][name] for i in range(len(rows))]) for name in rows[0]}
    return {**stacked, "weight": np.ones(len(rows), np.float32)}


def test_batch_k_follows_from_the_seed_and_k(folder, tmp_path):
    made = task(tmp_path, source=str(folder), resets=False)
    take = lambda step, seed: next(made.stream("train", batch_size=4, seed=seed, step=step))
    run = made.stream("train", batch_size=4, seed=3)
    first = [next(run) for _ in range(12)]  # more than an epoch
    assert len(made.rows("train")) < 12 * 4
    for k in (0, 5, 11):
        np.testing.assert_array_equal(take(k, 3)["inputs"], first[k]["inputs"])
    assert (take(0, 4)["inputs"] != first[0]["inputs"]).any()
    part = next(made.stream("train", batch_size=4, seed=3, step=5, rows=[3, 1]))
    np.testing.assert_array_equal(part["inputs"], first[5]["inputs"][[3, 1]])
    assert "reset" not in first[0]
    with pytest.raises(ValueError, match=r"split = 'all': expected one of train, valid, test"):
        made.stream("all", batch_size=4)


def test_a_corpus_is_built_once_and_again_when_it_changes(folder, tmp_path):
    made = task(tmp_path, source=str(folder))
    _ = made.splits
    built = sorted((tmp_path / "data" / "corpus").iterdir())
    assert task(tmp_path, source=str(folder)).fingerprint() == made.fingerprint()
    assert sorted((tmp_path / "data" / "corpus").iterdir()) == built
    copied = tmp_path / "changed"
    copied.mkdir()
    for i, text in enumerate(TEXTS):
        (copied / f"{i:02}.txt").write_bytes(text.replace(b"Book", b"Tome"))
    assert task(tmp_path, source=str(copied)).fingerprint()["digest"] != made.fingerprint()["digest"]
    with pytest.raises(ValueError, match=r"NextToken\.length = 999999: train of"):
        _ = task(tmp_path, source=str(folder), length=999_999).splits
    with pytest.raises(FileNotFoundError, match="is not there"):
        _ = task(tmp_path, source=str(tmp_path / "none")).splits


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [({"length": 0}, "length = 0"), ({"held_out": 0.5}, "held_out = 0.5"), ({"vocab": 0}, "vocab = 0")],
)
def test_settings_without_meaning_are_refused(kwargs, said):
    with pytest.raises(ValueError, match=rf"NextToken\.{said}: expected"):
        NextToken(**kwargs)


def witten_bell(train, test, vocab, order):
    """Straight from the definition, one id at a time."""
    counts = collections.defaultdict(collections.Counter)
    for n in range(order + 1):
        for i in range(n, len(train)):
            counts[tuple(train[i - n : i])][train[i]] += 1

    def p(x, context):
        lower = 1 / vocab if not context else p(x, context[1:])
        seen = counts.get(context)
        if seen is None:
            return lower
        return (seen[x] + len(seen) * lower) / (sum(seen.values()) + len(seen))

    return np.array([math.log(p(test[i], tuple(test[max(0, i - order) : i]))) for i in range(1, len(test))])


def test_baselines_are_interpolated_counts():
    rng = np.random.default_rng(0)
    train, test = rng.zipf(1.5, 300) % 12, rng.zipf(1.5, 80) % 13
    found = baselines.interpolated(train, test, 13)
    for order, log_p in enumerate(found):
        assert_close(log_p, witten_bell(train.tolist(), test.tolist(), 13, order), FORWARD["float64"], f"order {order}")


class Table(Mixer):
    """No mixing: the model is a table of bigrams."""

    def __init__(self, width, *, rngs):
        del width, rngs

    def __call__(self, x, carry=None, ctx=None):
        return Out(jnp.zeros_like(x), (), {})


@pytest.fixture(scope="module")
def bigrams():
    body = models.Backbone(models.Tokens(257, 16), width=8, depth=1, mixers=(Table,), rngs=nnx.Rngs(0))
    return models.LanguageModel(body, vocab=257, tied=False, rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def costs(bigrams):
    """-ln p(next | id) of every pair, in float64."""
    logits = np.float64(bigrams(jnp.arange(257)[None]).logits[0])
    return np.log(np.exp(logits).sum(1))[:, None] - logits


def test_loss_and_bits_per_byte_are_exact_over_a_split(bigrams, costs, folder, tmp_path):
    made = task(tmp_path, source=str(folder), held_out=0.2)
    loss = jax.jit(lambda batch: made.loss(bigrams, batch, None))
    sums = [loss(batch) for batch in made.stream("test", batch_size=4)]
    texts = [document() for document in documents(folder, 0.2)["test"]]
    stream = stream_of(Bytes(), texts)
    nats = costs[stream[:-1], stream[1:]]
    weight = sum(float(s.weight) for s in sums)
    assert weight == len(stream) - 1
    assert_close(sum(float(s.loss) for s in sums) / weight, nats.mean(), FORWARD["float32"])
    bits = sum(float(s.metrics["bits_per_byte"]) for s in sums) / weight
    assert_close(bits, nats.sum() / math.log(2) / sum(map(len, texts)), FORWARD["float32"])
    row = made.row({"test": {"loss": nats.mean(), "bits_per_byte": bits}})
    assert_close(row["test perplexity"], np.exp(nats.mean()), FORWARD["float64"])
    assert row["unigram"] > row["trigram"] > 0


def test_costs_by_position(bigrams, costs, folder, tmp_path):
    made = task(tmp_path, source=str(folder), held_out=0.2)
    found = {(p.first, p.last): p for p in evaluation.by_position(bigrams, made.stream("test", batch_size=4))}
    stream = stream_of(Bytes(), [document() for document in documents(folder, 0.2)["test"]])
    by_read = collections.defaultdict(list)
    read = 0
    for i in range(len(stream) - 1):
        read = 1 if i % 16 == 0 or stream[i] == 256 else read + 1
        part = next((a, b) for a, b in [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16)] if a <= read <= b)
        by_read[part].append(costs[stream[i], stream[i + 1]])
    assert found.keys() == by_read.keys()
    for part, nats in by_read.items():
        assert found[part].tokens == len(nats)
        assert_close(found[part].nll, np.mean(nats), FORWARD["float32"])


def test_windows_of_exact_length(bigrams, costs):
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 256, n) for n in (30, 95, 260)]
    lines = {line.length: line for line in evaluation.windows(bigrams, texts, [20, 90, 300], last=5)}
    for length, starts in ((20, ([0], range(0, 75, 10), range(0, 240, 24))), (90, ([], [0], range(0, 170, 17)))):
        means = []
        for ids, begins in zip(texts, starts, strict=True):
            for at in begins:
                window = ids[at : at + length]
                means.append(np.mean([costs[window[i - 1], window[i]] for i in range(length - 5, length)]))
        assert lines[length].windows == len(means)
        assert lines[length].documents == sum(len(begins) > 0 for begins in starts)
        assert_close(lines[length].perplexity, np.exp(np.mean(means)), 10 * FORWARD["float32"])
    assert lines[300].windows == 0
    assert math.isnan(lines[300].nll)
    assert list(evaluation.window_starts(20, 20)) == [0]
    with pytest.raises(ValueError, match="greater than the tokens scored"):
        next(evaluation.windows(bigrams, texts, [5], last=5))


def test_documents_of_a_stream():
    assert [part.tolist() for part in evaluation.split_at(np.array([9, 1, 2, 9, 9, 3]), 9)] == [[9, 1, 2], [9], [9, 3]]
