"""Where data come from: a folder here, or the Hugging Face Hub; and what is fetched from there, checked and converted."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from config import ConfigError, DatasetConfig, UserError
from data import INDEX, DataError, read_index, shard_entry, write_index
from hub.client import HubError, Refused, fetch_folder, with_retries
from hub.parquet import SPLITS, Converted, complete_sources, convert_parquet, split_of
from runtime import dist
from runtime.files import (STAGING, fsync_folder, host_name, make_folders, read_object, remove_tree, sha256, staging_name,
                           try_again, write_file)
from runtime.locks import alive
from runtime.log import node_log, printable

WINDOW = "window.json"  # of a streamed split: see streaming.py
HERE, EARLIER = "corpora", "data"  # the folder of datasets, and its name in earlier versions
PROJECT = Path(__file__).resolve().parents[1]
LEFTOVER_SECONDS = 86400.0  # after which what another machine left half made is nobody's
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "tokenizer.json")


def exists(path: Path) -> bool:
    """Whether it is there; a disk that fails for a moment is asked again. Raises UserError."""
    return try_again(path.exists, path)


# ---- here, or on the Hub -------------------------------------------------------------------------------------

def find_local(name: str, owner: bool = True) -> Path | None:
    """The file or folder that `name` means here; None for a name on the Hub, which has an owner unless `owner` is False.

    Raises DataError for what is neither, with the name that was probably meant.
    """
    path = Path(name)
    if exists(path):
        return path
    first, rest = (path.parts or ("",))[0], path.parts[1:]
    for place in [PROJECT / path, *([Path(EARLIER, *rest), PROJECT / EARLIER / Path(*rest)] if first == HERE else [])]:
        if rest and exists(place):
            node_log.info(f"{name}: is not here; taking {place}")
            return place
    near, folders = _nearest(path), (HERE, EARLIER)
    mistyped = near and difflib.get_close_matches(first, folders, cutoff=0.8)
    if (re.fullmatch(r"[\w.-]+/[\w.-]+" if owner else r"([\w.-]+/)?[\w.-]+", name)
            and not (first in folders or Path(first).is_dir() or mistyped)):
        return None
    raise DataError(f"{name!r} is neither here nor a name on the Hub, owner/name"
                    + (f"; did you mean {near}?" if near else "; a dataset is made by shards.py"))


def _nearest(path: Path) -> str | None:
    """What is here under nearly the same name."""
    known = []
    for folder in {path.parent, Path(HERE), Path(EARLIER)}:
        with contextlib.suppress(OSError):
            known += [place.as_posix() for place in sorted(folder.iterdir()) if not place.name.startswith(".")]
    by_name = {Path(place).name: place for place in known}
    return next(iter(difflib.get_close_matches(path.as_posix(), known, 1, cutoff=0.85)
                     or map(by_name.get, difflib.get_close_matches(path.name, by_name, 1, cutoff=0.75))), None)


def locate(name: str, owner: bool = True) -> Path | None:
    """find_local, agreed on by all ranks, each of which must call it. Raises UserError where only some have it."""
    answer: Path | UserError | None
    try:
        answer = find_local(name, owner)
    except UserError as error:
        answer = error
    answers = dist.all_gather_object(answer)
    missing = [rank for rank, theirs in enumerate(answers) if not isinstance(theirs, Path)]
    if 0 < len(missing) < len(answers):
        raise DataError(f"{name}: is missing on ranks {missing}; put it on every machine")
    if isinstance(answer, UserError):
        raise answer
    return answer


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """What is wrong inside is told as wrong with the option `key`."""
    try:
        yield
    except UserError as error:
        raise ConfigError(f"{key}: {error}") from None


# ---- datasets on the Hub -----------------------------------------------------------------------------------------

class Source(NamedTuple):
    """The files of one split of a Hub dataset at one revision, in order."""
    name: str
    split: str
    revision: str
    files: list[str]
    subset: str | None = None

    def home(self, cfg: DatasetConfig) -> Path:
        """The folder of its splits on this machine."""
        return home_of(self.name, self.subset, cfg) / self.revision


def home_of(name: str, subset: str | None, cfg: DatasetConfig) -> Path:
    """The folder of a Hub dataset's revisions on this machine."""
    return cache_folder(cfg) / (name if subset is None else f"{name}/{subset}").replace("/", "--")


def cache_folder(cfg: DatasetConfig) -> Path:
    """Where shards from the Hub are kept; where an earlier version kept them, if they are there only."""
    path = Path(cfg.cache_dir)
    earlier = Path(EARLIER, *path.parts[1:])
    return earlier if path.parts[:1] == (HERE,) and exists(earlier) and not exists(path) else path


