"""Files of torch.save, which may be a stranger's: nothing in them is executed, and no few bytes become many.

weights_only lets no code through, but a small archive may still hold gigabytes of zeros, a tensor that shows one number a
trillion times, or lists in lists that take forever to walk: what is read here is as large as the file, and no larger.
"""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime import files
from runtime.manifest import CheckpointError

MOST_PICKLED = 64 << 20  # bytes that tell what there is, besides the tensors
MOST_NUMBER = 1 << 64
DEEPEST = 100  # containers in containers
FEW = 10_000  # things, which any file may hold


def read_tensors(path: Path) -> Any:
    """What torch.save wrote: tensors, mapped, in plain containers. Raises CheckpointError, or Unreadable."""
    try:
        files.require_file(path)
        archive = zipfile.is_zipfile(path)
        pickled = _check_archive(path) if archive else path.stat().st_size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, on what it will refuse
            value = files.try_again(lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=archive), path)
        _check(value, path.stat().st_size, pickled)
    except files.Unreadable:
        raise
    except (Exception, RecursionError) as error:  # of a damaged pickle or archive: AssertionError, struct.error, anything
        words = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise CheckpointError(f"{path}: cannot be read ({words[:200] or type(error).__name__})") from None
    return value


def _check_archive(path: Path) -> int:
    """Bytes of what is pickled. Raises ValueError where the archive unpacks to more than it is."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    pickled = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
        raise ValueError("its archive is compressed, which torch.save does not do")
    if sum(entry.file_size for entry in entries) > path.stat().st_size or pickled > MOST_PICKLED:
        raise ValueError("its archive says that it holds more than it can")
    return pickled


def _check(value: Any, size: int, pickled: int) -> None:
    """Raise ValueError where a file of `size` bytes cannot hold what was read from it."""
    waiting, seen, held, most = [(value, 0)], 0, 0, max(FEW, pickled)
    while waiting:
        (item, depth), seen = waiting.pop(), seen + 1
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")
        if seen > most:  # each takes a byte, unless one list stands in many places
            raise ValueError("it holds more things than bytes that tell of them")
        if isinstance(item, (dict, list, tuple, set, frozenset)):
            inside = [*item.keys(), *item.values()] if isinstance(item, dict) else item
            waiting += [(inner, depth + 1) for inner in inside]
        elif isinstance(item, int) and abs(item) > MOST_NUMBER:
            raise ValueError("a number in it is impossibly large")
        elif isinstance(item, Tensor):
            plain = item.layout == torch.strided and item.device.type == "cpu" and not item.is_quantized
            if not plain or item.nbytes > item.untyped_storage().nbytes():
                raise ValueError("a tensor in it is not plain, or is larger than its bytes")
            held += item.nbytes
    if held > 2 * size:  # tied embeddings may count twice
        raise ValueError("its tensors are larger than it is")
