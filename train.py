"""Train a Pico decoder, full-rank or with ReLoRA.

    torchrun --standalone --nproc_per_node=2 train.py config/demo.yaml [section.key=value ...]
    python train.py config/demo.yaml training.max_steps=100            # one process; docs/options.md has the options

Read `loop` first: save when due; merge when due; set the learning rate; accumulate; step; log. "Step N" is the state
after N global batches and before batch N + 1. Killed at any moment, the same command goes on, to the same weights.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import config  # isort: skip  # before torch, whose threads it teaches to wait
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import evaluate
from config import Config, UserError, load_config, to_dict
from data import BatchLoader, DataError, TokenDataset, to_device
from hub import architecture, llama, streaming, tokenizers, uploads
from instruments import faults, forks, planning, snapshots
from model import PicoDecoder
from optim import make_optimizers, set_learning_rate
from relora import apply_relora, has_adapters, merge_and_reinit, merge_due, relora_layers, reset_optimizer
from runtime import dist, graphs, machine, signals
from runtime.command import Parser, command
from runtime.errors import Ending, TrainingError
from runtime.log import log
from runtime.progress import Progress
from runtime.run_folder import RunFolder, name_run
from runtime.wrap import check_sharding, eval_mode, gradient_sync, parallelize, reshard, wrapping

MERGE_TOLERANCE = 1e-4  # relative change of the logits that rounding explains
PROBE_TOKENS = 128  # of the row on which a merge is checked
VOTE_SECONDS = 0.5  # between two votes of ranks that wait for data


@dataclass
class TrainState:
    """What the algorithm changes, and what it is told. `model` is the bare decoder; `wrapped`, under DDP or FSDP2, trains."""
    cfg: Config
    device: torch.device
    precision: str
    model: PicoDecoder
    wrapped: nn.Module
    optimizers: list[torch.optim.Optimizer]
    progress: Progress  # sums behind the next log line, merges so far and where the latest was
    step: int = 0
    graph: graphs.Graph | bool | None = None  # of a micro-batch, on a GPU; False: none can be made


@dataclass
class Services:
    """What a run has beside the algorithm."""
    folder: RunFolder
    dataset: TokenDataset
    tokenizer: tokenizers.Tokenizer
    evaluators: dict[str, evaluate.Evaluator]
    val_rows: np.ndarray | None  # of the val snapshot
    saver: checkpoint.Saver
    uploader: uploads.Uploader | None
    not_llama: str | None  # why the model is no Llama to others
    saved: int | None = None  # the step of the newest training state
    evaluated: int | None = None  # of the newest evaluation
    snapshot: int | None = None  # of the newest snapshots


# ---- the loop ------------------------------------------------------------------------------------------------

def train(cfg: Config, device: torch.device) -> None:
    micro, accumulation = cfg.micro_batches(dist.world_size())
    check_sharding(cfg, device)
    cfg.checkpointing.run_name = name_run(cfg.checkpointing)
    folder = RunFolder(cfg.checkpointing, cfg.monitoring, to_dict(cfg))
    machine.same_everywhere(to_dict(cfg))
    with signals.catching_signals(), folder.in_use():
        state, services = setup(cfg, device, folder)
        with (dist.watched(cfg.training.hang_timeout_minutes), machine.advice(micro),
              BatchLoader(services.dataset, state.step, micro, accumulation, dist.rank(), dist.world_size(), device) as batches,
              contextlib.closing(services.dataset)):  # closed first, so that a waiting loader can stop
            signals.defer_signals()
            try:
                loop(state, services, batches)
            except Ending:
                save_before_ending(state, services)
                raise
        if services.uploader is not None:
            services.uploader.close(cfg.checkpointing.upload_grace_seconds, signals.stop_signal)


def loop(state: TrainState, services: Services, batches: BatchLoader) -> None:
    """Save, evaluate and snapshot; merge; learning rate; accumulate and step; log; until the last step.

    Raises Ending, on all ranks together, when training must end early.
    """
    cfg = state.cfg
    services.folder.start_bar(state.step, cfg.last_step)
    state.progress.start_window(state.step)
    while True:
        due = cfg.due(state.step, first=services.saved is None)
        if state.step < cfg.last_step or due.snapshot and services.snapshot != state.step:
            batch = next_batch(state, services, batches)  # before the snapshot, which looks at the same rows and could not wait
        if any(due):
            with state.progress.paused():
                save(state, services, due)
        if state.step >= cfg.last_step:
            break
        advance(state, services, batch)
        services.folder.advance(state.step)
        services.dataset.tell_epoch(state.step, cfg.data.dataloader.batch_size)
        if state.step % cfg.monitoring.logging.log_every_n_steps == 0 or state.step == cfg.last_step:
            record_progress(state, services, batches)
        services.dataset.advance(state.step)
    services.saver.wait()
    end_together(services)


def next_batch(state: TrainState, services: Services, batches: BatchLoader) -> list[tuple[int, Tensor]]:
    """This rank's micro-batches of the next update. All ranks wait for their data together, and end together."""
    batch = problem = None
    while True:
        try:
            batch = batch or batches.next(VOTE_SECONDS)
        except DataError as error:
            problem = error
        if not end_together(services, problem, waiting=batch is None):
            return batch


