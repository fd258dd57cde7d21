"""Datasets on the Hub, streamed: shards arrive ahead of the training and leave behind it, so the disk holds a window.

Any dataset repository in the layout of pico-lm/pretokenized-dolma works: SPLIT-00000-of-00010.parquet ... with a column
input_ids. The revision is pinned at first contact. On each node one rank fetches in a thread, converts each file to a
shard (data.py) and publishes it by renaming; the other ranks wait for the file, or for the fetcher's error.

    CACHE/NAME/REVISION/SPLIT/shard-00005.npy     the window
    CACHE/NAME/REVISION/SPLIT/window.json         {files, row_length, rows: {number: count}, sha256: {number: digest}}
    CACHE/NAME/REVISION/SPLIT/error.txt           why the fetcher gave up
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from config import ConfigError, DataConfig, DatasetConfig, ModelConfig
from data import ByteTokenizer, DataError, TokenDataset, token_dtype
from hub.datasets import WINDOW, Source, fetch, fetch_tokenizer, find, is_local, tell
from runtime import dist
from runtime.files import sha256, write_text

ERROR = "error.txt"
POLL_SECONDS = 0.05


# ---- the window ----------------------------------------------------------------------------------------------

class Fetcher(threading.Thread):
    """Keeps shards [base - keep, base + ahead] of a source on disk; `want` moves the window."""

    def __init__(self, source: Source, folder: Path, cfg: DatasetConfig, vocab_size: int, base: int, last: int,
                 rows: dict[int, int]):
        super().__init__(daemon=True)
        self.source, self.folder, self.cfg, self.vocab_size = source, folder, cfg, vocab_size
        self.rows = rows  # of the shards seen so far
        self.row_length: int | None = None
        self.digests: dict[int, str] = {}
        self._base, self._last = base, last
        self._moved, self._stopping = threading.Event(), threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ERROR).unlink(missing_ok=True)
        self._read_window()
        self._write_window()

    def want(self, base: int, last: int) -> None:
        """Training is at shard `base` now and needs all up to `last`."""
        if (base, last) != (self._base, self._last):
            self._base, self._last = base, last
            self._moved.set()

    def stop(self) -> None:
        self._stopping.set()
        self._moved.set()
        self.join(timeout=10)

    def run(self) -> None:
        try:
            while not self._stopping.is_set():
                number = self._next_missing()
                if number is None:
                    self._moved.wait(1.0)
                    self._moved.clear()
                else:
                    self._publish(number)
        except Exception as error:  # the ranks raise it when they miss the shard
            if not self._stopping.is_set():
                write_text(self.folder / ERROR, f"{error}\n")

    def _next_missing(self) -> int | None:
        count = len(self.source.files)
        end = max(self._base + self.cfg.prefetch_shards, self._last)
        window = [number % count for number in range(self._base, end + 1)]
        if self.cfg.keep_shards is not None:
            kept = {number % count for number in range(self._base - self.cfg.keep_shards, end + 1)}
            for path in self.folder.glob("shard-*.npy"):
                if int(path.stem[6:]) not in kept:
                    path.unlink(missing_ok=True)
        return next((n for n in window if not shard_path(self.folder, n).exists()), None)

    def _publish(self, number: int) -> None:
        target, first = shard_path(self.folder, number), next(iter(self.rows.values()), None)
        staged = target.with_suffix(f".new{dist.node_suffix()}")
        rows, row_length, _ = fetch(self.source, number, staged, self.vocab_size, self.cfg.patience_minutes, self._stopping)
        what = f"{self.source.name}: {self.source.files[number]}"
        if self.row_length not in (None, row_length):
            raise DataError(f"{what} has rows of {row_length} ids, the shards before it of {self.row_length}")
        short_last = number == len(self.source.files) - 1 and number not in self.rows
        if rows != self.rows.get(number, first or rows) and not short_last:
            raise DataError(f"{what} has {rows} rows where {self.rows.get(number, first)} were counted on: the order of the "
                            f"data would shift unseen; use shards.py download for files of unequal length")
        self.rows[number], self.row_length, self.digests[number] = rows, row_length, sha256(staged)
        self._write_window()  # before the shard appears: who finds the shard finds its row count and checksum
        os.replace(staged, target)

    def _read_window(self) -> None:
        path = self.folder / WINDOW
        if path.exists():
            window = json.loads(path.read_text())
            self.row_length = window["row_length"]
            self.rows |= {int(n): rows for n, rows in window["rows"].items()}
            self.digests = {int(n): digest for n, digest in window.get("sha256", {}).items()}

    def _write_window(self) -> None:
        window = {"source": self.source.name, "revision": self.source.revision, "files": self.source.files,
                  "row_length": self.row_length, "rows": self.rows, "sha256": self.digests}
        write_text(self.folder / WINDOW, json.dumps(window) + "\n")


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.npy"


class StreamedDataset(TokenDataset):
    """A Hub dataset as a TokenDataset. Row counts of shards not yet seen are taken to be the first one's.

    `seen` is what a checkpoint recorded of them; `step` is where training goes on. Use `advance` as it does.
    """

    def __init__(self, source: Source, cfg: DatasetConfig, vocab_size: int, batch_size: int, step: int = 0,
                 seen: dict[int, int] | None = None):
        self.source, self.cfg, self.batch_size = source, cfg, batch_size
        self.folder = Path(cfg.cache_dir) / source.name.replace("/", "--") / source.revision / source.split
        self.vocab_size, self._maps = vocab_size, {}
        self.seen = dict(seen or {})
        self.fetcher: Fetcher | None = None
        self._closed = False
        self.index = {"source": source.name, "revision": source.revision, "dtype": token_dtype(vocab_size).name,
                      "shards": [{"file": shard_path(self.folder, n).name, "rows": 0} for n in range(len(source.files))]}
        if self.seen:
            self._set_starts()
        base, last = self._window(step) if self.seen else (0, 0)
        if dist.local_rank() == 0:
            self.fetcher = Fetcher(source, self.folder, cfg, vocab_size, base, last, dict(self.seen))
            self.fetcher.start()
        dist.barrier()  # no rank may find an old error or window
        self._await(base)
        self._set_starts()
        self.row_length = self.index["row_length"] = self._window_file()["row_length"]
        self.advance(step)

    @property
    def fingerprint(self) -> str:
        return f"{self.source.name}@{self.source.revision}"

    @property
    def state(self) -> dict[str, Any]:
        return {**super().state, "seen": self.seen}

    def advance(self, step: int) -> None:
        """Training is about to take batch `step`: shards behind it may go."""
        if self.fetcher is not None:
            self.fetcher.want(*self._window(step))

    def close(self) -> None:
        self._closed = True
        if self.fetcher is not None:
            self.fetcher.stop()

    def rows(self, first: int, count: int) -> np.ndarray:
        last = len(self.source.files) - 1
        if last not in self.seen and first + count > self.starts[-2]:  # the length of an epoch matters from here on
            self._await(last)
            self._set_starts()
        return super().rows(first, count)

    def shard(self, number: int) -> np.ndarray:
        if number not in self._maps:
            self._await(number)
            self._maps = {n: m for n, m in self._maps.items() if n == number - 1}  # let go of files that left the window
            if digest := self._window_file().get("sha256", {}).get(str(number)):
                self.index["shards"][number]["sha256"] = digest
        return super().shard(number)

    def _window(self, step: int) -> tuple[int, int]:
        """(shard of the first row of batch `step`, shard of its last), the second counted on past the end."""
        first, total = step * self.batch_size, int(self.starts[-1])
        base = int(np.searchsorted(self.starts, first % total, side="right")) - 1
        end = first % total + self.batch_size - 1
        last = int(np.searchsorted(self.starts, end % total, side="right")) - 1 + end // total * len(self.source.files)
        return base, last

    def _set_starts(self) -> None:
        """Lay the rows out by the counts seen; the first shard's stands for the others."""
        self.seen |= {int(n): rows for n, rows in self._window_file().get("rows", {}).items()}
        usual = self.seen.get(0) or next(iter(self.seen.values()))
        for number, entry in enumerate(self.index["shards"]):
            entry["rows"] = self.seen.get(number, usual)
        self.starts = np.cumsum([0] + [entry["rows"] for entry in self.index["shards"]])

    def _window_file(self) -> dict[str, Any]:
        path = self.folder / WINDOW
        return json.loads(path.read_text()) if path.exists() else {}

    def _await(self, number: int) -> None:
        """Until shard `number` is there. Raises the fetcher's error if that comes first."""
        begun = told = time.monotonic()
        path = shard_path(self.folder, number)
        while not path.exists():
            error = self.folder / ERROR
            if error.exists():
                raise DataError(error.read_text().strip())
            if self._closed:
                raise DataError(f"{self.source.name}: closed while waiting for shard {number}")
            if time.monotonic() - told > 10 and dist.local_rank() == 0:
                told = time.monotonic()
                tell(f"waiting for shard {number} of {self.source.name}, {told - begun:.0f} s so far")
            time.sleep(POLL_SECONDS)


