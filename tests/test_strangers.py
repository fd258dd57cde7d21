"""What strangers may have put into files: refused in one line that names the file, at once, in little memory."""

import io
import json
import os
import resource
import struct
import time

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import yaml

import evaluate
import replay
import sample
import study
from checkpoint import CheckpointError, step_folders
from config import ConfigError, UserError, load_config
from data import DataError
from hub import card, packing, text
from hub import parquet as tables
from hub.datasets import _origin
from hub.inputs import find_inputs
from hub.parquet import convert_parquet, open_table, read_texts, records
from hub.llama import byte_tokenizer_json
from hub.tokenizers import ByteTokenizer, load_tokenizer
from instruments.snapshots import Snapshots
from runtime import files, manifest
from runtime.locks import RunLock

MEMORY = 300_000  # KB that a file of a few kB may take


@pytest.fixture(autouse=True)
def at_once_and_in_little_memory():
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - begun < 20 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(error, path):
    words = str(error.value)
    assert str(path) in words and "\n" not in words and len(words) < 900
    return words


def zeros(path):
    path.symlink_to("/dev/zero")


NO_FILES = [os.mkfifo, os.mkdir, *([zeros] if os.path.exists("/dev/zero") else [])]


# ---- YAML ------------------------------------------------------------------------------------------------------------

def grown(first, grow):
    """A few lines of aliases of aliases, that stand for 10^8 things."""
    return "\n".join([f"a: &a {first}", *(f"{b}: &{b} {grow(f'*{a}')}" for a, b in zip("abcdefgh", "bcdefghi"))])


LISTS = grown("[0, 0, 0]", lambda alias: f"[{', '.join([alias] * 9)}]")
MAPS = grown("{x: 0}", lambda alias: f"{{{', '.join(f'k{number}: {alias}' for number in range(9))}}}")
MERGES = grown("{x: 0}", lambda alias: f"{{<<: [{', '.join([alias] * 9)}]}}")


@pytest.mark.parametrize("more, says", [(LISTS, "aliases"), (MAPS, "aliases"), (MERGES, "aliases"), ("r: &r {a: *r}", "aliases"),
                                        ("model: {d_model: 4}", "written twice"), ("x: !!python/name:os.system", "not YAML"),
                                        ("x: " + "{a: " * 5000, "not YAML")], ids=range(7))
def test_yaml_that_grows_or_says_a_thing_twice_is_refused_by_every_reader(tmp_path, more, says):
    whole = yaml.safe_dump({"model": {"d_model": 32, "attention_n_heads": 4, "attention_n_kv_heads": 2},
                            "checkpointing": {"learning_dynamics_dir": "l", "checkpoints_dir": "c"}})
    path = written(tmp_path / "training_config.yaml", f"{whole}\n{more}\n")
    with pytest.raises(CheckpointError) as error:
        Snapshots(tmp_path)
    assert says in refused(error, path)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert says in refused(error, path)


@pytest.mark.parametrize("number", ["010", "-010", "1:30", "1:30:00", "1:30.5", "\u0663"])
@pytest.mark.parametrize("key", ["training.max_steps", "training.optimization.lr"])
def test_a_number_that_is_another_one_to_yaml_is_refused(tmp_path, key, number):
    *sections, leaf = key.split(".")
    whole = f"{leaf}: {number}"
    for section in reversed(sections):
        whole = f"{section}: {{{whole}}}"
    for path, words in ((written(tmp_path / "a.yaml", whole), ()), (written(tmp_path / "b.yaml", ""), (f"{key}={number}",))):
        with pytest.raises(ConfigError, match=f"{key}: "):
            load_config(path, words)
    assert load_config(path, (f"{key}=1_0",)).training is not None


def test_a_file_that_repeats_itself_by_aliases_a_little_is_read(tmp_path):
    text = "data: {dataset: {name: &name corpora/x}}\ncheckpointing: {run_name: *name}"
    with pytest.raises(ConfigError, match="must be one plain folder name"):  # and so was read
        load_config(written(tmp_path / "a.yaml", text))


@pytest.mark.parametrize("make", NO_FILES, ids=lambda make: make.__name__)
def test_what_is_no_file_is_not_waited_for(tmp_path, make):
    path = tmp_path / "training_config.yaml"
    make(path)
    for read in (lambda: load_config(path), lambda: Snapshots(tmp_path), lambda: find_inputs([path], "text")):
        if make is os.mkdir and read is not None and "find_inputs" in read.__code__.co_names:
            continue  # a folder may hold texts
        with pytest.raises(UserError) as error:
            read()
        refused(error, tmp_path)
    if make is not os.mkdir:
        with pytest.raises(DataError):
            with open_table(path):
                pass


# ---- JSON of ours -----------------------------------------------------------------------------------------------------

