"""What a run records: metrics.jsonl, the console log, the progress bar, exit.json.

    runs/RUN_NAME/training_config.yaml   every option with its value
    runs/RUN_NAME/metrics.jsonl          one strict JSON object a logged step: the record of the run
    runs/RUN_NAME/logs/                  what the console showed
    runs/RUN_NAME/exit.json              why the last process ended

Only rank 0 writes; on the other ranks every method does nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from config import CheckpointingConfig, ConfigError, MonitoringConfig, UserError
from runtime import dist, files, locks, meeting
from runtime.errors import Ending
from runtime.log import line_of, log, printable, speaks, start_logging

SHARED_SECONDS = 60.0  # that a network disk may take to show another machine what was written (NFS: acdirmax)

_unnamed = itertools.count()  # runs without a name that this process has begun


def name_run(cfg: CheckpointingConfig) -> str:
    """The run's name, agreed on by all ranks; without one rank 0 names it by the time, and by what no other start shares.

    A worker that torchrun restarts goes on with the run that its predecessor named.
    """
    name = cfg.run_name
    if name is None and dist.rank() == 0:
        name = dist.settled(f"run_name {next(_unnamed)}", f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{files.process_name()}")
    return dist.broadcast_object(name)


class LogFile(logging.Handler):
    """Hands what is said to the run's log."""

    def __init__(self, folder: RunFolder):
        super().__init__()
        self.folder = folder
        self.addFilter(speaks)

    def emit(self, record: logging.LogRecord) -> None:
        self.folder.append_to_log(line_of(record))


