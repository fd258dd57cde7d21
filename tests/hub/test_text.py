"""Documents out of files, block by block: against json, csv and the files' own bytes, at every size of a block."""

import csv
import gzip
import io
import json

import numpy as np
import pyarrow as arrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import DataError
from hub import text
from hub.inputs import find_inputs
from hub.text import read_documents, read_tokens
from runtime.log import start_logging

MARKS = "\ufeff \u2028\u2029\x85\x0b\x0c\r\n\t \"',;{}[]\\\0\u00e9\u4e16\U0001f30d"
TEXTS = st.text(st.sampled_from(MARKS) | st.characters(codec="utf-8"), max_size=30)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PACKED = {"": bytes, ".gz": gzip.compress, ".zst": lambda content: arrow.Codec("zstd").compress(content, asbytes=True)}


def documents(path, content=None, column="text"):
    """The documents of a file, their pieces joined."""
    if content is not None:
        path.write_bytes(content)
    found, open_one = [], ""
    for piece, ends in read_documents(find_inputs([path], column), column):
        open_one += piece
        if ends:
            found.append(open_one)
            open_one = ""
    assert open_one == ""
    return found


def refusal(path, content, column="text"):
    with pytest.raises(DataError) as caught:
        documents(path, content, column)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture(params=[1, 3, 50, 1 << 20])
