"""Datasets and tokenizers from the Hugging Face Hub: found, fetched with patience, checked, converted to shards."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from config import ConfigError, DatasetConfig, UserError
from data import INDEX, DataError, shard_entry, write_index
from hub.parquet import Converted, convert_parquet
from runtime import dist
from runtime.files import sha256

WINDOW = "window.json"  # of a streamed split: see stream.py
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between tries; doubled each time


class Source(NamedTuple):
    """The files of one split of a Hub dataset at one revision, in order."""
    name: str
    split: str
    revision: str
    files: list[str]


def tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def with_retries(action: Callable[[], Any], what: str, minutes: float, stop: threading.Event | None = None) -> Any:
    """The result of `action`; network trouble is tried again, with growing pauses, for `minutes`. Raises DataError.

    What trying again cannot fix (no such repository, no access) is raised at once.
    """
    from huggingface_hub import errors
    final = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError,
             errors.GatedRepoError, errors.OfflineModeIsEnabled, errors.HFValidationError)
    deadline, pause = time.monotonic() + 60 * minutes, FIRST_PAUSE
    while True:
        try:
            return action()
        except final as error:
            raise DataError(f"{what}: {first_line(error)}") from None
        except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:
            if time.monotonic() + pause > deadline:
                raise DataError(f"{what}: gave up after {minutes:g} minutes ({first_line(error)}); the run can be "
                                f"resumed when the Hub is back, or wait longer with data.dataset.patience_minutes") from None
            tell(f"{what}: {first_line(error)}; trying again in {pause:.0f} s")
        if stop is None:
            time.sleep(pause)
        elif stop.wait(pause):
            raise DataError(f"{what}: stopped")
        pause = min(2 * pause, LONGEST_PAUSE)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def find(name: str, split: str, cfg: DatasetConfig, revision: str | None = None) -> Source:
    """Resolve a Hub dataset, on rank 0, and tell the others. Raises ConfigError naming key and fix.

    A known `revision` whose file list is cached, and HF_HUB_OFFLINE=1, make no calls.
    """
    try:
        return dist.on_rank0(lambda: _find(name, split, cfg, revision or cfg.revision))
    except DataError as error:
        raise ConfigError(f"data.dataset.name: {name!r} is neither a local folder nor to be had from the Hub "
                          f"({error})") from None


def _find(name: str, split: str, cfg: DatasetConfig, revision: str | None) -> Source:
    from huggingface_hub import HfApi, constants
    home = Path(cfg.cache_dir) / name.replace("/", "--")
    known = sorted(home.glob(f"*/{split}/{WINDOW}"), key=lambda path: path.stat().st_mtime)
    for path in reversed(known):
        if constants.HF_HUB_OFFLINE or path.parent.parent.name == revision:
            return Source(name, split, path.parent.parent.name, json.loads(path.read_text())["files"])
    if constants.HF_HUB_OFFLINE:
        raise DataError(f"HF_HUB_OFFLINE is set, and {home} holds nothing of it")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise DataError("a dataset on the Hub is named owner/name; a local one is made by shards.py")
    info = with_retries(lambda: HfApi().dataset_info(name, revision=revision), f"contacting the Hub for {name}",
                        min(cfg.patience_minutes, 1.0))
    pattern = re.compile(rf"(?:.*/)?{re.escape(split)}-\d+-of-\d+\.parquet")
    files = sorted(s.rfilename for s in info.siblings if pattern.fullmatch(s.rfilename))
    if not files:
        raise DataError(f"the repository has no files {split}-NNNNN-of-NNNNN.parquet")
    return Source(name, split, info.sha, files)


def fetch(source: Source, number: int, target: Path, vocab_size: int, minutes: float,
          stop: threading.Event | None = None) -> Converted:
    """Download file `number`, verify its checksum, and convert it to the shard `target`."""
    from huggingface_hub import HfApi, hf_hub_download
    file, staging = source.files[number], target.with_name(f".fetch-{number:05d}{dist.node_suffix()}")
    what = f"{source.name}: {file}"

    def download() -> Path:
        info = HfApi().get_paths_info(source.name, [file], revision=source.revision, repo_type="dataset")[0]
        path = Path(hf_hub_download(source.name, file, repo_type="dataset", revision=source.revision, local_dir=staging))
        if path.stat().st_size != info.size or (info.lfs is not None and sha256(path) != info.lfs.sha256):
            shutil.rmtree(staging)
            raise OSError(f"what arrived differs from the Hub's size or checksum of {file}")
        return path

    try:
        staging.mkdir(parents=True, exist_ok=True)
        path = with_retries(download, what, minutes, stop)
        staged = staging / target.name
        made = convert_parquet(path, staged, vocab_size)
        os.replace(staged, target)
        return made
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def download(source: Source, numbers: range, out: Path, cfg: DatasetConfig, vocab_size: int) -> None:
    """Fetch shards `numbers` of a Hub dataset into the folder of its split, out/SPLIT, which appears when complete."""
    staged = out / f".staging-{source.split}{dist.node_suffix()}"
    staged.mkdir(parents=True, exist_ok=True)
    entries, lengths = [], set()
    try:
        for number in tqdm(numbers, desc=f"fetching {source.name}", unit=" shards", disable=None):
            path = staged / f"shard-{len(entries):05d}.npy"
            made = fetch(source, number, path, vocab_size, cfg.patience_minutes)
            lengths.add(made.row_length)
            entries.append(shard_entry(path, made.rows, made.sources))
        if len(lengths) > 1:
            raise DataError(f"{source.name}: its files have rows of different lengths, {sorted(lengths)}")
        write_index(staged, entries, lengths.pop(), vocab_size, source.name, source.revision, first_shard=numbers.start)
        try:
            os.rename(staged, out / source.split)
        except OSError:  # another machine, on the same disk, was faster
            if not (out / source.split / INDEX).exists():
                raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def local_or_hub(name: str, split: str, cfg: DatasetConfig, vocab_size: int) -> Path:
    """The folder of a dataset that is small enough to have whole: `name` itself, or the copy of it from the Hub.

    Every rank must call it. Raises UserError.
    """
    if is_local(name):
        return Path(name)
    source = find(name, split, cfg)
    folder = Path(cfg.cache_dir) / name.replace("/", "--") / source.revision
    dist.on_each_node(lambda: None if (folder / split / INDEX).exists() else
                      download(source, range(len(source.files)), folder, cfg, vocab_size))
    return folder


def is_local(name: str) -> bool:
    """Whether `name` is a path and not on the Hub. Every rank must call it. Raises ConfigError where only some have it."""
    there = dist.all_gather_object(Path(name).exists())
    if any(there) != all(there):
        raise ConfigError(f"{name}: is missing on ranks {[rank for rank, found in enumerate(there) if not found]}; "
                          f"put it on every machine")
    return there[0]


def fetch_tokenizer(name: str, folder: Path) -> None:
    """Put the tokenizer.json of `name`, a folder or a model on the Hub, into `folder`, unless it is there."""
    from huggingface_hub import hf_hub_download
    target, local = folder / "tokenizer.json", Path(name) / "tokenizer.json"

    def copy() -> None:
        if not target.exists():
            found = local if local.exists() else with_retries(lambda: hf_hub_download(name, "tokenizer.json"),
                                                              f"fetching the tokenizer {name}", 1.0)
            shutil.copy(found, target)
    try:
        dist.on_each_node(copy)
    except UserError as error:
        raise ConfigError(f"data.tokenizer.name: {name!r} cannot be had ({error}); name a folder or a "
                          f"model on the Hub with a tokenizer.json") from None
