"""What a run records: the sums behind a log line, metrics.jsonl, the console log, the progress bar, exit.json.

    runs/RUN_NAME/training_config.yaml   every option with its value
    runs/RUN_NAME/metrics.jsonl          one strict JSON object a logged step: the record of the run
    runs/RUN_NAME/logs/                  what the console showed
    runs/RUN_NAME/exit.json              why the last process ended

Only rank 0 writes; on the other ranks every method does nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from config import Config, UserError, to_dict
from runtime import dist, locks
from runtime.errors import Ending
from runtime.files import finite, set_aside, write_json, write_text

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def run_folder(cfg: Config) -> Path:
    """The folder of this run, agreed on by all ranks; without a run_name rank 0 names it by the time.

    A worker that torchrun restarts finds the run that its predecessor named: the same launcher started both.
    """
    runs = Path(cfg.checkpointing.runs_dir)
    name = cfg.checkpointing.run_name
    if name is None and dist.rank() == 0:
        name = time.strftime("%Y-%m-%d_%H-%M-%S")
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
            marks = sorted(runs.glob("*/.launcher"), key=lambda path: path.stat().st_mtime)
            name = next((m.parent.name for m in reversed(marks) if m.read_text() == _launcher()), name)
    cfg.checkpointing.run_name = dist.broadcast_object(name)
    return runs / cfg.checkpointing.run_name


def _launcher() -> str:
    return f"{os.uname().nodename if hasattr(os, 'uname') else os.environ.get('COMPUTERNAME')}:{os.getppid()}"


class RunFolder:
    """Everything that a run writes besides checkpoints."""

    def __init__(self, cfg: Config, path: Path):
        self.cfg, self.path, self.writes = cfg, path, dist.rank() == 0
        self.level = LEVELS.index(cfg.monitoring.logging.log_level)
        self.step: int | None = None  # updates made, once training has begun
        self._lock = locks.RunLock(path)
        self._wandb = self._bar = None
        self._waiting: dict[Path, str] = {}  # lines that a full disk did not take

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Around all of a run: no other process may use the folder, and however it ends, exit.json says why.

        Raises ConfigError where another one does. Writes nothing before `open` into a folder that is not there.
        """
        dist.on_rank0(lambda: self._lock.acquire() if self.path.is_dir() else None)
        code, reason = 0, "finished"
        try:
            yield
        except BaseException as error:
            code = getattr(error, "exit_code", 1)
            reason = str(error) if isinstance(error, (UserError, Ending)) else f"{type(error).__name__}: {error}"
            raise
        finally:
            self._close(code, reason)

    def open(self) -> None:
        """Make the folder; what stands in it of an earlier process's end is not true any more."""
        dist.on_rank0(self._open)

    def _open(self) -> None:
        try:
            (self.path / self.cfg.checkpointing.logs_dir).mkdir(parents=True, exist_ok=True)
            if not self._lock.held:
                self._lock.acquire()
            (self.path / "exit.json").unlink(missing_ok=True)
            (self.path / ".launcher").write_text(_launcher())
            write_text(self.path / "training_config.yaml", yaml.safe_dump(to_dict(self.cfg), sort_keys=False))
        except OSError as error:
            raise UserError(f"checkpointing.runs_dir: {self.path} cannot be written ({error.strerror})") from None

    def say(self, words: str, level: str = "INFO") -> None:
        """Show a line on the console, above the progress bar, and keep it in the log."""
        if self.writes and LEVELS.index(level) >= self.level:
            line = words if level == "INFO" else f"{level.lower()}: {words}"
            tqdm.write(line)
            self._append(self.path / self.cfg.checkpointing.logs_dir / "train.log",
                         f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def _append(self, path: Path, line: str) -> None:
        """Add a line to a file; what a full disk does not take is kept, and added when there is room again."""
        lines = self._waiting.pop(path, "") + line
        if not lines:
            return
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(path, size)  # no half line
            self._waiting[path] = lines
            if line and lines == line:  # the first of them
                tqdm.write(f"warning: {path} cannot be written ({error.strerror}); its lines wait in memory for room")

    # ---- metrics ---------------------------------------------------------------------------------------

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def metrics_size(self) -> int:
        """Bytes of metrics.jsonl so far: what a checkpoint keeps, so that a resume can drop what came after."""
        self._append(self.metrics_path, "")  # what waits for room belongs to this step too
        return self.metrics_path.stat().st_size if self.writes and self.metrics_path.exists() else 0

    def set_metrics_aside(self) -> None:
        """Keep the record of a run none of whose checkpoints can be used."""
        if self.writes and self.metrics_path.exists():
            self.say(f"its record so far is kept as {set_aside(self.metrics_path).name}", "WARNING")

    def rewind_metrics(self, size: int) -> None:
        """Drop the lines that were written after a checkpoint, half-written ones included."""
        if self.writes and self.metrics_size() > size:
            os.truncate(self.metrics_path, size)

    def record(self, metrics: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, and mirror it to W&B if that is on."""
        if not self.writes:
            return
        self._append(self.metrics_path, json.dumps(finite(metrics), allow_nan=False) + "\n")
        if self._wandb is not None:
            try:
                self._wandb.log({k: v for k, v in metrics.items() if k != "step"}, step=metrics["step"])
            except Exception as error:  # a mirror must never stop a run
                self.say(f"W&B stopped taking metrics ({error}); metrics.jsonl goes on", "WARNING")
                self._wandb = None

    def save_evaluation(self, step: int, results: dict[str, Any]) -> None:
        if self.writes:
            path = self.path / self.cfg.checkpointing.evaluation.eval_results_dir / f"step_{step}.json"
            try:
                path.parent.mkdir(exist_ok=True)
                write_json(path, results)
            except OSError as error:
                self.say(f"{path} cannot be written ({error.strerror}); its numbers are in metrics.jsonl", "WARNING")

    def start_wandb(self) -> None:
        if not (self.writes and self.cfg.monitoring.save_to_wandb):
            return
        try:
            import wandb
            options = self.cfg.monitoring.wandb
            self._wandb = wandb.init(project=options.project or None, entity=options.entity or None,
                                     name=self.path.name, id=self.path.name, resume="allow",
                                     dir=str(self.path), config=to_dict(self.cfg))
        except Exception as error:  # not installed, not logged in, no network: go on without
            self.say(f"monitoring.save_to_wandb: W&B is not available ({error}); metrics.jsonl is written as always",
                     "WARNING")

    # ---- progress and the end ------------------------------------------------------------------------------

    def start_bar(self, first: int, last: int) -> None:
        self.step = first
        if self.writes:
            self._bar = tqdm(initial=first, total=last, unit=" steps", dynamic_ncols=True, mininterval=0.5,
                             disable=None)  # only on a terminal: a log file keeps the lines alone

    def advance(self, step: int, **shown: str) -> None:
        self.step = step
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False) if shown else self._bar.update(step - self._bar.n)

    def _close(self, code: int, reason: str) -> None:
        if self._bar is not None:
            self._bar.close()
        if not self._lock.held:
            return
        for path in list(self._waiting):
            self._append(path, "")
        try:
            write_json(self.path / "exit.json", {"code": code, "reason": reason, "step": self.step})
        except OSError as error:
            self.say(f"exit.json cannot be written ({error.strerror})", "WARNING")
        self._lock.release()
        if self._wandb is not None:
            try:
                self._wandb.finish(exit_code=code)
            except Exception as error:
                self.say(f"W&B did not finish ({error})", "WARNING")


# ---- sums behind a log line ------------------------------------------------------------------------------------

class Window(NamedTuple):
    """The updates since the last log line."""
    steps: int
    seconds: float  # of training: evaluation, merges and saves are left out
    loss: float | None  # mean over the updates that were not skipped; None if all were
    grad_norm: float  # of the latest update, before clipping
    bad_steps: float  # updates skipped since the run began
    worst_in_a_row: float  # most updates skipped in a row, in this window


class Progress:
    """Sums since the last log line. They live on the device, so that no update waits to read them."""
    NAMES = ("loss_sum", "good_steps", "bad_steps", "bad_in_a_row", "worst_in_a_row", "grad_norm")

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(len(self.NAMES), device=device)
        self.reset_count = 0  # merges so far
        self.merged_at: int | None = None  # the step of the latest merge
        self._start, self._first_step = time.perf_counter(), 0

    def add(self, loss: Tensor, grad_norm: Tensor, bad: Tensor) -> None:
        """One update: its mean loss and gradient norm, and whether (1.) or not (0.) it was skipped."""
        loss_sum, good, total, row, worst, _ = self.sums.unbind()
        row = (row + 1) * bad
        self.sums = torch.stack([loss_sum + torch.where(bad > 0, 0.0, loss), good + 1 - bad, total + bad, row,
                                 torch.maximum(worst, row), grad_norm])

    def start_window(self, step: int) -> None:
        self._start, self._first_step = time.perf_counter(), step

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count as training."""
        begun = time.perf_counter()
        yield
        self._start += time.perf_counter() - begun

    def read(self, step: int) -> Window:
        """The window that ends at `step`; a new one begins."""
        sums = dict(zip(self.NAMES, self.sums.tolist()))
        window = Window(step - self._first_step, time.perf_counter() - self._start,
                        sums["loss_sum"] / sums["good_steps"] if sums["good_steps"] else None,
                        sums["grad_norm"], sums["bad_steps"], sums["worst_in_a_row"])
        self.sums = torch.tensor([0, 0, sums["bad_steps"], sums["bad_in_a_row"], 0, 0], device=self.sums.device)
        self.start_window(step)
        return window

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums.tolist(), "reset_count": self.reset_count, "merged_at": self.merged_at}

    def load(self, state: dict[str, Any]) -> None:
        self.sums = torch.tensor(state["sums"], device=self.sums.device)
        self.reset_count, self.merged_at = state["reset_count"], state.get("merged_at")