def end_together(services: Services, problem: UserError | None = None, waiting: bool = False) -> int:
    """A vote, as signals.end_together holds it, also on whether a checkpoint could not be written."""
    failed = services.saver.error and TrainingError(str(services.saver.error))
    return signals.end_together(problem or failed, waiting)


def advance(state: TrainState, services: Services, batch: list[tuple[int, Tensor]]) -> None:
    """From one step to the next: adapters and a merge where they are due, learning rate, update."""
    relora = state.cfg.model.relora
    if relora and not relora_layers(state.model) and state.step >= relora.warm_start_steps:
        begin_relora(state)
    if merge_is_due(state):
        with state.progress.paused():
            merge(state, services)
    set_learning_rate(state.optimizers, state.step, state.cfg.training, relora)
    train_step(state, batch)


def train_step(state: TrainState, batch: list[tuple[int, Tensor]]) -> None:
    """One update on this rank's micro-batches."""
    update(state, accumulate(state, batch))
    state.step += 1


def accumulate(state: TrainState, batch: list[tuple[int, Tensor]]) -> Tensor:
    """Forward and backward of each micro-batch; the mean loss over all ranks."""
    def forward_backward(rows: Tensor) -> Tensor:
        with torch.autocast(state.device.type, torch.bfloat16, enabled=state.precision == "bf16-mixed", cache_enabled=False):
            micro_loss = state.wrapped(rows[:, :-1], rows[:, 1:]) / len(batch)
        micro_loss.backward()
        return micro_loss.detach()
    state.graph = graphs.renewed(state.graph, state.cfg.training.cuda_graph, forward_backward, state.model, batch)
    loss = torch.zeros((), device=state.device)
    for number, (index, rows) in enumerate(batch):  # rows (micro, T + 1)
        if number:
            signals.stop_point()  # an unfinished update is dropped
        torch.manual_seed(dist.derive_seed(state.cfg.training.seed, state.step, index))  # of dropout
        with gradient_sync(state.wrapped, number == len(batch) - 1):  # around the forward too, or DDP reduces every time
            loss += state.graph(rows, number) if state.graph else forward_backward(rows)
    return dist.all_reduce_sum(loss) / dist.world_size()


def update(state: TrainState, loss: Tensor) -> None:
    """Clip and step; skipped by all ranks together if loss or gradient is not finite on any."""
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    grad_norm = dist.full_tensor(nn.utils.get_total_norm([p.grad for p in parameters]))
    if state.cfg.training.grad_clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, state.cfg.training.grad_clip, grad_norm)
    bad = 1 - (loss.isfinite() & grad_norm.isfinite()).float()  # the same on every rank, and still on the device
    for optimizer in state.optimizers:
        if optimizer.defaults.get("fused"):  # fused optimizers, and our Muon, read the flag on the device
            optimizer.grad_scale, optimizer.found_inf = None, bad
            optimizer.step()
        elif not bad.item():  # others have no such flag: this waits for the device
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    state.progress.add(loss, grad_norm, bad)