def find(name: str, split: str, cfg: DatasetConfig, revision: str | None = None) -> Source:
    """Resolve a Hub dataset, on rank 0, and tell the others. Raises DataError with reason and fix.

    A known `revision` whose file list is cached, and HF_HUB_OFFLINE=1, make no calls.
    """
    def ask() -> Source:
        try:
            own = name == cfg.name  # else its options are not about it
            return _find(name, split, cfg, revision or (cfg.revision if own else None), cfg.subset if own else None)
        except Refused as error:
            raise DataError(f"{error}; or did you mean {near}, here?") if (near := _nearest(Path(name))) else error from None
    return dist.on_rank0(ask)


def _find(name: str, split: str, cfg: DatasetConfig, revision: str | None, subset: str | None) -> Source:
    from huggingface_hub import HfApi, constants
    home = home_of(name, subset, cfg)
    paths = sorted((path for kind in (WINDOW, INDEX) for path in home.glob(f"*/{split}/{kind}")),
                   key=lambda path: try_again(path.stat, path).st_mtime)
    known = [source for path in reversed(paths) if (source := _cached(name, split, subset, path))]
    for source in known:
        if constants.HF_HUB_OFFLINE or source.revision == revision:
            return source
    if constants.HF_HUB_OFFLINE:
        raise DataError(f"{name}: HF_HUB_OFFLINE is set, and {home} holds nothing of it")
    try:
        info = with_retries(lambda: HfApi().dataset_info(name, revision=revision), name, cfg.patience_minutes)
    except HubError as error:
        if not known or revision or isinstance(error, Refused):
            raise
        node_log.warning(f"{error}; taking what is here of it, revision {known[0].revision}")
        return known[0]
    return Source(name, split, info.sha, _files_of(name, split, subset, [file.rfilename for file in info.siblings]), subset)


def _files_of(name: str, split: str, subset: str | None, names: list[str]) -> list[str]:
    """The parquet files of a split among those of a repository, in order. Raises DataError where they are of several subsets."""
    words = {split: split} | SPLITS  # a split may have a name of its own
    told = {file: split_of(file, words) for file in names if file.lower().endswith(".parquet")}
    found = {file: where[0] for file, where in told.items() if where is not None and where[1] == words[split]}
    if not found:
        raise DataError(f"{name}: the repository has no files {split}-NNNNN-of-NNNNN.parquet")
    known = sorted(set(found.values()))
    if len(known) > 1 if subset is None else subset not in known:
        raise DataError(f"{name}: its {split} files are of the subsets {', '.join(known)}, which are not joined; choose one with "
                        "data.dataset.subset (shards.py: --subset)")
    return sorted(file for file, where in found.items() if subset in (None, where))


