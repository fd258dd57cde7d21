"""Train a Pico decoder, full-rank or with ReLoRA.

    torchrun --standalone --nproc_per_node=2 train.py config/demo.yaml [section.key=value ...]
    python train.py config/demo.yaml training.max_steps=100            # one process

Read `train` first: evaluate, snapshot and save when due; merge when due; set the learning rate; accumulate; step;
log. "Step N" is the state after N global batches and before batch N + 1. Killed at any moment, the same command
goes on from the newest checkpoint and ends with the same weights.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import evaluate
from config import Config, UserError, check_strategy, load_config, to_dict
from data import BatchLoader, DataError, to_device
from hub import llama
from instruments import snapshots
from relora import (
    derive_seed,
    learning_rate_multiplier,
    merge_and_reinit,
    merge_due,
    merged_state,
    relora_layers,
    reset_optimizer,
    undo_reset,
)
from runtime import dist, machine, signals
from runtime.command import Parser, command
from runtime.errors import Ending
from runtime.run_folder import RunFolder, run_folder
from runtime.wrap import eval_mode, gradient_sync, reshard
from trainer import Trainer, build, setup

MERGE_TOLERANCE = 1e-4  # relative change of the logits that rounding explains
PROBE_TOKENS = 128  # of the row on which a merge is checked
VOTE_SECONDS = 0.5  # between two votes of ranks that wait for data


class TrainingError(UserError):
    """A run that must not go on."""
    exit_code = 1


# ---- the loop ------------------------------------------------------------------------------------------------

def train(cfg: Config, device: torch.device) -> None:
    micro, accumulation = cfg.micro_batches(dist.world_size())
    check_strategy(cfg, dist.world_size())
    folder = RunFolder(cfg, run_folder(cfg))
    machine.same_everywhere(to_dict(cfg))
    with signals.catching_signals(), folder.in_use():
        t = setup(cfg, device, folder)
        with (dist.watched(cfg.training.hang_timeout_minutes),
              BatchLoader(t.dataset, t.step, micro, accumulation, dist.rank(), dist.world_size(), device) as batches,
              contextlib.closing(t.dataset)):  # closed first, so that a waiting loader can stop
            signals.defer_signals()
            try:
                loop(t, batches)
            except Ending:
                keep(t)
                raise
        if t.uploader is not None:
            t.uploader.close(t.cfg.checkpointing.upload_grace_seconds, signals.stop_signal)


def loop(t: Trainer, batches: BatchLoader) -> None:
    """Evaluate, snapshot and save; merge; learning rate; accumulate and step; log; until the last step.

    Raises Ending, on all ranks together, when training must end early.
    """
    cfg = t.cfg
    t.folder.start_bar(t.step, cfg.last_step)
    t.progress.start_window(t.step)
    while True:
        due = t.step != t.saved and (t.step % cfg.checkpointing.save_every_n_steps == 0 or t.step == cfg.last_step)
        if t.step < cfg.last_step or due and cfg.checkpointing.learning_dynamics is not None:
            batch = next_batch(t, batches)  # before the snapshot, which looks at the same rows and could not wait for them
        if due:
            with t.progress.paused():
                save(t)
        if t.step >= cfg.last_step:
            break
        if cfg.model.relora and not relora_layers(t.model) and t.step >= cfg.model.relora.warm_start_steps:
            begin_relora(t)
        if merge_due(t.step, cfg) and t.progress.merged_at != t.step:
            with t.progress.paused():
                merge(t)
        set_learning_rate(t)
        train_step(t, batch)
        t.folder.advance(t.step)
        rows = cfg.data.dataloader.batch_size
        if (epoch := t.dataset.epoch(t.step, rows)) > t.dataset.epoch(t.step - 1, rows):
            t.folder.say(f"step {t.step}: epoch {epoch + 1} of the data has begun")
        if t.step % cfg.monitoring.logging.log_every_n_steps == 0 or t.step == cfg.last_step:
            log(t, batches)
        t.dataset.advance(t.step)
    t.saver.wait()
    end_together(t)


def next_batch(t: Trainer, batches: BatchLoader) -> list[tuple[int, Tensor]]:
    """This rank's micro-batches of the next update. All ranks wait for their data together, and end together."""
    batch = problem = None
    while True:
        try:
            batch = batch or batches.next(VOTE_SECONDS)
        except DataError as error:
            problem = error
        if not end_together(t, problem, waiting=batch is None):
            return batch


