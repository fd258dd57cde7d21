"""Checkpoints: plain torch files, published whole or not at all, the same from any number of ranks.

A step folder is written beside its final name, every file is fsynced and listed with its SHA-256 in
manifest.json, and only then the folder is renamed: a folder without a matching manifest is not a checkpoint.

    checkpoints/latest                       the newest complete step's folder name
    checkpoints/step_N/manifest.json         name, size, sha256 of every file; written last
    checkpoints/step_N/training_state/checkpoint.pt
        {"step", "model": {name: tensor}, "optimizer": {parameter name: {key: tensor}}, "data", "progress", "config"}

Tensors are whole and float32 on the CPU, so a run may go on with other ranks or another strategy.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from config import CheckpointingConfig, Config, ConfigError, UserError, contradictions, to_dict
from runtime import dist
from runtime.files import STAGING, NoRoom, fsync, full_disk, need_room, set_aside, sha256, write_text

MANIFEST = "manifest.json"


class Writer(NamedTuple):
    """How to write one file of a checkpoint."""
    write: Callable[[Path], Any]  # to the path that it is given
    size: int = 0  # bytes, about; 0: few


class CheckpointError(UserError):
    """A checkpoint that is not there, not whole, or of another run."""


# ---- state of model and optimizers --------------------------------------------------------------------------

def gather_state(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], everywhere: bool = False) -> dict[str, dict]:
    """{"model": {name: tensor}, "optimizer": {parameter name: {key: tensor}}}, whole copies in host memory.

    On rank 0, or `everywhere`; on other ranks the tensors are None. Call it on every rank, between updates.
    """
    def _host(tensor: Tensor) -> Tensor | None:
        whole = dist.full_tensor(tensor.detach())
        if not (everywhere or dist.rank() == 0):
            return None
        return whole.clone() if whole.device.type == "cpu" else whole.cpu()

    state = {"model": {name: _host(tensor) for name, tensor in model.state_dict().items()}, "optimizer": {}}
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, values in optimizer.state.items():
            state["optimizer"][names[id(parameter)]] = {
                key: _host(value) if isinstance(value, Tensor) else value for key, value in values.items()}
    return state


def load_model_state(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Copy `state` into an unwrapped model. Raises CheckpointError listing names or shapes that do not fit."""
    compare_states(model.state_dict(), state, source)
    model.load_state_dict(state)


def compare_states(expected: dict[str, Tensor], found: dict[str, Tensor], source: str | Path) -> None:
    """Raises CheckpointError listing the missing, unexpected and misshapen tensors of `found`."""
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is unexpected" for name in found.keys() - expected.keys()]
    problems += [f"{name} is {tuple(found[name].shape)}, not {tuple(tensor.shape)}"
                 for name, tensor in expected.items() if name in found and found[name].shape != tensor.shape]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{source}: does not fit the model: {'; '.join(sorted(problems)[:8])}{more}")


def load_optimizer_state(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer],
                         state: dict[str, dict[str, Any]]) -> None:
    """Give each parameter that `state` names its saved moments, sharded as the parameter is."""
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        packed, index = optimizer.state_dict()["state"], 0  # what new parameters begin with stays
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                values = state.get(names[id(parameter)])
                if values is not None:
                    packed[index] = {
                        key: dist.shard_like(v, parameter) if isinstance(v, Tensor) and v.shape == parameter.shape else v
                        for key, v in values.items()}
                index += 1
        optimizer.load_state_dict({"state": packed, "param_groups": optimizer.state_dict()["param_groups"]})