NO_OBJECTS = [b"", b"[]", b"5", b"null", b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]


@pytest.mark.parametrize("content", NO_OBJECTS, ids=lambda content: repr(content[:9]))
def test_json_that_is_no_object_is_one_line_wherever_it_is_read(tmp_path, capsys, content):
    with pytest.raises(ValueError):
        files.read_object(written(tmp_path / "a.json", content))
    window = written(tmp_path / "name/rev/train/window.json", content)
    with pytest.raises(DataError) as error:
        _origin(window)
    refused(error, window)
    lock = RunLock(tmp_path)
    written(lock.path, content)
    assert lock._holder() is None
    results = written(tmp_path / "eval_results/step_4.json", content)
    evaluate.write_results(results, {"val": {"loss": 1.0}}, beside=True)
    assert "cannot be written" in capsys.readouterr().out and results.read_bytes() == content


@pytest.mark.parametrize("holder", [{"host": "", "pid": 1}, {"host": " ", "pid": 1}, {"host": 5, "pid": 1}, {"host": "a"},
                                    {"host": "a", "pid": float("inf")}, {"host": "a", "pid": "1"}, {"host": "a", "pid": True}])
def test_a_lock_that_names_no_process_is_nobodys(tmp_path, holder):
    lock = RunLock(tmp_path)
    written(lock.path, json.dumps(holder | {"born": "x"}))
    assert lock._holder() is None


@pytest.mark.parametrize("name, content", [
    ("study.json", {"peak_bytes": 1, "tokens": 1, "seconds": 1.0}), ("study.json", {"x": 1}),
    ("study.json", {"peak_bytes": 1, "tokens": "x", "seconds": 1.0, "trainable": 1}), ("eval_results/final.json", []),
    ("eval_results/final.json", {"val": 5}), ("eval_results/final.json", {"val": {"loss": "x"}}),
    ("eval_results/final.json", {"val": {"loss": float("nan")}})], ids=str)
def test_the_results_of_a_strangers_study_are_checked(tmp_path, name, content):
    class Plan:
        def folder(self, job):
            return tmp_path
    good = {"exit.json": {"code": 0}, "study.json": {"peak_bytes": None, "tokens": 5, "seconds": 1.0, "trainable": None},
            "eval_results/final.json": {"val": {"loss": 1.5}}}
    job = study.Job("arm", 0.1, 1, True)
    for path, value in good.items():
        written(tmp_path / path, json.dumps(value))
    assert study.result_of(Plan(), job).loss == 1.5
    with pytest.raises(ConfigError) as error:
        written(tmp_path / name, json.dumps(content))
        study.result_of(Plan(), job)
    refused(error, tmp_path / name)


# ---- folders ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["step_04", "step_00004", "step_\u0664"])
def test_a_step_has_one_name(tmp_path, name):
    (tmp_path / "step_4").mkdir()
    (tmp_path / "step_4 ").mkdir()
    assert step_folders(tmp_path) == [tmp_path / "step_4"]
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match="step_4, or move it away"):
        step_folders(tmp_path)


@pytest.mark.parametrize("link", ["step_4", "step_4/learning_dynamics", "step_4/learning_dynamics/a.pt"])
def test_nothing_is_added_to_a_step_through_a_link(tmp_path, link):
    (tmp_path / "mine/learning_dynamics").mkdir(parents=True)
    target = tmp_path / "checkpoints" / link
    target.parent.mkdir(parents=True)
    target.symlink_to(tmp_path / "mine")
    written(tmp_path / "checkpoints/step_4/manifest.json", '{"files": {}}')
    before = sorted((tmp_path / "mine").rglob("*"))
    with pytest.raises(UserError, match="is a link to"):
        manifest.extend(tmp_path / "checkpoints/step_4",
                        {"learning_dynamics/a.pt": manifest.Writer(lambda file: file.write(b"x"))})
    assert sorted((tmp_path / "mine").rglob("*")) == before


