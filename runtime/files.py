"""Files that neither a crash nor a full disk can spoil: replaced in one step, synced, checked for room beforehand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from config import UserError
from runtime import dist
from runtime.errors import FULL

STAGING = ".staging-"  # before the names of what is not complete yet


def fsync(path: Path) -> None:
    """Make a file's contents, or a folder's entries, survive a power cut."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a small text file in one step."""
    staged = path.with_name(f"{STAGING}{path.name}{dist.node_suffix()}")
    try:
        staged.write_text(text, encoding="utf-8")
        fsync(staged)
        os.replace(staged, path)
    except OSError:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step; strict JSON, numbers that are not finite become null."""
    write_text(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """`value` fit for strict JSON: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def set_aside(path: Path) -> Path:
    """Rename a file or folder that cannot be used out of the way, keeping it; its new path."""
    for number in range(1, 10_000):
        target = path.with_name(f"{path.name}.aside-{number}")
        if not target.exists():
            os.rename(path, target)
            return target
    raise UserError(f"{path}: too many copies set aside; delete some")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- room on the disk ------------------------------------------------------------------------------------------

class NoRoom(UserError):
    """A disk that is full; says how much is needed."""
    exit_code = 1


def need_room(path: Path, size: int, what: str) -> None:
    """Raise NoRoom unless `size` bytes, and a little, fit on the disk of `path`."""
    folder = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if free < size + (1 << 16):
        raise NoRoom(f"{what} needs {size / 1e6:,.1f} MB, but {folder} has {free / 1e6:,.1f} MB free; make room")


def full_disk(error: Exception, path: Path, size: int) -> str:
    """The words of an error in writing `size` bytes to `path`; torch hides a full disk behind words of its own."""
    if isinstance(error, OSError) and error.errno not in FULL or isinstance(error, UserError):
        return str(error)
    try:
        need_room(path, size, "it")
    except NoRoom as why:
        return str(why)
    return " ".join(str(error).split())[:200]


def reserve(path: Path, what: str) -> None:
    """Give an existing, sparse file all of its blocks: writing to a memory map of a full disk kills the process."""
    size = path.stat().st_size
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno in FULL:
                    raise NoRoom(f"{what} needs {size / 1e6:,.1f} MB, more than {path.parent} has left; make room") from None
