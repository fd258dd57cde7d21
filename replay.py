"""Look again at steps that a run has passed: they are computed once more, bit for bit, from the nearest checkpoint before.

    python replay.py runs/demo --steps 3,5,7..40          # snapshots of these steps, as if they had been asked for
    python replay.py runs/demo --steps 160..170 --eval    # evaluations too, into eval_results/
    python replay.py runs/demo --steps 10 --probe my_probe.py
    torchrun --standalone --nproc_per_node=2 replay.py runs/demo --steps 3

Batches, dropout, merges and resets follow from the step and the seed. A replay proves itself by the losses that the run has
recorded on the way; on as many processes as trained they are equal bit for bit. What is there already is never touched.
A probe is a file of yours with a function `probe(model, batch)`, batch (rows, T + 1) int64, the next update's rows on this rank;
what it returns is kept as runs/RUN/probes/FILE/step_N.pt by rank 0.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import config  # noqa: F401  # isort: skip  # before torch, whose threads it teaches to wait
import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import evaluate
import train
from config import Config, ConfigError, UserError, config_from_dict, load_config, to_dict
from data import BatchLoader
from hub import architecture, llama, streaming, tokenizers
from instruments import snapshots
from instruments.record import training_record
from runtime import dist, files, locks, machine, manifest, signals
from runtime.command import Parser, command
from runtime.errors import TrainingError
from runtime.log import log

TINY = 1e-30  # in place of a recorded loss of 0
STRAY = 1e-3  # relative difference of a loss that rounding on other processes does not explain
LOOK = "replay.json"  # in a step folder: how its snapshots were come by

Look = Callable[[train.TrainState, train.Services, "Replay", list[tuple[int, Tensor]]], None]


class Unrecorded:
    """In place of the run folder: what happens on the way has been recorded already."""

    def record(self, metrics: dict[str, Any]) -> None:
        pass


class Replay:
    """A run that is there, and the steps of it that are to be looked at."""

    def __init__(self, run: Path):
        self.run, path = run, run / "training_config.yaml"
        if not path.is_file():
            raise ConfigError(f"{run}: not a run folder{files.did_you_mean(run)}")
        self.options = load_config(path).checkpointing
        self.checkpoints = run / self.options.checkpoints_dir
        files.refuse_links(run, self.checkpoints)
        self.recorded: dict[int, float] = dict(training_record(run)["train/loss"])
        self.compared, self.largest = 0, 0.0  # losses beside those recorded, and how far apart, relative

    def nearest(self, step: int) -> Path:
        """The newest step folder at or before `step` whose training state is whole. Raises ConfigError."""
        for folder in checkpoint.step_folders(self.checkpoints):
            state = folder / self.options.fabric_checkpoint_dir / self.options.fabric_checkpoint_filename
            if int(folder.name.removeprefix("step_")) <= step and state.exists():
                try:
                    checkpoint.verify(folder)
                    return folder
                except UserError as error:
                    log.warning(f"{error}; an older step is taken, if there is one")
        raise ConfigError(f"--steps: no whole training state at or before step {step} is left in {self.checkpoints}")

    def holds_snapshot(self, step: int) -> bool:
        folder = self.checkpoints / f"step_{step}"
        return folder.exists() and manifest.holds(folder, self.options.learning_dynamics_dir)

    def check(self, state: train.TrainState) -> None:
        """Compare the losses since the last line of the record with what it says at this one."""
        if state.step % state.cfg.monitoring.logging.log_every_n_steps and state.step != state.cfg.last_step:
            return
        loss, recorded = state.progress.read(state.step).loss, self.recorded.get(state.step)
        if loss is None or recorded is None:
            return
        self.compared, difference = self.compared + 1, abs(loss - recorded) / max(abs(recorded), TINY)
        self.largest = max(self.largest, difference)
        if difference > STRAY:
            raise TrainingError(f"step {state.step}: the loss is {loss}, and the run recorded {recorded}: this is not its course "
                                "any more (was its code, data or configuration changed?)")


# ---- what is looked at -------------------------------------------------------------------------------------------

def take_snapshot(state: train.TrainState, services: train.Services, replay: Replay, batch: list[tuple[int, Tensor]]) -> None:
    """As train.py's at this step, with the plain model where no checkpoint holds it."""
    cfg, folder = state.cfg.checkpointing, replay.checkpoints / f"step_{state.step}"
    if dist.on_rank0(lambda: replay.holds_snapshot(state.step)):
        return
    rows = {"train": services.dataset.batch(state.step, state.cfg.data.dataloader.batch_size), "val": services.val_rows}
    writers = snapshots.writers(state.model, state.optimizers, rows, cfg, services.tokenizer, state.device)
    tensors = checkpoint.gather_state(state.model, [])["model"]

    def write() -> None:
        proof = {"processes": dist.world_size(), "losses_compared": replay.compared, "largest_difference": replay.largest}
        whole = writers | {LOOK: checkpoint.Writer(lambda file: file.write(json.dumps(proof).encode()))}
        if folder.exists():
            return manifest.extend(folder, whole)
        plain = llama.writers(tensors, state.cfg.model, services.dataset.tokenizer_folder, not_llama=services.not_llama)
        manifest.publish(folder, plain | whole)
    dist.on_rank0(write)


