"""What people point shards.py at: kinds by content, splits by name as the Hub and `datasets` write them."""

import gzip
import json

import numpy as np
import pyarrow as arrow
import pyarrow.parquet
import pytest

from data import DataError
from hub.inputs import by_split, find_inputs, kind_of
from hub.parquet import split_of
from runtime.log import start_logging

HASH = "b513d9e388d56453"


def zstd(content):
    return arrow.Codec("zstd").compress(content, asbytes=True)


def table(**columns):
    sink = arrow.BufferOutputStream()
    pyarrow.parquet.write_table(arrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


# ---- names -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path, subset, split", [
    ("train-00000-of-00001.parquet", "default", "train"), (f"train-00000-of-00001-{HASH}.parquet", "default", "train"),
    ("data/validation-00000-of-00002.parquet", "default", "val"), (f"data/test-00001-of-00002-{HASH}.parquet", "default", "test"),
    ("data/val-00000-of-00001.parquet", "default", "val"), ("dev.jsonl", "default", "val"), ("valid.csv.gz", "default", "val"),
    ("default/train/0000.parquet", "default", "train"), ("default/validation/0003.parquet", "default", "val"),
    ("gpt2/train-00000-of-00009.parquet", "gpt2", "train"), ("data/llama3/test-00000-of-00009.parquet", "llama3", "test"),
    ("en/c4-train.00000-of-01024.json.gz", "en/c4", "train"), ("c4-validation.00007-of-00008.json.gz", "c4", "val"),
    ("wiki.train.tokens", "wiki", "train"), ("wiki.valid.raw", "wiki", "val"),
    ("TinyStoriesV2-GPT4-valid.txt", "TinyStoriesV2-GPT4", "val"),
    ("TRAIN.PARQUET", "default", "train"), ("train_001.parquet", "default", "train"),
    ("validation/part-00000-of-00002.snappy.parquet",
                                                                                       "default", "val"),
    ("plain_text/train-00000-of-00001.parquet", "plain_text", "train"), ("train.bin", "default", "train"),
    ("train/data-00000-of-00001.arrow", "default", "train")])
def test_a_name_tells_subset_and_split_as_the_hub_writes_them(path, subset, split):
    assert split_of(path) == (subset, split)


@pytest.mark.parametrize("path", [
    "valley.parquet", "trainer-00000-of-00001.parquet", "notval-00000-of-00001.parquet", "0000.parquet", "data.parquet",
    "train_sft-00000-of-00001.parquet", "partial-train/0000.parquet", "train.py", "test_it.txt", "latest.txt", "contest-1.txt",
    f"train-{HASH}.parquet", "README.md", "unsupervised-00000-of-00001.parquet"])
def test_other_names_tell_no_split(path):
    assert split_of(path) is None


def splits(folder, files, subset=None, split=None, only_named=True, column="text"):
    write(folder, dict.fromkeys(files, b"PAR1") if not isinstance(files, dict) else files)
    found = by_split(find_inputs([folder], column), subset, split, only_named)
    return {name: [item.path.relative_to(folder).as_posix() for item in inputs] for name, inputs in found.items()}


HUB = ["gpt2/train-00000-of-00001.parquet", "gpt2/validation-00000-of-00001.parquet", "llama3/train-00000-of-00001.parquet"]


def test_subsets_and_splits_are_chosen_and_never_joined(tmp_path):
    assert splits(tmp_path, HUB, "gpt2") == {"train": HUB[:1], "val": HUB[1:2]}
    assert splits(tmp_path, HUB, "llama3") == {"train": HUB[2:]}
    assert splits(tmp_path, HUB, "gpt2", "validation") == splits(tmp_path, HUB, "gpt2", "val") == {"val": HUB[1:2]}
    for subset, split, said in ((None, None, "--subset: choose one of gpt2, llama3"),
                                ("bert", None, "'bert' is none of gpt2, llama3"),
                                ("llama3", "test", "--split: 'test' is none of train")):
        with pytest.raises(DataError, match=said):
            splits(tmp_path, HUB, subset, split)


def test_a_split_of_its_own_name_is_taken_when_asked_for(tmp_path):
    files = ["data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"]
    with pytest.raises(DataError, match="test_sft-00000-of-00001.parquet: its name tells no split"):
        splits(tmp_path, files)
    assert splits(tmp_path, files, split="train_sft") == {"train": files[:1]} and splits(tmp_path, files, split="test_sft") == {
        "test": files[1:]}


