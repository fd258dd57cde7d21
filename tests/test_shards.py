"""Making datasets: parquet against pyarrow, text against its own bytes, and makes that fail and leave nothing."""

import collections
import csv
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import tokenizers
import zoo

import lab
import shards
from hub.tokenizers import load_tokenizer
from runtime.files import STAGING, host_name
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


def cut(documents, row_length, eos=EOS):
    """Lists of ids end to end, each with `eos` after it, in rows; what does not fill the last row is dropped."""
    stream = np.concatenate([[*ids, *([] if eos is None else [eos])] for ids in documents])
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
        names = ["train-1", "val-0", "train-0", "train-00000-of-00001-0123456789abcdef"]
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


def test_every_split_of_a_folder_has_its_own_and_what_no_name_tells_is_refused(tmp_path):
    names = {"train": "default/train/0000", "val": "default/validation/0000", "test": "default/test/0000"}
    for n, name in enumerate(names.values()):
        (tmp_path / "repo" / name).parent.mkdir(parents=True)
        write_parquet(tmp_path / "repo" / f"{name}.parquet", [[n, n]] * 3)
    call(tmp_path, "parquet", tmp_path / "repo")
    assert {split.name: read(split)[1].tolist() for split in (tmp_path / "out").iterdir()} == {
        split: [[n, n]] * 3 for n, split in enumerate(names)}
    call(tmp_path, "parquet", tmp_path / "repo", "--split", "validation", out="one")
    assert [split.name for split in (tmp_path / "one").iterdir()] == ["val"]
    write_parquet(tmp_path / "repo/valley.parquet", [[7, 7]])
    assert "valley.parquet: its name tells no split" in refusal(tmp_path, "parquet", tmp_path / "repo", out="two")


