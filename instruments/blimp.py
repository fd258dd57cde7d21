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

from config import BlimpConfig, ConfigError
from runtime import dist


class Pair(NamedTuple):
    uid: str  # the paradigm, one of 67
    term: str  # the linguistic phenomenon, one of 12
    good: str
    bad: str


def load_pairs(cfg: BlimpConfig) -> list[Pair]:
    """The pairs that cfg asks for, paradigm by paradigm. Every rank must call it. Raises ConfigError naming the key."""
    return dist.on_rank0(lambda: _load_pairs(cfg))


def _load_pairs(cfg: BlimpConfig) -> list[Pair]:
    path = Path(cfg.dataset_name)
    key = "evaluation.blimp.dataset_name"
    try:
        if path.is_dir():
            texts = [p.read_text(encoding="utf-8") for p in sorted(path.rglob("*.jsonl"))]
        elif path.is_file():
            texts = list(_zipped(path))
        else:
            texts = _from_hub(cfg.dataset_name)
        found = [_pair(line) for text in texts for line in text.splitlines() if line.strip()]
        if not found:
            raise ValueError("no pairs in it")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{key}: {cfg.dataset_name!r} cannot be read ({error}); give BLiMP.zip or a folder of its "
                          f"jsonl files") from None
    chosen: dict[str, list[Pair]] = defaultdict(list)
    for pair in found:
        if any(fnmatchcase(pair.uid, glob) for glob in cfg.metric_uids):
            chosen[pair.uid].append(pair)
    if not chosen:
        raise ConfigError(f"evaluation.blimp.metric_uids: {cfg.metric_uids} match none of "
                          f"{len({p.uid for p in found})} paradigms in {cfg.dataset_name}")
    return [pair for uid in sorted(chosen) for pair in chosen[uid][:cfg.samples_per_set]]


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


def _from_hub(name: str) -> list[str]:
    """The jsonl files, or the zip of them, of a Hub dataset."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    try:
        folder = Path(snapshot_download(name, repo_type="dataset", allow_patterns=["*.jsonl", "*.zip", "*.parquet"]))
    except (HfHubHTTPError, HFValidationError) as error:
        raise ValueError(f"neither a local file nor to be had from the Hub: {str(error).splitlines()[0]}") from None
    if parquets := sorted(folder.rglob("*.parquet")):
        from hub import parquet
        return ["\n".join(map(json.dumps, parquet.records(path))) for path in parquets]
    zips = sorted(folder.rglob("*.zip"))
    return list(_zipped(zips[0])) if zips else [p.read_text(encoding="utf-8") for p in sorted(folder.rglob("*.jsonl"))]


def accuracies(pairs: list[Pair], right: np.ndarray) -> dict[str, Any]:
    """Share of pairs that are right: overall, and by paradigm and by phenomenon."""
    def share(field: str) -> dict[str, float]:
        groups: dict[str, list[bool]] = defaultdict(list)
        for pair, hit in zip(pairs, right):
            groups[getattr(pair, field)].append(bool(hit))
        return {name: float(np.mean(hits)) for name, hits in sorted(groups.items())}
    return {"accuracy": float(np.mean(right)), "by_uid": share("uid"), "by_term": share("term")}