def test_an_evaluation_is_not_written_through_a_link(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/eval_results").symlink_to(tmp_path / "mine")
    evaluate.write_results(tmp_path / "run/eval_results/step_1.json", {"val": {}}, beside=True)
    assert "is a link to" in capsys.readouterr().out and list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize("file, listed", [
    ("dataset_dict.json", {"splits": listed}) for listed in (5, "train", [5], [".."], ["../x"], ["/etc"], ["."], [""], {})] + [
    ("state.json", {"_data_files": listed}) for listed in (5, [5], [{}], {"a": 1}, [{"filename": "../../x"}], [{"filename": 5}])],
    ids=str)
def test_a_saved_data_set_lists_what_lies_beside_it(tmp_path, file, listed):
    written(tmp_path / "dataset_info.json", "{}")
    path = written(tmp_path / file, json.dumps(listed))
    with pytest.raises(DataError) as error:
        find_inputs([tmp_path], "text")
    refused(error, path)


# ---- texts ------------------------------------------------------------------------------------------------------------

LONG = 4000


@pytest.mark.parametrize("reader, content, says", [
    (text.read_json, b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 1 cannot be used"),
    (text.read_json, b'{"text": "a"}\n{"text": "a", "text": "b"}', "line 2 cannot be used ('text' is written twice"),
    (text.read_json, b'{"text": "' + b"a" * 9 * LONG, "line 1 begins a value of more than"),
    (text.read_csv, b"text,b\rone,two\r", "line 1 is no CSV"),
    (text.read_csv, b"text,text\none,two\n", "the column text 2 times"),
    (text.read_csv, b"text,b" + b"c" * 2 * LONG, "a line of more than"),
    (text.read_csv, b"text,b\n" + b"," * 2 * LONG, "a line of more than"),
    (text.read_csv, b'text,b\n"' + b'a\n","' * LONG, "row of more than")], ids=range(8))
def test_rows_that_cannot_be_used_or_never_end_are_refused(tmp_path, monkeypatch, reader, content, says):
    monkeypatch.setattr(text, "LONGEST", LONG)
    monkeypatch.setattr(text, "BLOCK_BYTES", 512)
    path = written(tmp_path / "a", content)
    with pytest.raises(DataError) as error:
        list(reader(path, "text", lambda count: None))
    assert says in refused(error, path)


def test_a_text_without_words_is_cut_where_its_tokens_are_bytes_and_else_refused(monkeypatch):
    whole = "\u00e9" * 200_000 + "<|endoftext|>" + "b" * 100_000
    parts = list(packing.cut([(whole, True)], ByteTokenizer()))
    ids = [i for part in parts for i in ByteTokenizer().encode(part.text)[part.skip:]]
    assert ids == ByteTokenizer().encode(whole) and len(parts) > 5

    class Other:
        inner = None

        def encode(self, text):
            return [len(text)]
    monkeypatch.setattr(packing, "LONGEST_WORD", 1 << 17)
    with pytest.raises(packing.Unbroken, match="hold no end of a word"):
        list(packing.cut([("a" * (1 << 20), True)], Other()))


# ---- tables -----------------------------------------------------------------------------------------------------------

def id_rows(count, length):
    offsets = arrow.array(np.arange(count + 1, dtype=np.int32) * length)
    return arrow.table({"input_ids": arrow.ListArray.from_arrays(offsets, arrow.array(np.zeros(count * length, np.int32)))})


def varint(number):
    number, found = number << 1, b""
    while number > 127:
        number, found = number >> 7, found + bytes([number & 127 | 128])
    return found + bytes([number])


@pytest.mark.parametrize("claimed", [299, 301, 5000, 10**9])
def test_a_table_of_other_rows_than_it_says_is_refused(tmp_path, claimed):
    path = tmp_path / "a.parquet"
    parquet.write_table(id_rows(300, 17), path)
    data = path.read_bytes()
    size = struct.unpack("<I", data[-8:-4])[0]
    footer, known = data[-8 - size:-8], b"\x16" + varint(300) + b"\x19"  # num_rows, before the list of row groups
    assert footer.count(known) == 1
    footer = footer.replace(known, b"\x16" + varint(claimed) + b"\x19")
    path.write_bytes(data[:-8 - size] + footer + struct.pack("<I", len(footer)) + b"PAR1")
    with pytest.raises(DataError) as error:
        convert_parquet(path, tmp_path / "made.npy", 64)
    assert f"says that it holds {claimed:,} rows" in refused(error, path) and not (tmp_path / "made.npy").exists()


def not_text(count):
    return arrow.array([b"\xff"] * count, arrow.binary()).view(arrow.string())


@pytest.mark.parametrize("table, says", [
    (lambda: id_rows(1, 700_000), "a bomb"), (lambda: id_rows(7, 100_000), "a bomb"),
    (lambda: id_rows(1, 70_000), "rows of some"),
    (lambda: arrow.table([arrow.array([[1, 2]]), arrow.array([[3, 4]])], names=["input_ids"] * 2), "has 2 columns input_ids"),
    (lambda: arrow.table({"input_ids": [[1, 2]] * 3, "source": not_text(3)}), "cannot be read")], ids=range(5))
def test_a_table_that_cannot_be_held_or_used_is_refused(tmp_path, monkeypatch, table, says):
    path = tmp_path / "a.parquet"
    monkeypatch.setattr(tables, "SMALL", 1 << 20)
    monkeypatch.setattr(tables, "LONGEST_ROW", 1 << 16)
    parquet.write_table(table(), path)
    with pytest.raises(DataError) as error:
        convert_parquet(path, tmp_path / "made.npy", 64)
    assert says in refused(error, path)


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
@pytest.mark.parametrize("begin", [arrow.ipc.new_stream, arrow.ipc.new_file], ids=["stream", "file"])
def test_an_arrow_file_that_unpacks_to_much_more_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, begin, codec):
    monkeypatch.setattr(tables, "SMALL", 1 << 20)
    monkeypatch.setattr(tables, "MOST_GROWTH", 100)
    path, plain = tmp_path / "bomb.arrow", id_rows(300, 17)
    for made, chosen in ((id_rows(1000, 1000), codec), (plain, codec), (plain, None)):
        with begin(str(path), made.schema, options=arrow.ipc.IpcWriteOptions(compression=chosen)) as writer:
            writer.write_table(made)
        if made is plain:
            assert convert_parquet(path, tmp_path / f"{chosen}.npy", 64).rows == 300
            continue
        with pytest.raises(DataError) as error:
            convert_parquet(path, tmp_path / "made.npy", 64)
        assert "unpacks to 4 MB from 0.0" in refused(error, path)


def test_a_text_that_stands_in_many_rows_is_held_once_and_what_is_none_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    many = arrow.DictionaryArray.from_arrays(arrow.array(np.zeros(256, np.int32)), arrow.array(["word " * 800_000]))
    parquet.write_table(arrow.table({"text": many}), path, compression="zstd")  # 1 GB in a batch, from a kilobyte
    assert sum(len(text) for text, _ in read_texts(path, "text")) == 256 * 4_000_000
    parquet.write_table(arrow.table({"text": not_text(2)}), path)
    for read in (lambda: read_texts(path, "text"), lambda: records(path)):
        with pytest.raises(DataError) as error:
            list(read())
        refused(error, path)


# ---- tokenizers --------------------------------------------------------------------------------------------------------

def replacing(times, content):
    return [{"type": "Replace", "pattern": {"String": "a"}, "content": content} for _ in range(times)]


@pytest.mark.parametrize("part, steps", [("normalizer", {"type": "Sequence", "normalizers": replacing(9, "a" * 10)}),
                                         ("decoder", {"type": "Sequence", "decoders": replacing(9, "a" * 10)}),
                                         ("normalizer", replacing(1, "a" * 5000)[0])], ids=["normalizer", "decoder", "once"])
def test_a_tokenizer_that_makes_a_gigabyte_of_a_word_is_refused(tmp_path, part, steps):
    path = written(tmp_path / "tokenizer.json", json.dumps(byte_tokenizer_json() | {part: steps}))
    with pytest.raises(DataError) as error:
        load_tokenizer(path)
    assert "characters of one" in refused(error, path)
    if part == "normalizer":
        usual = {"type": "Sequence", "normalizers": [*replacing(9, "\u2581"), {"type": "NFKD"}]}
        written(path, json.dumps(byte_tokenizer_json() | {part: usual}))
        assert load_tokenizer(path).encode("b") == [98]


# ---- what is shown -----------------------------------------------------------------------------------------------------

def test_a_model_commands_no_terminal_and_is_shown_whole_elsewhere():
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    said = "a\x1b]0;x\x07\r\u202eb\n\tc"
    assert sample.fit_for(Terminal(), said) == "a\\x1b]0;x\\x07\\r\\u202eb\n\tc" and sample.fit_for(io.StringIO(), said) == said


def test_names_are_text_in_a_model_card(tmp_path):
    name = "<img src=x onerror=alert(1)>\n# [a](javascript:b) | `c`"
    run = tmp_path / "a <b>"
    written(run / "training_config.yaml", yaml.safe_dump({"data": {"dataset": {"name": name}}}))
    written(run / "eval_results/step_2.json", json.dumps({name: {name: 1.5}}))
    written(run / "eval_results/step_3.json", "[" * 100_000)
    os.mkfifo(run / "eval_results/step_4.json")
    made = card.model_card(run, 2)
    assert "<img" not in made and "a <b>" not in made and made.count("\n# ") == 1 and "1.5000 |" in made
    assert "](javascript" not in made


def test_a_recorded_loss_of_zero_is_another_course(tmp_path):
    held = replay.Replay.__new__(replay.Replay)
    held.recorded, held.compared, held.largest = {1: 0.0}, 0, 0.0
    read = type("Progress", (), {"read": lambda self, step: type("Window", (), {"loss": 2.0})})()
    state = type("State", (), {"step": 1, "progress": read, "cfg": load_config("config/demo.yaml")})
    state.cfg.monitoring.logging.log_every_n_steps = 1
    with pytest.raises(UserError, match="not its course"):
        held.check(state)
