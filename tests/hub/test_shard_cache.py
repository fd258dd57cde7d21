"""Two of everything at once on one cache folder, real processes against a small Hub: nothing lost, nothing half made."""

import io
import json
import os
import signal
import time

import numpy as np
import pyarrow as arrow
import pyarrow.parquet
import pytest

import lab
from config import DatasetConfig
from data import TokenDataset
from fake_hub import Hub
from hub import shard_cache
from hub.datasets import Source, make_fresh
from hub.parquet import Converted
from hub.shard_cache import ShardCache
from runtime.files import staging_name

FILES, ROWS, ROUNDS = 3, 8, 20
KINDS = "whole download tokenizer stream"
TWO = """
import sys, time
from pathlib import Path
import numpy as np
from config import DatasetConfig
from data import TokenDataset
from hub.tokenizers import JsonTokenizer
from hub import client, datasets, streaming
from hub.shard_cache import ShardCache
from runtime.files import staging_name
from runtime.command import command

client.FIRST_PAUSE = 0.02
kinds, me, folder, rounds = sys.argv[1].split(), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
expected = np.load(folder / "rows.npy")


def together(kind, number):
    (folder / f"{kind}-{number}-{me}").touch()
    while not (folder / f"{kind}-{number}-{1 - me}").exists():
        time.sleep(0.001)


def whole(cfg, out):
    split = TokenDataset(datasets.local_or_hub("lab/tiny", "train", cfg, 64), "train")
    return split.rows(0, len(split))


def download(cfg, out):
    source = datasets.find("lab/tiny", "train", cfg)
    datasets.download(source, range(len(source.files)), out / "mine", cfg, 64)
    split = TokenDataset(out / "mine")
    return split.rows(0, len(split))


def tokenizer(cfg, out):
    datasets.fetch_tokenizer("lab/words", out / "words", 1)
    assert JsonTokenizer(out / "words/tokenizer.json").vocab_size == 64
    return expected


def stream(cfg, out):
    # one from the front, one from the middle, each with a window of its own, over more than one epoch
    steps, first = 2 * len(expected) // 3, me * 4
    split = streaming.StreamedDataset(datasets.find("lab/tiny", "train", cfg), cfg, 64, 3, first)
    try:
        for step in range(first, first + steps):
            split.advance(step)
            got = split.batch(step, 3)
            assert (got == expected[np.arange(3 * step, 3 * step + 3) % len(expected)]).all(), step
    finally:
        split.close()
    return expected


def main():
    for kind, number in ((kind, number) for kind in kinds for number in range(rounds)):
        out = folder / f"{kind}-{number}"
        cfg = DatasetConfig(name="lab/tiny", cache_dir=str(out), prefetch_shards=1, keep_shards=me, patience_minutes=1)
        together(kind, number)
        assert (globals()[kind](cfg, out) == expected).all(), number


command(main)
"""


def table(rows):
    buffer = io.BytesIO()
    arrow.parquet.write_table(arrow.table({"input_ids": rows.tolist()}), buffer)
    return buffer.getvalue()


@pytest.fixture
def desk(tmp_path):
    """A folder with the script and the rows, and a Hub that is slow and fails now and then."""
    from tokenizers import Tokenizer, models
    rows = np.random.default_rng(0).integers(64, size=(FILES * ROWS - 2, 9))  # the last file is short
    np.save(tmp_path / "rows.npy", rows)
    (tmp_path / "two.py").write_text(TWO)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0")).to_str().encode()
    with Hub(latency=0.003) as hub:
        hub.retry_after = 0
        hub.repos["datasets/lab/tiny"] = {f"train-{i:05d}-of-00003.parquet": table(rows[i * ROWS:(i + 1) * ROWS])
                                          for i in range(FILES)}
        hub.repos["models/lab/words"] = {"tokenizer.json": words, "tokenizer_config.json": b"{}"}
        asked = iter(range(10 ** 9))
        hub.faults = [lambda line: {37: 503, 199: "drop", 303: "truncate"}.get(next(asked) % 400)]
        yield tmp_path, hub


def start(desk, kind, me, rounds=ROUNDS):
    folder, hub = desk
    return lab.start(folder / "two.py", kind, me, folder, rounds, env=hub.env(folder / f"hf{me}"))


def half_made(folder):
    return [path for path in folder.rglob("*") if ".staging" in path.name or path.name.startswith("window@")]


