"""Datasets on the Hub, streamed: shards arrive ahead of the training and leave behind it, so the disk holds a window.

Any dataset repository in the layout of pico-lm/pretokenized-dolma works: SPLIT-00000-of-00010.parquet ... with a column
input_ids. The revision is pinned at first contact. On each machine one rank fetches in a thread, converts each file to a
shard (data.py) and publishes it (shard_cache.py); the other ranks wait for the file, or for the fetcher's error.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from config import ConfigError, DataConfig, DatasetConfig, ModelConfig, TokenizerConfig
from data import DamagedShard, DataError, TokenDataset, token_dtype
from hub.datasets import Source, exists, fetch, fetch_tokenizer, find, locate, naming, tokenizer_home
from hub.parquet import Converted
from hub.shard_cache import ShardCache
from hub.tokenizers import ByteTokenizer, load_tokenizer
from runtime import dist, machine
from runtime.files import explain, host_name, process_name, staging_name
from runtime.log import log, node_log

DAMAGED = ".damaged"  # in place of .npy: a shard that a rank found so, for the fetcher to see
POLL_SECONDS = 0.05
TOLD_SECONDS = 5.0  # before it is said what is waited for; again after twice as long each time


# ---- the window ----------------------------------------------------------------------------------------------

class Fetcher(threading.Thread):
    """Keeps shards [base - keep, base + ahead] of a source on disk; `want` moves the window."""

    def __init__(self, cache: ShardCache, cfg: DatasetConfig, vocab_size: int, base: int, last: int, seen: dict[int, int]):
        super().__init__(daemon=True)
        self.cache, self.cfg, self.vocab_size = cache, cfg, vocab_size
        entries = cache.entries()
        self.rows = {number: entry["rows"] for number, entry in entries.items()} | seen  # of the shards seen so far
        self.row_length = next((entry["row_length"] for entry in entries.values()), None)
        self.error: str | None = None
        self._base, self._last = base, last
        self._moved, self._stopping = threading.Event(), threading.Event()
        self._told = self._kept()
        cache.join(self._told)

    def want(self, base: int, last: int) -> None:
        """Training is at shard `base` now and needs all up to `last`."""
        if (base, last) != (self._base, self._last):
            self._base, self._last = base, last
            self._moved.set()

    def stop(self) -> None:
        self._stopping.set()
        self._moved.set()
        self.cache.leave()
        self.join(timeout=10)

    def run(self) -> None:
        failed = False
        while not self._stopping.is_set():
            try:
                self._turn()
                failed = False
            except Exception as error:
                of_the_disk, reason = isinstance(error, OSError), explain(error, self.cache.folder, 0) or type(error).__name__
                if (of_the_disk or isinstance(error.__context__, OSError)) and not failed and not self._stopping.wait(1.0):
                    node_log.warning(f"{reason}; trying again")
                    failed = True
                elif not self._stopping.is_set():  # the ranks raise it when they miss the shard
                    self.error = f"{reason}; look after the disk, and start again" if of_the_disk else reason
                    with contextlib.suppress(OSError):
                        self.cache.tell(error=self.error)
                    return

    def _turn(self) -> None:
        """Show and clear the window; fetch one shard that is missing in it, or wait until it moves."""
        kept = self._kept()
        if kept != self._told:
            self.cache.tell(kept=kept)
            self._told = kept
        if kept is not None:
            self.cache.keep_only(kept)
        number = next((number for number in self._window() if self.cache.entry(number) is None), None)
        if number is None:
            self._moved.wait(1.0)
            self._moved.clear()
        else:
            self._publish(number)

    def _window(self, behind: int = 0) -> list[int]:
        end = max(self._base + self.cfg.prefetch_shards, self._last)
        return [number % len(self.cache.source.files) for number in range(self._base - behind, end + 1)]

    def _kept(self) -> list[int] | None:
        """The shards that may not be deleted; None: all."""
        return None if self.cfg.keep_shards is None else self._window(self.cfg.keep_shards)

    def _publish(self, number: int) -> None:
        source, path = self.cache.source, self.cache.path(number)
        staged = path.with_name(staging_name(path.name))
        if path.with_suffix(DAMAGED).exists():
            node_log.warning(f"{path}: differs from its checksum: damaged; fetching it again")
            path.with_suffix(DAMAGED).unlink(missing_ok=True)
        try:
            made = fetch(source, number, staged, self.vocab_size, self.cfg.patience_minutes, self._stopping)
            self._check(number, made)
            self.rows[number], self.row_length = made.rows, made.row_length
            self.cache.publish(number, staged, made, self.vocab_size)
        finally:
            staged.unlink(missing_ok=True)

    def _check(self, number: int, made: Converted) -> None:
        last = len(self.cache.source.files) - 1
        what = f"{self.cache.source.name}: {self.cache.source.files[number]}"
        if self.row_length not in (None, made.row_length):
            raise DataError(f"{what} has rows of {made.row_length} ids, the shards before it of {self.row_length}")
        counted_on = self.rows.get(number, usual_rows(self.rows, last) or made.rows)
        if made.rows != counted_on and not (number == last and number not in self.rows):  # the last may be short
            raise DataError(f"{what} has {made.rows} rows where {counted_on} were counted on: the order of the data would shift "
                            f"unseen; use shards.py download for files of unequal length")


def usual_rows(seen: dict[int, int], last: int) -> int | None:
    """The rows of every shard but the last, which may be shorter; None where only that one is known."""
    return next((rows for number, rows in seen.items() if number != last), None)


class StreamedDataset(TokenDataset):
    """A Hub dataset as a TokenDataset. Row counts of shards not yet seen are taken to be the first one's.

    `seen` is what a checkpoint recorded of them; `step` is where training goes on. Use `advance` as it does.
    """
    open_shards = 2  # a map of a shard that has left the window would still hold its blocks

    def __init__(self, source: Source, cfg: DatasetConfig, vocab_size: int, batch_size: int, step: int = 0,
                 seen: dict[int, int] | None = None, first_row: int = 0):
        self.source, self.cfg, self.batch_size, self.first_row = source, cfg, batch_size, first_row
        self.cache = ShardCache(source, source.home(cfg) / source.split)
        self.seen = dict(seen or {})
        self.fetcher: Fetcher | None = None
        self._closed = False
        self._fetched_again: set[int] = set()
        super().__init__(source.home(cfg), source.split, {
            "source": source.name, "revision": source.revision, "vocab_size": vocab_size, "dtype": token_dtype(vocab_size).name,
            "row_length": 0, "shards": [{"file": self.cache.path(n).name, "rows": 0} for n in range(len(source.files))]})
        if self.seen:
            self._learn_rows()
        base, last = self._window(step) if self.seen else (0, 0)
        if dist.local_rank() == 0:
            self.fetcher = Fetcher(self.cache, cfg, vocab_size, base, last, dict(self.seen))
        processes = dist.all_gather_object((host_name(), dist.local_rank(), process_name()))  # no rank may find an old window
        self._fetching = next(name for host, local, name in processes if host == host_name() and local == 0)
        if self.fetcher is not None:
            self.fetcher.start()
        self.index["row_length"] = self._await(base)["row_length"]
        self._learn_rows()
        self.advance(step)

    @property
    def fingerprint(self) -> str:
        return f"{self.source.name}@{self.source.revision}" + (f"#{self.source.subset}" if self.source.subset else "")

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
            self._learn_rows()
        return super().rows(first, count)

    def shard(self, number: int) -> np.ndarray:
        while number not in self._maps:
            entry = self._await(number)
            self.index["shards"][number] |= {key: entry[key] for key in ("dtype", "sha256") if key in entry}
            try:
                return super().shard(number)
            except DataError as error:
                if not self._comes_again(number, error):
                    raise
        return super().shard(number)

    def _comes_again(self, number: int, error: DataError) -> bool:
        """Whether a shard that could not be opened will be fetched again; a damaged one is, once."""
        from huggingface_hub import constants
        if self.cache.entry(number) is None:
            return True  # another run has let go of it
        if not isinstance(error, DamagedShard) or number in self._fetched_again or constants.HF_HUB_OFFLINE:
            return False
        self._fetched_again.add(number)
        with contextlib.suppress(FileNotFoundError):  # another rank was faster
            os.replace(self.cache.path(number), self.cache.path(number).with_suffix(DAMAGED))
        return True

    def _window(self, step: int) -> tuple[int, int]:
        """(shard of the first row of batch `step`, shard of its last), the second counted on past the end."""
        first, total = self.first_row + step * self.batch_size, int(self.starts[-1])
        base = int(np.searchsorted(self.starts, first % total, side="right")) - 1
        end = first % total + self.batch_size - 1
        last = int(np.searchsorted(self.starts, end % total, side="right")) - 1 + end // total * len(self.source.files)
        return base, last

    def _learn_rows(self) -> None:
        """Lay the rows out by the counts seen; the first shard's stands for the others."""
        self.seen |= {number: entry["rows"] for number, entry in self.cache.entries().items()}
        usual = usual_rows(self.seen, len(self.source.files) - 1) or next(iter(self.seen.values()))
        for number, entry in enumerate(self.index["shards"]):
            entry["rows"] = self.seen.get(number, usual)
        self.lay_out()

    def _await(self, number: int) -> dict[str, Any]:
        """The entry of shard `number`, once it is there. Raises the fetcher's error if that comes first."""
        begun, told = time.monotonic(), TOLD_SECONDS
        while (entry := self.cache.entry(number)) is None:
            error = self.fetcher.error if self.fetcher is not None else self.cache.error_of(self._fetching)
            if error:
                raise DataError(error)
            if self._closed:
                raise DataError(f"{self.source.name}: closed while waiting for shard {number}")
            if time.monotonic() - begun > told:
                node_log.info(f"waiting for shard {number} of {self.source.name}, {told:.0f} s so far")
                told *= 2
            time.sleep(POLL_SECONDS)
        return entry