def record_progress(state: TrainState, services: Services, batches: BatchLoader) -> None:
    """One line of metrics: means since the last line, over all tokens on all ranks."""
    cfg, window = state.cfg, state.progress.read(state.step)
    window.refuse_too_many_skipped(state.step, cfg.training.max_nonfinite_steps)
    rate = state.optimizers[0].param_groups[0]["lr"]
    metrics = window.metrics(state.step, cfg.data.dataloader.batch_size * cfg.model.max_seq_len, rate, batches.take_wait())
    speed, norm, left = metrics["tokens_per_second"], window.grad_norm, state.progress.time_left(state.step, cfg.last_step)
    if (peak := machine.peak_flops(state.device)) is not None:
        metrics["mfu"] = speed * state.model.flops_per_token() / (peak * dist.world_size())
    services.folder.record(metrics)
    loss = "no finite loss" if window.loss is None else f"loss {window.loss:.4f}"
    log.info(f"step {state.step}: {loss}, learning rate {rate:.2e}, gradient norm {norm:.3f}, {speed:,.0f} tokens/s{left}")
    services.folder.advance(state.step, loss=loss.removeprefix("loss "), lr=f"{rate:.1e}", tok_s=f"{speed:,.0f}")


# ---- merging -------------------------------------------------------------------------------------------------

def merge_is_due(state: TrainState) -> bool:
    relora, warmup = state.cfg.model.relora, state.cfg.training.optimization.lr_warmup_steps
    return state.progress.merged_at != state.step and merge_due(state.step - faults.merge_delay(relora), relora, warmup)


def merge(state: TrainState, services: Services) -> None:
    """Merge, reinitialise and reset; check on one small row that the model computes what it did before."""
    relora, seed = state.cfg.model.relora, state.cfg.training.seed
    before, loss_before = probe(state, services)
    scales = [dist.full_tensor(p.detach()).clone() for name, p in state.model.named_parameters() if name.endswith(".scaling")]
    norm = merge_and_reinit(state.model, seed=seed, step=state.step)
    zeroed = reset_optimizer(state.optimizers, state.model, seed=seed, step=state.step)
    after, loss_after = probe(state, services)
    change = ((after - before).abs().max() / before.abs().max()).item()
    state.progress.count_merge(state.step)
    services.folder.record({
        "step": state.step, "relora/reset_count": state.progress.reset_count, "relora/opt_zeroed": zeroed,
        "relora/loss_before": loss_before, "relora/loss_after": loss_after, "relora/logit_change": change,
        "relora/update_norm": norm} | ({"relora/sf_mean": torch.cat(scales).mean().item(),
                                        "relora/sf_std": torch.cat(scales).std(correction=0).item()} if scales else {}))
    held = "unchanged" if change <= MERGE_TOLERANCE else "CHANGED"
    log.info(f"step {state.step}: merge {state.progress.reset_count}, a delta of norm {norm:.3f}, the model {held} by it (to "
             f"{change:.0e} of its logits), {zeroed:.2%} of the adapters' moments are 0")
    if not change <= MERGE_TOLERANCE:
        message = f"step {state.step}: the merge changed the logits by {change:.1e} of their size"
        if not relora.reference_faults:
            raise TrainingError(f"{message}, more than {MERGE_TOLERANCE:.0e}; the last checkpoint is from before it")
        log.warning(f"{message} (model.relora.reference_faults is set)")


@torch.no_grad()
def probe(state: TrainState, services: Services) -> tuple[Tensor, float]:
    """(logits, mean loss) on the start of the next row; eval mode, float32."""
    ids = to_device(services.dataset.batch(state.step, state.cfg.data.dataloader.batch_size)[:1, :PROBE_TOKENS + 1], state.device)
    with eval_mode(state.model, state.device):
        logits = state.model(ids[:, :-1])  # (1, PROBE_TOKENS, V)
    return logits, F.cross_entropy(logits[0], ids[0, 1:]).item()


def begin_relora(state: TrainState) -> None:
    """End a warm start: freeze the targets and add adapters. What is wrapped changes, so all is built again."""
    whole, state.graph = checkpoint.gather_state(state.model, state.optimizers, everywhere=True), None
    state.model, state.wrapped, state.optimizers = build(state.cfg, state.device, True, whole["model"], whole["optimizer"])
    log.info(f"step {state.step}: the warm start is over; {state.model.num_parameters(trainable_only=True):,} of "
             f"{state.model.num_parameters():,} parameters train from here on")


# ---- saving --------------------------------------------------------------------------------------------------

