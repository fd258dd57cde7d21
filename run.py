"""What a run tells: the sums behind a log line, metrics.jsonl, the console log, the progress bar, exit.json.

    runs/RUN_NAME/training_config.yaml   every option with its value
    runs/RUN_NAME/metrics.jsonl          one strict JSON object a logged step: the record of the run
    runs/RUN_NAME/logs/                  what the console showed
    runs/RUN_NAME/exit.json              why the last process ended

Only rank 0 writes; on the other ranks every method does nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

import dist
from checkpoint import write_text
from config import Config, UserError, to_dict

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
    cfg.checkpointing.run_name = dist.from_rank0(name)
    return runs / cfg.checkpointing.run_name


def _launcher() -> str:
    return f"{os.uname().nodename if hasattr(os, 'uname') else os.environ.get('COMPUTERNAME')}:{os.getppid()}"


def finite(value: Any) -> Any:
    """`value` fit for strict JSON: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunFolder:
    """Everything that a run writes besides checkpoints."""

    def __init__(self, cfg: Config, path: Path):
        self.cfg, self.path, self.writes = cfg, path, dist.rank() == 0
        self.level = LEVELS.index(cfg.monitoring.logging.log_level)
        self._wandb = self._bar = None
        if self.writes:
            try:
                (path / cfg.checkpointing.logs_dir).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"checkpointing.runs_dir: {path} cannot be made ({error.strerror})") from None
            self._log_file = path / cfg.checkpointing.logs_dir / "train.log"
            (path / ".launcher").write_text(_launcher())
            self.save_config()

    def save_config(self) -> None:
        write_text(self.path / "training_config.yaml", yaml.safe_dump(to_dict(self.cfg), sort_keys=False))

    def say(self, words: str, level: str = "INFO") -> None:
        """Show a line on the console, above the progress bar, and keep it in the log."""
        if self.writes and LEVELS.index(level) >= self.level:
            line = words if level == "INFO" else f"{level.lower()}: {words}"
            tqdm.write(line)
            with open(self._log_file, "a", encoding="utf-8") as log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    # ---- metrics ---------------------------------------------------------------------------------------

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def metrics_size(self) -> int:
        """Bytes of metrics.jsonl so far: what a checkpoint keeps, so that a resume can drop what came after."""
        return self.metrics_path.stat().st_size if self.writes and self.metrics_path.exists() else 0

    def rewind_metrics(self, size: int) -> None:
        """Drop the lines that were written after a checkpoint, half-written ones included."""
        if self.writes and self.metrics_size() > size:
            os.truncate(self.metrics_path, size)

    def record(self, metrics: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, and mirror it to W&B if that is on."""
        if not self.writes:
            return
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(metrics), allow_nan=False) + "\n")
        if self._wandb is not None:
            try:
                self._wandb.log({k: v for k, v in metrics.items() if k != "step"}, step=metrics["step"])
            except Exception as error:  # a mirror must never stop a run
                self.say(f"W&B stopped taking metrics ({error}); metrics.jsonl goes on", "WARNING")
                self._wandb = None

    def save_evaluation(self, step: int, results: dict[str, Any]) -> None:
        if self.writes:
            folder = self.path / self.cfg.checkpointing.evaluation.eval_results_dir
            folder.mkdir(exist_ok=True)
            write_text(folder / f"step_{step}.json", json.dumps(finite(results), indent=1, allow_nan=False) + "\n")

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
        if self.writes:
            self._bar = tqdm(initial=first, total=last, unit=" steps", dynamic_ncols=True, mininterval=0.5,
                             disable=None)  # only on a terminal: a log file keeps the lines alone

    def advance(self, **shown: str) -> None:
        if self._bar is not None:
            if shown:
                self._bar.set_postfix(shown, refresh=False)
            self._bar.update(0 if shown else 1)

    @contextlib.contextmanager
    def reporting(self, step: Callable[[], int]) -> Iterator[None]:
        """Around the training: however it ends, exit.json says why, and at which step."""
        code, reason = 0, "finished"
        try:
            yield
        except BaseException as error:
            code = getattr(error, "exit_code", 1)
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._close(code, reason, step())

    def _close(self, code: int, reason: str, step: int) -> None:
        if not self.writes:
            return
        if self._bar is not None:
            self._bar.close()
        write_text(self.path / "exit.json", json.dumps({"code": code, "reason": reason, "step": step}) + "\n")
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
        return {"sums": self.sums.tolist(), "reset_count": self.reset_count}

    def load(self, state: dict[str, Any]) -> None:
        self.sums = torch.tensor(state["sums"], device=self.sums.device)
        self.reset_count = state["reset_count"]
