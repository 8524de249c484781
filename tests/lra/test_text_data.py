"""Readers of the official IMDB and AAN files, valid and damaged; alphabets; look-up baselines."""

import collections
import io
import logging
import os
import tarfile

import numpy as np
import pytest

from longwave.lra.text_data import aan, alphabet, baselines, imdb
from longwave.lra.text_data.texts import Texts
from longwave.tasks import build

# --- IMDB ---------------------------------------------------------------------------------------------------------

REVIEWS = {
    "train/neg/0_3.txt": b"bad bad film",
    "train/neg/10_1.txt": b"a bad one",
    "train/neg/9_4.txt": b"<br />",
    "train/pos/1_10.txt": "très bon".encode(),
    "train/pos/0_7.txt": b"good\x85 film",  # no UTF-8
    "train/unsup/0_0.txt": b"who knows",
    "test/neg/2_2.txt": b"also bad",
    "test/pos/3_8.txt": b"x" * 70_000,
    "README": b"read me",
}
ROWS = {"train": ["0_3", "9_4", "10_1", "0_7", "1_10"], "test": ["2_2", "3_8"]}  # by label, then by number


def unpacked(folder, reviews=REVIEWS):
    for name, text in reviews.items():
        path = folder / "aclImdb" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return folder / "aclImdb"


def packed(path, reviews=REVIEWS):
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, text in reversed(reviews.items()):  # an archive has its own order
            member = tarfile.TarInfo(f"aclImdb/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return path


def stored(builder):
    return {
        split: [(row["text"].tobytes(), int(row["label"])) for row in builder.as_data_source(split)]
        for split in imdb.SPLITS
    }


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("source") / "aclImdb_v1.tar.gz")


def test_folder_and_archive_are_the_same_data_set(tmp_path, archive, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        built = imdb.prepare(str(archive), str(tmp_path))
    expected = {
        split: [
            (text, int(place == "pos"))
            for i in ids
            for name, text in REVIEWS.items()
            for place in ("neg", "pos")
            if name == f"{split}/{place}/{i}.txt"
        ]
        for split, ids in ROWS.items()
    }
    assert stored(built) == expected
    assert built.facts["reviews"] == {"train/neg": 3, "train/pos": 2, "test/neg": 1, "test/pos": 1}
    assert built.facts["skipped"] == {"unsup": 1, "other files": 1}
    assert built.facts["not UTF-8"] == 1
    assert built.facts["bytes"]["train"] == {"min": 6, "mean": 9.2, "median": 9, "max": 12}
    assert "IMDB: 1 reviews are no UTF-8, which reads as U+FFFD; the first is " in caplog.text
    assert ":aclImdb/train/pos/0_7.txt" in caplog.text
    assert "has 3 in train/neg, 2 in train/pos, 1 in test/neg, 1 in test/pos: the release has 12,500" in caplog.text
    folder = imdb.prepare(str(unpacked(tmp_path / "files")), str(tmp_path))
    assert folder.facts["digest"] == built.facts["digest"]
    assert folder.facts["skipped"] == {"unsup": 1}


def test_imdb_is_found_in_its_place_and_needed_only_once(tmp_path, archive):
    with pytest.raises(FileNotFoundError, match=r"IMDB: .* lacks aclImdb or aclImdb_v1.tar.gz or .*Get it from https"):
        imdb.prepare(None, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"lacks there.tar.gz"):
        imdb.prepare(str(tmp_path / "there.tar.gz"), str(tmp_path))
    (tmp_path / "aclImdb.tar.gz").write_bytes(archive.read_bytes())
    built = imdb.prepare(None, str(tmp_path))
    (tmp_path / "aclImdb.tar.gz").unlink()
    assert stored(imdb.prepare(None, str(tmp_path))) == stored(built)


@pytest.mark.parametrize("source", ["folder", "archive"])
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train/pos/5_3.txt", b"fine", r"train/pos/5_3.txt: expected the name ID_RATING.txt, with a rating 7 to 10"),
        ("train/neg/5.txt", b"fine", r"train/neg/5.txt: expected the name ID_RATING.txt, with a rating 1 to 4"),
        ("test/pos/x_9.txt", b"fine", r"test/pos/x_9.txt: expected the name ID_RATING"),
        ("test/pos/4_9.txt", b"", r"test/pos/4_9.txt is empty"),
        ("test/pos/3_9.txt", b"fine", r"test/pos/3_.\.txt: there is another review with this ID"),
    ],
)
def test_a_damaged_review_is_named(tmp_path, source, name, text, message):
    reviews = {**REVIEWS, "test/pos/3_8.txt": b"fine", name: text}
    place = unpacked(tmp_path, reviews) if source == "folder" else packed(tmp_path / "a.tar.gz", reviews)
    with pytest.raises(imdb.Damaged, match=message) as caught:
        imdb.prepare(str(place), str(tmp_path / "data"))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "data") == []


