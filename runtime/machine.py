"""The machine: its devices, and whether all ranks run the same program on it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from config import ConfigError, UserError, flat
from runtime import cpu_kernels, dist
from runtime.errors import TrainingError
from runtime.files import host_name
from runtime.log import log

PEAK_FLOPS = {"H100": 989.5e12, "H200": 989.5e12, "A100": 312e12}  # by a part of the GPU's name
LAUNCHERS = {"srun": "SLURM_STEP_NUM_TASKS", "mpirun": "OMPI_COMM_WORLD_SIZE"}  # how many each says that it started
ROOMS = ("config", "runtime", "hub", "instruments")  # the folders of this project's code


# ---- devices ---------------------------------------------------------------------------------------------------

def pick_device(wanted: str = "auto") -> torch.device:
    """The device of this rank: `wanted` (cuda, mps, cpu) if it is there, otherwise the best that is.

    Raises UserError where processes and GPUs do not fit, or this torch has no kernels for the GPU.
    """
    check_launcher()
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and dist.world_size() == 1,
             "cpu": True}
    kind = wanted if there.get(wanted) else next(k for k, is_there in there.items() if is_there)
    if kind != "cuda":
        return torch.device(kind)
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if processes > gpus:
        raise UserError(f"torchrun started {processes} processes here, and this machine has {gpus} GPU{'s' * (gpus > 1)}; start "
                        f"it with --nproc_per_node={gpus}, or train on the CPU with training.fabric.accelerator=cpu")
    device = torch.device(kind, dist.local_rank())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a GPU that is too old is told by torch in ten lines, and below in one
        capability, built = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if not has_kernels(capability, built):
        raise UserError(f"{torch.cuda.get_device_name(device)}, of compute capability {capability[0]}.{capability[1]}, is not "
                        f"among what this torch {torch.__version__} is built for ({', '.join(built)}); install one that is, or "
                        "train on the CPU with training.fabric.accelerator=cpu")
    return device


def has_kernels(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether code built for `built` (sm_80, compute_90 ...) runs on a GPU of this compute capability.

    Binary code (sm) runs on later minor versions of its major one, PTX (compute) on whatever is later. AMD's (gfx) is not judged.
    """
    for name in built:
        if name.startswith("gfx"):
            return True
        kind, _, number = name.partition("_")
        digits = "".join(c for c in number if c.isdigit())  # sm_90a
        made = int(digits[:-1] or 0), int(digits[-1:] or 0)
        if made <= capability and (kind == "compute" or made[0] == capability[0]):
            return True
    return False


def check_launcher() -> None:
    """Raise UserError where a launcher started several processes without telling torch their places."""
    if "RANK" in os.environ:
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if dist.world_size() > 1 and "LOCAL_RANK" not in os.environ:
            missing.append("LOCAL_RANK")
        if missing:
            raise UserError(f"RANK is set, and {', '.join(missing)} not: start with torchrun, which sets all of them, or unset "
                            "RANK to train in one process")
        return
    for launcher, name in LAUNCHERS.items():
        if int(os.environ.get(name, 1)) > 1:
            raise UserError(f"{launcher} started {os.environ[name]} copies of this command, which would all be the same run; "
                            "have it start one torchrun a machine (as slurm/train.sbatch does), or a single task")


def choose_precision(wanted: str, device: torch.device) -> str:
    """What a run computes in: bf16 products are many times slower where the device only emulates them."""
    emulated = device.type == "cpu" or device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8
    if emulated and wanted != "32-true":
        log.info(f"precision {wanted} is slow on {'a CPU' if device.type == 'cpu' else 'this GPU, which has no bf16'}: training "
                 "in 32-true")
        return "32-true"
    return wanted


def choose_compile(wanted: bool | None, device: torch.device) -> bool:
    """Whether blocks are compiled: as `wanted`, or where it pays and can be done."""
    if wanted is False or wanted is None and device.type != "cuda":
        return False
    headers = Path(sysconfig.get_path("include", "nt" if os.name == "nt" else "posix_prefix")) / "Python.h"
    missing = [*missing_compiler(device), *([] if headers.exists() else ["Python's headers (python3-dev)"])]
    if missing:
        log.warning(f"training.compile: needs {' and '.join(missing)}, which this machine has not; training without it, slower")
    return not missing


def missing_compiler(device: torch.device) -> list[str]:
    """What to install, or to set, for torch to find the compiler that it calls: in words, as a list of one or none.

    On CUDA that is Triton's, for C, elsewhere inductor's, for C++. Each takes its variable as the name of a program, without
    options, and looks no further where it is set.
    """
    variable, what, names = ("CC", "a C compiler (gcc", ("gcc", "clang")) if device.type == "cuda" else (
        "CXX", "a C++ compiler (g++", ("clang++" if sys.platform == "darwin" else "g++",))
    asked = os.environ.get(variable)
    if any(map(shutil.which, names if asked is None else (asked,))):
        return []
    return [f"{what})" if asked is None else f"{what}; {variable} is {asked!r}, which names no program)"]


def prepare(device: torch.device, fast_paths: bool, deterministic: bool) -> None:
    """Set this process's torch to train on a device: memory that is kept, kernels that give the same bits each time.

    CPUs have no others. On CUDA the fastest attention adds up its gradients in whatever order they are ready; where not
    `deterministic`, it may. (cuBLAS is told in config/, since it reads the environment before its first product.)
    """
    if device.type == "cpu" and fast_paths:
        cpu_kernels.keep_freed_memory()
    elif device.type == "cuda":
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # for a search for bugs, and slow


def peak_flops(device: torch.device) -> float | None:
    """Operations a second that the GPU's maker names for dense bf16, where it is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def peak_memory(pid: int | None = None) -> int:
    """Most bytes that a process, this one or another, has held; 0 where the system does not tell.

    On Linux not from getrusage, which also knows who started us.
    """
    status = Path(f"/proc/{pid or 'self'}/status")
    try:
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    except (OSError, TypeError):  # another system, or a process that has ended
        pass
    if pid is not None:
        return 0
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- equal ranks -----------------------------------------------------------------------------------------------

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


def same_data(key: str, folder: Path, fingerprint: str) -> None:
    """Raise ConfigError unless all ranks find the same rows in the dataset folder that the option `key` names."""
    everyone = dist.all_gather_object((host_name(), fingerprint))
    for rank, (host, theirs) in enumerate(everyone):
        if theirs != everyone[0][1]:
            raise ConfigError(f"{key}: {folder} holds other rows on {host} (rank {rank}) than on {everyone[0][0]} (rank 0); copy "
                              "one of them to all machines, or put it on a disk that they share")


@contextlib.contextmanager
def advice(rows: int) -> Iterator[None]:
    """Around training with micro-batches of `rows` rows: what the machine refuses ends in a sentence that says what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "does not have a deterministic implementation" in str(error):
            raise TrainingError(f"{str(error).split()[0]} is used by the model, and has no form that gives the same bits each "
                                "time; set training.deterministic=false, or use another operation") from None
        if not is_out_of_memory(error):
            raise
        fix = (f"use training.micro_batch_size={max(1, rows // 2)}: the global batch stays what it is" if rows > 1 else
               "use a smaller model.max_seq_len or model, or training.strategy=fsdp on more ranks")
        raise TrainingError(f"out of memory with micro-batches of {rows} rows; {fix}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, on a CPU or a GPU, is that there is no memory left."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error) \
        or "not enough memory" in str(error)
