"""Token shards as batches: the order against plain numpy, the partition over ranks, and errors that name the file."""

import contextlib
import hashlib
import json
import os
import threading
import time

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lab
from data import BatchLoader, ByteTokenizer, DataError, JsonTokenizer, TokenDataset, load_tokenizer, token_dtype
from shards import write_shards

SIZES = (5, 1, 7, 3)  # rows of the shards: 16 in all
CPU = torch.device("cpu")


def write_split(folder, arrays, vocab=64, **index):
    """A split written without the code under test; `index` replaces entries of index.json."""
    folder.mkdir(parents=True)
    for number, array in enumerate(arrays):
        np.save(folder / f"{number}.npy", array)
    shards = [{"file": f"{n}.npy", "rows": len(a), "sha256": "?"} for n, a in enumerate(arrays)]
    (folder / "index.json").write_text(json.dumps({"row_length": arrays[0].shape[1], "dtype": arrays[0].dtype.name,
                                                   "vocab_size": vocab, "shards": shards} | index))
    if "shards" not in index:
        sign(folder)


def sign(folder):
    """Make the index's checksums fit the shards, whatever these hold."""
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        shard["sha256"] = hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def raw():
    """(rows, row_length) of ids that tell every row from every other."""
    return np.random.default_rng(1).permutation(16 * 9).reshape(16, 9).astype(np.uint16)


@pytest.fixture
def folder(tmp_path, raw):
    """A dataset of four shards of `raw`."""
    write_split(tmp_path / "set" / "train", np.split(raw, np.cumsum(SIZES)[:-1]), vocab=16 * 9)
    return tmp_path / "set"


def wrapped(raw, first, count):
    return raw[np.arange(first, first + count) % len(raw)]


def loader(folder, first_step=0, micro=2, accumulation=2, rank=0, world=1):
    return BatchLoader(TokenDataset(folder), first_step, micro, accumulation, rank, world, CPU)


def take(batches):
    """The next update's micro-batches."""
    return batches.next(seconds=20)


# ---- order ---------------------------------------------------------------------------------------------------

@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), first=st.integers(0, 10 ** 12),
       count=st.integers(1, 50))
def test_rows_are_those_of_all_shards_end_to_end_without_end(tmp_path_factory, sizes, first, count):
    folder = tmp_path_factory.mktemp("sizes")
    whole = np.random.default_rng(sizes).integers(64, size=(sum(sizes), 3), dtype=np.uint16)
    write_split(folder / "train", np.split(whole, np.cumsum(sizes)[:-1]))
    np.testing.assert_array_equal(TokenDataset(folder).rows(first, count), wrapped(whole, first, count))


@pytest.mark.parametrize("step, size, epoch", [(0, 4, 0), (3, 4, 0), (4, 4, 1), (3, 5, 0), (4, 5, 1), (2, 40, 5),
                                               (10 ** 9, 16, 10 ** 9)])
def test_batch_s_is_rows_s_g_to_s_plus_1_g_and_epochs_are_counted_before_it(folder, raw, step, size, epoch):
    dataset = TokenDataset(folder)
    assert len(dataset) == 16 and dataset.epoch(step, size) == epoch
    np.testing.assert_array_equal(dataset.batch(step, size), wrapped(raw, step * size, size))


@pytest.mark.parametrize("micro, accumulation, world", [(2, 6, 1), (2, 3, 2), (1, 3, 4), (3, 1, 4), (12, 1, 1)])
def test_the_ranks_micro_batches_in_index_order_are_the_global_batch(folder, raw, micro, accumulation, world):
    with contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(loader(folder, 0, micro, accumulation, rank, world)) for rank in range(world)]
        for step in range(4):  # 48 rows: three epochs
            pairs = sorted((pair for rank in ranks for pair in take(rank)), key=lambda pair: pair[0])
            assert [index for index, _ in pairs] == list(range(world * accumulation))
            assert all(rows.dtype == torch.int64 and len(rows) == micro for _, rows in pairs)
            np.testing.assert_array_equal(torch.cat([rows for _, rows in pairs]), wrapped(raw, step * 12, 12))