def test_a_damaged_archive_is_named(tmp_path):
    rng, small = np.random.default_rng(0), dict(REVIEWS)
    small["test/pos/3_8.txt"] = rng.bytes(30_000)  # which does not compress
    whole = packed(tmp_path / "whole.tar.gz", small).read_bytes()
    path = tmp_path / "aclImdb_v1.tar.gz"
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    cuts = [whole[: len(whole) * i // 40] for i in range(1, 40)] + [whole[:-1], whole[:-8]]
    for damaged in [*cuts, bytes(flipped), b"no archive", b""]:
        path.write_bytes(damaged)
        with pytest.raises(imdb.Damaged, match=r"aclImdb_v1.tar.gz is damaged: "):
            imdb.read(path)


def test_a_part_of_the_release_is_no_release(tmp_path):
    part = {name: text for name, text in REVIEWS.items() if not name.startswith("test/neg")}
    with pytest.raises(imdb.Damaged, match=r"has no folder test/neg"):
        imdb.read(unpacked(tmp_path, part))
    with pytest.raises(imdb.Damaged, match=r"a.tar.gz has no review in test/neg"):
        imdb.read(packed(tmp_path / "a.tar.gz", part))


@pytest.mark.full
@pytest.mark.skipif("ACLIMDB" not in os.environ, reason="ACLIMDB names no aclImdb, folder or archive")
def test_the_release(tmp_path):
    built = imdb.prepare(os.environ["ACLIMDB"], str(tmp_path))
    assert set(built.facts["reviews"].values()) == {12_500}
    assert built.facts["not UTF-8"] == 0
    lengths = built.facts["bytes"]
    assert (lengths["train"]["mean"], lengths["test"]["mean"]) == pytest.approx((1325.3, 1294.0), abs=0.1)
    assert (lengths["train"]["median"], lengths["test"]["median"]) == (979, 963)
    assert max(lengths["train"]["max"], lengths["test"]["max"]) == 13_704
    assert len(built.facts["alphabet"]) == 131
    assert built.facts["alphabet"].startswith(" etaoisnrhl")


# --- AAN ----------------------------------------------------------------------------------------------------------

PAIRS = {
    "train": [(1, b'he said "cite', b"said so"), (0, b"other", b"said so"), (0, b"other", b"caf\xc3\xa9")],
    "valid": [(1, b"a\x85b", b"")],
    "test": [(0, b"other", b"x"), (1, b'he said "cite', b"new")],
}


def tsv(folder, pairs=PAIRS, end=b"\n"):
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in pairs.items():
        lines = [b"\t".join((b"%d.0" % label, b"P01-1001", b"P02", a, b)) + end for label, a, b in rows]
        (folder / aan.FILES[split]).write_bytes(b"".join(lines))
    return folder


def kept(builder):
    return {
        split: [(int(r["label"]), r["first"].tobytes(), r["second"].tobytes()) for r in builder.as_data_source(split)]
        for split in aan.FILES
    }


def test_pairs_are_stored_as_they_are(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        built = aan.prepare(str(tsv(tmp_path / "tsv_data")), str(tmp_path))
    assert kept(built) == PAIRS
    assert "1 texts are no UTF-8, which reads as U+FFFD; the first is in " in caplog.text
    assert "new_aan_pairs.eval.tsv:1\n" in caplog.text
    assert "new_aan_pairs.train.tsv has 3 pairs: the release has 147,086" in caplog.text
    assert "new_aan_pairs.eval.tsv has 1 empty texts" in caplog.text
    assert "no line end" not in caplog.text
    assert built.facts["empty"] == {"train": 0, "valid": 1, "test": 0}
    assert built.facts["lengths"]["train"] == {"bytes": [13, 7, 5], "characters": [13, 7, 5]}
    assert sorted(built.facts["alphabet"]) == sorted({*'he said "citesaid sootherothercafé'})
    assert built.facts["baselines"] == {"majority": 0.5, "first text": 1.0, "second text": 0.5}


def test_windows_line_ends_and_integer_labels(tmp_path):
    assert list(aan.read(tsv(tmp_path, end=b"\r\n") / aan.FILES["train"])) == PAIRS["train"]
    (tmp_path / "a.tsv").write_bytes(b"1\ta\tb\tc\td\n")
    assert list(aan.read(tmp_path / "a.tsv")) == [(1, b"c", b"d")]


def test_aan_is_found_in_its_place(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lra_release/lra_release/tsv_data lacks new_aan_pairs.train.tsv, "):
        aan.prepare(None, str(tmp_path))
    tsv(tmp_path / "lra_release" / "lra_release" / "tsv_data")
    assert kept(aan.prepare(None, str(tmp_path))) == PAIRS


def test_a_field_of_20_megabytes(tmp_path, monkeypatch):
    wide = "é".encode() * 10_000_000
    built = aan.prepare(str(tsv(tmp_path / "tsv", {**PAIRS, "train": [(1, b"a" * 10_000, wide)]})), str(tmp_path))
    assert kept(built)["train"] == [(1, b"a" * 10_000, "é".encode() * aan.KEPT)]
    assert built.facts["lengths"]["train"] == {"bytes": [aan.KEPT + 1], "characters": [aan.KEPT + 1]}
    monkeypatch.setattr(aan, "LINE", 100)
    with pytest.raises(aan.CorruptRow, match=r"train.tsv:1: the line is longer than 100 bytes"):
        list(aan.read(tmp_path / "tsv" / aan.FILES["train"]))


GOOD = b"0.0\t1\t2\tone\ttwo\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"1.0\ta\tb\tc\n", "4 columns, expected 5"),
        (b"1.0\ta\tb\tc\td\te\n", "6 columns, expected 5"),
        (b"\n", "1 columns, expected 5"),
        (b"2.0\ta\tb\tc\td\n", "label '2.0', expected 0.0 or 1.0"),
        (b"label\ta\tb\tc\td\n", "label 'label'"),
        (b"\xff\xfe\ta\tb\tc\td\n", "label '\ufffd\ufffd'"),
    ],
)
def test_a_corrupt_pair_is_named(tmp_path, line, message):
    tsv(tmp_path / "tsv")
    (tmp_path / "tsv" / "new_aan_pairs.eval.tsv").write_bytes(GOOD + GOOD + line + GOOD)
    with pytest.raises(aan.CorruptRow) as caught:
        aan.prepare(str(tmp_path / "tsv"), str(tmp_path / "data"))
    expected = f"{tmp_path}/tsv/new_aan_pairs.eval.tsv:3: "
    assert str(caught.value).startswith(expected + message)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "data") == []


def test_a_truncated_file(tmp_path, caplog):
    path = tmp_path / "a.tsv"
    path.write_bytes(GOOD + GOOD[:-6])
    with pytest.raises(aan.CorruptRow, match=r"a.tsv:2: 4 columns"):
        list(aan.read(path))
    path.write_bytes(b"")
    with pytest.raises(aan.CorruptRow, match=r"a.tsv:1: the file is empty"):
        list(aan.read(path))
    (tsv(tmp_path / "tsv") / aan.FILES["test"]).write_bytes(GOOD + GOOD[:-2])  # which could be a shorter text
    with caplog.at_level(logging.WARNING, logger="absl"):
        aan.prepare(str(tmp_path / "tsv"), str(tmp_path))
    assert "new_aan_pairs.test.tsv:2 has no line end: the file may be cut off there" in caplog.text


# --- alphabets ----------------------------------------------------------------------------------------------------

TEXTS = ["the cat", "thé\u2009!", "\U0001f600 a", "", "tt\tt"]


def test_characters_have_the_ids_of_torchtext():
    """A dictionary sorted as torchtext sorts: by falling count, then by character."""
    census = alphabet.Census(length=5)
    for text in TEXTS:
        census.add(text.encode())
    counts = collections.Counter(c for text in TEXTS for c in text[:5])
    names = ["<pad>", "<unk>", "<eos>", *(c for c, n in sorted(counts.items(), key=lambda x: (-x[1], x[0])) if n >= 2)]
    ids = {name: i for i, name in enumerate(names)}
    characters = alphabet.Characters(census.alphabet(2), vocab=256)
    assert len(names) == alphabet.SPECIALS + len(characters.alphabet)
    for text in TEXTS:
        np.testing.assert_array_equal(characters.encode(text.encode()), [ids.get(c, 1) for c in text])


def test_bytes_are_shifted_by_one():
    assert alphabet.Bytes().encode(bytes(range(256))).tolist() == list(range(1, 257))


def test_bytes_that_are_no_utf8_read_as_a_character():
    assert alphabet.codes(b"a\xc3\x85\xff\xe2\x82b").tolist() == [97, 0xC5, 0xFFFD, 0xFFFD, 98]
    assert not alphabet.is_utf8(b"\xc3")


def test_an_alphabet_may_be_smaller_than_the_table_never_larger():
    alphabet.Characters("abc", vocab=6)
    with pytest.raises(ValueError, match=r"has 7 ids with <pad>, <unk>, <eos>: the task has room for 6"):
        alphabet.Characters("abcd", vocab=6)


@pytest.mark.parametrize("text", [b"ascii only", "zwölf Boxkämpfer".encode(), b"\x85\x85\x85ab\xe2\x82", b"\xe2" * 9])
@pytest.mark.parametrize("characters", [1, 3, 5])
def test_a_prefix_holds_whole_characters(text, characters):
    prefix = alphabet.shortest_prefix(text, characters)
    expected = text.decode("utf-8", "replace")[:characters]
    assert text.startswith(prefix)
    assert prefix.decode("utf-8", "replace")[:characters] == expected
    if alphabet.is_utf8(text):
        assert prefix.decode() == expected


# --- look-ups -----------------------------------------------------------------------------------------------------


def encoded(texts, labels):
    ids = [np.frombuffer(text.encode(), np.uint8) for text in texts]
    offsets, cut = np.cumsum([0, *map(len, ids)]), np.zeros(len(ids), bool)
    return Texts(np.concatenate(ids), offsets, np.array(labels, np.uint8), cut)


def test_look_ups_of_texts():
    train = encoded(["bad film", "so bad", "bad!", "a fine film", "fine, so fine", "x"], [0, 0, 0, 1, 1, 1])
    test = encoded(["bad again", "not here", "xx", "bad"], [0, 1, 0, 1])
    scores = baselines.of_texts(train, test)
    assert scores["one trigram"] == 0.5  # "bad": right, right, wrong, wrong
    assert scores["majority"] == 0.5  # of equally frequent labels the first
    assert set(scores) == {"majority", "length", "one trigram"}


def test_look_up():
    keys, labels = np.array([3, 3, 3, 7, 7, 9]), np.array([1, 1, 0, 0, 0, 0], np.uint8)
    asked, expected = np.array([3, 7, 9, 100, 0]), np.array([1, 1, 0, 0, 1], np.uint8)
    assert baselines.look_up(keys, labels, asked, expected) == 3 / 5


def test_a_build_may_be_read_by_anyone_at_once(tmp_path, archive):
    """One build serves all protocols: nothing in it depends on one."""
    built = imdb.prepare(str(archive), str(tmp_path))
    assert build.is_complete(tmp_path / "imdb" / imdb.IMDB(str(archive), tmp_path).name / "1.0.0")
    assert set(built.facts) == {"notes", "reviews", "skipped", "not UTF-8", "bytes", "alphabet", "digest"}
