"""Tables are written whole, with their origin, and read back unchanged."""

import math

import pandas as pd
import pytest

from vqr1 import records
from vqr1.data.manifests import EMBEDDED
from vqr1.records import machine_line, markdown, read_table, write_table

NAN = math.nan
TABLE = pd.DataFrame({"name": ["a", "b # c"], "value": [0.123456, NAN], "count": [1, 200000]})


@pytest.mark.parametrize("name", ["table.csv", "deep/table.csv.gz"])
def test_a_table_is_read_as_it_was_written(tmp_path, name):
    """A # in a cell starts no comment."""
    write_table(tmp_path / name, TABLE, seed=3)
    pd.testing.assert_frame_equal(read_table(tmp_path / name), TABLE.round(4))
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [(tmp_path / name).name]


def test_the_first_line_says_where_it_comes_from(tmp_path):
    write_table(tmp_path / "table.csv", TABLE, "0, 1", "%.2g", about="two threads")
    first, header, row = (tmp_path / "table.csv").read_text(encoding="utf-8").split("\n")[:3]
    assert first == f"# two threads; {machine_line('0, 1')}" and "; seed 0, 1; commit " in first
    assert (header, row) == ("name,value,count", "a,0.12,1")


def test_the_same_table_is_the_same_bytes(tmp_path):
    for name in ("one.csv.gz", "two.csv.gz"):
        write_table(tmp_path / name, TABLE)
    assert (tmp_path / "one.csv.gz").read_bytes() == (tmp_path / "two.csv.gz").read_bytes()


def test_a_write_that_fails_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    write_table(path, TABLE)
    monkeypatch.setattr(records.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_table(path, TABLE.head(0))
    assert len(read_table(path)) == 2


def test_a_table_that_is_not_there_is_an_error_or_an_empty_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        read_table(tmp_path / "nowhere.csv")
    empty = read_table(tmp_path / "nowhere.csv", columns=["a", "b"])
    assert empty.empty and list(empty) == ["a", "b"]


def test_several_lines_of_provenance_are_left_out():
    table = read_table(EMBEDDED / "table2.csv")
    assert "method" in table and table["mean"].dtype == float


def test_markdown_is_a_table_whatever_the_cells_hold():
    table = pd.DataFrame(
        {"set": ["a|b", "two\nlines"], "srcc": [0.12345, NAN], "rows": [1400, 3], "seconds": [512.0, 3.0]}
    )
    assert markdown(table).split("\n") == [
        "| set | srcc | rows | seconds |",
        "|---|---|---|---|",
        "| a b | 0.123 | 1400 | 512 |",
        "| two lines |  | 3 | 3.000 |",
    ]