# ---- what a run opens ------------------------------------------------------------------------------------------

def open_rows(cfg: DatasetConfig, vocab_size: int, batch_size: int, step: int = 0,
              saved: dict[str, Any] | None = None, first_row: int = 0) -> TokenDataset:
    """The train split of cfg.name, a folder or a Hub dataset, which is streamed. Every rank must call it. Raises UserError."""
    folder = locate(cfg.name)
    if folder is not None:
        dataset = TokenDataset(folder)
        dataset.first_row = first_row
        return dataset
    source = find(cfg.name, "train", cfg, saved["revision"] if saved else None)
    return StreamedDataset(source, cfg, vocab_size, batch_size, step, saved["seen"] if saved else None, first_row)


def open_dataset(data: DataConfig, model: ModelConfig, step: int, saved: dict[str, Any] | None) -> TokenDataset:
    """The training rows of `data` with their tokenizer; `saved` is a checkpoint's dataset.state.

    Every rank must call it. Raises UserError where the rows do not fit the model or are not those of the checkpoint.
    """
    with naming("data.dataset.name"):
        loader = data.dataloader
        dataset = open_rows(data.dataset, model.vocab_size, loader.batch_size, step, saved, loader.first_row)
    if dataset.row_length != model.max_seq_len + 1:
        raise ConfigError(f"model.max_seq_len: {model.max_seq_len} needs rows of {model.max_seq_len + 1} tokens, but "
                          f"{dataset.folder} has {dataset.row_length}; use model.max_seq_len={dataset.row_length - 1}")
    if dataset.vocab_size > model.vocab_size:
        raise ConfigError(f"model.vocab_size: {model.vocab_size} is below the {dataset.vocab_size} of {dataset.folder}; "
                          f"use model.vocab_size={dataset.vocab_size}")
    some = min(len(dataset), 1 if isinstance(dataset, StreamedDataset) else 64)
    # fails on a bad shard before anything is written
    first = dataset.rows(dataset.first_row + step * data.dataloader.batch_size, some)
    machine.same_data("data.dataset.name", dataset.folder, dataset.fingerprint)
    if saved and saved["fingerprint"] != dataset.fingerprint:
        raise ConfigError(f"data.dataset.name: {data.dataset.name} holds other tokens than the checkpoint was trained on; put "
                          f"the old ones back, or choose another checkpointing.run_name")
    dataset.tokenizer_folder = find_tokenizer(dataset, data.tokenizer, data.dataset, int(first.max()))
    return dataset