def _cached(name: str, split: str, subset: str | None, path: Path) -> Source | None:
    """The source that a window or an index in the cache is of."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged: as good as not there
        kept = read_object(path)
        files = kept.get("files") or [shard["file"] for shard in kept["shards"]]
        if all(isinstance(file, str) for file in files):
            return Source(name, split, path.parent.parent.name, list(files), subset)
    return None


def fetch(source: Source, number: int, target: Path, vocab_size: int, minutes: float,
          stop: threading.Event | None = None) -> Converted:
    """Download file `number`, verify its checksum, and convert it to the shard `target`."""
    from huggingface_hub import HfApi, hf_hub_download
    file, staging = source.files[number], target.with_name(staging_name(f"fetch-{number:05d}"))
    what = f"{source.name}: {file}"

    def download() -> Path:
        found = HfApi().get_paths_info(source.name, [file], revision=source.revision, repo_type="dataset")
        if not found:
            raise DataError(f"{what}: the repository holds no such file at revision {source.revision}")
        path = Path(hf_hub_download(source.name, file, repo_type="dataset", revision=source.revision, local_dir=staging))
        if path.stat().st_size != found[0].size or (found[0].lfs is not None and sha256(path) != found[0].lfs.sha256):
            remove_tree(staging)
            raise OSError(f"what arrived differs from the Hub's size or checksum of {file}")
        return path

    try:
        make_fresh(staging)
        path = with_retries(download, what, minutes, stop)
        staged = staging / target.name
        made = convert_parquet(path, staged, vocab_size)
        os.replace(staged, target)
        return made
    finally:
        remove_tree(staging)


def download(source: Source, numbers: range, out: Path, cfg: DatasetConfig, vocab_size: int) -> None:
    """Fetch shards `numbers` of a Hub dataset into the folder of its split, out/SPLIT, which appears when complete.

    Any number of processes and machines may do so at once.
    """
    staged = out / staging_name(source.split)
    remove_leftovers(out)
    make_fresh(staged)
    entries, lengths = [], set()
    try:
        for number in tqdm(numbers, desc=printable(f"fetching {source.name}"), unit=" shards", disable=None):
            path = staged / f"shard-{len(entries):05d}.npy"
            made = fetch(source, number, path, vocab_size, cfg.patience_minutes)
            lengths.add(made.row_length)
            entries.append(shard_entry(path, made.rows, made.sources))
        if len(lengths) > 1:
            raise DataError(f"{source.name}: its files have rows of different lengths, {sorted(lengths)}")
        complete_sources(entries)
        write_index(staged, entries, lengths.pop(), vocab_size, source.name, source.revision, first_shard=numbers.start,
                    files=[source.files[number] for number in numbers])
        fsync_folder(staged)
        try:
            os.rename(staged, out / source.split)
        except OSError as error:
            if not (out / source.split / INDEX).exists():  # else somebody else was faster
                raise DataError(f"{out / source.split}: is in the way ({error.strerror}); move it, or choose another "
                                "place") from None
        fsync_folder(out)
    finally:
        remove_tree(staged)


def make_fresh(folder: Path) -> None:
    """Make an empty folder; what somebody put under its name, a link to elsewhere too, is not used."""
    remove_tree(folder)
    make_folders(folder.parent)
    folder.mkdir()


def remove_leftovers(folder: Path) -> None:
    """Delete what processes that have ended left in a shared folder, .staging-NAME@HOST-PID and window@HOST-PID.json.

    Those of this machine are known by their number; another machine's have ended after LEFTOVER_SECONDS.
    """
    for path in [*folder.glob(f"{STAGING}*@*"), *folder.glob("window@*.json")]:
        host, _, pid = path.name.removesuffix(".json").rpartition("@")[2].rpartition("-")
        with contextlib.suppress(OSError):
            ended = host == host_name() and pid.isdigit() and not alive(int(pid))
            if ended or time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                remove_tree(path)


def local_or_hub(name: str, split: str, cfg: DatasetConfig, vocab_size: int) -> Path:
    """The folder of a dataset that is small enough to have whole: `name` itself, or the copy of it from the Hub.

    Where `name` is the folder of a dataset that is streamed, its other splits come from the same revision. Every rank must
    call it. Raises UserError.
    """
    folder, revision = locate(name), None
    if folder is not None:
        windows = [] if exists(folder / split / INDEX) else sorted(folder.glob(f"*/{WINDOW}"))
        if not dist.broadcast_object(bool(windows)):
            return folder
        name, revision = dist.on_rank0(lambda: _origin(windows[0]))
    source = find(name, split, cfg, revision)
    folder = source.home(cfg)
    dist.on_each_node(lambda: _complete(source, folder, cfg, vocab_size))
    return folder


def _origin(window: Path) -> tuple[str, str]:
    """(name, revision) of the Hub dataset that a streamed split's folder is of. Raises DataError."""
    try:
        source = read_object(window).get("source") or window.absolute().parents[2].name.replace("--", "/")
    except (OSError, ValueError) as error:
        raise DataError(f"{window}: cannot be read ({getattr(error, 'strerror', None) or error}); delete it") from None
    if not isinstance(source, str):
        raise DataError(f"{window}: does not say which data set it is of; delete it")
    return source, window.absolute().parents[1].name


def _complete(source: Source, folder: Path, cfg: DatasetConfig, vocab_size: int) -> None:
    """Have all shards of a split in its folder."""
    split = folder / source.split
    remove_leftovers(folder)
    if not exists(split / INDEX):
        node_log.info(f"{source.name}: fetching its {source.split} split, {len(source.files)} files, into {split}")
        download(source, range(len(source.files)), folder, cfg, vocab_size)
    index = read_index(split)
    for number, shard in enumerate(index["shards"]):
        if not exists(split / shard["file"]):
            node_log.warning(f"{split / shard['file']}: is missing; fetching it again")
            fetch(source, number, split / shard["file"], index["vocab_size"], cfg.patience_minutes)


# ---- tokenizers --------------------------------------------------------------------------------------------------

def tokenizer_home(name: str, cfg: DatasetConfig) -> Path:
    """The folder of a Hub model's tokenizer on this machine."""
    return cache_folder(cfg) / "tokenizers" / name.replace("/", "--")


def fetch_tokenizer(name: str, folder: Path, minutes: float = DatasetConfig.patience_minutes) -> None:
    """Put the tokenizer of `name`, a folder or a model on the Hub, into `folder`, which is ours, unless one is there."""
    target = folder / "tokenizer.json"
    if target.exists():
        return
    found = find_local(name, owner=False) or fetch_folder(name, "model", list(TOKENIZER_FILES), minutes)
    found = found if found.is_dir() else found.parent
    if not (found / target.name).is_file():
        raise DataError(f"{name}: has no tokenizer.json; name a folder or a model on the Hub that has one")
    make_folders(folder)
    for file in TOKENIZER_FILES:  # the one that counts last
        if (found / file).is_file():
            staged, content = folder / staging_name(file), (found / file).read_bytes()
            remove_tree(staged)
            write_file(staged, lambda out: out.write(content))
            os.replace(staged, folder / file)
    fsync_folder(folder)