def end_together(t: Trainer, problem: UserError | None = None, waiting: bool = False) -> int:
    """A vote, which every rank must hold: raises Ending if any rank has a reason; whether any rank is `waiting`."""
    problem = problem or t.saver.error
    ended, caught, anyone_waits = dist.max_over_ranks(problem is not None, signals.stop_signal(), waiting)
    if ended:  # every rank raises the first error met
        mine = problem and (str(problem), 2 if isinstance(problem, DataError) else 1)
        raise Ending(*next(theirs for theirs in dist.all_gather_object(mine) if theirs))
    signals.stop_point(caught)
    return anyone_waits


def train_step(t: Trainer, batch: list[tuple[int, Tensor]]) -> None:
    """One update on this rank's micro-batches."""
    update(t, accumulate(t, batch))
    t.step += 1


def accumulate(t: Trainer, batch: list[tuple[int, Tensor]]) -> Tensor:
    """Forward and backward of each micro-batch; the mean loss over all ranks."""
    loss = torch.zeros((), device=t.device)
    for number, (index, rows) in enumerate(batch):  # rows (micro, T + 1)
        if number:
            signals.stop_point()  # an unfinished update is dropped
        torch.manual_seed(derive_seed(t.cfg.training.seed, t.step, index))  # of dropout
        with gradient_sync(t.wrapped, number == len(batch) - 1):  # around the forward too, or DDP reduces every time
            with torch.autocast(t.device.type, torch.bfloat16, enabled=t.precision == "bf16-mixed"):
                micro_loss = t.wrapped(rows[:, :-1], rows[:, 1:]) / len(batch)
            micro_loss.backward()
        loss += micro_loss.detach()
    return dist.all_reduce_sum(loss) / dist.world_size()


def update(t: Trainer, loss: Tensor) -> None:
    """Clip and step; skipped by all ranks together if loss or gradient is not finite on any."""
    parameters = [p for p in t.model.parameters() if p.grad is not None]
    grad_norm = dist.full_tensor(nn.utils.get_total_norm([p.grad for p in parameters]))
    if t.cfg.training.grad_clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, t.cfg.training.grad_clip, grad_norm)
    bad = 1 - (loss.isfinite() & grad_norm.isfinite()).float()  # the same on every rank, and still on the device
    if t.progress.merged_at == t.step:
        undo_reset(t.model)  # a fault of the reference; nothing where it is not asked for
    for optimizer in t.optimizers:
        if optimizer.defaults.get("fused"):  # fused optimizers read the flag on the device
            optimizer.grad_scale, optimizer.found_inf = None, bad
            optimizer.step()
        elif not bad.item():  # Muon has no such flag: this waits for the device
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    t.progress.add(loss, grad_norm, bad)


