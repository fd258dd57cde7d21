"""Model folders on disk: which one a path means, what lies in it, and the format of the weights.

Everything in a folder may come from a stranger: it is read within bounds, nothing in it is executed, and what cannot be
read is one line that names the file.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import CheckpointError, read_manifest, step_folders
from config import CheckpointingConfig, UserError, load_config
from runtime import files
from runtime.log import log
from runtime.tensors import read_tensors

MOST_JSON = 64 << 20  # bytes; the index of the largest models has some 10 MB
FILE_NAME = re.compile(r"\w[\w.-]*\.(safetensors|bin)")  # of weights, as an index may name them: in this folder
DTYPES = {torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16",
          torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32", torch.float64: "F64",
          torch.int64: "I64", torch.uint64: "U64"}  # in the order in which safetensors sorts tensors, last first


# ---- which folder ----------------------------------------------------------------------------------------------

def resolve(path: str | Path) -> Path:
    """A step or model folder as it is; for a run folder its newest whole step. Raises UserError."""
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    run = path / "training_config.yaml"
    options = load_config(run).checkpointing if run.is_file() else CheckpointingConfig()
    for step in (step for folder in (path, path / options.checkpoints_dir) for step in step_folders(folder)):
        if problem := lacks(step):
            log.warning(f"{problem}; an older step is taken, if there is one")
        else:
            return step
    raise CheckpointError(f"{path}: neither a run, nor a checkpoint's step_N, nor a model folder{files.did_you_mean(path)}")


def lacks(step: Path) -> str | None:
    """What a step folder lacks of its model, by its manifest, where it has one."""
    if not (step / "manifest.json").is_file():
        return None if (step / "config.json").is_file() else f"{step}: holds no model"
    try:
        entries = read_manifest(step)
        wrong = [name for name, entry in entries.items()
                 if not ((step / name).is_file() and (step / name).stat().st_size == entry["size"])]
    except UserError as error:
        return str(error)
    return f"{step}: {wrong[0]} is not as its manifest says" if wrong else None


# ---- what lies in it -------------------------------------------------------------------------------------------

def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError, or Unreadable."""
    try:
        return files.read_object(path, MOST_JSON)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({one_line(error)})") from None


def one_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a model folder, in transformers' order of preference. Raises CheckpointError."""
    kinds = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    found = [folder / name for name in kinds if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder}: holds none of {', '.join(kinds)}")
    if len(found) > 1:
        log.info(f"{folder}: holds {' and '.join(path.name for path in found)}; the first is read")
    if found[0].suffix != ".json":
        return found[:1]
    names = read_json(found[0]).get("weight_map")
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    for name in names:
        if not FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{found[0]}: {name[:80]!r} is not the name of a file of weights in this folder")
        if not (folder / name).is_file():
            raise CheckpointError(f"{found[0]}: names {name}, which is not there")
    if not names:
        raise CheckpointError(f"{found[0]}: names no files")
    return [folder / name for name in names]


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, {name: tensor}) of a model folder, its weights as safetensors or .bin, in one file or several."""
    found, tensors = read_json(folder / "config.json"), {}
    for path in weight_files(folder):
        part = read_weights(path)
        if twice := tensors.keys() & part.keys():
            raise CheckpointError(f"{path}: holds {min(twice)}, as another file of the folder does")
        tensors |= part
    return found, tensors


def read_weights(path: Path) -> dict[str, Tensor]:
    """{name: tensor} of one file, mapped, not read. Raises CheckpointError, also for what is no plain tensor of numbers."""
    from safetensors.torch import load_file
    try:
        if path.suffix == ".safetensors":
            files.require_file(path)
            return load_file(path)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read as weights ({one_line(error)})") from None
    tensors = read_tensors(path)
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: holds no tensors by name")
    for name, tensor in tensors.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor) and tensor.dtype in DTYPES):
            raise CheckpointError(f"{path}: {str(name)[:80]!r} is not a plain tensor")
    return tensors


# ---- safetensors -----------------------------------------------------------------------------------------------

def write_safetensors(file: Any, tensors: dict[str, Tensor]) -> None:
    """Write tensors to an open binary file, byte for byte as safetensors' save_file does, but one after the other.

    The format (huggingface.co/docs/safetensors): the length of the header in 8 bytes, little-endian; the header, JSON padded
    with blanks to 8 bytes; the tensors' bytes. The library itself does not look whether the disk took them.
    """
    rank = {dtype: number for number, dtype in enumerate(DTYPES)}
    names, begin = sorted(tensors, key=lambda name: (-rank[tensors[name].dtype], name)), 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name in names:
        tensor, end = tensors[name], begin + tensors[name].nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        file.write(tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy())
