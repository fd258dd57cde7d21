"""Folders that are published whole or not at all, and say what is in them.

A folder is written beside its final name, every file is fsynced and listed with its size and SHA-256 in manifest.json, and
only then the folder is renamed: one without a matching manifest is not a checkpoint.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from config import UserError
from runtime import files
from runtime.files import remove_tree
from runtime.log import log

MANIFEST = "manifest.json"
MOST_MANIFEST = 64 << 20  # bytes


class Writer(NamedTuple):
    """How to write one file of a checkpoint."""
    write: Callable[[files.HashingFile], Any]  # to the open file that it is given
    size: int = 0  # bytes, about; 0: few


class CheckpointError(UserError):
    """A checkpoint that is not there, not whole, or of another run."""


# ---- writing -------------------------------------------------------------------------------------------------

def write_manifest(folder: Path, entries: dict[str, dict]) -> None:
    files.write_text(folder / MANIFEST, json.dumps({"files": entries}, indent=1, sort_keys=True) + "\n")


def publish(folder: Path, writers: dict[str, Writer], anew: bool = False) -> None:
    """Write `writers` (relative path -> writer) as the checkpoint `folder`, which appears only when complete; with `anew` where
    nothing is.

    Raises CheckpointError, saying how much is needed, and leaves nothing behind, where the disk fails or is full.
    """
    staged = folder.with_name(files.staging_name(folder.name))
    size, problem = sum(writer.size for writer in writers.values()), None
    parents = {(staged / name).parent for name in writers}
    try:
        remove_tree(staged)
        files.require_room(folder, size, "it")
        files.make_folders(folder.parent)
        for parent in parents:
            parent.mkdir(parents=True, exist_ok=True)
        entries = {name: files.write_file(staged / name, writer.write) for name, writer in writers.items()}
        for parent in parents | {staged}:
            files.fsync_folder(parent)
        write_manifest(staged, entries)
        _replace(folder, staged, entries, anew)
    except BaseException as error:
        remove_tree(staged)
        if not isinstance(error, (OSError, RuntimeError, files.NoRoom)):  # torch.save tells of some failures by RuntimeError
            raise
        problem = files.explain(error, folder, size)
    if problem is not None:  # raised only here: the error above keeps the half-written file open, and its disk space in use
        raise CheckpointError(f"{folder} cannot be written: {problem}")


def _replace(folder: Path, staged: Path, entries: dict[str, dict], anew: bool) -> None:
    """Rename the staged folder. One that stood there is kept aside, unless it held nothing more (see `save` in train.py)."""
    before = files.set_aside(folder) if folder.exists() and not anew else None
    try:
        os.rename(staged, folder)  # over a folder that holds something it fails
    except OSError:
        if before is not None:
            os.rename(before, folder)
        if anew and folder.exists():
            raise FileExistsError(errno.EEXIST, "another process has made it meanwhile", str(folder)) from None
        raise
    try:
        files.fsync_folder(folder.parent)
        if before is not None and read_manifest(before).keys() <= entries.keys():
            remove_tree(before)
    except (OSError, UserError) as error:  # the checkpoint is there all the same
        log.warning(f"{folder}: is written, but what is around it cannot be tidied ({error})")


def extend(folder: Path, writers: dict[str, Writer]) -> None:
    """Add files to a checkpoint; until the manifest names them it is what it was. Raises CheckpointError.

    Files of the same bytes take their room once, where the file system has hard links: both names are whole files.
    """
    staged, added = folder / files.staging_name("more"), {}
    size = sum(writer.size for writer in writers.values())
    try:
        files.require_room(folder, size, "it")
        entries = read_manifest(folder)
        files.refuse_links(folder.parent, *(folder / name for name in writers))
        staged.mkdir()
        for name, writer in writers.items():
            entry = files.write_file(staged / "file", writer.write)
            files.make_folders((folder / name).parent)
            if (twin := added.setdefault(entry["sha256"], folder / name)) != folder / name:
                files.link_instead(twin, staged / "file")
            files.replace(staged / "file", folder / name)
            entries[name] = entry
        for parent in {(folder / name).parent for name in writers}:
            files.fsync_folder(parent)
        write_manifest(folder, entries)
    except (OSError, RuntimeError, files.NoRoom) as error:
        raise CheckpointError(f"{folder} cannot be added to: {files.explain(error, folder, size)}") from None
    finally:
        remove_tree(staged)


def holds(folder: Path, part: str) -> bool:
    """Whether a checkpoint has files in its folder `part`."""
    return any(name.startswith(f"{part}/") for name in read_manifest(folder))


# ---- reading -------------------------------------------------------------------------------------------------

def read_manifest(folder: Path) -> dict[str, dict]:
    """{relative path: {size, files.sha256}}. Raises CheckpointError where it is missing or makes no sense, or Unreadable."""
    try:
        entries = json.loads(files.read_text(folder / MANIFEST, MOST_MANIFEST))["files"]
        for name, entry in entries.items():
            path = Path(name)
            if path.is_absolute() or ".." in path.parts or set(name) & set("\\:") or not isinstance(entry["size"], int):
                raise ValueError(f"the entry {name!r} points outside of the folder or has no size")
            str(entry["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} is missing or damaged ({error})") from None
    return entries


def verify(folder: Path) -> dict[str, dict]:
    """The manifest's entries, every file compared with them.

    Raises CheckpointError naming the first that differs, and Unreadable where the disk does not give one.
    """
    entries = read_manifest(folder)
    for name, entry in entries.items():
        path = folder / name
        try:
            size = files.try_again(path.stat, path).st_size
            if size != entry["size"]:
                raise CheckpointError(f"{folder}: {name} has {size} bytes instead of {entry['size']}")
            if files.sha256(path) != entry["sha256"]:
                raise CheckpointError(f"{folder}: {name} differs from its checksum")
        except OSError:
            raise CheckpointError(f"{folder}: {name} is missing") from None
    return entries