def set_learning_rate(t: Trainer) -> None:
    rate = t.cfg.training.optimization.lr * learning_rate_multiplier(t.step, t.cfg)
    for optimizer in t.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def log(t: Trainer, batches: BatchLoader) -> None:
    """One line of metrics: means since the last line, over all tokens on all ranks."""
    window = t.progress.read(t.step)
    if window.worst_in_a_row >= t.cfg.training.max_nonfinite_steps:
        raise TrainingError(f"step {t.step}: {window.worst_in_a_row:.0f} updates in a row were skipped because loss or "
                            f"gradient was not finite; set training.grad_clip=1.0, or lower training.optimization.lr "
                            "under another run_name")
    seq_len, rows = t.cfg.model.max_seq_len, t.cfg.data.dataloader.batch_size
    speed = window.steps * rows * seq_len / window.seconds
    rate = t.optimizers[0].param_groups[0]["lr"]
    metrics = {
        "step": t.step, "train/loss": window.loss, "train/perplexity": evaluate.perplexity(window.loss),
        "trainer/learning_rate": rate, "trainer/grad_norm": window.grad_norm,
        "trainer/inf_or_nan_count": int(window.bad_steps), "tokens": t.step * rows * seq_len,
        "tokens_per_second": speed, "data/wait_fraction": batches.take_wait() / window.seconds,
    }
    if (peak := machine.peak_flops(t.device)) is not None:
        metrics["mfu"] = speed * t.model.flops_per_token() / (peak * dist.world_size())
    t.folder.record(metrics)
    loss = "no finite loss" if window.loss is None else f"loss {window.loss:.4f}"
    t.folder.say(f"step {t.step}: {loss}, learning rate {rate:.2e}, gradient norm {window.grad_norm:.3f}, "
                 f"{speed:,.0f} tokens/s")
    t.folder.advance(t.step, loss=loss.removeprefix("loss "), lr=f"{rate:.1e}", tok_s=f"{speed:,.0f}")


# ---- merging -------------------------------------------------------------------------------------------------

def merge(t: Trainer) -> None:
    """Merge, reinitialise and reset; check on one small row that the model computes what it did before."""
    relora, seed = t.cfg.model.relora, t.cfg.training.seed
    before, loss_before = probe(t)
    scales = [dist.full_tensor(layer.scaling.detach()).clone() for layer in relora_layers(t.model).values() if relora.trainable_scaling]
    norm = merge_and_reinit(t.model, seed=seed, step=t.step)
    zeroed = reset_optimizer(t.optimizers, t.model, seed=seed, step=t.step)
    after, loss_after = probe(t)
    change = ((after - before).abs().max() / before.abs().max()).item()
    t.progress.reset_count += 1
    t.progress.merged_at = t.step
    metrics = {"step": t.step, "relora/reset_count": t.progress.reset_count, "relora/opt_zeroed": zeroed,
               "relora/loss_before": loss_before, "relora/loss_after": loss_after, "relora/logit_change": change,
               "relora/update_norm": norm}
    if scales:
        metrics |= {"relora/sf_mean": torch.cat(scales).mean().item(),
                    "relora/sf_std": torch.cat(scales).std(correction=0).item()}
    t.folder.record(metrics)
    t.folder.say(f"step {t.step}: merge {t.progress.reset_count}, norm of the update {norm:.3f}, loss on a small batch "
                 f"{loss_before:.4f} -> {loss_after:.4f}, {zeroed:.2%} of the adapters' moments are 0")
    if not change <= MERGE_TOLERANCE:
        words = f"step {t.step}: the merge changed the logits by {change:.1e} of their size"
        if not relora.reference_faults:
            raise TrainingError(f"{words}, more than {MERGE_TOLERANCE:.0e}; the last checkpoint is from before it")
        t.folder.say(f"{words} (model.relora.reference_faults is set)", "WARNING")


@torch.no_grad()
def probe(t: Trainer) -> tuple[Tensor, float]:
    """(logits, mean loss) on the start of the next row; eval mode, float32."""
    rows = t.dataset.rows(t.step * t.cfg.data.dataloader.batch_size, 1)[:, :PROBE_TOKENS + 1]
    ids = to_device(rows, t.device)
    with eval_mode(t.model, t.device):
        logits = t.model(ids[:, :-1])  # (1, PROBE_TOKENS, V)
    return logits, F.cross_entropy(logits[0], ids[0, 1:]).item()