def torch_writer(value: Any) -> Writer:
    return Writer(lambda path: torch.save(value, path), tensor_bytes(value))


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts."""
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(tensor_bytes, value.values())) if isinstance(value, dict) else 0


# ---- writing -------------------------------------------------------------------------------------------------

def _write_manifest(folder: Path, entries: dict[str, dict]) -> None:
    write_text(folder / MANIFEST, json.dumps({"files": entries}, indent=1, sort_keys=True) + "\n")


def publish(folder: Path, files: dict[str, Writer]) -> None:
    """Write `files` (relative path -> writer) as the checkpoint `folder`, which appears only when complete.

    Raises CheckpointError, saying how much is needed, and leaves nothing behind, where the disk is full.
    """
    staged = folder.with_name(f"{STAGING}{folder.name}")
    needed, problem = sum(writer.size for writer in files.values()), None
    try:
        shutil.rmtree(staged, ignore_errors=True)
        need_room(folder, needed, "it")
        staged.mkdir(parents=True)
        entries = {name: _write_file(staged / name, writer) for name, writer in files.items()}
        for parent in {(staged / name).parent for name in files}:
            fsync(parent)
        _write_manifest(staged, entries)
    except BaseException as error:
        shutil.rmtree(staged, ignore_errors=True)
        if not isinstance(error, (OSError, RuntimeError, NoRoom)):  # torch.save tells of a full disk by RuntimeError
            raise
        problem = full_disk(error, folder, needed)
    if problem is not None:  # raised only here: the error above keeps the half-written file open, and its disk space in use
        raise CheckpointError(f"{folder} cannot be written: {problem}")
    _replace(folder, staged, entries)


def _write_file(path: Path, writer: Writer) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write(path)
    fsync(path)
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _replace(folder: Path, staged: Path, entries: dict[str, dict]) -> None:
    """Rename the staged folder. One that stood there is kept aside, unless it held nothing more (see `save` in train.py)."""
    before = set_aside(folder) if folder.exists() else None
    os.rename(staged, folder)
    fsync(folder.parent)
    if before is not None:
        with contextlib.suppress(CheckpointError):
            if read_manifest(before).keys() <= entries.keys():
                shutil.rmtree(before)


def mark_latest(folder: Path) -> None:
    write_text(folder.parent / "latest", f"{folder.name}\n")


class Saver:
    """Publishes checkpoints in a thread, one in flight, so that training goes on meanwhile."""

    def __init__(self, cfg: CheckpointingConfig, run: Path, say: Callable[..., None],
                 published: Callable[[], None] = lambda: None):
        self.cfg, self.folder, self.say, self.published = cfg, run / cfg.checkpoints_dir, say, published
        self.error: Exception | None = None  # of the latest write
        self._thread: threading.Thread | None = None

    def save(self, step: int, files: dict[str, Writer]) -> None:
        """Start to publish step_N; first waits for the one before."""
        self.wait()
        self._thread = threading.Thread(target=self._work, args=(self.folder / f"step_{step}", files))
        self._thread.start()

    def _work(self, folder: Path, files: dict[str, Writer]) -> None:
        try:
            self.error = None
            self._publish(folder, files)
        except Exception as error:  # the training loop checks it
            self.error = error
            return
        try:
            mark_latest(folder)
            prune_training_states(self.folder, self.cfg)
        except OSError as error:  # the checkpoint is there; `latest` is put right at the next start
            self.say(f"{folder.parent}: cannot be tidied ({error.strerror})", "WARNING")
        self.published()

    def _publish(self, folder: Path, files: dict[str, Writer]) -> None:
        try:
            publish(folder, files)
        except CheckpointError as error:
            needed = {n: w for n, w in files.items() if not n.startswith(f"{self.cfg.learning_dynamics_dir}/")}
            if len(needed) == len(files):
                raise
            self.say(f"{error}; writing it without its snapshots", "WARNING")
            publish(folder, needed)

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until nothing is in flight; `error` then tells how it went."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def prune_training_states(checkpoints: Path, cfg: CheckpointingConfig) -> None:
    """Delete all but the newest cfg.keep_training_states training states; snapshots and weights stay."""
    if cfg.keep_training_states is None:
        return
    holders = [folder for folder in step_folders(checkpoints) if (folder / cfg.fabric_checkpoint_dir).is_dir()]
    for folder in holders[cfg.keep_training_states:]:
        try:
            entries = read_manifest(folder)
        except CheckpointError:  # a damaged folder is for find_resumable to judge
            continue
        _write_manifest(folder, {n: e for n, e in entries.items() if not n.startswith(f"{cfg.fabric_checkpoint_dir}/")})
        shutil.rmtree(folder / cfg.fabric_checkpoint_dir)


# ---- finding and reading -------------------------------------------------------------------------------------

def step_folders(checkpoints: Path) -> list[Path]:
    """The step_N folders, newest first, whether whole or not."""
    if not checkpoints.is_dir():
        return []
    found = [(int(m[1]), p) for p in checkpoints.iterdir() if (m := re.fullmatch(r"step_(\d+)", p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def read_manifest(folder: Path) -> dict[str, dict]:
    """{relative path: {size, sha256}}. Raises CheckpointError where it is missing or makes no sense."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in entries.items():
            path = Path(name)
            if path.is_absolute() or ".." in path.parts or set(name) & set("\\:") or not isinstance(entry["size"], int):
                raise ValueError(f"the entry {name!r} points outside of the folder or has no size")
            str(entry["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} is missing or damaged ({error})") from None
    return entries


def verify(folder: Path) -> dict[str, dict]:
    """The manifest's entries, every file compared with them. Raises CheckpointError naming the first that differs."""
    entries = read_manifest(folder)
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        if path.stat().st_size != entry["size"]:
            raise CheckpointError(f"{folder}: {name} has {path.stat().st_size} bytes instead of {entry['size']}")
        if sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{folder}: {name} differs from its checksum")
    return entries


def find_resumable(checkpoints: Path, cfg: CheckpointingConfig) -> tuple[Path | None, list[str]]:
    """(the newest valid step folder with a training state, or None; what is wrong with each newer one).

    Damaged folders are set aside, leftovers of interrupted writes are deleted or, where only the renaming was left to
    do, completed.
    """
    if checkpoints.is_dir():
        for leftover in checkpoints.glob(f"{STAGING}*"):
            _settle(leftover)
    complaints = []
    for folder in step_folders(checkpoints):
        try:
            entries = verify(folder)
        except CheckpointError as error:
            complaints.append(f"{error}; kept as {set_aside(folder).name}")
            continue
        if f"{cfg.fabric_checkpoint_dir}/{cfg.fabric_checkpoint_filename}" in entries:
            with contextlib.suppress(OSError):  # a full disk
                mark_latest(folder)
            return folder, complaints
        complaints.append(f"{folder}: holds no training state (pruned)")
    return None, complaints


def _settle(leftover: Path) -> None:
    target = leftover.with_name(leftover.name.removeprefix(STAGING))
    try:
        if target.exists():
            raise CheckpointError(f"{target}: is there already")
        verify(leftover)
        os.rename(leftover, target)
    except CheckpointError:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def read_state(path: Path) -> dict[str, Any]:
    """The training state in a file, tensors on the CPU; nothing pickled is ever executed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    kinds = {"step": int, "model": dict, "optimizer": dict, "config": dict, "progress": dict, "data": dict, "metrics_bytes": int}
    if not (isinstance(state, dict) and all(isinstance(state.get(key), kind) for key, kind in kinds.items())):
        raise CheckpointError(f"{path}: not a training state of this lab")
    return state


def resume(checkpoints: Path, cfg: Config) -> tuple[dict[str, Any] | None, list[str]]:
    """(the newest valid training state for a run of `cfg`, or None: start afresh; what the user should be told).

    Every rank must call it. Raises UserError where run and checkpoint contradict each other.
    """
    def find() -> tuple[Path | None, list[str]]:
        if cfg.checkpointing.training.auto_resume:
            return find_resumable(checkpoints, cfg.checkpointing)
        if step_folders(checkpoints):
            raise ConfigError(f"checkpointing.training.auto_resume: is off, but {checkpoints} holds checkpoints; choose "
                              f"another checkpointing.run_name")
        return None, []

    found, notes = dist.on_rank0(find)
    if found is None:
        return None, notes
    state = read_state(found / cfg.checkpointing.fabric_checkpoint_dir / cfg.checkpointing.fabric_checkpoint_filename)
    try:
        differences = contradictions(state["config"], to_dict(cfg))
        before = state["config"]["training"]["max_steps"]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{found}: holds no configuration of this lab ({error})") from None
    if differences:
        raise ConfigError(f"{found}: is of another run ({'; '.join(differences)}); put these back, or choose another "
                          f"checkpointing.run_name")
    if before != cfg.training.max_steps:
        notes.append(f"training.max_steps: {before} -> {cfg.training.max_steps} bends the schedule from here on")
    return state, notes
