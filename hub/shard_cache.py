"""A folder of streamed shards that any number of processes and machines fill, use and clear at once, without locks.

What is in it has its final name only once it is whole: it is made under a name of its process alone, then renamed. A shard
without its entry counts as missing, and what is missing is fetched again; so whatever is lost in a race costs a download.

    CACHE/NAME/REVISION/SPLIT/window.json             {source, revision, files}
    CACHE/NAME/REVISION/SPLIT/shard-00005.npy         the shard
    CACHE/NAME/REVISION/SPLIT/shard-00005.json        its entry: {rows, row_length, dtype, sha256}
    CACHE/NAME/REVISION/SPLIT/window@HOST-PID.json    of each process that fetches: the shards that it has use for, its error

Earlier versions kept the entries in window.json, as {row_length, rows: {number: count}, sha256: {number: digest}}.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from config import UserError
from data import DataError, token_dtype
from hub.datasets import WINDOW, Source, exists, remove_leftovers
from hub.parquet import Converted
from runtime.files import make_folders, process_name, read_object, sha256, write_text

BEAT_SECONDS, LIVE_SECONDS = 10.0, 180.0  # between signs of life; after which a process counts as gone (NFS may be 60 s late)


class ShardCache:
    """The shards of one split, by number."""

    def __init__(self, source: Source, folder: Path):
        self.source, self.folder = source, folder
        self.window = folder / f"window@{process_name()}.json"  # this process's own
        self._told: dict[str, Any] = {"kept": [], "error": None}
        self._telling = threading.Lock()
        self._left = threading.Event()

    # ---- shards ----------------------------------------------------------------------------------------------

    def path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.npy"

    def entry(self, number: int) -> dict[str, Any] | None:
        """{rows, row_length} of a shard that is here whole; but for an earlier version's also {dtype, sha256}.

        Raises DataError.
        """
        try:
            if not exists(self.path(number)):
                return None
        except UserError as error:
            raise DataError(str(error)) from None
        own = _read(self.path(number).with_suffix(".json"))
        return own if _is_entry(own) else self._earlier().get(number)

    def entries(self) -> dict[int, dict[str, Any]]:
        """{number: entry} of every shard that is known here."""
        found = {int(path.stem[6:]): _read(path) for path in self.folder.glob("shard-*.json")}
        return dict(sorted((self._earlier() | {number: entry for number, entry in found.items() if _is_entry(entry)}).items()))

    def _earlier(self) -> dict[int, dict[str, Any]]:
        window, found = _read(self.folder / WINDOW), {}
        digests, counts = window.get("sha256") or {}, window.get("rows") or {}
        with contextlib.suppress(ValueError, TypeError, AttributeError):  # not of ours
            found = {int(number): {"rows": rows, "row_length": window.get("row_length")}
                     | ({"sha256": digests[number]} if number in digests else {}) for number, rows in counts.items()}
        return {number: entry for number, entry in found.items() if _is_entry(entry)}

    def publish(self, number: int, staged: Path, made: Converted, vocab_size: int) -> None:
        """Give a converted shard its name, unless another process has been faster."""
        if self.entry(number) is not None:
            staged.unlink()
            return
        entry = {"rows": made.rows, "row_length": made.row_length, "dtype": token_dtype(vocab_size).name,
                 "sha256": sha256(staged)}
        write_text(self.path(number).with_suffix(".json"), json.dumps(entry) + "\n")
        os.replace(staged, self.path(number))

    def keep_only(self, kept: Iterable[int]) -> None:
        """Delete the shards that neither are in `kept` nor in the window of any other live process."""
        surplus = {int(path.stem[6:]) for path in self.folder.glob("shard-*.npy")} - set(kept)
        for window in self._others() if surplus else []:
            surplus = set() if window["kept"] is None else surplus - set(window["kept"])
        for number in surplus:
            self.path(number).unlink(missing_ok=True)
            self.path(number).with_suffix(".json").unlink(missing_ok=True)

    # ---- processes ---------------------------------------------------------------------------------------------

    def join(self, kept: list[int] | None) -> None:
        """Begin to fetch into the folder, and to show signs of life."""
        make_folders(self.folder)
        remove_leftovers(self.folder)
        if not exists(self.folder / WINDOW):
            write_text(self.folder / WINDOW, json.dumps({"source": self.source.name, "revision": self.source.revision,
                                                         "files": self.source.files}) + "\n")
        self.tell(kept=kept, error=None)
        threading.Thread(target=self._beat, daemon=True).start()

    def tell(self, **news: Any) -> None:
        """Show other processes the shards that this one has use for (`kept`; None: all), and its `error`."""
        with self._telling:
            self._told |= news
            if not self._left.is_set():
                write_text(self.window, json.dumps(self._told) + "\n")

    def leave(self) -> None:
        self._left.set()
        with self._telling:
            self.window.unlink(missing_ok=True)

    def error_of(self, process: str) -> str | None:
        """Why another process has given up."""
        return _read(self.folder / f"window@{process}.json").get("error")

    def _beat(self) -> None:
        while not self._left.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a disk that is full, say, until the next time
                self.tell()

    def _others(self) -> list[dict[str, Any]]:
        """The windows of other live processes. Times of the disk are compared with each other, not with this clock's."""
        if not self.window.exists():  # taken for a dead process's
            self.tell()
        found, now = [], self.window.stat().st_mtime
        for path in self.folder.glob("window@*.json"):
            with contextlib.suppress(FileNotFoundError):
                if path != self.window and now - path.stat().st_mtime < LIVE_SECONDS and (window := _read(path)):
                    found.append(window)
        return found


def _is_entry(value: dict[str, Any]) -> bool:
    return (all(type(value.get(key)) is int and 0 < value[key] < 2 ** 31 for key in ("rows", "row_length"))
            and value.get("dtype", "uint16") in ("uint16", "uint32") and isinstance(value.get("sha256", ""), str))


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none, or a damaged one."""
    try:
        return read_object(path)
    except (OSError, ValueError, UserError):
        return {}
