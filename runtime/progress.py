"""The sums behind a log line, kept on the device, and where the algorithm is."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.errors import TrainingError
from runtime.manifest import CheckpointError


def perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, 700.0))  # e^710 overflows


def duration(seconds: float) -> str:
    """In the words of somebody who waits."""
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


class Window(NamedTuple):
    """The updates since the last log line."""
    steps: int
    seconds: float  # of training: evaluation, merges and saves are left out
    loss: float | None  # mean over the updates that were not skipped; None if all were
    grad_norm: float  # of the latest update, before clipping
    bad_steps: float  # updates skipped since the run began
    worst_in_a_row: float  # most updates skipped in a row, in this window

    def metrics(self, step: int, tokens: int, rate: float, waited: float) -> dict[str, Any]:
        """The line of metrics.jsonl; `tokens` are those of an update, `waited` the seconds that the loader was waited for."""
        return {"step": step, "train/loss": self.loss, "train/perplexity": perplexity(self.loss),
                "trainer/learning_rate": rate, "trainer/grad_norm": self.grad_norm,
                "trainer/inf_or_nan_count": int(self.bad_steps), "tokens": step * tokens,
                "tokens_per_second": self.steps * tokens / self.seconds, "data/wait_fraction": waited / self.seconds}

    def refuse_too_many_skipped(self, step: int, limit: int) -> None:
        """Raise TrainingError where `limit` updates in a row were skipped."""
        if self.worst_in_a_row >= limit:
            raise TrainingError(f"step {step}: {self.worst_in_a_row:.0f} updates in a row were skipped because loss or gradient "
                                "was not finite; set training.grad_clip=1.0, or lower training.optimization.lr under another "
                                "run_name")


class Progress:
    """Sums since the last log line. They live on the device, so that no update waits to read them."""
    NAMES = ("loss_sum", "good_steps", "bad_steps", "bad_in_a_row", "worst_in_a_row", "grad_norm")

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(len(self.NAMES), device=device)
        self.reset_count = 0  # merges so far
        self.merged_at: int | None = None  # the step of the latest merge
        self._start, self._first_step = time.perf_counter(), 0
        self._began: tuple[float, int] | None = None  # when the first window that was told ended, and at which step

    def add(self, loss: Tensor, grad_norm: Tensor, bad: Tensor) -> None:
        """One update: its mean loss and gradient norm, and whether (1.) or not (0.) it was skipped."""
        loss_sum, good, total, row, worst, _ = self.sums.unbind()
        row = (row + 1) * bad
        self.sums = torch.stack([loss_sum + torch.where(bad > 0, 0.0, loss), good + 1 - bad, total + bad, row,
                                 torch.maximum(worst, row), grad_norm])

    def count_merge(self, step: int) -> None:
        self.reset_count, self.merged_at = self.reset_count + 1, step

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

    def time_left(self, step: int, last: int) -> str:
        """For the end of a log line: how long the steps up to `last` will take, saves and all; "" if not known yet."""
        began, now = self._began, time.perf_counter()
        if began is None or step >= last:
            self._began = began or (now, step)
            return ""
        return f", {duration((now - began[0]) / (step - began[1]) * (last - step))} left"

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums.tolist(), "reset_count": self.reset_count, "merged_at": self.merged_at}

    def load(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError for what `state` never was."""
        sums, count, merged_at = (state.get(key) for key in ("sums", "reset_count", "merged_at"))
        if not (isinstance(sums, list) and len(sums) == len(self.NAMES) and all(type(number) is float for number in sums)
                and all(0 <= number < 1e15 for number in sums[1:5])  # counts; loss and norm may be infinite
                and type(count) is int and count >= 0 and (merged_at is None or type(merged_at) is int)):
            raise CheckpointError("the checkpoint: its progress is not what a run of this lab keeps")
        self.sums = torch.tensor(sums, device=self.sums.device)
        self.reset_count, self.merged_at = count, merged_at
