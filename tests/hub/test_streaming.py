"""Datasets streamed from a Hub on loopback by the real client: order, window, faults, resume."""

import io
import json
import os
import shutil
import signal
import threading
import time

import lab
import numpy as np
import pyarrow as arrow
import pyarrow.parquet
import pytest
from fake_hub import Hub, once

SHARDS, ROWS = 6, 20
PREFETCH, KEEP = 1, 1


def parquet(rows: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    arrow.parquet.write_table(arrow.table({"input_ids": [row.tolist() for row in rows]}), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same rows as a local dataset: six shards' worth."""
    return lab.make_dataset(tmp_path_factory.mktemp("stream") / "local", rows=SHARDS * ROWS)


@pytest.fixture
def hub(local, tmp_path):
    rows = np.load(local / "train" / "shard-00000.npy")
    files = {f"data/train-{i:05d}-of-00006.parquet": parquet(rows[i * ROWS:(i + 1) * ROWS]) for i in range(SHARDS)}
    with Hub() as hub:
        hub.repos["datasets/lab/tiny"] = files
        hub.repos["models/lab/words"] = {"tokenizer.json": tiny_tokenizer()}
        yield hub


def tiny_tokenizer() -> bytes:
    from tokenizers import Tokenizer, models
    return Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0")).to_str().encode()


def config(tmp_path, local, run, **dataset):
    tree = lab.tiny_tree(local, tmp_path / "runs", run)
    tree["data"]["dataset"] = {"name": "lab/tiny", "cache_dir": str(tmp_path / "cache"), "prefetch_shards": PREFETCH,
                               "keep_shards": KEEP, "patience_minutes": 1} | dataset
    tree["data"]["tokenizer"] = {"name": "lab/words"}
    tree["checkpointing"]["learning_dynamics"] = None
    tree["evaluation"] = {"metrics": None}
    return lab.write_config(tmp_path / f"{run}.yaml", tree)


@pytest.fixture(scope="module")
def losses(local, tmp_path_factory):
    """The losses of an undisturbed run on local shards: 20 steps of 8 rows, past the end of the 120."""
    tmp_path = tmp_path_factory.mktemp("undisturbed")
    path = config(tmp_path, local, "local", name=str(local))
    lab.forked("train.py", path, ranks=2)
    return lab.metrics(tmp_path / "runs" / "local")


class Watch:
    """Counts the shards on disk while it lasts."""

    def __init__(self, cache):
        self.cache, self.most, self.stopped = cache, 0, threading.Event()

    def __enter__(self):
        self.thread = threading.Thread(target=self._count)
        self.thread.start()
        return self

    def _count(self):
        while not self.stopped.wait(0.01):
            found = [name for _, _, names in os.walk(self.cache) for name in names]  # a folder that goes is no error here
            self.most = max(self.most, sum(name.startswith("shard-") and name.endswith(".npy") for name in found))

    def __exit__(self, *_):
        self.stopped.set()
        self.thread.join()


def test_streamed_losses_are_the_local_ones_on_a_bounded_disk(hub, local, losses, tmp_path):
    hub.latency = 0.3
    hub.faults = [once("GET /datasets/lab/tiny/resolve", 503), once("train-00002", "truncate", 2)]
    path = config(tmp_path, local, "run")
    with Watch(tmp_path / "cache") as watch:
        lab.forked("train.py", path, ranks=2, env=hub.env(tmp_path / "hf"))
    assert lab.metrics(tmp_path / "runs" / "run") == losses
    assert 1 <= watch.most <= PREFETCH + KEEP + 1
    assert not list((tmp_path / "cache").glob("**/.staging*"))
    state = json.loads(next((tmp_path / "cache").glob("**/window.json")).read_text())
    assert state["revision"] == hub.revision("datasets/lab/tiny")


def test_a_hub_that_comes_back_is_waited_for(local, losses, tmp_path, hub):
    asked = threading.Event()
    hub.faults = [lambda line: asked.set() if "GET /datasets" in line and "train-00003" in line else None]
    process = lab.start("train.py", config(tmp_path, local, "run"), ranks=2, env=hub.env(tmp_path / "hf"))
    try:
        assert asked.wait(60)
        hub.__exit__()  # nothing listens there any more
        time.sleep(8)  # the run uses up its window and waits
        stuck = lab.metrics(tmp_path / "runs" / "run")
        time.sleep(2)
        assert lab.metrics(tmp_path / "runs" / "run") == stuck and 5 <= max(stuck) < 20
        with Hub(port=hub.port) as again:
            again.repos = hub.repos
            out, err = process.communicate(timeout=90)
    finally:
        lab.kill(process)
    assert process.returncode == 0, err[-2000:]
    assert "trying again" in out + err
    assert lab.metrics(tmp_path / "runs" / "run") == losses


def test_a_hub_gone_for_good_leaves_a_checkpoint_and_a_clear_error(local, losses, tmp_path, hub):
    hub.faults = [lambda line: 500 if "train-00003" in line else None]
    path = config(tmp_path, local, "run", patience_minutes=0.1)
    words = ("checkpointing.save_every_n_steps=7", "checkpointing.learning_dynamics.eval_data=null")  # a snapshot of those rows
    printed = lab.forked("train.py", path, *words, ranks=2, env=hub.env(tmp_path / "hf"), code=2, timeout=120)
    assert "gave up after 0.1 minutes" in printed and "train.py\", line" not in printed  # no traceback of ours
    last = max(lab.metrics(tmp_path / "runs" / "run"))
    assert (tmp_path / "runs" / "run" / "checkpoints" / f"step_{last}" / "manifest.json").exists()
    assert last == 7  # rows 56-63 need shard 3
    hub.faults = []
    lab.forked("train.py", path, *words, ranks=2, env=hub.env(tmp_path / "hf"))
    assert lab.metrics(tmp_path / "runs" / "run") == losses
    assert (tmp_path / "runs/run/checkpoints/step_7/learning_dynamics/train_gradients.pt").exists()


def test_a_signal_while_data_are_waited_for_ends_the_run_in_time(local, losses, tmp_path, hub):
    hub.faults = [lambda line: 503 if "train-00003" in line else None]
    path, run = config(tmp_path, local, "run"), tmp_path / "runs" / "run"
    process = lab.start("train.py", path, ranks=2, env=hub.env(tmp_path / "hf"))
    try:
        lab.wait_until(lambda: (run / "metrics.jsonl").exists() and max(lab.metrics(run), default=0) == 7, 60, 0.05)
        time.sleep(2)
        everyone, begun = lab.descendants(process.pid), time.monotonic()
        process.send_signal(signal.SIGTERM)
        lab.wait_until(lambda: not any(map(lab.alive, everyone)), timeout=25, pause=0.02)
        assert time.monotonic() - begun < 20
    finally:
        lab.kill(process)
        process.communicate()
    assert json.loads((run / "exit.json").read_text()) == {"code": 75, "reason": "stopped by SIGTERM", "step": 7}
    hub.faults = []
    assert "resumed at step 7" in lab.forked("train.py", path, ranks=2, env=hub.env(tmp_path / "hf"))
    assert lab.metrics(run) == losses


def test_a_deep_resume_fetches_its_shard_first_and_none_before(local, losses, tmp_path, hub):
    path = config(tmp_path, local, "run")
    lab.forked("train.py", path, "training.stop_at_step=13", env=hub.env(tmp_path / "hf"), ranks=2)  # 104 rows: in shard 5
    shutil.rmtree(tmp_path / "cache")
    hub.requests.clear()
    lab.forked("train.py", path, "training.stop_at_step=14", env=hub.env(tmp_path / "hf"), ranks=2)
    fetched = hub.fetched("lab/tiny")
    assert fetched[0] == "data/train-00005-of-00006.parquet"
    assert set(fetched) <= {"data/train-00005-of-00006.parquet", "data/train-00000-of-00006.parquet"}  # 0: next epoch
    assert {s: v for s, v in losses.items() if s <= 14} == lab.metrics(tmp_path / "runs" / "run")


def test_offline_makes_no_calls(local, losses, tmp_path, hub):
    path = config(tmp_path, local, "run", keep_shards=None)
    lab.forked("train.py", path, "training.stop_at_step=10", env=hub.env(tmp_path / "hf"))
    hub.requests.clear()
    offline = {**hub.env(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    lab.forked("train.py", path, "training.stop_at_step=10", "checkpointing.run_name=again", env=offline)
    assert lab.metrics(tmp_path / "runs" / "again") == lab.metrics(tmp_path / "runs" / "run")
    shard = next((tmp_path / "cache").glob("**/shard-00000.npy"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    printed = lab.forked("train.py", path, "checkpointing.run_name=damaged", env=offline, code=2)
    assert "shard-00000.npy: differs from its checksum" in printed and not (tmp_path / "runs/damaged").exists()
    shutil.rmtree(tmp_path / "cache")
    printed = lab.forked("train.py", path, "checkpointing.run_name=third", env=offline, code=2)
    assert "HF_HUB_OFFLINE" in printed and not hub.requests


@pytest.mark.parametrize("fault, words", [
    (lambda line: "lie" if "train-00001" in line else None, "checksum"),
    (lambda line: 404 if "train-00001" in line else None, "train-00001"),
])
def test_a_shard_that_cannot_be_had_is_named(local, tmp_path, hub, fault, words):
    hub.faults = [fault]
    path = config(tmp_path, local, "run", patience_minutes=0.05)
    printed = lab.forked("train.py", path, env=hub.env(tmp_path / "hf"), code=2, timeout=90)
    assert words in printed and "Traceback" not in printed


def test_files_of_unequal_length_are_an_error_not_a_shift(local, tmp_path, hub):
    short = parquet(np.zeros((7, 17), dtype=np.int64))
    hub.repos["datasets/lab/tiny"]["data/train-00002-of-00006.parquet"] = short
    printed = lab.forked("train.py", config(tmp_path, local, "run"), env=hub.env(tmp_path / "hf"), code=2)
    assert "train-00002" in printed and "7 rows" in printed


def test_a_dataset_that_is_not_there_is_one_line(local, tmp_path, hub):
    printed = lab.forked("train.py", config(tmp_path, local, "run", name="lab/none"), env=hub.env(tmp_path / "hf"), code=2)
    assert printed.count("error: ") == 1 and "data.dataset.name: lab/none: no such repository" in printed
    assert not (tmp_path / "runs").exists()


def test_download_and_show_agree_with_the_local_rows(local, tmp_path, hub):
    env, out = hub.env(tmp_path / "hf"), tmp_path / "mine"
    lab.forked("shards.py", "download", "lab/tiny", "--shards", "1:3", "--out", out, "--tokenizer", "lab/words",
            "--vocab-size", 64, env=env)
    rows = np.load(local / "train" / "shard-00000.npy")
    got = np.concatenate([np.load(path) for path in sorted((out / "train").glob("*.npy"))])
    np.testing.assert_array_equal(got, rows[ROWS:3 * ROWS])
    assert "40 rows" in lab.call("shards.py", "verify", out)
    printed = lab.call("shards.py", "show", out, "--step", 1, "--batch-size", 8, "--rank", 1, "--world", 2)
    shown = [line for line in printed.splitlines() if line.startswith("row ")]
    assert [int(line.split()[1].rstrip(",")) for line in shown] == [12, 13, 14, 15]
    assert " ".join(f"w{i}" for i in rows[ROWS + 12]) in shown[0]