def run_evaluation(state: train.TrainState, services: train.Services, replay: Replay, batch: list[tuple[int, Tensor]]) -> None:
    results = evaluate.run_evaluators(services.evaluators, state.model, f"step {state.step}: ")
    path = replay.run / replay.options.evaluation.eval_results_dir / f"step_{state.step}.json"
    dist.on_rank0(lambda: None if path.exists() else evaluate.write_results(path, results, beside=True))


def run_probe(function: Callable[[Any, Tensor], Any], name: str) -> Look:
    """What calls a user's function, and keeps what it returns."""
    def look(state: train.TrainState, services: train.Services, replay: Replay, batch: list[tuple[int, Tensor]]) -> None:
        found = function(state.model, torch.cat([rows for _, rows in batch]))
        state.model.zero_grad(set_to_none=True)
        path = replay.run / "probes" / name / f"step_{state.step}.pt"
        files.refuse_links(replay.run, path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        if dist.rank() == 0:
            files.write_file(path, lambda file: torch.save(found, file))
            if isinstance(found, (int, float)):
                log.info(f"step {state.step}: {name} {found:.6g}")
    return look


def load_probe(path: Path) -> Callable[[Any, Tensor], Any]:
    if not path.is_file():
        raise ConfigError(f"--probe: {path} is not there; give a Python file with a function probe(model, batch)")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "probe", None)):
        raise ConfigError(f"--probe: {path} has no function probe(model, batch)")
    return module.probe


# ---- the replay ------------------------------------------------------------------------------------------------------

def begin(replay: Replay, folder: Path, device: torch.device) -> tuple[train.TrainState, train.Services]:
    """The run as it was at a step folder, with nothing in it that writes."""
    saved = checkpoint.read_state(folder / replay.options.fabric_checkpoint_dir / replay.options.fabric_checkpoint_filename)
    cfg = config_from_dict(saved["config"])
    cfg.training.micro_batch_size = saved["data"].get("micro_rows", cfg.training.micro_batch_size)  # dropout is drawn for each
    dynamics = cfg.checkpointing.learning_dynamics
    machine.same_everywhere(to_dict(cfg))
    dataset = streaming.open_dataset(cfg.data, cfg.model, saved["step"], saved["data"])
    tokenizer = tokenizers.load_tokenizer(dataset.tokenizer_folder)
    setting = evaluate.Setting(cfg.evaluation, cfg.data.dataset, cfg.model, dataset.folder.parent, tokenizer, device)
    services = train.Services(
        Unrecorded(), dataset, tokenizer, evaluate.make_evaluators(setting),
        setting.snapshot_rows(dynamics) if dynamics else None, checkpoint.Saver(cfg.checkpointing, replay.run), None,
        dist.on_rank0(lambda: architecture.check_code(cfg.model)))
    return train.make_state(cfg, device, saved), services