def block(request, monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", request.param)


# ---- text ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("packed", PACKED)
def test_a_text_is_one_document_as_it_is(tmp_path, block, packed):
    whole = f"\u00e9 first{MARKS}\r\nlast\r".replace("\0", "") * 3
    assert documents(tmp_path / f"a.txt{packed}", PACKED[packed](whole.encode())) == [whole]
    assert documents(tmp_path / f"b.txt{packed}", PACKED[packed](b"")) == [""]


def test_only_a_byte_order_mark_that_begins_a_file_is_left_out_and_said(tmp_path, block, capsys):
    start_logging()
    assert documents(tmp_path / "a.txt", "\ufeffa\ufeffb\n\ufeff".encode()) == ["a\ufeffb\n\ufeff"]
    assert "a.txt: the byte-order mark that begins it is left out" in capsys.readouterr().out
    assert documents(tmp_path / "a.jsonl", '\ufeff{"text": "\ufeffx"}'.encode()) == ["\ufeffx"]
    assert documents(tmp_path / "a.csv", "\ufefftext\n\ufeffx\n".encode()) == ["\ufeffx"]


@pytest.mark.parametrize("content, place", [(b"x" * 50 + b"\xff", "byte 50"), (b"abc\xe4\xb8", "byte 3"), (b"\x80", "byte 0"),
                                            (b"\xed\xa0\x80", "byte 0")])
def test_what_is_no_utf8_is_refused_naming_the_place(tmp_path, content, place):
    assert f"UTF-8 text (after {place}" in refusal(tmp_path / "a.txt", content)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst"])
def test_a_packed_file_that_is_cut_off_is_refused(tmp_path, name):
    packed = PACKED[name[name.rindex("."):]](b'{"text": "%s"}\n' % np.random.default_rng(0).bytes(200_000).hex().encode())
    assert "cannot be read" in refusal(tmp_path / name, packed[:len(packed) // 2])


# ---- JSON ------------------------------------------------------------------------------------------------------

@QUICK
@given(st.lists(TEXTS, max_size=6), st.booleans(), st.sampled_from([None, 1]),
       st.sampled_from(["lines", "array", "blank lines", "crlf"]))
def test_json_gives_the_texts_that_were_written(tmp_path, block, texts, ascii, indent, form):
    written = [json.dumps({"id": {"n": [1, 2.5, None]}, "text": one}, ensure_ascii=ascii, indent=indent) for one in texts]
    joint = {"lines": "\n", "array": " ,\n", "blank lines": "\n\n \n", "crlf": "\r\n"}[form]
    content = f"[{joint.join(written)}]\n" if form == "array" else joint.join(written)
    assert documents(tmp_path / "a.json", content.encode("utf-8")) == texts


@pytest.mark.parametrize("packed", PACKED)
def test_json_lines_are_recognised_and_unpacked(tmp_path, packed):
    lines = b'{"text": "a"}\n{"text": null}\n{"text": ""}\n'
    assert documents(tmp_path / f"A.NDJSON{packed}", PACKED[packed](lines)) == ["a", ""]
    assert documents(tmp_path / f"plain{packed}", PACKED[packed](lines)) == ["a", ""]


def test_texts_that_are_null_are_counted_and_said(tmp_path, capsys):
    start_logging()
    assert documents(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": null}\n') == ["a"]
    pyarrow.parquet.write_table(arrow.table({"text": ["a", None, None]}), tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet") == ["a"]
    printed = capsys.readouterr().out
    assert "a.jsonl: 1 rows have no text" in printed and "a.parquet: 2 rows have no text" in printed


@pytest.mark.parametrize("content, said", [
    ('{"text": "x"}\n{"text": ', "line 2 is no JSON"), ('{"text": 5}', "line 1 is not an object with a text"),
    ('["text"]', "line 1 is not"),
    ('{"text": "x"}\n\n{"words": "x", "n": 1}',
     'line 3 is not an object with a text "text" (it has words, n; choose with --text-column'),
    ('[{"text": "x"},\n{"text": "y"}', "line 2 is no JSON"),
    ('[{"text": "x"}]\n{"text": "y"}', "line 2 is no JSON (something follows"),
    ('{"text": "x"\n}\n{"text": "un\nclosed"}', "line 3 is no JSON"), ('{"text": "x"} nonsense', "line 1 is no JSON"),
    ('{"text": "x"}\n' + "[" * 100_000, "line 2 is nested too deeply"),
    ('{"text": "half \\ud800 a letter"}', "line 1 has half a character"),
    ('{"a": ' * 3 + "1" + "}" * 3, "it has a;")], ids=str)
def test_json_that_cannot_be_used_is_refused_naming_the_line(tmp_path, block, content, said):
    assert said in refusal(tmp_path / "a.json", content.encode())


def test_a_long_value_is_read_again_only_as_it_doubles(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 100)
    reads, take = [], text._take
    monkeypatch.setattr(text, "_take", lambda *args: reads.append(1) or take(*args))
    assert documents(tmp_path / "a.jsonl", json.dumps({"text": "x" * 100_000}).encode()) == ["x" * 100_000]
    assert len(reads) < 15


# ---- CSV -------------------------------------------------------------------------------------------------------

@QUICK
@given(st.lists(st.tuples(TEXTS, TEXTS).filter(lambda row: "\0" not in "".join(row)), max_size=5),
       st.sampled_from([",", ";", "\t"]),
       st.sampled_from(["\n", "\r\n"]), st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
def test_csv_gives_the_texts_that_were_written(tmp_path, block, rows, delimiter, end, quoting):
    if quoting == csv.QUOTE_MINIMAL and end == "\n":  # Python then leaves a bare CR unquoted, which is an end of line
        rows = [(one.replace("\r", "r"), two.replace("\r", "r")) for one, two in rows]
    sheet = io.StringIO()
    writer = csv.writer(sheet, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerows([("id", "text"), *rows])
    path = tmp_path / ("a.tsv" if delimiter == "\t" else "a.csv")
    assert documents(path, sheet.getvalue().encode("utf-8")) == [one for _, one in rows]


@pytest.mark.parametrize("content, said", [
    ("a,b\n1,2\n", "names no column text; choose with --text-column: a,b"), ("", "names no column"),
    ("id,text\n1,x\n2\n", "line 3 has 1 fields"),
    ('id,text\n1,"x\n', "no CSV"), ('id,text\n1,"x"y\n', "line 2 is no CSV"), ("id,text\n1,x,y\n", "line 2 has 3 fields")],
                         ids=str)
def test_csv_that_cannot_be_used_is_refused_naming_the_line(tmp_path, content, said):
    assert said in refusal(tmp_path / "a.csv", content.encode())


def test_a_quote_that_is_never_closed_does_not_swallow_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LONGEST", 1000)
    assert "line 2" not in refusal(tmp_path / "a.csv", b'text\n"never\n' + b"closed, no\n" * 10_000)


def test_the_column_is_chosen(tmp_path):
    assert documents(tmp_path / "a.jsonl", b'{"text": 1, "story": "x"}', "story") == ["x"]
    assert documents(tmp_path / "a.csv", b"text;story\n1;x\n", "story") == ["x"]


# ---- tables and tokens -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [arrow.string(), arrow.large_string(), arrow.dictionary(arrow.int32(), arrow.string())], ids=str)
def test_a_table_gives_its_column_of_text(tmp_path, kind):
    table = arrow.table({"n": range(300), "text": arrow.array([f"{n} \u2028\r\n" for n in range(300)]).cast(kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    with arrow.ipc.new_stream(tmp_path / "b.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=70)
    with arrow.ipc.new_file(tmp_path / "c.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=70)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        assert documents(tmp_path / name) == table["text"].to_pylist()
    with pytest.raises(DataError, match=r"has no column story; choose with --column: text \(text\)"):
        documents(tmp_path / "a.parquet", column="story")


def test_raw_tokens_are_read_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 64)
    ids = np.random.default_rng(0).integers(300, size=1001).astype("<u2")
    ids.tofile(tmp_path / "train.bin")
    assert np.concatenate(list(read_tokens(tmp_path / "train.bin", 300))).tolist() == ids.tolist()
    ids[777] = 300
    ids.tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match="train.bin: number 777 is the id 300, outside the vocabulary of 300"):
        list(read_tokens(tmp_path / "train.bin", 300))
    (tmp_path / "train.bin").write_bytes(b"123")
    with pytest.raises(DataError, match="odd number of bytes"):
        list(read_tokens(tmp_path / "train.bin", 300))
