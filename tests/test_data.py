"""Token shards as batches: the order against plain numpy, the partition over ranks, and errors that name the file."""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lab
from data import BatchLoader, DamagedShard, DataError, TokenDataset, to_device, token_dtype
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


def damaged_header(path):
    """One flipped bit in the header, which numpy hands to Python's own tokenizer."""
    content = path.read_bytes()
    path.write_bytes(content.replace(b"{'descr'", b"{'descr`", 1))


def flipped_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm, reason", [
    (lambda path: os.truncate(path, path.stat().st_size - 1), "cannot be opened"),
    (lambda path: os.truncate(path, 20), "cannot be opened"), (lambda path: path.write_bytes(b""), "cannot be opened"),
    (lambda path: path.write_bytes(b"not numpy"), "cannot be opened"), (pickled, "cannot be opened"), (zipped, None),
    (damaged_header, "cannot be opened"),
    (lambda path: np.save(path, np.zeros((7, 8), np.uint16)), r"\(7, 8\)"),
    (lambda path: np.save(path, np.zeros((6, 9), np.uint16)), r"\(6, 9\)"),
    (lambda path: np.save(path, np.zeros((7, 9), np.int64)), "int64"),
    (lambda path: np.save(path, np.zeros((7, 9), ">u2")), None),  # which torch cannot take
    (lambda path: np.save(path, np.eye(7, 9, k=-4, dtype=np.uint16) * 144), "row 4 holds id 144"),
    (flipped_bit, "row 6 holds id")],
    ids="truncated cut-header empty text pickle npz header row-length rows int64 big-endian id flipped-bit".split())
@pytest.mark.parametrize("signed", [False, True])  # True: whoever made the shard made the index's checksum for it, too
def test_a_bad_shard_is_an_error_naming_it_and_runs_nothing(folder, harm, reason, signed):
    path = folder / "train" / "2.npy"
    harm(path)
    if signed:
        sign(path.parent)
    dataset = TokenDataset(folder)
    dataset.rows(0, 6)  # the two shards before it are sound
    with pytest.raises(DataError, match=reason if signed else "differs from its checksum") as caught:
        dataset.rows(5, 8)
    assert str(path) in str(caught.value) and not (folder / "train" / "executed").exists()


def test_a_shard_that_is_missing_is_an_error_naming_it(folder):
    (folder / "train" / "2.npy").unlink()
    with pytest.raises(DataError, match="2.npy: cannot be opened .*No such file"):
        TokenDataset(folder).rows(5, 8)


def test_a_stranger_s_damaged_header_is_one_line(folder):
    """Whatever numpy and this Python raise of it."""
    if not (example := lab.SHARED.parent / "cases/strangers/header.npy").exists():
        pytest.skip("no such example here")
    shutil.copy(example, folder / "train" / "2.npy")
    sign(folder / "train")
    with pytest.raises(DataError, match="2.npy: cannot be opened"):
        TokenDataset(folder).rows(5, 8)


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


# ---- many shards, and a disk that fails for a moment -------------------------------------------------------------

MANY = """
import resource, sys, time
import numpy as np
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import data
from data import BatchLoader, TokenDataset
import torch

digests, sha256 = [], data.sha256
data.sha256 = lambda path: digests.append(path) or sha256(path)
dataset = TokenDataset(sys.argv[1])
seen = [dataset.rows(first, 2).copy() for first in range(0, 3 * len(dataset), 2)]  # three epochs
assert len(digests) == len(set(digests)) == len(dataset.index["shards"]), "each shard is hashed once"
np.save(sys.argv[2], np.concatenate(seen))
with BatchLoader(dataset, 0, 4, 2, 1, 2, torch.device("cpu")) as batches:
    for _ in range(200):
        batches.next(20)
    dataset.batch(7, 64)  # as the training thread does meanwhile
"""


def test_more_shards_than_a_process_may_open_files(tmp_path):
    """A map holds a descriptor: only those in use stay open; and none is hashed each time it is opened again."""
    rows = np.random.default_rng(0).integers(64, size=(1300, 3), dtype=np.uint16)
    write_split(tmp_path / "set" / "train", list(rows[:, None]))
    done = subprocess.run([sys.executable, "-c", MANY, tmp_path / "set", tmp_path / "seen.npy"], cwd=lab.ROOT, timeout=120,
                          capture_output=True, text=True, env={**os.environ, **lab.ENV})
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_array_equal(np.load(tmp_path / "seen.npy"), np.concatenate([rows] * 3))
    limited = ["-c", "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); "
                     "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"]
    done = subprocess.run([sys.executable, *limited, "shards.py", "verify", tmp_path / "set"], cwd=lab.ROOT, timeout=120,
                          capture_output=True, text=True, env={**os.environ, **lab.ENV})
    assert "1,300 rows" in done.stdout, done.stderr[-2000:]


def test_a_shard_that_changes_while_it_is_closed_is_hashed_again(folder, raw):
    dataset = TokenDataset(folder)
    dataset.open_shards = 1
    np.testing.assert_array_equal(dataset.rows(0, 16), raw)
    flipped_bit(folder / "train" / "0.npy")
    os.utime(folder / "train" / "0.npy", ns=(1, 1))  # however coarse the clock of the disk is
    with pytest.raises(DamagedShard, match="0.npy: differs"):
        dataset.rows(0, 16)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EACCES, errno.EMFILE], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["index.json", "2.npy"])
def test_a_disk_that_fails_for_a_moment_is_asked_again(folder, raw, monkeypatch, name, code):
    """And if it goes on failing, the error is one line that names the file."""
    failing, opened = [2], io.open

    def fail(file, *args, **options):
        if str(file).endswith(name) and failing[0]:
            failing[0] -= 1
            raise OSError(code, os.strerror(code), str(file))
        return opened(file, *args, **options)
    monkeypatch.setattr("runtime.files.PAUSES", (0.01, 0.01, 0.01))
    lab.open_by(fail, monkeypatch)
    np.testing.assert_array_equal(TokenDataset(folder).rows(0, 16), raw)
    assert failing == [0]
    failing[0] = 1000
    with pytest.raises(DataError) as caught:
        TokenDataset(folder).rows(0, 16)
    assert str(folder / "train" / name) in str(caught.value) and os.strerror(code) in str(caught.value)


def test_only_copies_to_cuda_are_not_waited_for():
    """To MPS such a copy may read memory that has been given to somebody else by then."""
    class Record(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            asked.append((getattr(function, "__name__", ""), kwargs or {}))
            return function(*args, **(kwargs or {}))
    asked = []
    with Record():
        moved = to_device(np.arange(6, dtype=np.uint16).reshape(2, 3), torch.device("meta"))
    assert moved.dtype == torch.int64 and moved.device.type == "meta"
    assert {"to"} <= {name for name, _ in asked} and not any(options.get("non_blocking") for _, options in asked)
    places = [path.name for path in [*lab.ROOT.glob("*.py"), *lab.ROOT.glob("*/*.py")] if path.parent.name != "tests"
              and "non_blocking" in path.read_text()]
    assert places == ["data.py"]


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
