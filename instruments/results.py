"""The folder that an analysis writes, and what has been measured before.

    FOLDER/metrics.json metrics.csv report.html figures/...   the results
    FOLDER/written.json                                       {name: SHA-256} of them: what a later analysis may replace or delete
    FOLDER/cache/                                             rows of steps, sealed with a key of the user's own

A run folder may be a stranger's: nothing is written or deleted through a link in it, files that we did not write stay, and
rows are believed only where this user measured them.
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import io
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from config import UserError
from runtime import files
from runtime.log import log, printable

LIST = "written.json"


def refuse_link(path: Path) -> None:
    """Raises UserError where a folder to be written is a link, which somebody may have planted."""
    if path.is_symlink():
        raise UserError(f"{path}: is a link to {os.readlink(path)}, and an analysis writes through none; give a folder with "
                        "--out")


class Results:
    """Files of one analysis. Raises UserError where the folder cannot be written: before hours of measuring."""

    def __init__(self, folder: Path, chosen: bool):
        """`chosen`: the user named the folder, so it may be a link of theirs."""
        self.folder, self.fresh = folder, set()
        if not chosen:
            refuse_link(folder)
        self.listed = self._listed()
        try:
            files.make_folders(folder)
            self._write_list()
        except OSError as error:
            raise self._cannot_be_written(folder, error) from None

    def _listed(self) -> dict[str, str]:
        """What an earlier analysis says that it wrote; a file counts as ours while its bytes are those."""
        try:
            listed = json.loads(files.read_text(self.folder / LIST))
        except (OSError, ValueError, RecursionError):
            return {}
        plain = re.compile(r"(figures/)?\w[\w.-]*")
        return {name: digest for name, digest in listed.items() if plain.fullmatch(name)} if isinstance(listed, dict) else {}

    def _write_list(self) -> None:
        replace_file(self.folder / LIST, json.dumps(self.listed, indent=1).encode())

    def _is_ours(self, name: str) -> bool:
        path = self.folder / name
        linked = path.is_symlink() or name.startswith("figures/") and path.parent.is_symlink()
        return not linked and path.is_file() and files.sha256(path) == self.listed.get(name)

    def write(self, name: str, content: str | bytes) -> Path:
        """Replace a file of ours; what stands there and is not ours is kept under another name, and said. Raises UserError."""
        path, data = self.folder / name, content.encode("utf-8") if isinstance(content, str) else content
        if path.parent != self.folder:
            refuse_link(path.parent)
        try:
            if (path.is_symlink() or path.exists()) and not self._is_ours(name):
                log.warning(f"{path}: was not written by an analysis; kept as {files.set_aside(path).name}")
            path.parent.mkdir(exist_ok=True)
            replace_file(path, data)
            self.listed[name] = hashlib.sha256(data).hexdigest()
            self.fresh.add(name)
            self._write_list()
        except OSError as error:
            raise self._cannot_be_written(path, error) from None
        return path

    def finish(self) -> None:
        """Delete what an earlier analysis wrote and this one did not, unless somebody has changed it since."""
        for name in self.listed.keys() - self.fresh:
            if self._is_ours(name):
                (self.folder / name).unlink()
            del self.listed[name]
        self._write_list()

    @staticmethod
    def _cannot_be_written(path: Path, error: OSError) -> UserError:
        return UserError(f"{path}: cannot be written ({error.strerror}); give another folder with --out")


def replace_file(path: Path, data: bytes) -> None:
    """Write a file in one step, through no link; not synced, since it can be made again."""
    staged = path.with_name(files.staging_name(path.name))
    staged.unlink(missing_ok=True)
    try:
        with open(staged, "xb", opener=files.no_links) as file:
            file.write(data)
        files.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


# ---- tables ----------------------------------------------------------------------------------------------------------

def table_text(fields: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A CSV file's text."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(fields)
    writer.writerows([cell(value) for value in row] for row in rows)
    return text.getvalue()


def cell(value: Any) -> Any:
    """A text that a spreadsheet takes for no formula; numbers as they are."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.lstrip()[:1] in tuple("=+-@\uff1d\uff0b\uff0d\uff20") else text


# ---- rows measured before --------------------------------------------------------------------------------------------

class Cache:
    """Rows by what they were measured from, in FOLDER/cache. Where it cannot be used, everything is measured each time."""

    def __init__(self, folder: Path):
        self.folder, self.key = folder / "cache", own_key()
        if link := next((path for path in (folder, self.folder) if path.is_symlink()), None):
            log.warning(f"{link}: is a link to {os.readlink(link)}; what is measured is not kept there")
            self.key = None

    def read(self, name: str, source: str) -> list[dict[str, Any]] | None:
        """The rows of a file that this user sealed for `source`, or None."""
        try:
            kept = json.loads((self.folder / name).read_bytes()) if self.key else {}
            return kept["rows"] if hmac.compare_digest(kept["seal"], self._seal(source, kept["rows"])) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # not there, damaged, or of another kind
            return None

    def write(self, name: str, source: str, rows: list[dict[str, Any]]) -> None:
        if not self.key:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = {"seal": self._seal(source, rows), "rows": rows}
            replace_file(self.folder / name, json.dumps(kept, allow_nan=False).encode())
        except OSError as error:
            log.warning(f"{self.folder}: cannot be written ({error.strerror}); every analysis measures anew")
            self.key = None

    def _seal(self, source: str, rows: Any) -> str:
        return hmac.new(self.key, f"{source}\n{json.dumps(rows)}".encode(), hashlib.sha256).hexdigest()


def own_key() -> bytes | None:
    """A secret of this user, outside of all run folders: whoever gives a folder away cannot know it. None: there can be none."""
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pico-relora" / "analysis.key"
        if not path.is_file() or path.stat().st_size != 32:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, staged = tempfile.mkstemp(dir=path.parent)  # readable by its owner alone
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(32))
            os.replace(staged, path)
        key = path.read_bytes()
    except (OSError, RuntimeError) as error:  # no home
        log.warning(f"the key of measured rows cannot be kept ({error}); every analysis measures anew")
        return None
    return key


def as_text(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A table in columns, for a terminal; columns that hold nothing are left out."""
    cells = [[f"{cell:.5g}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
    columns = [column for column in zip(head, *cells) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in zip(*columns))