def test_one_micro_batch_size_gives_the_same_micro_batches_on_any_number_of_ranks(folder):
    def indexed(world):
        with contextlib.ExitStack() as stack:
            ranks = [stack.enter_context(loader(folder, 5, 3, 4 // world, rank, world)) for rank in range(world)]
            return {index: rows.tolist() for rank in ranks for index, rows in take(rank)}
    assert indexed(1) == indexed(2) == indexed(4)


@pytest.mark.parametrize("step", [1, 7])
def test_starting_at_a_step_equals_skipping_to_it(folder, step):
    with loader(folder) as skipped, loader(folder, first_step=step) as started:
        for _ in range(step):
            take(skipped)
        for _ in range(3):
            for (index, rows), (same_index, same_rows) in zip(take(skipped), take(started), strict=True):
                assert index == same_index and torch.equal(rows, same_rows)


@pytest.mark.parametrize("vocab, dtype", [(1, "uint16"), (65536, "uint16"), (65537, "uint32"), (2 ** 31 - 1, "uint32")])
def test_the_dtype_holds_the_last_id_through_disk_and_loader(tmp_path, vocab, dtype):
    rows = np.array([[0, vocab - 1, 0], [vocab - 1, 0, vocab // 2]])
    write_shards(tmp_path / "train", rows, vocab, "a test")
    assert token_dtype(vocab) == dtype == np.load(tmp_path / "train" / "shard-00000.npy").dtype
    with loader(tmp_path, micro=2, accumulation=1) as batches:
        assert take(batches)[0][1].tolist() == rows.tolist()


def test_the_fingerprint_follows_the_tokens_and_not_the_folder(tmp_path):
    rows = np.arange(12).reshape(4, 3)
    changed, swapped = rows.copy(), rows[[1, 0, 2, 3]]
    changed[2, 1] += 1
    for name, tokens in (("a", rows), ("b", changed), ("c", swapped), ("d", rows)):
        write_shards(tmp_path / name / "train", tokens, 64, name)
    before = TokenDataset(tmp_path / "a").fingerprint
    os.rename(tmp_path / "a", tmp_path / "moved")
    assert TokenDataset(tmp_path / "moved").fingerprint == before == TokenDataset(tmp_path / "d").fingerprint
    assert len({before, TokenDataset(tmp_path / "b").fingerprint, TokenDataset(tmp_path / "c").fingerprint}) == 3


# ---- what cannot be used -------------------------------------------------------------------------------------

class Bomb:
    """Unpickled, it makes a folder."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickled(path):
    array = np.empty((7, 9), dtype=object)
    array[:] = Bomb(path.parent / "executed")
    np.save(path, array, allow_pickle=True)


def zipped(path):
    with open(path, "wb") as file:
        np.savez(file, np.zeros((7, 9), np.uint16))


@pytest.mark.parametrize("harm, reason", [
    (lambda path: path.unlink(), "cannot be opened"),
    (lambda path: os.truncate(path, path.stat().st_size - 1), "cannot be opened"),
    (lambda path: os.truncate(path, 20), "cannot be opened"), (lambda path: path.write_bytes(b""), "cannot be opened"),
    (lambda path: path.write_bytes(b"not numpy"), "cannot be opened"), (pickled, "cannot be opened"), (zipped, None),
    (lambda path: np.save(path, np.zeros((7, 8), np.uint16)), r"\(7, 8\)"),
    (lambda path: np.save(path, np.zeros((6, 9), np.uint16)), r"\(6, 9\)"),
    (lambda path: np.save(path, np.zeros((7, 9), np.int64)), "int64"),
    (lambda path: np.save(path, np.zeros((7, 9), ">u2")), None),  # which torch cannot take
    (lambda path: np.save(path, np.eye(7, 9, k=-4, dtype=np.uint16) * 144) or sign(path.parent), "row 4 holds id 144"),
    (lambda path: path.write_bytes(path.read_bytes()[:-3] + bytes([path.read_bytes()[-3] ^ 1]) + path.read_bytes()[-2:]),
     "a bit has flipped")],
    ids="missing truncated cut-header empty text pickle npz row-length rows int64 big-endian id flipped-bit".split())
def test_a_bad_shard_is_an_error_naming_it_and_runs_nothing(folder, harm, reason):
    path = folder / "train" / "2.npy"
    harm(path)
    dataset = TokenDataset(folder)
    dataset.rows(0, 6)  # the two shards before it are sound
    with pytest.raises(DataError, match=reason) as caught:
        dataset.rows(5, 8)
    assert str(path) in str(caught.value) and not (folder / "train" / "executed").exists()


@pytest.mark.parametrize("index", [
    {"shards": []}, {"shards": None}, {"shards": [{"file": "0.npy", "rows": 5}]}, {"row_length": 1},
    {"row_length": "9"}, {"row_length": None}, {"dtype": "float32"}, {"dtype": "object"}, {"vocab_size": 0},
    *({"shards": [{"file": "0.npy", "rows": rows, "sha256": "x"}]} for rows in (0, -1, "5", None, 5.5, float("inf")))],
    ids=str)
def test_an_index_that_makes_no_sense_is_an_error_naming_it(tmp_path, raw, index):
    write_split(tmp_path / "train", [raw], **index)
    with pytest.raises(DataError) as caught:
        TokenDataset(tmp_path).rows(0, 1)
    assert str(tmp_path / "train") in str(caught.value)


@pytest.mark.parametrize("name", ["../x.npy", "{}/x.npy", "sub/../../x.npy", "..", "", 5, None, "a\0.npy"])
def test_an_index_cannot_point_out_of_its_folder(tmp_path, raw, name):
    np.save(tmp_path / "x.npy", raw)  # sound, and where the hostile names lead
    name = name.format(tmp_path) if isinstance(name, str) else name
    write_split(tmp_path / "train", [raw], vocab=16 * 9, shards=[{"file": name, "rows": 16, "sha256": "x"}])
    (tmp_path / "train" / "sub").mkdir()
    with pytest.raises(DataError) as caught:
        TokenDataset(tmp_path).rows(0, 1)
    assert str(tmp_path / "train") in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"5", b"null", b"{}", b"\xff\xfe"])
def test_a_missing_or_unreadable_index_is_an_error_naming_it(tmp_path, content):
    (tmp_path / "train").mkdir()
    if content is not None:
        (tmp_path / "train" / "index.json").write_bytes(content)
    with pytest.raises(DataError, match="shards.py" if content is None else None) as caught:
        TokenDataset(tmp_path)
    assert str(tmp_path / "train" / "index.json") in str(caught.value)


# ---- the thread ----------------------------------------------------------------------------------------------

def test_an_error_of_the_thread_reaches_the_consumer_after_the_batches_before_it(folder, raw):
    np.save(folder / "train" / "3.npy", np.full((3, 9), 999, np.uint16))  # rows 13 to 15
    sign(folder / "train")
    with loader(folder) as batches:
        for step in range(3):
            np.testing.assert_array_equal(torch.cat([rows for _, rows in take(batches)]), wrapped(raw, 4 * step, 4))
        with pytest.raises(DataError, match="row 0 holds id 999"):
            take(batches)


@pytest.mark.parametrize("taken, error", [(0, None), (2, None), (1, KeyboardInterrupt)])
def test_the_thread_ends_with_the_context(folder, taken, error):
    before = set(threading.enumerate())
    with contextlib.suppress(KeyboardInterrupt), loader(folder) as batches:
        for _ in range(taken):
            take(batches)
        time.sleep(0.2)  # by now the queue is full and the thread waits for room
        assert len(set(threading.enumerate()) - before) == 1
        if error:
            raise error
    assert set(threading.enumerate()) <= before


def test_waiting_is_counted_once(folder):
    with loader(folder) as batches:
        started = time.perf_counter()
        take(batches)
        assert 0 < batches.take_wait() <= time.perf_counter() - started
        assert batches.take_wait() == 0


# ---- tokenizers ----------------------------------------------------------------------------------------------

TEXTS = ["", "plain", "Gr\u00fc\u00dfe, \u4e16\u754c \U0001f30d\n\ttabs  and  spaces", "\0\x7f", "<|endoftext|"]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_round_trip_with_the_end_of_a_text_outside_of_them(tmp_path, text):
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, ByteTokenizer) and (tokenizer.vocab_size, tokenizer.eos) == (257, 256)
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text) + [tokenizer.eos]) == text


def test_bytes_that_are_no_text_decode_to_replacement_characters():
    assert ByteTokenizer().decode([0x61, 0xFF, 256, 0x62]) == "a\ufffdb"


def tiny_bpe(folder):
    """A byte-level BPE whose special tokens come first, as the library numbers them: eos 0, pad 1."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False,
                                             special_tokens=["<|endoftext|>", "<|padding|>"])
    inner.train_from_iterator(["plain tabs and spaces"] * 9, trainer)
    inner.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("source, expected", [("made", (270, 0, 1)), ("real", (50280, 50279, 1))])
def test_a_tokenizer_json_round_trips_and_says_its_special_tokens(tmp_path, source, expected):
    folder = tiny_bpe(tmp_path) if source == "made" else lab.SHARED / "tokenizer"
    if not folder.exists():
        pytest.skip("no real tokenizer here")
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, JsonTokenizer) and (tokenizer.vocab_size, tokenizer.eos, tokenizer.pad) == expected
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and all(0 <= i < expected[0] for i in ids)
        assert tokenizer.eos not in ids


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": 3}'])
def test_a_broken_tokenizer_json_is_an_error_naming_it(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