class RunFolder:
    """Everything that a run writes besides checkpoints."""

    def __init__(self, checkpointing: CheckpointingConfig, monitoring: MonitoringConfig, resolved: dict[str, Any]):
        self.path = Path(checkpointing.runs_dir) / checkpointing.run_name
        self.checkpointing, self.monitoring, self.resolved = checkpointing, monitoring, resolved
        self.writes, self.opened = dist.rank() == 0, False
        self.step: int | None = None  # updates made, once training has begun
        self._lock = locks.RunLock(self.path)
        self._wandb = self._tensorboard = self._bar = None
        self._waiting: dict[Path, str] = {}  # lines that wait for the folder, or that a full disk did not take
        start_logging(monitoring.logging.log_level)

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log_path(self) -> Path:
        return self.path / self.checkpointing.logs_dir / "train.log"

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Around all of a run: no other process may use the folder, and however it ends, exit.json says why.

        Raises ConfigError where another one does. Writes nothing before `open` into a folder that is not there.
        """
        handler = LogFile(self)
        if self.writes:
            log.addHandler(handler)
        code, reason = 0, "finished"
        try:
            self.lock()
            with dist.naming_the_lost():
                yield
        except BaseException as error:
            code = getattr(error, "exit_code", 1)
            reason = str(error) if isinstance(error, (UserError, Ending)) else f"{type(error).__name__}: {error}"
            if isinstance(error, meeting.Lost) and dist.rank() == error.teller != 0:  # in place of rank 0, which is gone
                self.opened = self.path.is_dir()
                self._tell_end(code, reason)
            raise
        finally:
            self._close(code, reason)
            log.removeHandler(handler)

    def lock(self) -> None:
        """Nobody else may use the folder from here on, if it is there. Every rank must call it. Raises ConfigError."""
        dist.on_rank0(lambda: self._acquire() if self.path.is_dir() else None)
        self._check_shared()

    def _acquire(self) -> None:
        """The lock of a folder that is there, and may be a stranger's: nothing is written through what is a link in it."""
        names = (self.checkpointing.checkpoints_dir, self.checkpointing.evaluation.eval_results_dir, "tensorboard")
        files.refuse_links(self.path, self.metrics_path, self.log_path, *(self.path / name for name in names))
        if not self._lock.held:
            self._lock.acquire()

    def _check_shared(self) -> None:
        """Raise ConfigError unless all machines see one folder: what rank 0 wrote into its lock, each reads."""
        held, end = dist.on_rank0(self._lock.text), time.monotonic() + SHARED_SECONDS
        while (seen := self._lock.text()) != held and time.monotonic() < end:
            time.sleep(0.2)
        everyone = dist.all_gather_object((files.host_name(), seen == held))
        for rank, (host, shared) in enumerate(everyone):
            if not shared:
                raise ConfigError(f"checkpointing.runs_dir: {self.path} is another folder on {host} (rank {rank}) than on "
                                  f"{everyone[0][0]} (rank 0); put it on a disk that all machines share")

    def open(self, fresh: bool = False, fork: dict[str, Any] | None = None) -> None:
        """Make the folder; what stands in it of an earlier process's end is not true any more.

        For a `fresh` run the record of an attempt that left no checkpoint is kept aside; `fork` tells where it began.
        """
        dist.on_rank0(lambda: self._open(fresh, fork))
        self._check_shared()

    def _open(self, fresh: bool, fork: dict[str, Any] | None) -> None:
        try:
            found = self._lock.held or not self.path.is_dir()
            files.make_folders(self.path / self.checkpointing.logs_dir)
            if not self._lock.held:
                self._lock.acquire()
            if not found and (self.path / self.checkpointing.checkpoints_dir).exists():
                raise UserError(f"checkpointing.run_name: another process has just made {self.path}; start again, or choose "
                                "another run_name")
            for leftover in list(self.path.rglob(f"{files.STAGING}*")):
                if not _being_written(leftover):
                    files.remove_tree(leftover)
            (self.path / "exit.json").unlink(missing_ok=True)
            files.write_text(self.path / "training_config.yaml", yaml.safe_dump(self.resolved, sort_keys=False))
            if fork is not None:
                files.write_json(self.path / "fork.json", fork)
            if fresh and self.metrics_path.exists():
                log.warning(f"the record so far of {self.path} is kept as {files.set_aside(self.metrics_path).name}")
        except OSError as error:
            raise UserError(f"checkpointing.runs_dir: {self.path} cannot be written ({error.strerror})") from None
        self.opened = True

    def append(self, path: Path, line: str) -> None:
        """Add a line to a file; what a full disk does not take is kept, and added when there is room again."""
        lines = self._waiting.pop(path, "") + line
        if not lines:
            return
        if not self.opened:
            self._waiting[path] = lines
            return
        size = None
        try:
            with open(path, "a", encoding="utf-8", opener=files.no_links) as file:
                size = os.fstat(file.fileno()).st_size
                file.write(lines)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(path, size) if size is not None else None  # no half line
            self._waiting[path] = lines
            if line and lines == line:  # the first of them
                tqdm.write(f"warning: {path} cannot be written ({error.strerror}); its lines wait in memory for room")

    def append_to_log(self, line: str) -> None:
        self.append(self.log_path, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    # ---- metrics ---------------------------------------------------------------------------------------

    def sync_metrics(self) -> dict[str, Any]:
        """What a checkpoint keeps of metrics.jsonl so far, once it is on the disk: {metrics_bytes, metrics_sha256}."""
        self.append(self.metrics_path, "")  # what waits for room belongs to this step too
        def on_disk() -> bytes:
            with open(self.metrics_path, "r+b") as file:
                text = file.read()
                os.fsync(file.fileno())
            files.fsync_folder(self.path)  # which may have lost the name of a new file
            return text
        text = b""
        with contextlib.suppress(FileNotFoundError):
            text = files.try_again(on_disk, self.metrics_path) if self.writes else b""
        return {"metrics_bytes": len(text), "metrics_sha256": hashlib.sha256(text).hexdigest()}

    def _recorded(self) -> bytes:
        return files.read_bytes(self.metrics_path) if self.metrics_path.exists() else b""

    def check_no_record(self, save_every: int) -> None:
        """Raise UserError where a run without a checkpoint must once have had one. Every rank must call it."""
        def check() -> None:
            trained = [line["step"] for line in objects(self._recorded())]
            if max(trained, default=0) - min(trained, default=0) > save_every:  # by then its first checkpoint was on the disk
                raise UserError(f"{self.path}: holds the record of {max(trained)} steps, but no checkpoint; put its "
                                f"{self.checkpointing.checkpoints_dir}/ back, choose another run_name, or delete metrics.jsonl "
                                "to begin anew")
        dist.on_rank0(check)

    def rewind_metrics(self, step: int, size: int, sha256: str | None = None) -> bool:
        """Drop the lines that were written after the checkpoint of `step`, which counted `size` bytes; its own evaluation stays.

        Where the record is not the one that was counted, it is kept aside, and what makes sense of it is taken over. Returns
        whether it holds the evaluation of `step`. Every rank must call it.
        """
        return dist.on_rank0(lambda: self._rewind(step, size, sha256))

    def _rewind(self, step: int, size: int, sha256: str | None) -> bool:
        text = self._recorded()
        counted, after = text[:size], objects(text[size:])
        if len(counted) < size or sha256 not in (None, hashlib.sha256(counted).hexdigest()):
            aside = files.set_aside(self.metrics_path).name if text else "nothing"
            kept = {json.dumps(line): line for line in objects(text) if line["step"] <= step}
            counted = "".join(f"{line}\n" for line in kept).encode()
            log.warning(f"{self.metrics_path}: is not what the checkpoint of step {step} counted on (a disk that lost it?); kept "
                        f"as {aside}, and {len(kept)} of its lines taken over: the record before step {step} may have gaps")
        def evaluates(line: dict[str, Any]) -> bool:
            return line["step"] == step and any(key.startswith("eval/") for key in line)
        later = next((json.dumps(line) + "\n" for line in after if evaluates(line)), "")
        if counted + later.encode() != text:
            files.write_text(self.metrics_path, counted.decode() + later)
        return bool(later) or any(map(evaluates, objects(counted[-(1 << 16):])))

    def record(self, metrics: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, and mirror it to W&B if that is on."""
        if not self.writes:
            return
        self.append(self.metrics_path, json.dumps(files.finite(metrics), allow_nan=False) + "\n")
        if self._wandb is not None:
            try:
                self._wandb.log({k: v for k, v in metrics.items() if k != "step"}, step=metrics["step"])
            except Exception as error:  # a mirror must never stop a run
                log.warning(f"W&B stopped taking metrics ({error}); metrics.jsonl goes on")
                self._wandb = None
        if self._tensorboard is not None:
            for key, value in metrics.items():
                if isinstance(value, (int, float)) and key != "step":
                    self._tensorboard.add_scalar(key, value, metrics["step"])

    def save_evaluation(self, step: int, results: dict[str, Any]) -> None:
        if self.writes:
            path = self.path / self.checkpointing.evaluation.eval_results_dir / f"step_{step}.json"
            try:
                files.make_folders(path.parent)
                files.write_json(path, results)
            except OSError as error:
                log.warning(f"{path} cannot be written ({error.strerror}); its numbers are in metrics.jsonl")

    def start_mirrors(self, step: int) -> None:
        """Whatever else shows the record of a run that is at `step`."""
        self._start_wandb()
        if self.writes and self.monitoring.save_to_tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
                self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)
            except ImportError:
                log.warning("monitoring.save_to_tensorboard: TensorBoard is not installed (pip install tensorboard); "
                            "metrics.jsonl is written as always")

    def _start_wandb(self) -> None:
        """Mirror to W&B: a run of the folder's own id there, which is kept in it; nothing is ever asked at the terminal."""
        if not (self.writes and self.monitoring.save_to_wandb):
            return
        try:
            import wandb
            marker, options = self.path / ".wandb_id", self.monitoring.wandb
            if not marker.exists():
                files.write_text(marker, wandb.util.generate_id())
            if not (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") or wandb.api.api_key):
                raise RuntimeError("not logged in: run `wandb login`, or set WANDB_API_KEY")
            self._wandb = wandb.init(project=options.project or None, entity=options.entity or None, name=self.path.name,
                                     id=files.read_text(marker, 1000).strip(), resume="allow", dir=str(self.path),
                                     config=self.resolved)
        except Exception as error:  # not installed, not logged in, no network: go on without
            log.warning(f"monitoring.save_to_wandb: W&B is not available ({error}); metrics.jsonl is written as always")

    # ---- progress and the end ------------------------------------------------------------------------------

    def start_bar(self, first: int, last: int) -> None:
        self.step = first
        if self.writes:
            self._bar = tqdm(initial=first, total=last, unit=" steps", dynamic_ncols=True, mininterval=0.5,
                             disable=None)  # only on a terminal: a log file keeps the lines alone

    def advance(self, step: int, **shown: str) -> None:
        self.step = step
        dist.at_step(step)
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False) if shown else self._bar.update(step - self._bar.n)

    def _close(self, code: int, reason: str) -> None:
        if self._bar is not None:
            self._bar.close()
        if not self._lock.held:
            return
        for path in list(self._waiting):
            self.append(path, "")
        self._tell_end(code, reason)
        self._lock.release()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            try:
                self._wandb.finish(exit_code=code)
            except Exception as error:
                log.warning(f"W&B did not finish ({error})")

    def _tell_end(self, code: int, reason: str) -> None:
        if not code and self.opened:
            log.info(f"finished at step {self.step}; all of it is in {self.path}. Next: python sample.py {self.path}, python "
                     f"analyze.py {self.path}, python evaluate.py {self.path}, python export.py hf {self.path} FOLDER")
        if code:
            self.append_to_log(f"ended with code {code}: {printable(reason)}")
        try:
            files.write_json(self.path / "exit.json", {"code": code, "reason": reason, "step": self.step})
        except OSError as error:
            log.warning(f"exit.json cannot be written ({error.strerror})")


def _being_written(staged: Path) -> bool:
    """Whether the process that a staged file is named after may still be at it: alive here, or elsewhere in the last hour."""
    host, _, pid = staged.name.rpartition("@")[2].rpartition("-")
    if host == files.host_name() and pid.isdigit():
        return locks.birth(int(pid)) != ""
    with contextlib.suppress(OSError):
        return time.time() - staged.stat().st_mtime < 3600
    return False


def objects(text: bytes) -> list[dict[str, Any]]:
    """The JSON objects with a step that stand in lines of a record, whatever else does."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict) and type(value.get("step")) is int:
                found.append(value)
    return found
