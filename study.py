"""Run a study: arms that differ in one thing, a learning rate chosen for each, then seeds at that rate, and the verdict.

    python study.py config/studies/smoke.yaml                # two arms, two seeds, under 2 minutes
    python study.py config/studies/ablation.yaml --jobs 2    # two runs side by side
    python study.py config/studies/ablation.yaml --report    # the verdict on what has been run so far
    python study.py config/suites/pico-small.yaml            # four scales at equal steps, a minute

Every arm is first run at every rate with a seed of its own, and the rate with the lowest loss on the first `selection_rows`
of val is taken; where that is the lowest or the highest rate, the sweep goes on beyond it, and where there is one rate there
is no sweep. Then it is run at that rate with each of `seeds`; what counts is the loss on the rest of val, which chose
nothing. Runs are ordinary run folders, runs/STUDY/ARM/RUN; table.csv, study.json, study.html and the figures are in
runs/STUDY. Killed at any moment, the same command goes on. Where runs keep snapshots, one figure holds the arms' losses, ranks
and similarities at equal steps.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import config  # noqa: F401  # isort: skip  # before torch, whose threads it teaches to wait
import torch

from config import ConfigError, UserError, load_config
from config.study import ROOT, Job, Plan
from instruments import verdict
from runtime import dist, files, machine, signals
from runtime.command import Parser, command, number
from runtime.locks import RunLock
from runtime.log import log
from runtime.progress import duration

POLL_SECONDS = 0.2
FINAL = "final.json"  # the evaluation that counts, among a run's eval_results
DIVERGED = "loss or gradient was not finite"  # what a run that ended so says in its exit.json


# ---- results of runs ----------------------------------------------------------------------------------------------

def result_of(plan: Plan, job: Job) -> verdict.Result | None:
    """What a run came to; None where it has not ended. A run that diverged has an infinite loss."""
    folder = plan.folder(job)
    try:
        ended, beside = (files.read_object(folder / name) for name in ("exit.json", "study.json"))
    except (OSError, ValueError):
        return None
    if beside.keys() != {"peak_bytes", *verdict.COSTS} or not all(map(_is_cost, beside.values())):
        raise ConfigError(f"{folder / 'study.json'}: is not what a study writes there; move the run's folder away")
    if ended.get("code") and DIVERGED in str(ended.get("reason")):
        return verdict.Result(job.arm, job.rate, job.seed, job.final, math.inf, math.inf, folder, **beside)
    final, selection = folder / "eval_results" / FINAL, verdict.last_loss(folder)
    if ended.get("code") != 0 or job.final and not final.exists():
        return None
    loss = _final_loss(final) if job.final else selection
    return verdict.Result(job.arm, job.rate, job.seed, job.final, loss, selection, folder, **beside)


def _is_cost(value: Any) -> bool:
    return value is None or type(value) in (int, float) and 0 <= value < math.inf


def _final_loss(path: Path) -> float:
    try:
        loss = files.read_object(path)["val"]["loss"]
        if type(loss) is float and math.isfinite(loss):
            return loss
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"{path}: holds no val loss; delete it, and start again")


def sweep_of(plan: Plan, arm: str, results: dict[Job, verdict.Result]) -> tuple[list[Job], float | None]:
    """(the runs of an arm's sweep that are still to be made, the best rate once there are none)."""
    rates, begun = plan.rates(arm), plan.rates(arm)
    if len(begun) == 1:
        return [], begun[0]
    factor = (begun[-1] / begun[0]) ** (1 / (len(begun) - 1))
    while True:
        jobs = [Job(arm, rate, seed, False) for rate in rates for seed in plan.study.sweep_seeds]
        if missing := [job for job in jobs if job not in results]:
            return missing, None
        losses = {rate: sum(results[Job(arm, rate, seed, False)].selection for seed in plan.study.sweep_seeds) for rate in rates}
        best = min(losses, key=losses.__getitem__)
        if math.isinf(losses[best]):
            return [], best
        below, above = rates.index(begun[0]), len(rates) - 1 - rates.index(begun[-1])
        if best == rates[0] and below < plan.study.extend:
            rates = [_rounded(best / factor), *rates]
        elif best == rates[-1] and above < plan.study.extend:
            rates = [*rates, _rounded(best * factor)]
        else:
            return [], best


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def wanted(plan: Plan, results: dict[Job, verdict.Result]) -> tuple[list[Job], int]:
    """(the runs that can be made now, how many more will follow): a function of the results so far, so that it resumes."""
    now, later = [], 0
    for arm in plan.arms:
        sweep, best = sweep_of(plan, arm, results)
        now += sweep
        if best is None:
            later += len(plan.study.seeds)
        else:
            now += [job for seed in plan.study.seeds if (job := Job(arm, best, seed, True)) not in results]
    return now, later


# ---- running -----------------------------------------------------------------------------------------------------

class Worker:
    """A run under way, on a core or a GPU of its own: training, then the evaluation that counts."""

    def __init__(self, plan: Plan, job: Job, device: int | None):
        self.plan, self.job, self.device, self.begun, self.peak = plan, job, device, time.monotonic(), 0
        plan.folder(job).parent.mkdir(parents=True, exist_ok=True)
        self.errors = tempfile.TemporaryFile()  # what the process has to say, read only if it fails
        self.steps = self._commands()
        self.process = self._start(next(self.steps))

    def _commands(self) -> Iterator[list[str]]:
        folder = self.plan.folder(self.job)
        yield ["train.py", str(self.plan.base(self.job.arm)), *self.plan.words(self.job)]
        if self.job.final:
            rows = self.plan.study
            yield ["evaluate.py", str(folder), "evaluation.metrics=[val]", f"evaluation.val.max_rows={rows.final_rows or 'null'}",
                   f"evaluation.val.skip_rows={rows.selection_rows}", "--out", str(folder / "eval_results" / FINAL)]

    def _start(self, words: list[str]) -> subprocess.Popen:
        """One thread each: with two runs of two threads on two cores, threads that wait would keep the others from working."""
        env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        if self.device is not None:
            env["CUDA_VISIBLE_DEVICES"] = str(self.device)
        return subprocess.Popen([sys.executable, str(ROOT / words[0]), *words[1:]], env=env, stdout=subprocess.DEVNULL,
                                stderr=self.errors, preexec_fn=_die_with_study if os.name == "posix" else None)

    def ended(self) -> bool:
        """Whether the run is over; raises UserError where it failed."""
        self.peak = max(self.peak, machine.peak_memory(self.process.pid))
        code = self.process.poll()
        if code is None:
            return False
        self.errors.seek(0)
        told = self.errors.read().decode(errors="replace").strip().splitlines()[-1:] if code else []
        diverged = any(DIVERGED in line for line in told)
        if code and not diverged:
            reason = told[0].removeprefix("error: ") if told else f"exit code {code}"
            raise UserError(f"{self.plan.folder(self.job)}: {reason}")
        folder = self.plan.folder(self.job)
        if not (folder / "study.json").exists():  # before an evaluation: what is measured is training
            files.write_json(folder / "study.json", {"peak_bytes": self.peak or None, **verdict.costs(folder)})
        if not diverged and (following := next(self.steps, None)) is not None:
            self.process = self._start(following)
            return False
        self.errors.close()
        return True


def _die_with_study() -> None:
    """A study that is killed leaves no run behind that would go on in the folder of the next start."""
    dist.die_with_parent("SIGTERM")


def run_all(plan: Plan, jobs: int) -> dict[Job, verdict.Result]:
    """Make every run that the study needs, `jobs` at a time; one that is there already is not made again.

    Raises ConfigError where another process makes them.
    """
    files.make_folders(plan.out)
    lock = RunLock(plan.out, "--out")
    lock.acquire()
    results = _found(plan)
    devices = list(range(torch.cuda.device_count())) or [None]
    workers: list[Worker] = []
    seconds: list[float] = []
    try:
        while True:
            now, later = wanted(plan, results)
            waiting = [job for job in now if job not in [worker.job for worker in workers]]
            if not now:
                return results
            while waiting and len(workers) < jobs:
                busy = [worker.device for worker in workers]
                workers.append(Worker(plan, waiting.pop(0), min(devices, key=busy.count)))
            time.sleep(POLL_SECONDS)
            signals.stop_point()
            for worker in [worker for worker in workers if worker.ended()]:
                workers.remove(worker)
                seconds.append(time.monotonic() - worker.begun)
                results[worker.job] = result_of(plan, worker.job) or _no_result(plan, worker.job)
                now, later = wanted(plan, results)  # anew: two may have ended
                left = (len(now) + later) * sum(seconds) / len(seconds) / jobs
                log.info(f"{plan.name}: {len(results)} runs made, {len(now) + later} or more to come, about "
                         f"{duration(left)}; {worker.job.arm} {worker.job.name}: {_told(results[worker.job])}")
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.wait()
        lock.release()


def _found(plan: Plan) -> dict[Job, verdict.Result]:
    """The results that are there, each checked to be of the run that the study now asks for."""
    results: dict[Job, verdict.Result] = {}
    while True:
        found = {job: result for job in wanted(plan, results)[0] if (result := result_of(plan, job)) is not None}
        if not found:
            return results
        for job in found:
            saved = load_config(plan.folder(job) / "training_config.yaml")
            if saved != plan.config(job):
                raise ConfigError(f"{plan.folder(job)}: is of another study, or of an earlier state of this file; move "
                                  f"{plan.out} away, or put the file back")
        results |= found


def _no_result(plan: Plan, job: Job) -> verdict.Result:
    raise UserError(f"{plan.folder(job)}: ended without a result; see its logs/train.log")


def _told(result: verdict.Result) -> str:
    return "diverged" if math.isinf(result.loss) else f"val loss {result.loss:.4f}"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("study", type=Path, help="a YAML file, such as config/studies/smoke.yaml")
    parser.add_argument("--jobs", type=number(int, 1, 1024), help="runs side by side (default: one for each core or GPU)")
    parser.add_argument("--out", type=Path, help="folder of the study (default: runs/NAME of the study's file)")
    parser.add_argument("--report", action="store_true", help="make no runs; the verdict on those that are there")
    args = parser.parse_args()
    plan = Plan(args.study, args.out)
    with signals.catching_signals():
        signals.defer_signals()  # an exception may come at a moment that has no place for one, and be lost
        results = _found(plan) if args.report else run_all(plan, args.jobs or torch.cuda.device_count() or dist.cores())
    best = {arm: sweep_of(plan, arm, results)[1] for arm in plan.arms}
    against = {arm: plan.against(arm) for arm in plan.arms}
    print(verdict.write(plan.name, against, best, list(results.values()), plan.out))


if __name__ == "__main__":
    command(main)