def test_two_at_once_twenty_times(desk):
    processes = [start(desk, KINDS, me) for me in (0, 1)]
    for process in processes:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, out[-2000:] + err[-3000:]
    assert half_made(desk[0]) == []
    for index in desk[0].glob("*/**/index.json"):
        split = TokenDataset(index.parent.parent, index.parent.name)
        assert (split.rows(0, len(split)) == np.load(desk[0] / "rows.npy")).all()


@pytest.mark.parametrize("kind", ["stream", "whole"])
def test_one_that_is_killed_in_the_middle_takes_nothing_with_it(desk, kind):
    folder, hub = desk
    killed, other = (start(desk, kind, me, rounds=2) for me in (0, 1))
    lab.wait_until(lambda: any("fetch" in path.name for path in folder.glob(f"{kind}-0/**/.staging*")), 60, 0.0005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    (folder / f"{kind}-1-0").touch()  # where the other waits for it
    out, err = other.communicate(timeout=100)
    assert other.returncode == 0, out[-2000:] + err[-3000:]
    for path in folder.glob(f"{kind}-*-1"):
        path.unlink()
    out, err = (again := start(desk, kind, 1, rounds=2)).communicate(timeout=100)
    assert again.returncode == 0, out[-2000:] + err[-3000:]
    assert half_made(folder) == []


def test_two_runs_that_stream_from_one_cache_lose_nothing(desk, tmp_path):
    """With windows of one shard each, and one of them a hundred steps behind."""
    folder, hub = desk
    hub.faults = []
    word_folder = folder / "words"
    word_folder.mkdir()
    (word_folder / "tokenizer.json").write_bytes(hub.repos["models/lab/words"]["tokenizer.json"])
    trees = {}
    for name, seed in (("a", 1), ("b", 2)):
        tree = trees[name] = lab.tiny_tree("lab/tiny", tmp_path / "runs", name)
        tree["data"]["dataset"] |= {"cache_dir": str(tmp_path / "cache"), "prefetch_shards": 0, "keep_shards": 0}
        tree["data"]["dataset"]["patience_minutes"] = 1
        tree["data"]["tokenizer"] = {"name": str(word_folder)}
        tree["data"]["dataloader"]["batch_size"] = 4
        tree["model"]["max_seq_len"], tree["training"]["seed"] = 8, seed
        tree["evaluation"], tree["checkpointing"]["learning_dynamics"] = {"metrics": None}, None
    paths = {name: lab.write_config(tmp_path / f"{name}.yaml", tree) for name, tree in trees.items()}
    processes = [lab.start("train.py", path, env=hub.env(tmp_path / f"hf-{name}")) for name, path in paths.items()]
    for process in processes:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, out[-2000:] + err[-3000:]
    for name, tree in trees.items():
        alone = {**tree, "checkpointing": {**tree["checkpointing"], "run_name": f"{name}-alone"}}
        lab.forked("train.py", lab.write_config(tmp_path / "alone.yaml", alone), env=hub.env(tmp_path / "hf"))
        assert lab.metrics(tmp_path / "runs" / name) == lab.metrics(tmp_path / "runs" / f"{name}-alone")
    assert half_made(tmp_path / "cache") == []


# ---- one process at a time -----------------------------------------------------------------------------------------

@pytest.fixture
def cache(tmp_path):
    found = ShardCache(Source("lab/tiny", "train", "r1", [f"{i}.parquet" for i in range(9)]), tmp_path / "train")
    yield found
    found.leave()


def publish(cache, number):
    staged = cache.folder / f"made-{number}.npy"
    np.save(staged, np.full((2, 3), number, np.uint16))
    cache.publish(number, staged, Converted(2, 3, None), 64)


def window_of(cache, process, seconds_ago=0.0, **told):
    path = cache.folder / f"window@{process}.json"
    path.write_text(json.dumps({"kept": [], "error": None} | told))
    then = time.time() - seconds_ago
    os.utime(path, (then, then))
    return path


def numbers(cache):
    return sorted(int(path.stem[6:]) for path in cache.folder.glob("shard-*.npy"))


def test_only_shards_that_no_live_process_has_use_for_are_deleted(cache):
    cache.join(kept=[])
    for number in range(6):
        publish(cache, number)
    window_of(cache, "elsewhere-1", kept=[1, 2])
    window_of(cache, "elsewhere-2", seconds_ago=shard_cache.LIVE_SECONDS + 60, kept=[3])  # long silent
    cache.keep_only([5])
    assert numbers(cache) == [1, 2, 5] and sorted(cache.entries()) == [1, 2, 5]
    window_of(cache, "elsewhere-1", kept=None)  # which keeps all
    cache.keep_only([])
    assert numbers(cache) == [1, 2, 5]


def test_signs_of_life_go_on_while_a_shard_is_fetched(cache, monkeypatch):
    monkeypatch.setattr(shard_cache, "BEAT_SECONDS", 0.02)
    cache.join(kept=[1])
    os.utime(cache.window, (1, 1))
    lab.wait_until(lambda: cache.window.stat().st_mtime > 1, 5)
    cache.window.unlink()  # by somebody who took this process for a dead one
    lab.wait_until(cache.window.exists, 5)
    cache.keep_only([])
    cache.leave()
    time.sleep(0.1)
    assert not cache.window.exists()


def test_what_the_dead_left_is_cleared_and_what_the_living_make_is_not(cache):
    cache.folder.mkdir()
    child = lab.start("sample.py", "--help")
    child.communicate()
    mine, host = shard_cache.process_name(), shard_cache.process_name().rpartition("-")[0]
    dead = [cache.folder / f".staging-fetch-00001@{host}-{child.pid}", cache.folder / f".staging-x@{host}-{child.pid}",
            window_of(cache, f"{host}-{child.pid}")]
    living = [cache.folder / f".staging-fetch-00002@{host}-{os.getppid()}", cache.folder / ".staging-fetch-00003@elsewhere-7",
              window_of(cache, "elsewhere-7")]
    for path in (dead[0], living[0], living[1]):
        path.mkdir()
        (path / "half.parquet").write_bytes(b"half")
    dead[1].write_text("half")
    old = cache.folder / ".staging-fetch-00004@elsewhere-8"
    old.mkdir()
    os.utime(old, (1, 1))
    cache.join(kept=[])
    assert not any(path.exists() for path in [*dead, old]) and all(path.exists() for path in living)
    assert mine in cache.window.name


@pytest.mark.parametrize("entry", [None, b"", b"{", b"[]", b"\xff", b'{"rows": 2}', b'{"rows": -1, "row_length": 3}',
                                   b'{"rows": 2, "row_length": 3, "dtype": "object", "sha256": "x"}'])
def test_a_shard_without_a_sound_entry_counts_as_missing(cache, entry):
    cache.join(kept=[])
    publish(cache, 0)
    path = cache.path(0).with_suffix(".json")
    path.unlink() if entry is None else path.write_bytes(entry)
    assert cache.entry(0) is None and cache.entries() == {}
    publish(cache, 0)
    assert cache.entry(0)["rows"] == 2


@pytest.mark.parametrize("window", [{"rows": {"x": 2}}, {"rows": [1]}, {"rows": {"0": "2"}, "row_length": 3}, {"sha256": 5}])
def test_a_window_of_somebody_else_s_is_not_believed(cache, window):
    cache.folder.mkdir()
    np.save(cache.path(0), np.zeros((2, 3), np.uint16))
    (cache.folder / "window.json").write_text(json.dumps(window))
    assert cache.entry(0) is None and cache.entries() == {}


def test_a_link_under_the_name_of_what_is_being_made_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/photo.png").write_bytes(b"")
    planted = tmp_path / "cache" / staging_name("fetch-00000")
    planted.parent.mkdir()
    planted.symlink_to(tmp_path / "elsewhere")
    make_fresh(planted)
    assert planted.is_dir() and not planted.is_symlink() and os.listdir(tmp_path / "elsewhere") == ["photo.png"]


def test_the_cache_of_an_earlier_version_is_read(tmp_path, cache):
    """window.json kept the counts and checksums; training goes on with the shards that it speaks of."""
    cache.folder.mkdir()
    np.save(cache.path(3), np.zeros((2, 3), np.uint16))
    np.save(cache.path(4), np.zeros((2, 3), np.uint16))
    (cache.folder / "window.json").write_text(json.dumps({
        "source": "lab/tiny", "revision": "r1", "files": cache.source.files, "row_length": 3, "rows": {"3": 2, "4": 2, "8": 1},
        "sha256": {"3": "d3", "8": "d8"}}))
    cache.join(kept=[])
    assert cache.entry(3) == {"rows": 2, "row_length": 3, "sha256": "d3"}
    assert cache.entry(4) == {"rows": 2, "row_length": 3} and cache.entry(8) is None
    assert {number: entry["rows"] for number, entry in cache.entries().items()} == {3: 2, 4: 2, 8: 1}
    publish(cache, 5)
    assert sorted(cache.entries()) == [3, 4, 5, 8]
    assert DatasetConfig().cache_dir == "corpora/hub"
