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

import json
import os
import pickle
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dist
from config import CheckpointingConfig, Config, ConfigError, UserError, flat, to_dict
from data import sha256

MANIFEST = "manifest.json"
STAGING = ".staging-"
Writer = Callable[[Path], Any]  # writes one file at the path that it is given


class CheckpointError(UserError):
    """A checkpoint that is not there, not whole, or of another run."""


# ---- state of model and optimizers --------------------------------------------------------------------------

def _host(tensor: Tensor) -> Tensor:
    """The whole tensor as a copy in host memory, safe while training goes on. Every rank must call it."""
    whole = dist.full(tensor.detach())
    return whole.clone() if whole.device.type == "cpu" else whole.cpu()


def gather_state(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, dict]:
    """{"model": {name: tensor}, "optimizer": {parameter name: {key: tensor}}}, whole, on every rank's CPU.

    Call it on every rank, between updates.
    """
    state = {"model": {name: _host(tensor) for name, tensor in model.state_dict().items()}, "optimizer": {}}
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, values in optimizer.state.items():
            state["optimizer"][names[id(parameter)]] = {
                key: _host(value) if isinstance(value, Tensor) else value for key, value in values.items()}
    return state


def load_model_state(model: nn.Module, state: dict[str, Tensor], source: str | Path, copy: bool = True) -> None:
    """Copy `state` into an unwrapped model, or only compare. Raises CheckpointError listing names or shapes amiss."""
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own.keys() - state.keys()]
    problems += [f"{name} is unexpected" for name in state.keys() - own.keys()]
    problems += [f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
                 for name, tensor in own.items() if name in state and state[name].shape != tensor.shape]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{source}: does not fit the model: {'; '.join(sorted(problems)[:8])}{more}")
    if copy:
        model.load_state_dict(state)


def load_optimizer_state(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer],
                         state: dict[str, dict[str, Any]]) -> None:
    """Give each parameter that `state` names its saved moments, sharded as the parameter is."""
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        packed, index = {}, 0
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                values = state.get(names[id(parameter)])
                if values is not None:
                    packed[index] = {
                        key: dist.like(v, parameter) if isinstance(v, Tensor) and v.shape == parameter.shape else v
                        for key, v in values.items()}
                index += 1
        optimizer.load_state_dict({"state": packed, "param_groups": optimizer.state_dict()["param_groups"]})


def torch_writer(value: Any) -> Writer:
    return lambda path: torch.save(value, path)


# ---- writing -------------------------------------------------------------------------------------------------

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
    staged = path.with_name(f"{STAGING}{path.name}")
    staged.write_text(text, encoding="utf-8")
    fsync(staged)
    os.replace(staged, path)
    fsync(path.parent)


def _write_manifest(folder: Path, entries: dict[str, dict]) -> None:
    write_text(folder / MANIFEST, json.dumps({"files": entries}, indent=1, sort_keys=True) + "\n")


