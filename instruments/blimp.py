"""BLiMP's minimal pairs (Warstadt et al., arXiv 1912.00582): reading them from a folder, a zip or the Hub, and counting."""

from __future__ import annotations

import json
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import BlimpConfig, ConfigError, DatasetConfig, UserError
from hub import parquet
from hub.client import fetch_folder
from hub.datasets import find_local
from runtime import dist


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
        path = path or fetch_folder(cfg.dataset_name, "dataset", ["*.jsonl", "*.zip", "*.parquet"], minutes)
        found = [_pair(line) for text in _texts(path) for line in text.splitlines() if line.strip()]
        if not found:
            raise ValueError("no pairs in it")
    except (UserError, OSError, ValueError, KeyError, TypeError, RecursionError, zipfile.BadZipFile) as error:
        raise ConfigError(f"evaluation.blimp.dataset_name: {cfg.dataset_name!r} cannot be read ({error}); give BLiMP.zip, or a "
                          f"folder of its jsonl or parquet files") from None
    chosen: dict[str, list[Pair]] = defaultdict(list)
    for pair in found:
        if any(fnmatchcase(pair.uid, glob) for glob in cfg.metric_uids):
            chosen[pair.uid].append(pair)
    if not chosen:
        raise ConfigError(f"evaluation.blimp.metric_uids: {cfg.metric_uids} match none of "
                          f"{len({p.uid for p in found})} paradigms in {cfg.dataset_name}")
    return [pair for uid in sorted(chosen) for pair in chosen[uid][:cfg.samples_per_set]]


def _texts(path: Path) -> Iterator[str]:
    """The lines of JSON of a zip, or of a folder: of its parquet files if it has any, else its zip's, else its jsonl files'."""
    if path.is_file():
        yield from _zipped(path)
    elif parquets := sorted(path.rglob("*.parquet")):
        yield from ("\n".join(map(json.dumps, parquet.records(file))) for file in parquets)
    elif zips := sorted(path.rglob("*.zip")):
        yield from _zipped(zips[0])
    else:
        yield from (file.read_text(encoding="utf-8") for file in sorted(path.rglob("*.jsonl")))


def _zipped(path: Path) -> Iterator[str]:
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".jsonl") and "__MACOSX" not in name:
                yield archive.read(name).decode("utf-8")


def _pair(line: str) -> Pair:
    record = json.loads(line)
    pair = Pair(record["UID"], record["linguistics_term"], record["sentence_good"], record["sentence_bad"])
    if not all(isinstance(text, str) for text in pair):
        raise ValueError(f"not texts: {line[:80]}")
    return pair


def accuracies(pairs: list[Pair], right: np.ndarray) -> dict[str, Any]:
    """Share of pairs that are right: overall, and by paradigm and by phenomenon."""
    def share(field: str) -> dict[str, float]:
        groups: dict[str, list[bool]] = defaultdict(list)
        for pair, hit in zip(pairs, right):
            groups[getattr(pair, field)].append(bool(hit))
        return {name: float(np.mean(hits)) for name, hits in sorted(groups.items())}
    return {"accuracy": float(np.mean(right)), "by_uid": share("uid"), "by_term": share("term")}