def replay_from(replay: Replay, folder: Path, steps: list[int], looks: list[Look], device: torch.device, bar: tqdm) -> None:
    """Train on in memory from `folder`, and look at each of `steps`."""
    state, services = begin(replay, folder, device)
    micro, accumulation = state.cfg.micro_batches(dist.world_size())
    with BatchLoader(services.dataset, state.step, micro, accumulation, dist.rank(), dist.world_size(), device) as batches:
        while True:
            batch = train.next_batch(state, services, batches)
            if state.step in steps:
                for look in looks:
                    look(state, services, replay, batch)
                bar.update()
            if state.step == steps[-1]:
                break
            train.advance(state, services, batch)
            replay.check(state)
            services.dataset.advance(state.step)
    services.dataset.close()


def segments(replay: Replay, steps: list[int]) -> list[tuple[Path, list[int]]]:
    """[(step folder to begin at, the steps that it is nearest to)]."""
    found: list[tuple[Path, list[int]]] = []
    for step in steps:
        folder = dist.on_rank0(lambda: replay.nearest(step))
        if found and found[-1][0] == folder:
            found[-1][1].append(step)
        else:
            found.append((folder, [step]))
    return found


def read_steps(text: str) -> list[int]:
    """Steps from words such as 3,5,7..40, sorted. Raises ConfigError."""
    steps: set[int] = set()
    for word in text.split(","):
        if not (match := re.fullmatch(r"(\d{1,12})(?:\.\.(\d{1,12}))?", word.strip())):
            raise ConfigError(f"--steps: {word!r} is neither a step nor a range; write 3,5,7..40")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first > 1_000_000:
            raise ConfigError(f"--steps: {word!r} is no range that goes up, of a million steps at most")
        steps |= set(range(first, last + 1))
    return sorted(steps)


def missing(replay: Replay, steps: list[int], wants_snapshot: bool, cfg: Config) -> list[int]:
    """The steps that hold no snapshot yet; raises ConfigError for those that the run has not reached."""
    newest = max((int(f.name.removeprefix("step_")) for f in checkpoint.step_folders(replay.checkpoints)), default=0)
    reached = max([newest, *replay.recorded])
    if steps[-1] > reached:
        raise ConfigError(f"--steps: the run has come to step {reached}, and {steps[-1]} is beyond; train on first")
    if not wants_snapshot:
        return steps
    if cfg.checkpointing.learning_dynamics is None:
        raise ConfigError("checkpointing.learning_dynamics: is null in this run, so that it says nothing of snapshots; use "
                          "--eval or --probe")
    left = [step for step in steps if not replay.holds_snapshot(step)]
    if len(left) < len(steps):
        log.info(f"{len(steps) - len(left)} of {len(steps)} steps hold their snapshots already")
    return left


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--steps", required=True, help="such as 3,5,7..40")
    parser.add_argument("--eval", action="store_true", help="also evaluate, as the run's configuration says")
    parser.add_argument("--probe", type=Path, metavar="FILE", help="call this file's probe(model, batch), no snapshot")
    args = parser.parse_args()
    replay, steps = Replay(args.run), read_steps(args.steps)
    cfg = load_config(args.run / "training_config.yaml")
    looks: list[Look] = [run_probe(load_probe(args.probe), args.probe.stem)] if args.probe else [take_snapshot]
    looks += [run_evaluation] if args.eval else []
    with dist.session(machine.pick_device(cfg.training.fabric.accelerator), cfg.training.hang_timeout_minutes,
                      cfg.data.dataset.patience_minutes) as device:
        lock = locks.RunLock(args.run)
        dist.on_rank0(lock.acquire)
        try:
            with signals.catching_signals():
                signals.defer_signals()
                left = dist.on_rank0(lambda: missing(replay, steps, looks[0] is take_snapshot and not args.eval, cfg))
                with tqdm(total=len(left), unit=" steps", disable=None if dist.rank() == 0 else True) as bar:
                    for folder, some in segments(replay, left):
                        replay_from(replay, folder, some, looks, device, bar)
        finally:
            if lock.held:
                lock.release()
        same = "equal bit for bit to" if replay.largest == 0 else f"up to {replay.largest:.1e} of their size from"
        proof = f"{replay.compared} losses on the way, {same} those that the run recorded" if replay.compared else \
            "the run has recorded no loss on the way, so that nothing proves them"
        log.info(f"{len(left)} steps replayed; {proof}")


if __name__ == "__main__":
    command(main)
