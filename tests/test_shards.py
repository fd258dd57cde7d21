"""Making datasets: parquet against pyarrow, text against its own bytes, and makes that fail and leave nothing."""

import collections
import hashlib
import json
import math
import os
import signal
import sysconfig
from pathlib import Path

import lab
import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import tokenizers

from shards import entropies

EOS = 256  # of bytes


def call(folder, *words, out="out", code=0):
    return lab.call("shards.py", *words, "--out", folder / out, code=code)


def refusal(folder, *words, out="out"):
    """The one line with which `shards.py words` refuses; it leaves everything below `folder` as it was."""
    before = contents(folder)
    lines = [line for line in call(folder, *words, out=out, code=2).splitlines() if "error" in line.lower()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and contents(folder) == before
    return lines[0]


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def read(split):
    """(index, all rows) of a split's folder, read with json and numpy alone."""
    index = json.loads((split / "index.json").read_text())
    arrays = [np.load(split / shard["file"]) for shard in index["shards"]]
    assert [len(array) for array in arrays] == [shard["rows"] for shard in index["shards"]]
    assert {array.dtype.name for array in arrays} == {index["dtype"]} and all(a.flags.c_contiguous for a in arrays)
    for shard in index["shards"]:
        assert hashlib.sha256((split / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    return index, np.concatenate(arrays)


def counted(rows):
    """The rows as a multiset."""
    return collections.Counter(map(tuple, rows.tolist()))


def cut(documents, row_length):
    """Lists of ids end to end, each with EOS after it, in rows; what does not fill the last row is dropped."""
    stream = np.concatenate([[*ids, EOS] for ids in documents])
    return stream[:len(stream) // row_length * row_length].reshape(-1, row_length)


# ---- parquet -------------------------------------------------------------------------------------------------

def write_parquet(path, rows, kind=arrow.list_(arrow.int32()), column="input_ids", group=700, **columns):
    table = arrow.table({"idx": arrow.array(range(len(rows))), column: arrow.array(rows, kind), **columns})
    parquet.write_table(table, path, row_group_size=group)
    return path


@pytest.mark.parametrize("kind", [
    arrow.list_(arrow.int32()), arrow.list_(arrow.int64()), arrow.large_list(arrow.int32()),
    arrow.large_list(arrow.int64()), arrow.list_(arrow.int32(), 5), arrow.list_(arrow.int64(), 5)], ids=str)
@pytest.mark.parametrize("vocab, dtype", [(64, "uint16"), (65537, "uint32")])
def test_parquet_of_every_list_type_and_several_row_groups_becomes_a_shard(tmp_path, kind, vocab, dtype):
    ids = np.random.default_rng(0).integers(vocab, size=(2100, 5))
    ids[0, 0] = vocab - 1
    path = write_parquet(tmp_path / "train-0.parquet", ids.tolist(), kind)
    call(tmp_path, "parquet", path, "--vocab-size", vocab)
    index, rows = read(tmp_path / "out" / "train")
    assert rows.tolist() == parquet.read_table(path)["input_ids"].to_pylist() == ids.tolist()
    assert (index["row_length"], index["dtype"], index["vocab_size"]) == (5, dtype, vocab)


@pytest.mark.parametrize("source", ["made", "pretokenized-dolma-sample", "pretokenized-paloma-sample"])
def test_parquet_files_become_the_shards_of_their_split_in_the_order_given(tmp_path, source):
    files = sorted((lab.SHARED / source / "data").glob("*.parquet"), reverse=True)
    if source == "made":
        names = ["train-1", "val-0", "train-0", "valley"]
        files = [write_parquet(tmp_path / f"{name}.parquet", [[n, 1, 2]] * (n + 1), source=[name] * (n + 1))
                 for n, name in enumerate(names)]
    elif not files:
        pytest.skip("no real data here")
    call(tmp_path, "parquet", *files)
    for split in ("train", "val"):
        tables = [parquet.read_table(path) for path in files if path.name.startswith("val-") == (split == "val")]
        assert bool(tables) == (tmp_path / "out" / split).exists()
        if tables:
            index, rows = read(tmp_path / "out" / split)
            assert rows.tolist() == [ids for table in tables for ids in table["input_ids"].to_pylist()]
            assert [shard.get("sources") for shard in index["shards"]] == [
                table["source"].to_pylist() if "source" in table.column_names else None for table in tables]


@pytest.mark.parametrize("bad, kind, reason", [
    ([1, 2], "int32", "2 ids"), ([1, 2, 3, 4], "int32", "4 ids"), ([], "int32", "0 ids"), ([1, -2, 3], "int32", "-2"),
    ([1, 2, 64], "int64", "64"), ([1, 2, 2 ** 40], "int64", "1099511627776"), ([1, None, 3], "int32", ""),
    (None, "int64", "")])
def test_a_bad_row_is_refused_naming_file_row_and_reason(tmp_path, bad, kind, reason):
    rows = [[1, 2, 3]] * 1500 + [bad] + [[1, 2, 3]] * 9
    path = write_parquet(tmp_path / "train-0.parquet", rows, arrow.list_(arrow.type_for_alias(kind)))
    message = refusal(tmp_path, "parquet", path, "--vocab-size", 64)
    assert f"{path}: row 1500 " in message and reason in message.partition("row 1500")[2]


@pytest.mark.parametrize("rows, kind", [
    ([None, [1, 2]], arrow.list_(arrow.int32())), ([None, [1, 2]], arrow.list_(arrow.int32(), 2)),
    ([[], []], arrow.list_(arrow.int32())), ([[1], [2]], arrow.list_(arrow.int32())), ([], arrow.list_(arrow.int32())),
    ([1, 2], arrow.int32()), (["a", "b"], arrow.string()), ([["1", "2"]], arrow.list_(arrow.string())),
    ([[1.0, 2.5]], arrow.list_(arrow.float64())), ([[1.0, math.nan]], arrow.list_(arrow.float32())),
    ([[[1], [2]]], arrow.list_(arrow.list_(arrow.int32()))), ([[True, False]], arrow.list_(arrow.bool_()))], ids=str)
def test_a_file_without_token_rows_is_refused_naming_it(tmp_path, rows, kind):
    path = write_parquet(tmp_path / "train-0.parquet", rows, kind)
    message = refusal(tmp_path, "parquet", path)
    assert str(path) in message and ("row 0" in message or None not in rows)


@pytest.mark.parametrize("harm", [
    lambda path: path.unlink(), lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"PAR1 nothing PAR1"),
    lambda path: os.truncate(path, path.stat().st_size // 2), lambda path: path.unlink() or path.mkdir(),
    lambda path: write_parquet(path, [[1, 2]], column="tokens"), lambda path: write_parquet(path, [[1, 2]])],
    ids="missing empty not-parquet truncated folder no-column other-row-length".split())
def test_one_unusable_file_among_good_ones_is_refused_naming_it(tmp_path, harm):
    good, bad = (write_parquet(tmp_path / f"train-{n}.parquet", [[1, 2, 3]] * 9) for n in range(2))
    harm(bad)
    assert str(bad) in refusal(tmp_path, "parquet", good, bad)


# ---- the standard library ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stdlib")
    call(folder, "stdlib")
    return folder / "out"


def test_each_file_of_the_standard_library_is_in_the_split_that_its_path_decides(stdlib):
    root, documents = Path(sysconfig.get_paths()["stdlib"]), {"train": [], "val": []}
    for name in sorted(path.relative_to(root) for path in root.rglob("*.py")):
        content = (root / name).read_bytes()
        is_text = content.decode(errors="ignore").encode() == content
        if is_text and not {"site-packages", "dist-packages"} & set(name.parts):
            held_out = hashlib.sha256(name.as_posix().encode()).hexdigest()[0] == "0"  # the same on every machine
            documents["val" if held_out else "train"] += np.frombuffer(content, np.uint8), [np.uint16(EOS)]
    for split, ids in documents.items():
        stream, found = np.concatenate(ids), read(stdlib / split)[1]
        expected = stream[:len(stream) // 129 * 129].reshape(-1, 129)
        assert found.shape == expected.shape and found.dtype == np.uint16
        assert collections.Counter(map(bytes, found)) == collections.Counter(map(bytes, expected))


def test_the_standard_library_is_made_only_once(stdlib):
    before = {path: path.stat().st_mtime_ns for path in stdlib.rglob("*")}
    assert "already there" in call(stdlib.parent, "stdlib")
    assert {path: path.stat().st_mtime_ns for path in stdlib.rglob("*")} == before


def entropy(items):
    items = list(items)
    return -math.fsum(n / len(items) * math.log(n / len(items)) for n in collections.Counter(items).values())


def entropies_by_counting(rows):
    """Unigrams over all tokens; bigrams as pairs less their first halves."""
    pairs = [pair for row in rows.tolist() for pair in zip(row, row[1:])]
    return {"unigram": entropy(rows.ravel().tolist()), "bigram": entropy(pairs) - entropy(a for a, _ in pairs)}


@pytest.mark.parametrize("rows, vocab", [
    ([[0, 1], [1, 0]], 2), (np.zeros((3, 4)), 1), ([[1023, 1022]], 1024),
    (np.random.default_rng(0).integers(300, size=(50, 9)), 300),
    (np.random.default_rng(1).geometric(0.2, size=(50, 9)), 257)], ids=["pair", "one", "last", "even", "skew"])
def test_entropies_are_those_of_counted_tokens_and_pairs(rows, vocab):
    rows = np.array(rows, np.uint16)
    assert entropies(rows, vocab) == pytest.approx(entropies_by_counting(rows), abs=1e-12)


# ---- text ----------------------------------------------------------------------------------------------------

TEXTS = ["Call me Ishmael. " * 9, "Gr\u00fc\u00dfe, \u4e16\u754c\n" * 7, "", "x", "The end, and\n\n the rest. " * 5]


@pytest.fixture
def files(tmp_path):
    """TEXTS in their order, in three files: text, jsonl, text."""
    (tmp_path / "a.txt").write_text(TEXTS[0], encoding="utf-8")
    lines = [json.dumps({"text": text, "id": n}, ensure_ascii=n == 1) for n, text in enumerate(TEXTS[1:4], 1)]
    (tmp_path / "b.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "c.md").write_text(TEXTS[4], encoding="utf-8")
    return [tmp_path / name for name in ("a.txt", "b.jsonl", "c.md")]


@pytest.mark.parametrize("row_length, share", [(2, 0.05), (7, 0.25), (16, 0.5), (16, 0)])
def test_text_is_its_bytes_with_eos_after_each_and_loses_only_the_last_short_row(tmp_path, files, row_length, share):
    call(tmp_path, "text", *files, "--row-length", row_length, "--val-share", share)
    expected = cut([list(text.encode()) for text in TEXTS], row_length)
    held_out = round(len(expected) * share)
    index, train = read(tmp_path / "out" / "train")
    assert counted(train) == counted(expected[:len(expected) - held_out])
    assert index["entropy"] == pytest.approx(entropies_by_counting(train))
    assert (tmp_path / "out" / "val").exists() == bool(held_out)
    if held_out:
        assert counted(read(tmp_path / "out" / "val")[1]) == counted(expected[-held_out:])


def test_text_with_a_tokenizer_has_its_ids_and_keeps_it(tmp_path, files):
    words = {"<unk>": 0, "the": 1, "me": 2, "<|endoftext|>": EOS}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "words.json"))
    call(tmp_path, "text", *files, "--row-length", 3, "--val-share", 0, "--tokenizer", tmp_path / "words.json",
         "--vocab-size", 300)
    index, rows = read(tmp_path / "out" / "train")
    assert counted(rows) == counted(cut([inner.encode(text).ids for text in TEXTS], 3)) and index["vocab_size"] == 300
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "words.json").read_bytes()


def test_the_same_text_makes_the_same_dataset(tmp_path, files):
    for out in ("one", "two"):
        call(tmp_path, "text", *files, "--row-length", 8, out=out)
    one, two = ({path.relative_to(tmp_path / out): data for path, data in contents(tmp_path / out).items()}
                for out in ("one", "two"))
    assert one == two and any(path.suffix == ".npy" for path in one)


@pytest.mark.parametrize("name, content, reason", [
    ("bad.txt", b"", "too few"), ("bad.txt", b"short", "too few"), ("bad.txt", b"x" * 50 + b"\xff", "UTF-8"),
    ("bad.jsonl", b"", "too few"), ("bad.jsonl", b'{"text": "x"}\n{"text": ', ""),
    ("bad.jsonl", b'{"text": 5}', "line 1"), ("bad.jsonl", b'["text"]', "line 1"),
    ("bad.jsonl", b'{"text": "x"}\n\n{"words": "x"}', "line 3"),
    ("bad.jsonl", b'{"text": "\xff"}', "UTF-8"), ("bad.jsonl", b'{"text": "%s\\ud800"}' % (b"x" * 50), ""),
    ("bad.txt", None, "No such file"), ("bad.jsonl", None, "No such file")])
def test_text_that_cannot_be_used_is_refused_naming_the_file(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path, "text", tmp_path / name, "--row-length", 16)
    assert str(tmp_path / name) in message and reason in message


@pytest.mark.parametrize("words, named", [
    (["--row-length", 1], "--row-length"), (["--row-length", -3], "--row-length"),
    (["--tokenizer", "absent.json"], "absent.json"), (["--tokenizer", __file__], "tokenizer.json"),
    (["--val-share", 1.5], ""), (["--val-share", 1], ""), (["--val-share", -0.5], ""), (["--val-share", "nan"], ""),
    (["--vocab-size", 100], "100"), (["--vocab-size", -1], "-1"), (["--vocab-size", 256], "256")], ids=str)
def test_an_impossible_option_is_refused(tmp_path, files, words, named):
    assert named in refusal(tmp_path, "text", *files, "--row-length", 4, *words)


# ---- nothing in the way, nothing left behind -----------------------------------------------------------------

@pytest.mark.parametrize("out", ["c.md", "folder", "c.md/below"])
@pytest.mark.parametrize("command", ["text", "parquet"])
def test_an_out_that_is_there_or_cannot_be_is_refused_and_untouched(tmp_path, files, command, out):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    source = files[0] if command == "text" else write_parquet(tmp_path / "train-0.parquet", [[1, 2]])
    assert out.partition("/")[0] in refusal(tmp_path, command, source, out=out)


def test_a_make_that_is_interrupted_leaves_nothing(tmp_path):
    process = lab.start("shards.py", "stdlib", "--out", tmp_path / "out")
    try:
        lab.wait_until(lambda: any(tmp_path.iterdir()), timeout=60)  # it is at work
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err and not any(tmp_path.iterdir())


# ---- verify --------------------------------------------------------------------------------------------------

def test_verify_counts_the_rows_of_a_sound_dataset(dataset):
    assert "108 rows" in lab.call("shards.py", "verify", dataset)


@pytest.mark.parametrize("words", [("--batch-size", 0), ("--batch-size", -4, "--micro-batch-size", 2), ("--world", 0),
                                   ("--step", -1), ("--rank", 7), ("--batch-size", 3, "--world", 5), ("--width", -3)], ids=str)
def test_rows_that_cannot_be_shown_are_one_line(dataset, words):
    printed = lab.call("shards.py", "show", dataset, "--step", 0, *words, code=2)
    assert printed.count("error: --") == 1 and "Traceback" not in printed


@pytest.mark.parametrize("at", [0, 20, 64, 200, -1])  # magic, header, its padding, ids, the last byte
def test_verify_finds_one_flipped_bit_and_names_the_shard(tmp_path, at):
    path = lab.make_dataset(tmp_path) / "val" / "shard-00000.npy"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    assert f"error: {path}" in lab.call("shards.py", "verify", tmp_path, code=2)


def test_verify_finds_what_was_added_or_is_missing(tmp_path):
    path = lab.make_dataset(tmp_path) / "train" / "shard-00000.npy"
    path.write_bytes(path.read_bytes() + b"\0")
    assert f"error: {path}" in lab.call("shards.py", "verify", tmp_path, code=2)
    path.unlink()
    assert lab.call("shards.py", "verify", tmp_path, code=2).count(f"error: {path}") == 1
    assert "index.json" in lab.call("shards.py", "verify", tmp_path / "nothing", code=2)
