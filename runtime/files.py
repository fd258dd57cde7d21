"""Files that neither a crash, a full disk nor a bad one can spoil: written through one writer, replaced in one step, synced.

What is read is whole, damaged or unreadable: an I/O error that may pass is tried again, and is never taken for damage.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from config import UserError
from runtime.errors import FULL

T = TypeVar("T")
STAGING = ".staging-"  # before the names of what is not complete yet
MOST = 1 << 30  # bytes of a record or an index that is read at once
PAUSES = (0.1, 0.4, 1.6)  # seconds between tries to read
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)  # to try again would change nothing
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM)


class Unreadable(UserError):
    """A file that the disk does not give now; it may be whole."""
    exit_code = 1


# ---- reading ---------------------------------------------------------------------------------------------------

def try_again(read: Callable[[], T], path: Path) -> T:
    """read(), tried again where the disk fails. Raises Unreadable, or OSError where the file is not there."""
    for pause in (*PAUSES, None):
        try:
            return read()
        except OSError as error:
            if error.errno in ABSENT or error.errno is None:
                raise
            if pause is None:
                raise Unreadable(f"{path}: cannot be read ({error.strerror}); look after the disk, and start again") from None
            time.sleep(pause)
    raise AssertionError


def require_file(path: Path, most: int | None = None) -> None:
    """Raise OSError where it is none, or has more than `most` bytes: a named pipe would be waited for, /dev/zero has no end."""
    status = try_again(path.stat, path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EISDIR, "is no file", str(path))
    if most is not None and status.st_size > most:
        raise OSError(errno.EFBIG, f"has {status.st_size:,} bytes, more than such a file has", str(path))


def read_bytes(path: Path, most: int = MOST) -> bytes:
    require_file(path, most)
    return try_again(path.read_bytes, path)


def read_text(path: Path, most: int = MOST) -> str:
    require_file(path, most)
    return try_again(lambda: path.read_text(encoding="utf-8"), path)


def read_object(path: Path, most: int = MOST) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError, or ValueError where it holds none."""
    try:
        found = json.loads(read_text(path, most))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    return found


def sha256(path: Path) -> str:
    require_file(path)

    def digest() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
    return try_again(digest, path)


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()  # Python 3.10
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


# ---- writing ---------------------------------------------------------------------------------------------------

class HashingFile:
    """A new file on its way to the disk: what is handed over is counted and hashed here, not read back.

    A failed write shows at `close`, since torch and others take no exception well in the middle of a file.
    """

    def __init__(self, path: Path):
        # exclusive and no links: nobody can have us write elsewhere
        binary = getattr(os, "O_BINARY", 0)  # of Windows
        handle = no_links(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | binary)
        self.path, self.size, self.error = path, 0, None
        self._file, self._digest = os.fdopen(handle, "wb", buffering=1 << 20), hashlib.sha256()

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
            self._digest.update(data)
        self.size += size
        return size

    def flush(self) -> None:
        """What the system has not taken yet is written at the end."""

    def close(self) -> dict[str, Any]:
        """{size, sha256} of the file, which is on the disk now. Raises OSError."""
        try:
            if self.error is not None:
                raise self.error
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            error.filename = error.filename or str(self.path)
            with contextlib.suppress(OSError):
                self._file.close()
            raise
        self._file.close()
        return {"size": self.size, "sha256": self._digest.hexdigest()}


def write_file(path: Path, write: Callable[[HashingFile], Any]) -> dict[str, Any]:
    """Make a file by write(file); returns its {size, sha256}. Raises OSError."""
    file = HashingFile(path)
    try:
        write(file)
    except BaseException:
        with contextlib.suppress(OSError):
            file.close()
        raise
    return file.close()


def make_folders(path: Path) -> None:
    """Make a folder and those above it, each one's entry synced too. Raises OSError."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync_folder(folder.parent)


def fsync_folder(path: Path) -> None:
    """Make a folder's entries survive a power cut, where the file system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def host_name() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname())[:40]


def process_name() -> str:
    """A name that no two processes of the machines that share a disk have at once."""
    return f"{host_name()}-{os.getpid()}"


def staging_name(name: str) -> str:
    """A name for what is not complete."""
    return f"{STAGING}{name}@{process_name()}"


def no_links(path: str, flags: int) -> int:
    """An `opener` of open: a link that somebody planted where we write is refused, not followed."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def refuse_links(top: Path, *below: Path) -> None:
    """Raise UserError where a way from `top`, which may be a link of the user's own, to one of the paths `below` is a link."""
    for path in below:
        parts = path.relative_to(top).parts
        for link in (top.joinpath(*parts[:count]) for count in range(1, len(parts) + 1)):
            if link.is_symlink():
                raise UserError(f"{link}: is a link to {os.readlink(link)}, and nothing is written through one that lies in a "
                                "folder that may be somebody else's; put what it leads to in its place")


def replace(staged: Path, path: Path) -> None:
    """Rename over a file, also where the file system renames over none."""
    try:
        os.replace(staged, path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.EPERM, errno.EACCES, errno.ENOTSUP) or not path.is_file():
            raise
        path.unlink()
        os.rename(staged, path)


def link_instead(twin: Path, path: Path) -> None:
    """Make `path` a further name of `twin`, which has the same bytes, where the file system can; else it stays a copy."""
    linked = path.with_name(f"{path.name}.linked")
    with contextlib.suppress(OSError):
        os.link(twin, linked)
        os.replace(linked, path)


def write_text(path: Path, text: str) -> None:
    """Replace a small text file in one step. Raises OSError."""
    staged = path.with_name(staging_name(path.name))
    try:
        staged.unlink(missing_ok=True)
        write_file(staged, lambda file: file.write(text.encode("utf-8")))
        replace(staged, path)
    except OSError:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


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


def did_you_mean(path: Path) -> str:
    """A hint at the folder beside `path` with the most similar name, for the end of an error; or nothing."""
    try:
        names = [p.name for p in path.parent.iterdir() if p.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6) if not path.exists() else []
    return f"; did you mean {path.with_name(near[0])}?" if near else ""


def remove_tree(path: Path) -> None:
    """Delete a folder of ours and what is in it; of a link only the link."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


# ---- room on the disk ------------------------------------------------------------------------------------------

class NoRoom(UserError):
    """A disk that is full; says how much is needed."""
    exit_code = 1


def free_bytes(path: Path) -> float:
    """Free on the disk that `path` is on, or will be; infinite where a disk tells of 0 blocks, as some network disks do."""
    usage = shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists()))
    return usage.free if usage.total else math.inf


def require_room(path: Path, size: int, what: str) -> None:
    """Raise NoRoom unless `size` bytes, and a little, fit on the disk of `path`, as far as it tells."""
    if (free := free_bytes(path)) < size + (1 << 16):
        raise NoRoom(f"{what} needs {size / 1e6:,.1f} MB, but the disk of {path} has {free / 1e6:,.1f} MB free; make room")


def explain(error: Exception, path: Path, size: int) -> str:
    """The message of an error in writing `size` bytes to `path`; libraries hide a full disk behind sentences of their own."""
    if isinstance(error, UserError):
        return str(error)
    if not isinstance(error, OSError) or error.errno in FULL:
        try:
            require_room(path, size, "it")
        except NoRoom as why:
            return str(why)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or path}: {error.strerror}"
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