def begin_relora(t: Trainer) -> None:
    """End a warm start: freeze the targets and add adapters. What is wrapped changes, so all is built again."""
    state = checkpoint.gather_state(t.model, t.optimizers, everywhere=True)
    build(t, adapters=True, weights=state["model"], optimizer_state=state["optimizer"])
    t.folder.say(f"step {t.step}: the warm start is over; {t.model.num_parameters(trainable_only=True):,} of "
                 f"{t.model.num_parameters():,} parameters train from here on")


# ---- saving --------------------------------------------------------------------------------------------------

def save(t: Trainer, whole: bool = True) -> None:
    """Evaluate, take snapshots, and start to write the checkpoint of this step; only that if not `whole`."""
    c, files, results = t.cfg.checkpointing, {}, {}
    if whole:
        results = t.evaluation.run(t.model, lambda words: t.folder.say(f"step {t.step}: {words}"))
    if whole and c.learning_dynamics is not None:
        sources = {"train": t.dataset.batch(t.step, t.cfg.data.dataloader.batch_size), "val": t.evaluation.snapshot_rows}
        for split, rows in sources.items():
            if rows is not None:
                snapshot = snapshots.snapshot(t.model, rows, c.learning_dynamics, t.device)
                snapshot["data"]["text"] = [t.evaluation.tokenizer.decode(r) for r in snapshot["data"]["input_ids"].tolist()]
                files |= {f"{c.learning_dynamics_dir}/{split}_{kind}.pt": checkpoint.torch_writer(tensors)
                          for kind, tensors in snapshot.items()}
    if results:  # only now: interrupted before, all of it is done again
        t.folder.record({"step": t.step} | evaluate.flat_metrics(results))
        t.folder.save_evaluation(t.step, results)
    t.saver.wait()  # before there is a second copy of everything
    state = checkpoint.gather_state(t.model, t.optimizers)
    t.saved = t.step
    if dist.rank() == 0:
        if whole and c.learning_dynamics is not None and c.learning_dynamics.optimizer_states:
            moments = snapshots.optimizer_states(state["optimizer"], c.learning_dynamics.layer_suffixes)
            files[f"{c.learning_dynamics_dir}/train_optimizer.pt"] = checkpoint.torch_writer(moments)
        state |= {"step": t.step, "whole": whole, "config": to_dict(t.cfg), "progress": t.progress.state(),
                  "data": t.dataset.state | {"next_row": t.step * t.cfg.data.dataloader.batch_size},
                  "random": {"seed": t.cfg.training.seed},  # from which, with the step, all randomness follows
                  "metrics_bytes": t.folder.metrics_size()}
        files[f"{c.fabric_checkpoint_dir}/{c.fabric_checkpoint_filename}"] = checkpoint.torch_writer(state)
        files |= llama.writers(merged_state(state["model"], t.cfg.model.relora), t.cfg.model, t.dataset.folder.parent)
        t.saver.save(t.step, files)


def keep(t: Trainer) -> None:
    """Training ends early: drop the unfinished update, and write a checkpoint of the last whole step."""
    for optimizer in t.optimizers:
        optimizer.zero_grad(set_to_none=True)
    reshard(t.model)
    undo_reset(t.model)  # as the update that is dropped would have done
    t.saver.wait()
    if dist.max_over_ranks(t.step != t.saved or t.saver.error is not None)[0]:  # only rank 0 writes, and knows of errors
        t.folder.say(f"writing a checkpoint of step {t.step}")
        save(t, whole=False)
        t.saver.wait()
    dist.barrier()  # when one rank has ended, torchrun gives the others 30 s


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("config", type=Path, help="a YAML file, such as config/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="options on top of it")
    args = parser.parse_args()
    cfg = load_config(args.config, args.overrides)
    with dist.session(machine.pick_device(cfg.training.fabric.accelerator), cfg.training.hang_timeout_minutes,
                      cfg.data.dataset.patience_minutes) as device:
        train(cfg, device)


if __name__ == "__main__":
    command(main)
