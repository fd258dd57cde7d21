"""The machine: its devices, and whether all ranks run the same program on it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from config import ConfigError, flat
from runtime import dist
from runtime.log import log

PEAK_FLOPS = {"H100": 989.5e12, "H200": 989.5e12, "A100": 312e12}  # by a part of the GPU's name
ROOMS = ("config", "runtime", "hub", "instruments")  # the folders of this project's code


def pick_device(wanted: str = "auto") -> torch.device:
    """The device of this rank: `wanted` (cuda, mps, cpu) if it is there, otherwise the best that is."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and dist.world_size() == 1,
             "cpu": True}
    kind = wanted if there.get(wanted) else next(k for k, is_there in there.items() if is_there)
    return torch.device(kind, dist.local_rank()) if kind == "cuda" else torch.device(kind)


def choose_precision(wanted: str, device: torch.device) -> str:
    """What a run computes in: bf16 products are many times slower on a CPU."""
    if device.type == "cpu" and wanted != "32-true":
        log.info(f"precision {wanted} is slow on a CPU: training in 32-true")
        return "32-true"
    return wanted


def peak_flops(device: torch.device) -> float | None:
    """Operations a second that the GPU's maker names for dense bf16, where it is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def same_everywhere(options: dict[str, Any]) -> None:
    """Raise ConfigError unless all ranks run with the same options, the same code and the same torch."""
    root = Path(__file__).parent.parent
    code = {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted([*root.glob("*.py"), *(p for room in ROOMS for p in root.glob(f"{room}/*.py"))])}
    everyone = dist.all_gather_object(flat(options) | code | {"torch": torch.__version__})
    for rank, theirs in enumerate(everyone):
        for key, value in everyone[0].items():
            if theirs.get(key) != value:
                how = "is other code" if key in code else f"is {theirs.get(key)!r}, {value!r} on rank 0"
                raise ConfigError(f"{key}: {how} on rank {rank}; start all ranks with the same words and the same code")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, on a CPU or a GPU, is that there is no memory left."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error) \
        or "not enough memory" in str(error)