def find_tokenizer(dataset: TokenDataset, cfg: TokenizerConfig, cache: DatasetConfig, largest: int) -> Path:
    """The folder of the tokenizer of rows that hold ids up to `largest`; bytes are a folder without one.

    It is the dataset's own, or data.tokenizer.name's, which is kept below the cache and never put beside the data. Every
    rank must call it. Raises ConfigError for one that cannot have made the rows.
    """
    own, streamed = dataset.folder.parent, isinstance(dataset, StreamedDataset)
    if not streamed and (dataset.vocab_size <= ByteTokenizer.vocab_size or exists(own / "tokenizer.json")):
        folder, name = own, f"{own / 'tokenizer.json'}"
    else:
        with naming("data.tokenizer.name"):
            folder, name = locate(cfg.name, owner=False), cfg.name
            if folder is None:
                folder = tokenizer_home(cfg.name, cache)
                dist.on_each_node(lambda: fetch_tokenizer(cfg.name, folder, cache.patience_minutes))
            folder = folder if folder.is_dir() else folder.parent
    count = load_tokenizer(folder).vocab_size
    guessed = folder != own and not streamed and cfg.name == TokenizerConfig.name
    if largest >= count or (folder != own and count > dataset.vocab_size) or (guessed and count < dataset.vocab_size / 2):
        raise ConfigError(f"data.tokenizer.name: {name} has {count:,} ids and cannot have made {dataset.folder}, with ids up to "
                          f"{largest:,} of {dataset.vocab_size:,}; put the tokenizer.json that did beside the data, or name it "
                          f"with data.tokenizer.name=FOLDER")
    if folder != own:
        log.info(f"{dataset.source.name if streamed else own} has no tokenizer.json of its own; taking data.tokenizer.name, "
                 f"{name} ({count:,} ids)")
    return folder