def test_a_null_source_and_files_without_any_give_a_dataset_whose_figures_are_of_the_right_rows(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", [[1, 1]] * 2)
    write_parquet(tmp_path / "train-1.parquet", [[2, 2]] * 2, source=["web", None])
    printed = call(tmp_path, "parquet", tmp_path / "train-0.parquet", tmp_path / "train-1.parquet")
    assert "1 of 2 rows have no source" in printed and "2 rows in 1 of 2 files have no source" in printed
    assert [shard["sources"] for shard in read(tmp_path / "out/train")[0]["shards"]] == [["unknown"] * 2, ["web", "unknown"]]
    assert "4 rows" in lab.call("shards.py", "verify", tmp_path / "out")


def test_the_vocabulary_is_the_tokenizers_which_must_have_made_the_rows(tmp_path):
    zoo.save("gpt2", tmp_path)
    size = load_tokenizer(tmp_path).vocab_size
    sound = write_parquet(tmp_path / "train-0.parquet", [[1, size - 1]])
    call(tmp_path, "parquet", sound, "--tokenizer", tmp_path)
    assert read(tmp_path / "out/train")[0]["vocab_size"] == size
    call(tmp_path, "parquet", sound, "--tokenizer", tmp_path, "--vocab-size", 512, out="padded")
    assert read(tmp_path / "padded/train")[0]["vocab_size"] == 512
    assert "--vocab-size" in refusal(tmp_path, "parquet", sound, "--tokenizer", tmp_path, "--vocab-size", size - 1, out="small")
    other = write_parquet(tmp_path / "train-1.parquet", [[1, size]])
    assert "train-1.parquet" in refusal(tmp_path, "parquet", other, "--tokenizer", tmp_path, out="other")
    assert "cannot have made" in refusal(tmp_path, "parquet", other, "--tokenizer", tmp_path, "--vocab-size", 512, out="other")


def test_another_column_of_tokens_or_text_is_chosen(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", [[1, 2, 3]] * 4, column="tokens", story=["once upon a time"] * 4)
    message = refusal(tmp_path, "parquet", tmp_path / "train-0.parquet")
    assert "no column input_ids; choose with --column: tokens (tokens), story (text)" in message
    call(tmp_path, "parquet", tmp_path / "train-0.parquet", "--column", "tokens")
    assert read(tmp_path / "out/train")[1].tolist() == [[1, 2, 3]] * 4
    write_parquet(tmp_path / "validation-0.parquet", [[1]], column="tokens", story=["held out"] * 1)
    call(tmp_path, "parquet", tmp_path / "train-0.parquet", tmp_path / "validation-0.parquet", "--column", "story",
         "--row-length", 4, out="text")
    for split, texts in (("train", ["once upon a time"] * 4), ("val", ["held out"])):
        assert counted(read(tmp_path / "text" / split)[1]) == counted(cut([list(text.encode()) for text in texts], 4))
    assert "--row-length" in refusal(tmp_path, "parquet", tmp_path / "train-0.parquet", "--column", "tokens", "--row-length", 4,
                                     out="no")


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
    unread = "Expected all lists to be of size=2" in message  # pyarrow before 26 reads no null among lists of a fixed size
    assert str(path) in message and ("row 0" in message or None not in rows or unread)


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
    for name in sorted(path.relative_to(root) for path in root.rglob("*.py") if path.is_file()):
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


@pytest.mark.parametrize("name", ["trunc", "pad", "plain"])
def test_a_tokenizer_that_cuts_or_pads_makes_the_rows_of_one_that_does_not(tmp_path, files, name):
    made = zoo.gpt2()
    expected = cut([made.encode(text).ids for text in TEXTS], 5, made.token_to_id(zoo.END))
    {"trunc": lambda: made.enable_truncation(16), "pad": lambda: made.enable_padding(length=64), "plain": lambda: None}[name]()
    made.save(str(tmp_path / f"{name}.json"))
    printed = call(tmp_path, "text", *files, "--tokenizer", tmp_path / f"{name}.json", "--row-length", 5, "--val-share", 0)
    assert counted(read(tmp_path / "out/train")[1]) == counted(expected)
    assert f"end of text {zoo.END} (id {made.token_to_id(zoo.END)}, by its name)" in printed


def test_an_unknown_end_of_text_is_refused_asked_for_or_done_without(tmp_path, files):
    made = zoo.gpt2(end="<fin>")
    made.save(str(tmp_path / "fin.json"))
    how = ("text", *files, "--tokenizer", tmp_path / "fin.json", "--row-length", 5, "--val-share", 0)
    message = refusal(tmp_path, *how)
    assert "the documents would be joined" in message and "--eos" in message and "<fin>" in message
    call(tmp_path, *how, "--eos", "<fin>")
    kept = load_tokenizer(tmp_path / "out")
    assert kept.text_of(kept.eos) == "<fin>" and kept.eos_source == "tokenizer_config.json"
    assert counted(read(tmp_path / "out/train")[1]) == counted(cut([made.encode(text).ids for text in TEXTS], 5, kept.eos))
    assert "no end of text" in call(tmp_path, *how, "--eos", "", out="joined")
    assert counted(read(tmp_path / "joined/train")[1]) == counted(cut([made.encode(text).ids for text in TEXTS], 5, None))
    assert "'<absent>'; its special tokens are: <fin>" in refusal(tmp_path, *how, "--eos", "<absent>", out="no")


@pytest.mark.parametrize("how, count", [("ids", 3), ("text", 1)])
def test_a_special_token_that_a_text_spells_out_is_what_was_chosen(tmp_path, how, count):
    (tmp_path / "a.txt").write_text(f"one{zoo.END}two{zoo.END}three")
    call(tmp_path, "text", tmp_path / "a.txt", "--row-length", 2, "--val-share", 0, "--special-tokens", how)
    assert np.count_nonzero(read(tmp_path / "out/train")[1] == EOS) in (count, count - 1)  # the last may be in a short row
    assert (load_tokenizer(tmp_path / "out").encode(zoo.END) == [EOS]) == (how == "ids")


@pytest.mark.parametrize("form", ["json", "csv", "zst", "folder", "upper"])
def test_documents_in_every_form_give_the_same_rows(tmp_path, form):
    sources = tmp_path / "sources"
    sources.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    if form == "csv":
        with open(sources / "a.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["text"], *([text] for text in TEXTS)])
    elif form == "folder":
        for n, text in enumerate(TEXTS):
            (sources / f"{n}.txt").write_text(text, encoding="utf-8")
    else:
        content = arrow.Codec("zstd").compress(lines.encode(), asbytes=True) if form == "zst" else lines.encode()
        (sources / {"json": "a.json", "zst": "a.jsonl.zst", "upper": "A.JSONL"}[form]).write_bytes(content)
    call(tmp_path, "text", sources, "--row-length", 3, "--val-share", 0)
    assert counted(read(tmp_path / "out/train")[1]) == counted(cut([list(text.encode()) for text in TEXTS], 3))


def test_files_that_are_named_as_splits_are_these_splits(tmp_path):
    for split in ("train", "valid"):
        (tmp_path / f"Stories-{split}.txt").write_text(f"{split} " * 50)
    call(tmp_path, "text", *tmp_path.glob("*.txt"), "--row-length", 10)
    for split, name in (("train", "train"), ("val", "valid")):
        assert counted(read(tmp_path / "out" / split)[1]) == counted(cut([list((f"{name} " * 50).encode())], 10))


def test_nanogpts_tokens_are_rows_of_a_vocabulary_that_must_be_said(tmp_path):
    ids = {split: np.random.default_rng(n).integers(300, size=1000).astype("<u2") for n, split in enumerate(("train", "val"))}
    for split, some in ids.items():
        some.tofile(tmp_path / f"{split}.bin")
    files = [tmp_path / "train.bin", tmp_path / "val.bin"]
    assert "--vocab-size" in refusal(tmp_path, "text", *files)
    assert "outside the vocabulary of 299" in refusal(tmp_path, "text", *files, "--vocab-size", 299, "--row-length", 9)
    assert "last 1 tokens, which fill no row, are left out" in call(tmp_path, "text", *files, "--vocab-size", 300,
                                                                    "--row-length", 9)
    for split, some in ids.items():
        assert counted(read(tmp_path / "out" / split)[1]) == counted(some[:999].reshape(-1, 9))


def test_a_large_text_takes_little_memory(tmp_path):
    zoo.save("gpt2", tmp_path)
    (tmp_path / "a.txt").write_bytes(zoo.TEXT.encode() * 30_000)  # 10 MB
    script = tmp_path / "measured.py"
    script.write_text("import shards\nfrom runtime.machine import peak_memory\nfrom runtime.command import command\n"
                      "before = peak_memory()\ntry:\n    command(shards.main)\nfinally:\n"  # a torch for CUDA takes 500 MB itself
                      "    print('peak', peak_memory() - before >> 20)\n")
    printed = lab.run(script, "text", tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer", tmp_path)
    assert int(printed.split("peak ")[1].split()[0]) < 250


@pytest.mark.parametrize("option", ["--row-length=4", "--val-share=0.1", "--eos=</s>", "--special-tokens=text"])
def test_an_option_that_would_do_nothing_is_refused(tmp_path, option):
    rows = write_parquet(tmp_path / "train-0.parquet", [[1, 2]])
    assert f"error: {option.partition('=')[0]}: does nothing" in refusal(tmp_path, "parquet", rows, option)
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("some text " * 50)
    if option.startswith("--val"):
        assert "does nothing for texts with a split val" in refusal(tmp_path, "text", *tmp_path.glob("*.txt"), option)


def test_a_standard_library_with_a_link_to_nothing_is_read_without_it(tmp_path, monkeypatch):
    """As sitecustomize.py is one to /etc in Debian's, where a container has left /etc out."""
    (tmp_path / "lib").mkdir()
    for number in range(40):
        (tmp_path / f"lib/module_{number}.py").write_text(f"number = {number}\n" * 20)
    (tmp_path / "lib/sitecustomize.py").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(shards.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    call(tmp_path, "stdlib", "--row-length", 33)
    assert (tmp_path / "out/train/index.json").exists()


# ---- nothing in the way, nothing left behind -----------------------------------------------------------------

@pytest.mark.parametrize("out", ["c.md", "folder", "c.md/below"])
@pytest.mark.parametrize("command", ["text", "parquet"])
def test_an_out_that_is_there_or_cannot_be_is_refused_and_untouched(tmp_path, files, command, out):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    source = files[0] if command == "text" else write_parquet(tmp_path / "train-0.parquet", [[1, 2]])
    assert out.partition("/")[0] in refusal(tmp_path, command, source, out=out)


@pytest.mark.parametrize("harm", [
    lambda out: (out / "val/shard-00000.npy").unlink(), lambda out: os.truncate(out / "train/shard-00000.npy", 99),
    lambda out: shutil.rmtree(out / "val"), lambda out: shutil.rmtree(out) or out.mkdir()],
                         ids="shard-missing shard-cut split-missing empty".split())
def test_a_standard_library_that_is_not_whole_is_not_taken_for_one(stdlib, tmp_path, harm):
    shutil.copytree(stdlib, tmp_path / "out")
    harm(tmp_path / "out")
    assert "already there, but not whole" in refusal(tmp_path, "stdlib")
    assert "delete it first" in refusal(tmp_path, "stdlib", "--row-length", 100)


def test_all_that_is_made_is_on_the_disk_before_it_has_its_name(tmp_path, files, monkeypatch):
    synced, fsync, rename = set(), os.fsync, os.rename

    def recorded(handle):
        fsync(handle)
        synced.add(Path(os.readlink(f"/proc/self/fd/{handle}")))

    def checked(source, target):
        if Path(target) == tmp_path / "out":
            whole = {*Path(source).rglob("*"), Path(source)}
            small = {path for path in whole - synced if any(p.name.startswith(f".staging-{path.name}@") for p in synced)}
            assert whole <= synced | small  # what was renamed once it was synced
        rename(source, target)
    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(os, "rename", checked)
    zoo.save("gpt2", tmp_path)
    call(tmp_path, "text", *files, "--row-length", 8, "--tokenizer", tmp_path)
    assert tmp_path in synced
    call(tmp_path, "parquet", write_parquet(tmp_path / "train-0.parquet", [[1, 2]]), out="rows")
    assert any(path.name == "shard-00000.npy" and path.parent.parent.name.startswith(".staging-rows") for path in synced)


def test_what_is_made_is_no_failure_when_its_folder_cannot_be_synced(tmp_path, files, monkeypatch):
    def failing(folder):
        if folder == tmp_path:
            raise OSError(5, "Input/output error")
    monkeypatch.setattr(shards, "fsync_folder", failing)
    assert "rows of 8 tokens" in call(tmp_path, "text", *files, "--row-length", 8)


def test_of_two_that_make_the_same_one_says_that_it_is_there(tmp_path, files, monkeypatch):
    def meanwhile(staged, args):
        make_files(staged, args)
        lab.forked("shards.py", "text", *files, "--row-length", 9, "--out", tmp_path / "out")
    make_files = shards.make_files
    monkeypatch.setattr(shards, "make_files", meanwhile)
    assert "another process has made it meanwhile" in call(tmp_path, "text", *files, "--row-length", 8, code=2)
    assert read(tmp_path / "out/train")[0]["row_length"] == 9 and not list(tmp_path.glob(".staging*"))


def test_what_a_killed_make_left_is_removed_and_what_a_living_one_makes_is_not(tmp_path, files):
    killed = subprocess.Popen(["true"])
    killed.wait()
    for pid in (killed.pid, os.getppid(), "x"):
        (tmp_path / f"{STAGING}out@{host_name()}-{pid}").mkdir()
    call(tmp_path, "text", *files, "--row-length", 8)
    assert sorted(path.name.rpartition("-")[2] for path in tmp_path.glob(f"{STAGING}*")) == sorted([str(os.getppid()), "x"])


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
