"""Token shards as memory maps, and batches as a pure function of the step.

A dataset folder holds one folder a split (`train`, `val`), each with `index.json` and `shard-00000.npy` ...:
uint16 arrays (uint32 where ids go above 65,535) of shape (rows, row_length). shards.py makes them. Batch s is rows
[s G, (s+1) G) for global batch size G, counted from first_row, whatever the number of ranks; past the last row a new
epoch begins.

    train = TokenDataset("corpora/stdlib", "train")
    rows = train.batch(step=10, batch_size=16)     # (16, row_length), any step in O(1)
"""

from __future__ import annotations

import hashlib
import json
import math
import queue
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import UserError
from runtime.files import Unreadable, read_text, sha256, try_again, write_text
from runtime.log import log

INDEX = "index.json"


class DataError(UserError):
    """A shard, index or tokenizer that cannot be used; names the file, the row and the reason."""


class DamagedShard(DataError):
    """A shard that is not the one that the index counted."""


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.uint32)


def read_index(folder: Path) -> dict[str, Any]:
    """The checked index of one split's folder.

    Keys: row_length, dtype, vocab_size, source, revision, shards: [{file, rows, sha256}], and what the maker of
    the dataset wished to add, such as entropies.
    """
    path = folder / INDEX
    try:
        index = json.loads(read_text(path))
    except FileNotFoundError:
        raise DataError(f"{path}: not there; make the dataset with shards.py (see python shards.py --help)") from None
    except Unreadable as error:
        raise DataError(str(error)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    try:
        numbers = [index["row_length"], index["vocab_size"], *(shard["rows"] for shard in index["shards"])]
        sound = (all(type(n) is int and 1 <= n < 2 ** 31 for n in numbers) and index["row_length"] >= 2
                 and index["dtype"] in ("uint16", "uint32")
                 and all(shard["file"] == Path(shard["file"]).name and shard["sha256"] and _sources_fit(shard)
                         for shard in index["shards"])
                 and _entropy_fits(index.get("entropy") or {}))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not an index of token shards ({type(error).__name__}: {error})") from None
    if not sound or not index["shards"]:
        raise DataError(f"{path}: needs row_length of 2 or more, a uint dtype, entropies that are finite or none, and shards "
                        "with rows in this folder")
    return index


def _sources_fit(shard: dict[str, Any]) -> bool:
    sources = shard.get("sources")
    return sources is None or len(sources) == shard["rows"] and all(isinstance(source, str) for source in sources)


def _entropy_fits(entropy: dict[str, float]) -> bool:
    return not entropy or entropy.keys() == {"unigram", "bigram"} and all(
        isinstance(number, float) and math.isfinite(number) for number in entropy.values())


def shard_entry(path: Path, rows: int, sources: list[str] | None = None) -> dict[str, Any]:
    """A shard's line in the index; `sources` names where each row is from, if that is known."""
    return {"file": path.name, "rows": rows, "sha256": sha256(path)} | ({"sources": sources} if sources else {})


def write_index(folder: Path, shards: list[dict], row_length: int, vocab_size: int, source: str,
                revision: str | None = None, **extra: Any) -> None:
    index = {"row_length": row_length, "dtype": token_dtype(vocab_size).name, "vocab_size": vocab_size,
             "source": source, "revision": revision, **extra, "shards": shards}
    write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")


class TokenDataset:
    """Rows of one split of a dataset folder, in order, without end. Raises DataError.

    `index` stands in for the folder's, where that is still to come. The tokenizer is in `tokenizer_folder`, or is bytes.
    """
    first_row = 0  # of batch 0
    open_shards = 4  # memory maps held, each with a descriptor: a process may often have no more than 1,024

    def __init__(self, folder: str | Path, split: str = "train", index: dict[str, Any] | None = None):
        self.folder, self.tokenizer_folder = Path(folder) / split, Path(folder)
        self.index = read_index(self.folder) if index is None else index
        self.vocab_size: int = self.index["vocab_size"]
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()  # the latest used last
        self._verified: dict[int, tuple[int, int]] = {}  # (time, size) of the file whose checksum was right
        self.lay_out()

    def lay_out(self) -> None:
        """Place the rows as the index says now."""
        self.row_length: int = self.index["row_length"]
        self.starts = np.cumsum([0] + [shard["rows"] for shard in self.index["shards"]])  # first row of each shard

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def fingerprint(self) -> str:
        """Identifies the tokens and their order: a resumed run must find the same."""
        parts = [self.row_length, *((s["rows"], s["sha256"]) for s in self.index["shards"])]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def advance(self, step: int) -> None:
        """Training is about to take batch `step`; of use to datasets that fetch their shards as they go."""

    def close(self) -> None:
        """Training is over."""

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data, so that a resume finds the same rows."""
        return {"fingerprint": self.fingerprint, "revision": self.index.get("revision")}

    def shard(self, number: int) -> np.ndarray:
        """The memory map of a shard, (rows, row_length); those used last stay open."""
        array = self._maps.pop(number, None)  # another thread that wants it meanwhile opens one of its own
        self._maps[number] = array = self._open(number) if array is None else array
        while len(self._maps) > self.open_shards:
            self._maps.popitem(last=False)  # closed as soon as nobody reads it
        return array

    def _open(self, number: int) -> np.ndarray:
        entry, path = self.index["shards"][number], self.folder / self.index["shards"][number]["file"]
        try:
            stat = try_again(path.stat, path)
            version = stat.st_mtime_ns, stat.st_size
            if "sha256" in entry and self._verified.get(number) != version:  # before the header of a damaged file is believed
                if sha256(path) != entry["sha256"]:  # 0.1 s for a shard of the Dolma
                    raise DamagedShard(f"{path}: differs from its checksum in {INDEX}: damaged or changed; delete it and make "
                                       "or fetch it again")
                self._verified[number] = version
            array = try_again(lambda: np.load(path, mmap_mode="r", allow_pickle=False), path)
        except UserError as error:
            raise error if isinstance(error, DataError) else DataError(str(error)) from None
        except Exception as error:  # what a header that makes no sense raises depends on Python: tokenize.TokenError, say
            raise DataError(f"{path}: cannot be opened ({error}); make or fetch it again") from None
        want = ((entry["rows"], self.row_length), np.dtype(entry.get("dtype", self.index["dtype"])))
        if not isinstance(array, np.ndarray) or (array.shape, array.dtype) != want:
            found = f"{array.shape} {array.dtype}" if isinstance(array, np.ndarray) else "several arrays"
            raise DataError(f"{path}: holds {found}, but {INDEX} says {want[0]} {want[1]}")
        return array

    def rows(self, first: int, count: int) -> np.ndarray:
        """Rows first ... first + count - 1 as (count, row_length); numbers past the end wrap into the next epoch.

        Raises DataError, naming file and row, where an id is not below vocab_size.
        """
        pieces = []
        while count > 0:
            within = first % len(self)
            number = int(np.searchsorted(self.starts, within, side="right")) - 1
            offset = within - int(self.starts[number])
            piece = self.shard(number)[offset:offset + count]
            if piece.max() >= self.vocab_size:
                bad = int(np.argmax((piece >= self.vocab_size).any(axis=1)))
                raise DataError(f"{self.folder / self.index['shards'][number]['file']}: row {offset + bad} holds id "
                                f"{piece[bad].max()}, outside the vocabulary of {self.vocab_size}")
            pieces.append(piece)
            first, count = first + len(piece), count - len(piece)
        return np.concatenate(pieces)

    def batch(self, step: int, batch_size: int) -> np.ndarray:
        """The global batch of update `step`, counted from 0: (batch_size, row_length)."""
        return self.rows(self.first_row + step * batch_size, batch_size)

    def epoch(self, step: int, batch_size: int) -> int:
        """How often the last row has been passed before batch `step`."""
        return (self.first_row + step * batch_size) // len(self)

    def tell_epoch(self, step: int, batch_size: int) -> None:
        """Say so where batch `step` is the first of a new epoch."""
        if (epoch := self.epoch(step, batch_size)) > self.epoch(step - 1, batch_size):
            log.info(f"step {step}: epoch {epoch + 1} of the data has begun")


def to_device(rows: np.ndarray, device: torch.device) -> Tensor:
    """Token rows as an int64 tensor; to CUDA they travel narrow, and are widened there.

    The one place where a copy is not waited for: from pinned memory, which outlives it, and to CUDA, which orders it. To
    MPS such a copy may read memory that is somebody else's by then, and brings wrong tokens without an error.
    """
    tensor = torch.from_numpy(rows)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True).to(torch.int64)
    return tensor.to(torch.int64).to(device)


class BatchLoader:
    """Prefetches this rank's micro-batches in a thread; a context manager that stops the thread.

    `next` gives, for one update after another, a list of `accumulation` pairs (index of the micro-batch in the global
    batch, rows int64 (micro, row_length)). Micro-batch a of rank r has index a * world + r, so the same micro-batch size
    gives the same micro-batches on any number of ranks. `wait` adds up the seconds that the consumer stood still.
    """

    def __init__(self, dataset: TokenDataset, first_step: int, micro: int, accumulation: int,
                 rank: int, world: int, device: torch.device, ahead: int = 3):
        self.dataset, self.micro, self.accumulation = dataset, micro, accumulation
        self.rank, self.world, self.device = rank, world, device
        self.wait = 0.0
        self._queue: queue.Queue = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(first_step,), daemon=True)
        self._thread.start()

    def _fill(self, step: int) -> None:
        while not self._stop.is_set():
            try:
                item: Any = self._read(step)
            except Exception as error:  # reaches the training loop through the queue
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    pass
            if isinstance(item, Exception):
                return
            step += 1

    def _read(self, step: int) -> list[tuple[int, np.ndarray]]:
        first = self.dataset.first_row + step * self.micro * self.accumulation * self.world
        indices = [a * self.world + self.rank for a in range(self.accumulation)]
        return [(i, self.dataset.rows(first + i * self.micro, self.micro)) for i in indices]

    def next(self, seconds: float) -> list[tuple[int, Tensor]] | None:
        """The next update's micro-batches, or None if they do not come within `seconds`. Raises DataError at the end."""
        start = time.perf_counter()
        try:
            item = self._queue.get(timeout=seconds)
        except queue.Empty:
            return None
        finally:
            self.wait += time.perf_counter() - start
        if isinstance(item, Exception):
            raise item
        return [(index, to_device(rows, self.device)) for index, rows in item]

    def take_wait(self) -> float:
        """The seconds waited since the last call."""
        wait, self.wait = self.wait, 0.0
        return wait

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
