"""Tables of token rows: what is left out is said, what would mislead is mended or refused; against pyarrow."""

import numpy as np
import pyarrow as arrow
import pyarrow.parquet
import pytest

from data import DataError, shard_entry
from hub.parquet import Converted, complete_sources, convert_parquet
from runtime.log import start_logging


@pytest.fixture
def convert(tmp_path):
    start_logging()

    def made(rows, form="parquet", **columns):
        table, path = arrow.table({"input_ids": arrow.array(rows, arrow.list_(arrow.int32())), **columns}), tmp_path / "x"
        if form == "parquet":
            arrow.parquet.write_table(table, path, row_group_size=700)
        else:
            new = arrow.ipc.new_stream if form == "stream" else arrow.ipc.new_file
            with new(path, table.schema) as out:
                out.write_table(table, max_chunksize=300)
        (tmp_path / "made.npy").unlink(missing_ok=True)
        return convert_parquet(path, tmp_path / "made.npy", 64), np.load(tmp_path / "made.npy")
    return made


@pytest.mark.parametrize("form", ["parquet", "stream", "file"])
@pytest.mark.parametrize("count", [1, 700, 1024, 2048, 2100])
def test_rows_are_taken_from_parquet_and_arrow_alike(convert, form, count):
    rows = np.random.default_rng(0).integers(64, size=(count, 5))
    made, found = convert(rows.tolist(), form)
    assert made == Converted(count, 5, None) and found.dtype == np.uint16
    np.testing.assert_array_equal(found, rows)


@pytest.mark.parametrize("count, last", [(2, 4), (1025, 1), (2049, 0), (2100, 3)])
def test_a_last_row_that_is_short_is_left_out_and_said(convert, capsys, count, last):
    rows = np.random.default_rng(0).integers(64, size=(count, 5))
    made, found = convert([*rows[:-1].tolist(), rows[-1, :last].tolist()], source=["a"] * (count - 1) + ["b"])
    assert made == Converted(count - 1, 5, ["a"] * (count - 1))
    np.testing.assert_array_equal(found, rows[:-1])
    assert f"its last row, of {last} ids where the others have 5, is left out" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [[[1, 2, 3], [1, 2], [1, 2, 3]], [[1, 2, 3], [1, 2, 3, 4]], [[1, 2, 3], [1, 2], [1]]], ids=str)
def test_other_rows_of_another_length_are_refused(convert, rows):
    with pytest.raises(DataError, match="row 1 has"):
        convert(rows)


def test_a_row_without_a_source_is_of_an_unknown_one_and_said(convert, capsys):
    made, _ = convert([[1, 2]] * 4, source=["a", None, "b", None])
    assert made.sources == ["a", "unknown", "b", "unknown"] and "2 of 4 rows have no source" in capsys.readouterr().out


@pytest.mark.parametrize("source", [[1, 2], [["a"], ["b"]], [{"a": 1}, None], [b"a", b"b"]], ids=str)
def test_sources_that_are_no_text_are_left_out_and_said(convert, capsys, source):
    made, _ = convert([[1, 2]] * 2, source=source)
    assert made.sources is None and "source holds no text and is left out" in capsys.readouterr().out


@pytest.mark.parametrize("sources, expected", [([["a"], None], [["a"], ["unknown"]]), ([None, None], [None, None]),
                                               ([["a"], ["b"]], [["a"], ["b"]])], ids=str)
def test_either_every_shard_says_its_rows_sources_or_none_does(tmp_path, sources, expected):
    np.save(tmp_path / "x.npy", np.zeros((1, 2)))
    shards = [shard_entry(tmp_path / "x.npy", 1, some) for some in sources]
    complete_sources(shards)
    assert [shard.get("sources") for shard in shards] == expected