def publish(folder: Path, files: dict[str, Writer]) -> None:
    """Write `files` (relative path -> writer) as the checkpoint `folder`, which appears only when complete."""
    staged = folder.with_name(f"{STAGING}{folder.name}")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    entries = {}
    for name, write in files.items():
        path = staged / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
        fsync(path)
        entries[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    for parent in {(staged / name).parent for name in files}:
        fsync(parent)
    _write_manifest(staged, entries)
    if folder.exists():
        set_aside(folder)
    os.rename(staged, folder)
    fsync(folder.parent)


def mark_latest(folder: Path) -> None:
    write_text(folder.parent / "latest", f"{folder.name}\n")


def set_aside(folder: Path) -> Path:
    """Rename a folder that is no checkpoint out of the way, keeping it."""
    for number in range(1, 10_000):
        target = folder.with_name(f"{folder.name}.aside-{number}")
        if not target.exists():
            os.rename(folder, target)
            return target
    raise CheckpointError(f"{folder}: too many copies set aside; delete some")


class Saver:
    """Publishes checkpoints in a thread, one in flight, so that training goes on meanwhile."""

    def __init__(self, cfg: CheckpointingConfig, run: Path, published: Callable[[], None] = lambda: None):
        self.cfg, self.folder, self.published = cfg, run / cfg.checkpoints_dir, published
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, files: dict[str, Writer]) -> None:
        """Start to publish step_N; first waits for the one before. Raises what that one raised."""
        self.wait()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._work, args=(self.folder / f"step_{step}", files))
        self._thread.start()

    def _work(self, folder: Path, files: dict[str, Writer]) -> None:
        try:
            publish(folder, files)
            mark_latest(folder)
            prune_training_states(self.folder, self.cfg)
            self.published()
        except BaseException as error:  # raised again in the training thread
            self._error = error

    def wait(self) -> None:
        """Until nothing is in flight; raises what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


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
            if path.is_absolute() or ".." in path.parts or not isinstance(entry["size"], int):
                raise ValueError(f"the entry {name!r} points outside of the folder or has no size")
            str(entry["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} is missing or damaged ({error})") from None
    return entries


def verify(folder: Path) -> None:
    """Compare every file with the manifest. Raises CheckpointError naming the first that differs."""
    for name, entry in read_manifest(folder).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        if path.stat().st_size != entry["size"]:
            raise CheckpointError(f"{folder}: {name} has {path.stat().st_size} bytes instead of {entry['size']}")
        if sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{folder}: {name} differs from its checksum")


def find_resumable(checkpoints: Path, cfg: CheckpointingConfig) -> Iterator[tuple[Path | None, str]]:
    """Yield (None, complaint) for each newer folder that is damaged, then (the newest valid one or None, "").

    Damaged folders are set aside, leftovers of interrupted writes are deleted.
    """
    if checkpoints.is_dir():
        for leftover in checkpoints.glob(f"{STAGING}*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    for folder in step_folders(checkpoints):
        try:
            entries = read_manifest(folder)
            verify(folder)
        except CheckpointError as error:
            yield None, f"{error}; kept as {set_aside(folder).name}"
            continue
        if f"{cfg.fabric_checkpoint_dir}/{cfg.fabric_checkpoint_filename}" in entries:
            mark_latest(folder)
            yield folder, ""
            return
        yield None, f"{folder}: holds no training state (pruned)"
    yield None, ""


def read_state(path: Path) -> dict[str, Any]:
    """The training state in a file, tensors on the CPU; nothing pickled is ever executed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        assert {"step", "model", "config"} <= state.keys()
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    except (AssertionError, AttributeError):
        raise CheckpointError(f"{path}: not a training state of this lab") from None
    return state


def resume(checkpoints: Path, cfg: Config) -> tuple[dict[str, Any] | None, list[str]]:
    """(the newest valid training state for a run of `cfg`, or None: start afresh; what the user should be told).

    Every rank must call it. Raises UserError where run and checkpoint contradict each other.
    """
    found, notes = None, []
    if dist.rank() == 0 and cfg.checkpointing.training.auto_resume:
        for found, complaint in find_resumable(checkpoints, cfg.checkpointing):
            notes += [complaint] if complaint else []
    refused = dist.rank() == 0 and not cfg.checkpointing.training.auto_resume and bool(step_folders(checkpoints))
    found, refused = dist.from_rank0((found, refused))
    if refused:
        raise ConfigError(f"checkpointing.training.auto_resume: is off, but {checkpoints} holds checkpoints; choose "
                          f"another checkpointing.run_name")
    if found is None:
        return None, notes
    state = read_state(found / cfg.checkpointing.fabric_checkpoint_dir / cfg.checkpointing.fabric_checkpoint_filename)
    if differences := contradictions(state["config"], cfg):
        raise ConfigError(f"{found}: is of another run ({'; '.join(differences)}); put these back, or choose another "
                          f"checkpointing.run_name")
    before = state["config"]["training"]["max_steps"]
    if before != cfg.training.max_steps:
        notes.append(f"training.max_steps: {before} -> {cfg.training.max_steps} bends the schedule from here on")
    return state, notes


def contradictions(saved: dict[str, Any], cfg: Config) -> list[str]:
    """What makes `cfg` another run than the one whose config was saved: "key: saved -> now", one each."""
    def facts(tree: dict[str, Any]) -> dict[str, Any]:
        optimization = {k: v for k, v in tree["training"]["optimization"].items() if k != "gradient_accumulation_steps"}
        return {"data.dataloader.batch_size": tree["data"]["dataloader"]["batch_size"], **flat(tree["model"], "model."),
                "training.seed": tree["training"]["seed"], **flat(optimization, "training.optimization.")}
    before, now = facts(saved), facts(to_dict(cfg))
    return [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)]