def save(state: TrainState, services: Services, due: config.Due) -> None:
    """The training state first; then what is derived from it, which a kill or too little memory may spoil."""
    cfg, saver = state.cfg.checkpointing, services.saver
    if (due.state or due.snapshot) and services.saved != state.step:
        write_step(state, services, resumable=due.state)
    if due.snapshot or due.evaluation and services.evaluators:
        saver.wait()
    if due.evaluation and services.evaluated != state.step:
        results = evaluate.run_evaluators(services.evaluators, state.model, f"step {state.step}: ")
        if results:
            services.folder.save_evaluation(state.step, results)
            services.folder.record({"step": state.step} | evaluate.flat_metrics(results))
        services.evaluated = state.step
    if due.snapshot and services.snapshot != state.step:
        rows = {"train": services.dataset.batch(state.step, state.cfg.data.dataloader.batch_size), "val": services.val_rows}
        saver.extend(state.step, snapshots.writers(state.model, state.optimizers, rows, cfg, services.tokenizer, state.device))
        services.snapshot = state.step


def write_step(state: TrainState, services: Services, resumable: bool = True) -> None:
    """Start to write the plain model, and what a resume needs."""
    cfg, saver = state.cfg.checkpointing, services.saver
    saver.wait()  # before there is a second copy of everything
    whole = checkpoint.gather_state(state.model, state.optimizers if resumable else [])
    services.saved = state.step if resumable else services.saved
    if dist.rank() == 0:
        tokenizer = services.dataset.tokenizer_folder
        writers = llama.writers(whole["model"], state.cfg.model, tokenizer, not_llama=services.not_llama)
        if resumable:
            next_row = services.dataset.first_row + state.step * state.cfg.data.dataloader.batch_size
            data = services.dataset.state | {"next_row": next_row, "micro_rows": state.cfg.micro_batches(dist.world_size())[0]}
            whole |= {"step": state.step, "config": to_dict(state.cfg), "progress": state.progress.state(), "data": data,
                      "random": {"seed": state.cfg.training.seed},  # from which, with the step, all randomness follows
                      **services.folder.sync_metrics()}
            writers[f"{cfg.fabric_checkpoint_dir}/{cfg.fabric_checkpoint_filename}"] = checkpoint.torch_writer(whole)
        saver.save(state.step, writers)


def save_before_ending(state: TrainState, services: Services) -> None:
    """Training ends early: drop the unfinished update, and write a checkpoint of the last whole step."""
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)
    reshard(state.model)
    faults.undo_reset(state.model)  # as the update that is dropped would have done
    services.saver.wait()
    failed = dist.max_over_ranks(services.saver.error is not None)[0]  # only rank 0 writes, and knows of errors
    if services.saved != state.step or failed:
        log.info(f"writing a checkpoint of step {state.step}")
        write_step(state, services)
        services.saver.wait()
    dist.barrier()  # when one rank has ended, torchrun gives the others 30 s


# ---- how a run is put together -----------------------------------------------------------------------------------

def setup(cfg: Config, device: torch.device, folder: RunFolder) -> tuple[TrainState, Services]:
    """Open data, run folder and evaluation; resume, or start. Raises UserError before anything is trained."""
    model, dynamics = architecture.skeleton(cfg.model), cfg.checkpointing.learning_dynamics
    if dynamics is not None:  # an option that names layers which the model has not is refused before all else
        snapshots.chosen_layers(model, dynamics.layer_suffixes)
    folder.lock()
    found, saved, notes = checkpoint.resume(folder.path / cfg.checkpointing.checkpoints_dir, cfg.checkpointing)
    if saved is not None:
        notes += config.check_resume(saved, cfg, dist.world_size(), found)
    elif not notes:  # else its checkpoints are there, and are damaged
        folder.check_no_record(cfg.checkpointing.save_every_n_steps)
    saved = saved or forks.fork(cfg)
    dataset = streaming.open_dataset(cfg.data, cfg.model, saved["step"] if saved else 0, saved["data"] if saved else None)
    tokenizer = tokenizers.load_tokenizer(dataset.tokenizer_folder)
    setting = evaluate.Setting(cfg.evaluation, cfg.data.dataset, cfg.model, dataset.folder.parent, tokenizer, device)
    evaluators, val_rows = evaluate.make_evaluators(setting), setting.snapshot_rows(dynamics) if dynamics else None
    weights = llama.starting_weights(cfg.training.start_from, cfg.model) if cfg.training.start_from and not saved else None
    not_llama = dist.on_rank0(lambda: architecture.check_code(cfg.model))
    folder.open(fresh=found is None, fork=saved and saved.get("fork"))
    sends = cfg.checkpointing.save_to_hf and dist.rank() == 0
    uploader = uploads.Uploader(folder.path, cfg.checkpointing, fresh=found is None) if sends else None
    saver = checkpoint.Saver(cfg.checkpointing, folder.path, uploader.kick if uploader else lambda: None)
    services = Services(folder, dataset, tokenizer, evaluators, val_rows, saver, uploader, not_llama)
    notes += [f"the model is no Llama to other programs: {not_llama}; checkpoints keep our own names"] if not_llama else []
    state = make_state(cfg, device, saved, weights)
    notes += config.warnings(cfg, dist.world_size(), device.type)
    for note in [*notes, *planning.misfits(cfg, state.model, state.optimizers, state.step)]:
        log.warning(note)
    if found is not None:
        resume(state, services, found, saved)
    describe(state, services)
    folder.start_mirrors(state.step)
    return state, services


