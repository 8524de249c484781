"""Data on disk: built once, whole or not at all, found again, the same whoever builds it."""

import dataclasses
import os
import re
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from longwave.lra.listops_data import builder as module
from longwave.lra.listops_data import tsv
from longwave.lra.listops_data.builder import Generated, Official, prepare, read_split
from longwave.lra.listops_data.generator import Distribution, generate
from longwave.tasks import build

SHORT = Distribution(min_tokens=20, max_tokens=100)
SMALL = Generated(distribution=SHORT, train=150, valid=20, test=30, processes=1)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return prepare(SMALL, tmp_path_factory.mktemp("data"))


def test_splits_are_the_rows_in_order(built):
    rows = generate(SHORT, 200, seed=0, processes=1)
    for split, start, stop in (("train", 0, 150), ("valid", 150, 170), ("test", 170, 200)):
        stored, expected = read_split(built, split), rows.slice(start, stop)
        for name in ("tokens", "offsets", "labels"):
            np.testing.assert_array_equal(getattr(stored, name), getattr(expected, name), err_msg=split)
    source = built.as_data_source("valid")
    np.testing.assert_array_equal(source[3]["tokens"], rows.row(153))
    assert sum(built.facts["lengths"]["test"]) == 30


def test_data_is_found_again(built, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "generate", lambda *_, **__: pytest.fail("built a second time"))
    again = prepare(SMALL, built.data_path.parent.parent.parent)
    assert again.facts == built.facts


def test_environment_names_the_folder(tmp_path, monkeypatch, built):
    monkeypatch.setenv("LONGWAVE_DATA", str(tmp_path / "here"))
    assert prepare(SMALL).data_path.is_relative_to(tmp_path / "here")
    assert files(tmp_path / "here") == files(built.data_path.parent.parent.parent)


def test_full_disk_leaves_nothing(tmp_path):
    """Files may not grow over 50 kB: writes fail inside the writer, as they do on a full disk."""
    large = dataclasses.replace(SMALL, train=3000)
    old_limit, old_signal = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old_limit[1]))
    try:
        with pytest.raises(OSError, match=rf"could not be built in {tmp_path}: .* MB are free there") as caught:
            prepare(large, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_signal)
    assert "File too large" in str(caught.value)
    assert files(tmp_path) == []
    assert prepare(large, tmp_path).info.splits["test"].num_examples == 30


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"could not be built in .*file/data: .*Not a directory.*LONGWAVE_DATA"):
        prepare(SMALL, tmp_path / "file" / "data")


def test_a_bucket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data_dir = 'gs://bucket/data': expected a folder of a local or shared file"):
        prepare(SMALL, "gs://bucket/data")
    monkeypatch.setenv("LONGWAVE_DATA", "s3://bucket")
    with pytest.raises(ValueError, match=r"data_dir = 's3://bucket'.*LONGWAVE_DATA"):
        prepare(SMALL)
    assert files(tmp_path) == []


def test_drafts_of_killed_builds_are_removed_a_day_later(tmp_path):
    for name, hours in ((".building-old", 25), (".building-new", 23), ("other", 1000)):
        (tmp_path / name / "listops").mkdir(parents=True)
        then = time.time() - hours * 3600
        os.utime(tmp_path / name, (then, then))
    prepare(SMALL, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".building-new", "listops", "other"]


def test_two_builders_at_once(tmp_path, built, monkeypatch):
    """Another one builds all of it between this one's last write and its rename: both read whole data."""
    move, others = build._move, []

    def late(draft, final):
        monkeypatch.setattr(build, "_move", move)
        others.append(prepare(SMALL, tmp_path))
        assert others[0].data_path.exists()
        move(draft, final)

    monkeypatch.setattr(build, "_move", late)
    mine = prepare(SMALL, tmp_path)
    for other in (mine, *others):
        assert other.facts["digest"] == built.facts["digest"]
        assert len(read_split(other, "train")) == 150
    assert files(tmp_path) == files(built.data_path.parent.parent.parent)


def flip_a_byte(draft):
    path = next(path for path in Path(draft.data_dir).iterdir() if "train.array_record" in path.name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def store_another_row(draft):
    """Train row 7 becomes a copy of row 8: it evaluates to its label, but it is not what was to be written."""
    generate_examples = draft._generate_examples

    def wrong(split, rows):
        examples = list(generate_examples(split, rows))
        if split == "train":
            examples[7] = (7, examples[8][1])
        return examples

    draft._generate_examples = wrong


@pytest.mark.parametrize(("before", "after"), [(store_another_row, None), (None, flip_a_byte)])
def test_a_corrupted_write_is_found_by_reading_back(tmp_path, monkeypatch, before, after):
    write = build.ByteRows.download_and_prepare

    def corrupt(draft):
        if before:
            before(draft)
        write(draft)
        if after:
            after(draft)

    monkeypatch.setattr(build.ByteRows, "download_and_prepare", corrupt)
    with pytest.raises(OSError, match="could not be built in"):
        prepare(SMALL, tmp_path)
    assert files(tmp_path) == []


def test_a_wrong_label_is_never_kept(tmp_path, monkeypatch):
    def wrong(*args, **kwargs):
        rows = generate(*args, **kwargs)
        rows.labels[155] = (rows.labels[155] + 1) % 10
        return rows

    monkeypatch.setattr(module, "generate", wrong)
    with pytest.raises(ValueError, match=r"valid row 5 evaluates to \d, but its label is \d"):
        prepare(SMALL, tmp_path)
    assert files(tmp_path) == []


def official(folder, rows):
    folder.mkdir(parents=True)
    for name, start, stop in (("train", 0, 150), ("val", 150, 170), ("test", 170, 200)):
        tsv.write(folder / f"basic_{name}.tsv", rows.slice(start, stop))


def test_official_files(tmp_path, built):
    official(tmp_path / "lra" / "listops-1000", generate(SHORT, 200, seed=0, processes=1))
    stored = prepare(Official(tmp_path / "lra"), tmp_path / "data")
    assert stored.facts["digest"] == built.facts["digest"]
    assert re.fullmatch(r"official_[0-9a-f]{12}", stored.data_path.parent.name)


def test_damaged_or_missing_official_files(tmp_path):
    official(tmp_path / "lra", generate(SHORT, 200, seed=0, processes=1))
    with (tmp_path / "lra" / "basic_val.tsv").open("a") as file:
        file.write("[MAX 1 2 ]\t7\n")
    with pytest.raises(ValueError, match=r"basic_val.tsv:22: the expression evaluates to 2"):
        prepare(Official(tmp_path / "lra"), tmp_path / "data")
    assert files(tmp_path / "data") == []
    (tmp_path / "lra" / "basic_test.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks basic_test.tsv"):
        Official(tmp_path / "lra")
