"""Checkpoints: plain torch files, published whole or not at all, the same from any number of ranks.

A step folder is written beside its final name, every file is fsynced and listed with its SHA-256 in
manifest.json, and only then the folder is renamed: a folder without a matching manifest is not a checkpoint.

    checkpoints/latest                       the newest complete step's folder name
    checkpoints/step_N/manifest.json         name, size, files.sha256 of every file; written last
    checkpoints/step_N/training_state/checkpoint.pt
        {"step", "model": {name: tensor}, "optimizer": {parameter name: {key: tensor}}, "data", "progress", "config"}

Tensors are whole and float32 on the CPU, so a run may go on with other ranks or another strategy.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import CheckpointingConfig, ConfigError, UserError
from runtime import dist, files
from runtime.files import STAGING, Unreadable, remove_tree, set_aside
from runtime.log import log
from runtime.manifest import CheckpointError, Writer, extend, holds, publish, read_manifest, verify, write_manifest  # noqa: F401
from runtime.tensors import read_tensors

MOMENTS = {"Adam": {"step", "exp_avg", "exp_avg_sq"}, "AdamW": {"step", "exp_avg", "exp_avg_sq"}, "SGD": set(),
           "Muon": {"momentum_buffer"}}  # what torch's optimizers need to find of a parameter

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
    """Give each parameter that `state` names its saved moments, sharded as the parameter is. Raises CheckpointError."""
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        packed, index = optimizer.state_dict()["state"], 0  # what new parameters begin with stays
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                values = state.get(names[id(parameter)])
                if values is not None:
                    _check_moments(values, parameter, optimizer, names[id(parameter)])
                    packed[index] = {
                        key: dist.shard_like(v.contiguous(), parameter) if isinstance(v, Tensor) and v.shape == parameter.shape
                        else v for key, v in values.items()}
                index += 1
        optimizer.load_state_dict({"state": packed, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_moments(values: dict[str, Any], parameter: Tensor, optimizer: torch.optim.Optimizer, name: str) -> None:
    """Raise CheckpointError unless they are what torch's optimizer keeps: fused ones write without a look at the sizes."""
    expected = MOMENTS.get(type(optimizer).__name__)
    if expected is None or not values:
        return
    def fits(key: str, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return key == "step" and isinstance(value, (int, float)) or value is None and key not in expected
        return value.is_floating_point() and (value.numel() == 1 if key == "step" else value.shape == parameter.shape)
    if not (expected <= values.keys() and all(map(fits, values.keys(), values.values()))):
        raise CheckpointError(f"the checkpoint: what it keeps of the optimizer for {name} does not fit the parameter")


def torch_writer(value: Any) -> Writer:
    return Writer(lambda file: torch.save(value, file), tensor_bytes(value))


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts."""
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(tensor_bytes, value.values())) if isinstance(value, dict) else 0


# ---- writing -------------------------------------------------------------------------------------------------

def _twice(work: Callable[[], None], folder: Path) -> None:
    """work(), and once more after an error that may pass."""
    try:
        work()
    except (CheckpointError, OSError) as error:
        log.warning(f"{files.explain(error, folder, 0)}; trying again")
        work()


def mark_latest(folder: Path) -> None:
    files.write_text(folder.parent / "latest", f"{folder.name}\n")


class Saver:
    """Publishes checkpoints in a thread, one in flight, so that training goes on meanwhile."""

    def __init__(self, cfg: CheckpointingConfig, run: Path, published: Callable[[], None] = lambda: None):
        self.cfg, self.folder, self.published = cfg, run / cfg.checkpoints_dir, published
        self.error: Exception | None = None  # of the latest write
        self._thread: threading.Thread | None = None

    def save(self, step: int, writers: dict[str, Writer]) -> None:
        """Start to publish step_N; first waits for the one before."""
        self.wait()
        self._thread = threading.Thread(target=self._work, args=(self.folder / f"step_{step}", writers))
        self._thread.start()

    def _work(self, folder: Path, writers: dict[str, Writer]) -> None:
        try:
            self.error = None
            _twice(lambda: self._publish(folder, writers), folder)
        except Exception as error:  # the training loop checks it
            self.error = CheckpointError(files.explain(error, folder, 0)) if isinstance(error, OSError) else error
            return
        try:
            mark_latest(folder)
            prune_training_states(self.folder, self.cfg)
        except (OSError, UserError) as error:  # the checkpoint is there; `latest` is put right at the next start
            log.warning(f"{folder.parent}: cannot be tidied ({getattr(error, 'strerror', error)})")
        self.published()

    def _publish(self, folder: Path, writers: dict[str, Writer]) -> None:
        """A step of snapshots alone becomes a checkpoint by what is added to it; without that it is made again."""
        state, snapshots_alone = self.cfg.fabric_checkpoint_dir, False
        with contextlib.suppress(CheckpointError):  # damaged: kept aside
            snapshots_alone = folder.exists() and not holds(folder, state)
        if snapshots_alone and any(name.startswith(f"{state}/") for name in writers):
            return extend(folder, writers)
        if snapshots_alone:
            remove_tree(folder)
        publish(folder, writers)

    def extend(self, step: int, writers: dict[str, Writer]) -> None:
        """Start to add files to step_N; first waits for what is in flight."""
        self.wait()
        if writers and self.error is None:
            self._thread = threading.Thread(target=self._extend, args=(self.folder / f"step_{step}", writers))
            self._thread.start()

    def _extend(self, folder: Path, writers: dict[str, Writer]) -> None:
        try:
            _twice(lambda: extend(folder, writers), folder)
        except Exception as error:  # they can be had again from this step; the training state is safe
            log.warning(f"{files.explain(error, folder, 0)}; going on without the snapshots of {folder.name}")
        self.published()

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
    holders = [folder for folder in step_folders(checkpoints)
               if (folder / cfg.fabric_checkpoint_dir).is_dir() and not folder.is_symlink()]  # which would be another run's
    for folder in holders[cfg.keep_training_states:]:
        try:
            entries = read_manifest(folder)
        except CheckpointError:  # a damaged folder is for find_resumable to judge
            continue
        write_manifest(folder, {n: e for n, e in entries.items() if not n.startswith(f"{cfg.fabric_checkpoint_dir}/")})
        remove_tree(folder / cfg.fabric_checkpoint_dir)


# ---- finding and reading -------------------------------------------------------------------------------------

def step_folders(checkpoints: Path) -> list[Path]:
    """The step_N folders, newest first, whether whole or not."""
    if not checkpoints.is_dir():
        return []
    found = [(int(m[1]), p) for p in checkpoints.iterdir() if (m := re.fullmatch(r"step_(\d+)", p.name))]
    if odd := next((p for number, p in found if p.name != f"step_{number}"), None):  # two might be of one step
        raise CheckpointError(f"{odd}: is not how the folder of a step is named; give it the name of its step, such as step_"
                              f"{int(odd.name[5:])}, or move it away")
    return [path for _, path in sorted(found, reverse=True)]


def find_resumable(checkpoints: Path, cfg: CheckpointingConfig) -> tuple[Path | None, list[str]]:
    """(the newest valid step folder with a training state, or None; what is wrong with each newer one).

    Damaged folders are set aside, unreadable ones stay; leftovers of interrupted writes are deleted or, where only the
    renaming was left to do, completed. Raises Unreadable where that is why there is none. Call it with the run's lock held.
    """
    if checkpoints.is_dir():
        for leftover in checkpoints.glob(f"{STAGING}*"):
            _finish_or_remove(leftover)
    complaints, without_state, unreadable = [], [], None
    for folder in files.try_again(lambda: step_folders(checkpoints), checkpoints):
        try:
            entries = verify(folder)
        except CheckpointError as error:
            complaints.append(f"{error}; kept as {set_aside(folder).name}")
            continue
        except Unreadable as error:
            complaints.append(f"{error} (an older step is taken, if there is one)")
            unreadable = unreadable or error
            continue
        if f"{cfg.fabric_checkpoint_dir}/{cfg.fabric_checkpoint_filename}" in entries:
            with contextlib.suppress(OSError):  # a full disk
                mark_latest(folder)
            return folder, complaints
        without_state.append(f"{folder}: holds no training state")  # pruned, or never more than snapshots
    if unreadable is not None:
        raise unreadable
    return None, complaints + without_state


def _finish_or_remove(leftover: Path) -> None:
    target = leftover.with_name(leftover.name.removeprefix(STAGING).partition("@")[0])
    try:
        if target.exists():
            raise CheckpointError(f"{target}: is there already")
        verify(leftover)
        os.rename(leftover, target)
    except CheckpointError:
        remove_tree(leftover)


def read_state(path: Path) -> dict[str, Any]:
    """The training state in a file, tensors on the CPU; nothing pickled is ever executed."""
    state = read_tensors(path)
    kinds = {"step": int, "model": dict, "optimizer": dict, "config": dict, "progress": dict, "data": dict, "metrics_bytes": int}
    if not (isinstance(state, dict) and all(isinstance(state.get(key), kind) for key, kind in kinds.items())
            and min(state["step"], state["metrics_bytes"]) >= 0 and isinstance(state["data"].get("fingerprint"), str)
            and all(type(state["data"].get(key, 0)) is int for key in ("micro_rows", "next_row"))
            and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state["model"].items())
            and all(isinstance(values, dict) for values in state["optimizer"].values())):
        raise CheckpointError(f"{path}: not a training state of this lab")
    return state


def resume(checkpoints: Path, cfg: CheckpointingConfig) -> tuple[Path | None, dict[str, Any] | None, list[str]]:
    """(the newest valid step folder, its training state, what the user should be told); None and None: start afresh.

    Every rank must call it, rank 0 with the run's lock held where there is a folder. Raises UserError.
    """
    def find() -> tuple[Path | None, list[str]]:
        if cfg.training.auto_resume:
            return find_resumable(checkpoints, cfg)
        if step_folders(checkpoints):
            raise ConfigError(f"checkpointing.training.auto_resume: is off, but {checkpoints} holds checkpoints; choose "
                              f"another checkpointing.run_name")
        return None, []

    found, notes = dist.on_rank0(find)
    if found is None:
        return None, None, notes
    state = read_state(found / cfg.fabric_checkpoint_dir / cfg.fabric_checkpoint_filename)
    if found.name != f"step_{state['step']}":
        raise CheckpointError(f"{found}: holds the state of step {state['step']}; give the folder its name back, step_"
                              f"{state['step']}")
    return found, state, notes