@pytest.mark.parametrize("files, split, only_named, expected", [
    (["train.jsonl", "valid.jsonl"], None, False, {"train": ["train.jsonl"], "val": ["valid.jsonl"]}),
    (["a.txt", "b.txt"], None, False, {"train": ["a.txt", "b.txt"]}), (["a.txt", "val.txt"], None, False, "val.txt"),
    (["a.txt", "val.txt"], "all", False, {"train": ["a.txt", "val.txt"]}),
    (["a.txt", "val.txt"], "val", False, {"val": ["val.txt"]}),
     (["a.txt", "b.txt"], "val", False, {"val": ["a.txt", "b.txt"]}),
    (["test.txt"], None, False, "test.txt"), (["test.txt"], "test", False, {"test": ["test.txt"]}),
    (["src/test/a.txt", "src/b.txt"], None, False, {"train": ["src/b.txt", "src/test/a.txt"]}),
    (["book.parquet"], None, True, "book.parquet"), (["book.parquet"], "train", True, {"train": ["book.parquet"]})], ids=str)
def test_what_no_name_tells_is_training_text_and_held_out_files_are_never_mixed_in(tmp_path, files, split, only_named, expected):
    files = {name: b"PAR1" if name.endswith("parquet") else '{"text": "x"}' for name in files}
    if isinstance(expected, str):
        with pytest.raises(DataError, match=f"{expected}: .*--split"):
            splits(tmp_path, files, None, split, only_named)
    else:
        assert splits(tmp_path, files, None, split, only_named) == expected


def test_files_that_are_given_tell_their_split_by_what_sets_them_apart(tmp_path):
    files = [tmp_path / name for name in ("val/repo/default/train/0000.parquet", "val/repo/default/validation/0000.parquet")]
    for path in files:
        write(path.parent, {path.name: b"PAR1"})
    found = by_split(find_inputs(files, ""), None, None, True)
    assert {split: [item.path for item in inputs] for split, inputs in found.items()} == {"train": files[:1], "val": files[1:]}
    assert list(by_split(find_inputs(files[1:], ""), None, None, True)) == ["val"]
    write(tmp_path / "val", {"a.txt": "x"})  # the folder of one given file says nothing
    assert list(by_split(find_inputs([tmp_path / "val/a.txt"], ""), None, None, False)) == ["train"]


# ---- kinds -----------------------------------------------------------------------------------------------------

JSON = '{"text": "x", "id": 1}\n{"text": "y"}\n'


@pytest.mark.parametrize("name, content, kind", [
    ("a.txt", "plain {braces}", "text"), ("a", "", "text"), ("a.py", "x = {}", "text"), ("a.md", "# title", "text"),
    ("a.txt", "a, b, text", "text"), ("a.txt", '{\n  "a": 1,  # a piece of a program\n}\n' + "x" * 99, "text"),
    ("a.md", JSON.partition("\n")[0] + "\nis a line of it", "text"), ("a", f"[{JSON}] and so on" + JSON, "text"),
    ("a.txt", JSON[:10] + "x" * (1 << 16), "json"),
    ("a.TXT", "x", "text"), ("a.jsonl", JSON, "json"), ("a.json", f"[{JSON}]", "json"), ("a.ndjson", JSON, "json"),
    ("A.JSONL", JSON, "json"),
    ("a.txt", JSON, "json"), ("a", "\ufeff" + JSON, "json"), ("a.data", "[\n  {\n    \"te\\\"xt\": 1", "json"),
    ("a.jsonl.gz", gzip.compress(JSON.encode(), mtime=0), "json"),
    ("a.json.zst", zstd(JSON.encode()), "json"), ("a.gz", gzip.compress(JSON.encode(), mtime=0), "json"),
    ("a.txt.gz", gzip.compress(b"plain", mtime=0), "text"),
    ("a.jsonl.ZST", zstd(JSON.encode()), "json"), ("a.csv", "text\nx", "csv"), ("a.tsv", "text\tb\nx\ty", "tsv"),
    ("a.txt", "id,text\n1,x\n", "csv"),
    ("a.dat", "id\ttext\r\n1\tx\r\n", "tsv"), ("a.CSV", "", "csv"), ("a.parquet", table(text=["x"]), "table"),
    ("a", table(text=["x"]), "table"),
    ("train.bin", np.arange(9, dtype="<u2").tobytes(), "tokens"), ("a.jsonl.gz", JSON, "json")])
def test_a_kind_is_told_by_name_or_content(tmp_path, name, content, kind):
    assert kind_of(write(tmp_path, {name: content}) / name, "text") == kind


