"""BLiMP's minimal pairs (Warstadt et al., arXiv 1912.00582): reading them from a file, a folder or the Hub, and counting.

lm-eval's stock task puts a space before each sentence, and starts with the model's end of text. For equal numbers, give its
task `target_delimiter: ""`, and evaluation.blimp.start_token=eos here.
"""

from __future__ import annotations

import json
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import BlimpConfig, ConfigError, DatasetConfig
from config.reading import show
from hub import parquet
from hub.client import fetch_folder
from hub.datasets import find_local
from hub.tokenizers import Tokenizer
from runtime import dist
from runtime.files import require_file
from runtime.log import log

KINDS = (".parquet", ".zip", ".jsonl")  # of files with pairs: where a folder has several, the first is read
MOST_BYTES, LONGEST = 1 << 27, 1 << 16  # of one of them, unpacked (all of BLiMP has 26 MB); characters of a text in it
MOST_CUT = 0.01  # share of sentences longer than the model, from which on a score tells nothing


class Pair(NamedTuple):
    uid: str  # the paradigm, one of 67
    term: str  # the linguistic phenomenon, one of 12
    good: str
    bad: str


def load_pairs(cfg: BlimpConfig, minutes: float = DatasetConfig.patience_minutes) -> list[Pair]:
    """The pairs that cfg asks for, paradigm by paradigm; the Hub may be away for `minutes`. Every rank must call it.

    Raises ConfigError naming the key.
    """
    return dist.on_rank0(lambda: _load_pairs(cfg, minutes))


def _load_pairs(cfg: BlimpConfig, minutes: float) -> list[Pair]:
    try:
        path = find_local(cfg.dataset_name)
        path = path or fetch_folder(cfg.dataset_name, "dataset", [f"*{kind}" for kind in KINDS], minutes)
        found = [_pair(record) for record in _records(path)]
        if not found:
            raise ValueError("no pairs in it")
    except Exception as error:  # archives of strangers raise what their format's library likes
        told = " ".join(str(error).split())[:300] if str(error) else type(error).__name__
        raise ConfigError(f"evaluation.blimp.dataset_name: {cfg.dataset_name!r} cannot be read ({told}); give BLiMP.zip, or a "
                          f"folder of its jsonl or parquet files") from None
    chosen: dict[str, list[Pair]] = defaultdict(list)
    for pair in found:
        if any(fnmatchcase(pair.uid, glob) for glob in cfg.metric_uids):
            chosen[pair.uid].append(pair)
    if not chosen:
        raise ConfigError(f"evaluation.blimp.metric_uids: {cfg.metric_uids} match none of "
                          f"{len({p.uid for p in found})} paradigms in {cfg.dataset_name}")
    return [pair for uid in sorted(chosen) for pair in chosen[uid][:cfg.samples_per_set]]


def _records(path: Path) -> Iterator[Any]:
    """The records in a zip, a parquet file or one of JSON lines, or in the files of a folder, those of one kind."""
    if path.is_dir():
        files = {kind: found for kind in KINDS if (found := sorted(path.rglob(f"*{kind}")))}
        if len(files) > 1:
            log.info(f"{path}: holds {' and '.join(files)} files; the {next(iter(files))} are read")
        chosen = next(iter(files.values()), [])
        if chosen and chosen[0].suffix == ".zip" and len(chosen) > 1:
            raise ValueError(f"it holds several zips, {', '.join(file.name for file in chosen)}; name one")
        for file in chosen:
            yield from _records(file)
        return
    require_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in set(archive.namelist()) if name.endswith(".jsonl") and "__MACOSX" not in name)
            _check_size(path, sum(archive.getinfo(name).file_size for name in names))
            for name in names:
                yield from _lines(archive.read(name))
    else:
        _check_size(path, path.stat().st_size)
        yield from parquet.records(path) if path.suffix == ".parquet" else _lines(path.read_bytes())


def _check_size(path: Path, size: int) -> None:
    if size > MOST_BYTES:
        raise ValueError(f"{path.name} holds {size:,} bytes, more than BLiMP has")


def _lines(content: bytes) -> Iterator[Any]:
    """JSON lines, which end with \\n only: a sentence may hold what Python takes for an end of line."""
    return (json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line.strip())


def _pair(record: Any) -> Pair:
    pair = Pair(record["UID"], record["linguistics_term"], record["sentence_good"], record["sentence_bad"])
    if not all(isinstance(text, str) and len(text) < LONGEST for text in pair):
        raise ValueError(f"not texts of a sentence: {show(record)[:200]}")
    return pair


def check_lengths(pairs: list[Pair], tokenizer: Tokenizer, longest: int) -> None:
    """Raise ConfigError where, of some pairs from all paradigms, too many sentences have more than `longest` tokens."""
    some = [text for pair in pairs[::-(-len(pairs) // 1000)] for text in (pair.good, pair.bad)]
    cut = sum(len(tokenizer.encode(text)) > longest for text in some) / len(some)
    if cut > MOST_CUT:
        raise ConfigError(f"evaluation.metrics: {cut:.0%} of BLiMP's sentences have more than the {longest} tokens that the "
                          "model reads, and their ends decide; leave blimp out, or give model.max_seq_len more")


def accuracies(pairs: list[Pair], right: np.ndarray) -> dict[str, Any]:
    """Share of pairs that are right: overall, and by paradigm and by phenomenon."""
    def share(field: str) -> dict[str, float]:
        groups: dict[str, list[bool]] = defaultdict(list)
        for pair, hit in zip(pairs, right):
            groups[getattr(pair, field)].append(bool(hit))
        return {name: float(np.mean(hits)) for name, hits in sorted(groups.items())}
    return {"accuracy": float(np.mean(right)), "by_uid": share("uid"), "by_term": share("term")}