# ---- what a run opens ------------------------------------------------------------------------------------------

def open_dataset(data: DataConfig, model: ModelConfig, step: int, saved: dict[str, Any] | None) -> TokenDataset:
    """The training rows of `data`, from a local folder or the Hub; `saved` is a checkpoint's dataset.state.

    Every rank must call it. Raises UserError where the rows do not fit the model or are not those of the checkpoint.
    """
    d, m = data.dataset, model
    if is_local(d.name):
        dataset = TokenDataset(d.name)
        if dataset.vocab_size > ByteTokenizer.vocab_size:  # not bytes: text could not be shown, nor the model exported
            fetch_tokenizer(data.tokenizer.name, Path(d.name))
    else:
        source = find(d.name, "train", d, saved["revision"] if saved else None)
        dataset = StreamedDataset(source, d, m.vocab_size, data.dataloader.batch_size, step,
                                  saved["seen"] if saved else None)
        fetch_tokenizer(data.tokenizer.name, dataset.folder.parent)
    if dataset.row_length != m.max_seq_len + 1:
        raise ConfigError(f"model.max_seq_len: {m.max_seq_len} needs rows of {m.max_seq_len + 1} tokens, but "
                          f"{dataset.folder} has {dataset.row_length}; use model.max_seq_len={dataset.row_length - 1}")
    if dataset.vocab_size > m.vocab_size:
        raise ConfigError(f"model.vocab_size: {m.vocab_size} is below the {dataset.vocab_size} of {dataset.folder}; "
                          f"use model.vocab_size={dataset.vocab_size}")
    dataset.rows(step * data.dataloader.batch_size, 1)  # fails on a bad shard before anything is written
    if saved and saved["fingerprint"] != dataset.fingerprint:
        raise ConfigError(f"data.dataset.name: {d.name} holds other tokens than the checkpoint was trained on; put the "
                          f"old ones back, or choose another checkpointing.run_name")
    return dataset