def resume(state: TrainState, services: Services, found: Path, saved: dict[str, Any]) -> None:
    """Go on from the step folder `found`; what should be derived from that step and is not, is left to do."""
    services.saved = state.step
    if services.folder.rewind_metrics(state.step, saved["metrics_bytes"], saved.get("metrics_sha256")):
        services.evaluated = state.step
    if dist.on_rank0(lambda: checkpoint.holds(found, state.cfg.checkpointing.learning_dynamics_dir)):
        services.snapshot = state.step
    log.info(f"resumed at step {state.step}")


def make_state(cfg: Config, device: torch.device, saved: dict | None = None, weights: dict | None = None) -> TrainState:
    """As the training state `saved` has it; without one at step 0, with `weights` or the model's own."""
    precision = machine.choose_precision(cfg.training.fabric.precision, device)
    if saved is None:
        adapters = cfg.model.relora is not None and cfg.model.relora.warm_start_steps == 0
        return TrainState(cfg, device, precision, *build(cfg, device, adapters, weights), Progress(device))
    parts = build(cfg, device, has_adapters(saved["model"]), saved["model"], saved["optimizer"])
    state = TrainState(cfg, device, precision, *parts, Progress(device), saved["step"])
    state.progress.load(saved["progress"])
    if state.progress.merged_at == state.step:
        faults.repeat_reset(state.model, cfg.training.seed, state.step)
    return state


def build(cfg: Config, device: torch.device, adapters: bool, weights: dict[str, Tensor] | None = None,
          optimizer_state: dict[str, dict] | None = None) -> tuple[PicoDecoder, nn.Module, list[torch.optim.Optimizer]]:
    """(model, wrapped, optimizers); `weights` with adapters go in after these are made, plain ones before."""
    torch.manual_seed(cfg.training.seed)
    machine.prepare(device, cfg.model.fast_paths, cfg.training.deterministic)
    model = PicoDecoder(cfg.model)
    plain = weights is not None and not has_adapters(weights)
    if plain:
        checkpoint.load_model_state(model, weights, "the plain weights")
    if adapters:
        apply_relora(model, cfg.model.relora, cfg.training.seed, faults.layer_type(cfg.model.relora))
    if weights is not None and not plain:
        checkpoint.load_model_state(model, weights, "the checkpoint")
    model = model.to(device)
    wrapped = parallelize(model, model.layers, cfg.training, device)
    optimizers = make_optimizers(model, cfg.training.optimization)
    if adapters:
        faults.install(model, optimizers, cfg.model.relora)
    if optimizer_state is not None:
        checkpoint.load_optimizer_state(model, optimizers, optimizer_state)
    return model, wrapped, optimizers


def describe(state: TrainState, services: Services) -> None:
    micro, accumulation = state.cfg.micro_batches(dist.world_size())
    log.info(f"{state.model.num_parameters():,} parameters, {state.model.num_parameters(trainable_only=True):,} trainable; "
             f"{dist.world_size()} x {state.device.type}, {wrapping(state.wrapped)}, {state.precision}")
    log.info(f"{services.dataset.folder}: {len(services.dataset):,} rows of {services.dataset.row_length} tokens; an update "
             f"takes {dist.world_size()} ranks x {accumulation} micro-batches x {micro} rows; run folder {services.folder.path}")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("config", type=Path, help="a YAML file, such as config/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="options on top of it")
    parser.add_argument("--plan", action="store_true", help="say what the run will take, by a few steps; write nothing")
    args = parser.parse_args()
    cfg = load_config(args.config, args.overrides)
    with dist.session(machine.pick_device(cfg.training.fabric.accelerator), cfg.training.hang_timeout_minutes,
                      cfg.data.dataset.patience_minutes) as device:
        planning.tell(make_state(cfg, device), train_step) if args.plan else train(cfg, device)


if __name__ == "__main__":
    command(main)
