"""Official files: round trips, and every kind of damage named by file and line."""

import numpy as np
import pytest

from longwave.lra.listops_data import tsv
from longwave.lra.listops_data.generator import Distribution, shard
from longwave.lra.listops_data.grammar import CLOSE, MAX

GOOD = "( ( ( [MAX 4 ) 7 ) ] )\t7"


def write(path, *lines):
    path.write_text("\n".join((tsv.HEADER, *lines)) + "\n")
    return path


def test_written_rows_read_back(tmp_path):
    rows = shard(Distribution(), 3, 0).slice(0, 40)  # wide rows: lines of up to 15,000 characters
    tsv.write(tmp_path / "rows.tsv", rows)
    back = tsv.read(tmp_path / "rows.tsv")
    for name in ("tokens", "offsets", "labels"):
        np.testing.assert_array_equal(getattr(back, name), getattr(rows, name))


def test_the_form_of_a_line(tmp_path):
    rows = tsv.read(write(tmp_path / "a.tsv", GOOD))
    assert rows.row(0).tolist() == [MAX, 7, 10, CLOSE]
    tsv.write(tmp_path / "b.tsv", rows)
    assert (tmp_path / "b.tsv").read_text() == f"Source\tTarget\n{GOOD}\n"
    nested = "( ( ( ( [SM 1 ) ( ( ( [MIN 2 ) 3 ) ] ) ) 9 ) ] )\t2"
    rows = tsv.read(write(tmp_path / "c.tsv", nested))
    tsv.write(tmp_path / "d.tsv", rows)
    assert (tmp_path / "d.tsv").read_text().splitlines()[1] == nested


def test_both_names_of_the_bracket_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(f"{tsv.HEADER}\r\n{GOOD}\r\n[MAX 4 7 X\t7\r\n".encode())
    rows = tsv.read(path)
    np.testing.assert_array_equal(rows.row(0), rows.row(1))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("( ( ( [MAX 4 ) 7 ) ] )", "1 columns, expected 2"),
        (f"{GOOD}\t7", "3 columns, expected 2"),
        ("", "1 columns, expected 2"),
        ("( ( ( [FIRST 4 ) 7 ) ] )\t4", r"unknown token '\[FIRST'"),
        ("( ( ( [MAX 4 ) 1\ufffd ) ] )\t4", "unknown token"),
        ("( ( ( [MAX 4 ) 7 ) ] )\t10", "label '10', expected a digit 0 to 9"),
        ("( ( ( [MAX 4 ) 7 ) ] )\t-1", "label '-1'"),
        ("( ( ( [MAX 4 ) 7 ) ] )\tx", "label 'x'"),
        ("( ( ( [MAX 4 ) 7 ) ]\t7", r"unbalanced: 3 '\(' and 2 '\)'"),
        ("( ( [MAX 4 ) 7 )\t7", "unbalanced: 1 operators are not closed"),
        ("[MAX 4 7 ] ]\t7", "token 4 .* cannot stand there"),
        ("( ( ( [MAX 4 ) 7 ) ] )\t4", "evaluates to 7, but its label is 4"),
    ],
)
def test_a_corrupt_row_is_named(tmp_path, line, message):
    path = write(tmp_path / "basic_train.tsv", GOOD, GOOD, line, GOOD)
    with pytest.raises(tsv.CorruptRow, match=rf"basic_train.tsv:4: .*{message}"):
        tsv.read(path)


def test_a_file_without_rows_or_header(tmp_path):
    with pytest.raises(tsv.CorruptRow, match=r"a.tsv:2: there is no row"):
        tsv.read(write(tmp_path / "a.tsv"))
    (tmp_path / "b.tsv").write_text(GOOD)
    with pytest.raises(tsv.CorruptRow, match=r"b.tsv:1: header '\( \( \( \[MAX"):
        tsv.read(tmp_path / "b.tsv")
    (tmp_path / "c.tsv").write_text("")
    with pytest.raises(tsv.CorruptRow, match=r"c.tsv:1: header ''"):
        tsv.read(tmp_path / "c.tsv")