@pytest.mark.parametrize("name, content", [
    ("a.zip", b"PK\3\4\0\0"), ("a.pdf", b"%PDF-1.4\n"), ("a.txt", "wide".encode("utf-16")), ("a.png", b"\x89PNG\r\n\x1a\n\0\0"),
    ("a.npy", b"\x93NUMPY\1\0"),
    ("a.tar.gz", gzip.compress(b"name\0\0\0", mtime=0)), ("a.pkl", b"cos\nsystem\n"), ("a.docx", b"PK\3\4\x14\0"),
    ("a.txt.bz2", b"BZh91AY&SY"),
    ("train.bin", (20240520).to_bytes(4, "little") + b"\1\0\0\0"), ("train.bin", gzip.compress(b"x", mtime=0))])
def test_what_is_not_read_is_refused_with_what_is(tmp_path, name, content):
    with pytest.raises(DataError, match=f"{name}.*supported are text in UTF-8.*parquet.*save_to_disk.*train.bin"):
        find_inputs([write(tmp_path, {name: content}) / name], "text")
    with pytest.raises(DataError, match="holds nothing that is read here"):
        find_inputs([tmp_path], "text")


def found(folder):
    return [(item.path.relative_to(folder).as_posix(), item.kind) for item in find_inputs([folder], "text")]


def test_of_a_folder_the_richest_kind_is_taken_and_the_rest_said(tmp_path, capsys):
    start_logging()
    write(tmp_path, {"b/x.txt": "x", "a.md": "y", ".git/config": "z", "pic.png": b"\0"})
    assert found(tmp_path) == [("a.md", "text"), ("b/x.txt", "text")]
    assert "2 others are left out: .git/config, pic.png" in capsys.readouterr().out
    write(tmp_path, {"c.jsonl": JSON, "d.csv.gz": gzip.compress(b"text\nx", mtime=0)})
    assert found(tmp_path) == [("c.jsonl", "json"), ("d.csv.gz", "csv")]
    write(tmp_path, {"data/train-00000-of-00001.parquet": table(text=["x"])})
    assert found(tmp_path) == [("data/train-00000-of-00001.parquet", "table")]
    assert "a.md" in capsys.readouterr().out


def save_to_disk(folder, split=None, files=1, **state):
    """As `datasets` 3 writes it: Arrow streams, and a state that lists them."""
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    write(folder,
          {"dataset_info.json": "{}",
           "state.json": json.dumps({"_data_files": [{"filename": name} for name in names], "_split": split} | state),
                   "cache-1234.arrow": b"old"})
    for name in names:
        with arrow.ipc.new_stream(folder / name, arrow.schema([("text", arrow.string())])) as stream:
            stream.write_batch(arrow.record_batch({"text": [f"{folder.name} {name}"] * 3}))
    return folder


def test_of_a_saved_dataset_the_files_that_it_lists_are_taken(tmp_path):
    save_to_disk(tmp_path / "all/train", "train", 2)
    save_to_disk(tmp_path / "all/validation", "validation")
    write(tmp_path / "all", {"dataset_dict.json": '{"splits": ["train", "validation"]}'})
    parts = by_split(find_inputs([tmp_path / "all"], "text"), None, None, True)
    assert {split: [item.path.name for item in inputs] for split, inputs in parts.items()} == {
        "train": ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"], "val": ["data-00000-of-00001.arrow"]}
    assert list(by_split(find_inputs([tmp_path / "all/validation"], "text"), None, None, True)) == ["val"]
    assert list(by_split(find_inputs([save_to_disk(tmp_path / "one")], "text"), None, None, False)) == ["train"]
    with pytest.raises(DataError, match="flatten_indices"):
        find_inputs([save_to_disk(tmp_path / "two", _indices_data_files=[{"filename": "i.arrow"}])], "text")


def test_nanogpts_pickle_is_refused_and_not_opened(tmp_path):
    write(tmp_path, {"train.bin": b"\0\0", "val.bin": b"\0\0", "input.txt": "x", "prepare.py": "y"})
    assert found(tmp_path) == [("train.bin", "tokens"), ("val.bin", "tokens")]
    write(tmp_path, {"meta.pkl": b"cos\nsystem\n(S'touch executed'\ntR."})
    for given in (tmp_path, tmp_path / "train.bin", tmp_path / "meta.pkl"):
        with pytest.raises(DataError, match="meta.pkl.* pickle, which may run anything"):
            find_inputs([given], "text")
    assert not (tmp_path / "executed").exists()
