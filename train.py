"""Train a Pico decoder, full-rank or with ReLoRA.

    torchrun --standalone --nproc_per_node=2 train.py config/demo.yaml [section.key=value ...]
    python train.py config/demo.yaml training.max_steps=100            # one process

Read `train` first: evaluate, snapshot and save when due; merge when due; set the learning rate; accumulate; step;
log. "Step N" is the state after N global batches and before batch N + 1. Killed at any moment, the same command
goes on from the newest checkpoint and ends with the same weights.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import config
import dist
import dynamics
import evaluate
import export
import stream
import upload
from config import Config, UserError, load_config
from data import BatchLoader, TokenDataset
from model import PicoDecoder
from relora import (apply_relora, derive_seed, learning_rate_multiplier, merge_and_reinit, merge_due, merged_state,
                    relora_layers, reset_optimizer)
from run import Progress, RunFolder, run_folder

PEAK_FLOPS = {"H100": 989.5e12, "H200": 989.5e12, "A100": 312e12}  # dense bf16, by a part of the GPU's name
MERGE_TOLERANCE = 1e-4  # relative change of the logits that rounding explains
PROBE_TOKENS = 128  # of the row on which a merge is checked


class TrainingError(UserError):
    """A run that must not go on."""
    exit_code = 1


@dataclass
class Trainer:
    """All that a run needs. `model` is the bare decoder; `wrapped` is what trains, under DDP or FSDP2."""
    cfg: Config
    device: torch.device
    precision: str
    folder: RunFolder
    dataset: TokenDataset
    evaluation: evaluate.Evaluation
    saver: checkpoint.Saver
    uploader: upload.Uploader | None
    progress: Progress
    step: int = 0
    resumed_at: int | None = None
    model: PicoDecoder | None = None
    wrapped: nn.Module | None = None
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)


# ---- the loop ------------------------------------------------------------------------------------------------

def train(cfg: Config, device: torch.device) -> None:
    t = setup(cfg, device)
    micro, accumulation = cfg.micro_batches(dist.world_size())
    with (t.folder.reporting(lambda: t.step), contextlib.closing(t.dataset),
          BatchLoader(t.dataset, t.step, micro, accumulation, dist.rank(), dist.world_size(), device) as batches):
        loop(t, batches)
        if t.uploader is not None:
            t.uploader.close(t.cfg.checkpointing.upload_grace_seconds)


def loop(t: Trainer, batches: BatchLoader) -> None:
    """Evaluate, snapshot and save; merge; learning rate; accumulate and step; log; until the last step."""
    cfg = t.cfg
    saved = t.resumed_at
    t.folder.start_bar(t.step, cfg.last_step)
    t.progress.start_window(t.step)
    while True:
        if t.step != saved and (t.step % cfg.checkpointing.save_every_n_steps == 0 or t.step == cfg.last_step):
            with t.progress.paused():
                save(t)
            saved = t.step
        if t.step >= cfg.last_step:
            break
        batch, problem = next(batches)
        if dist.any_rank(problem is not None):  # no more data: keep what there is, on all ranks together
            if t.step != saved:
                save(t, whole=False)
            t.saver.wait()
            raise problem or TrainingError("another rank ran out of data; its message is above")
        if cfg.model.relora and not relora_layers(t.model) and t.step >= cfg.model.relora.warm_start_steps:
            begin_relora(t)
        if merge_due(t.step, cfg):
            with t.progress.paused():
                merge(t)
        set_learning_rate(t)
        train_step(t, batch)
        rows = cfg.data.dataloader.batch_size
        if (epoch := t.dataset.epoch(t.step, rows)) > t.dataset.epoch(t.step - 1, rows):
            t.folder.say(f"step {t.step}: epoch {epoch + 1} of the data has begun")
        if t.step % cfg.monitoring.logging.log_every_n_steps == 0 or t.step == cfg.last_step:
            log(t, batches)
        t.folder.advance()
        t.dataset.advance(t.step)
    t.saver.wait()


def train_step(t: Trainer, batch: list[tuple[int, Tensor]]) -> None:
    """One update on this rank's micro-batches; skipped by all ranks together if any loss or gradient is not finite."""
    loss = torch.zeros((), device=t.device)
    for number, (index, rows) in enumerate(batch):  # rows (micro, T + 1)
        torch.manual_seed(derive_seed(t.cfg.training.seed, t.step, index))  # of dropout
        with gradient_sync(t.wrapped, number == len(batch) - 1):  # around the forward too, or DDP reduces every time
            with torch.autocast(t.device.type, torch.bfloat16, enabled=t.precision == "bf16-mixed"):
                micro_loss = t.wrapped(rows[:, :-1], rows[:, 1:]) / len(batch)
            micro_loss.backward()
        loss += micro_loss.detach()
    loss = dist.sum_(loss) / dist.world_size()

    parameters = [p for p in t.model.parameters() if p.grad is not None]
    grad_norm = dist.full(nn.utils.get_total_norm([p.grad for p in parameters]))
    if t.cfg.training.grad_clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, t.cfg.training.grad_clip, grad_norm)
    bad = 1 - (loss.isfinite() & grad_norm.isfinite()).float()  # the same on every rank, and still on the device
    for optimizer in t.optimizers:
        if optimizer.defaults.get("fused"):  # fused optimizers read the flag on the device
            optimizer.grad_scale, optimizer.found_inf = None, bad
            optimizer.step()
        elif not bad.item():  # Muon has no such flag: this waits for the device
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    t.progress.add(loss, grad_norm, bad)
    t.step += 1


def gradient_sync(wrapped: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Let ranks exchange gradients on the last micro-batch of an update only."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(last)
    elif isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    return contextlib.nullcontext()


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
                            f"gradient was not finite; lower training.optimization.lr or set training.grad_clip=1.0")
    seq_len, rows = t.cfg.model.max_seq_len, t.cfg.data.dataloader.batch_size
    speed = window.steps * rows * seq_len / window.seconds
    rate = t.optimizers[0].param_groups[0]["lr"]
    metrics = {
        "step": t.step, "train/loss": window.loss, "train/perplexity": evaluate.perplexity(window.loss),
        "trainer/learning_rate": rate, "trainer/grad_norm": window.grad_norm,
        "trainer/inf_or_nan_count": int(window.bad_steps), "tokens": t.step * rows * seq_len,
        "tokens_per_second": speed, "data/wait_fraction": batches.take_wait() / window.seconds,
    }
    peak = next((f for name, f in PEAK_FLOPS.items()
                 if t.device.type == "cuda" and name in torch.cuda.get_device_name(t.device)), None)
    if peak is not None:
        metrics["mfu"] = speed * t.model.flops_per_token() / (peak * dist.world_size())
    t.folder.record(metrics)
    loss = "no finite loss" if window.loss is None else f"loss {window.loss:.4f}"
    t.folder.say(f"step {t.step}: {loss}, learning rate {rate:.2e}, gradient norm {window.grad_norm:.3f}, "
                 f"{speed:,.0f} tokens/s")
    t.folder.advance(loss=loss.removeprefix("loss "), lr=f"{rate:.1e}", tok_s=f"{speed:,.0f}")


# ---- merging -------------------------------------------------------------------------------------------------

def merge(t: Trainer) -> None:
    """Merge, reinitialise and reset; check on one small row that the model computes what it did before."""
    relora, seed = t.cfg.model.relora, t.cfg.training.seed
    before, loss_before = probe(t)
    scales = [dist.full(layer.scaling.detach()).clone() for layer in relora_layers(t.model).values() if relora.trainable_scaling]
    norm = merge_and_reinit(t.model, seed=seed, step=t.step)
    zeroed = reset_optimizer(t.optimizers, t.model, seed=seed, step=t.step)
    after, loss_after = probe(t)
    change = ((after - before).abs().max() / before.abs().max()).item()
    t.progress.reset_count += 1
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
    ids = torch.from_numpy(rows.astype(np.int64)).to(t.device)
    t.model.eval()
    logits = t.model(ids[:, :-1])  # (1, PROBE_TOKENS, V)
    t.model.train()
    reshard(t.model)
    return logits, F.cross_entropy(logits[0], ids[0, 1:]).item()


def begin_relora(t: Trainer) -> None:
    """End a warm start: freeze the targets and add adapters. What is wrapped changes, so all is built again."""
    state = checkpoint.gather_state(t.model, t.optimizers)
    build(t, adapters=True, weights=state["model"], optimizer_state=state["optimizer"])
    t.folder.say(f"step {t.step}: the warm start is over; {t.model.num_parameters(trainable_only=True):,} of "
                 f"{t.model.num_parameters():,} parameters train from here on")


# ---- saving --------------------------------------------------------------------------------------------------

def save(t: Trainer, whole: bool = True) -> None:
    """Evaluate, take snapshots, and start to write the checkpoint of this step; only that if not `whole`."""
    c, files = t.cfg.checkpointing, {}
    if whole:
        if results := t.evaluation.run(t.model, lambda words: t.folder.say(f"step {t.step}: {words}")):
            t.folder.record({"step": t.step} | evaluate.flat_metrics(results))
            t.folder.save_evaluation(t.step, results)
        reshard(t.model)
    if whole and c.learning_dynamics is not None:
        sources = {"train": t.dataset.batch(t.step, t.cfg.data.dataloader.batch_size), "val": t.evaluation.snapshot_rows}
        for split, rows in sources.items():
            if rows is not None:
                snapshot = dynamics.snapshot(t.model, rows, c.learning_dynamics, t.device)
                snapshot["data"]["text"] = [t.evaluation.tokenizer.decode(r) for r in snapshot["data"]["input_ids"].tolist()]
                files |= {f"{c.learning_dynamics_dir}/{split}_{kind}.pt": checkpoint.torch_writer(tensors)
                          for kind, tensors in snapshot.items()}
                reshard(t.model)
    state = checkpoint.gather_state(t.model, t.optimizers)
    if dist.rank() == 0:
        if whole and c.learning_dynamics is not None and c.learning_dynamics.optimizer_states:
            moments = dynamics.optimizer_states(state["optimizer"], c.learning_dynamics.layer_suffixes)
            files[f"{c.learning_dynamics_dir}/train_optimizer.pt"] = checkpoint.torch_writer(moments)
        state |= {"step": t.step, "config": config.to_dict(t.cfg), "progress": t.progress.state(),
                  "data": t.dataset.state | {"next_row": t.step * t.cfg.data.dataloader.batch_size},
                  "random": {"seed": t.cfg.training.seed},  # with the step, all that randomness follows from
                  "metrics_bytes": t.folder.metrics_size()}
        files[f"{c.fabric_checkpoint_dir}/{c.fabric_checkpoint_filename}"] = checkpoint.torch_writer(state)
        files |= export.writers(merged_state(state["model"], t.cfg.model.relora), t.cfg.model, t.dataset.folder.parent)
        t.saver.save(t.step, files)


def reshard(model: nn.Module) -> None:
    """After a forward outside of training FSDP2's root stays whole; touch no parameters before this."""
    if isinstance(model, FSDPModule):
        model.reshard()


# ---- setting up ----------------------------------------------------------------------------------------------

def setup(cfg: Config, device: torch.device) -> Trainer:
    """Open data, run folder and evaluation; resume, or start. Raises UserError before anything is trained."""
    cfg.micro_batches(dist.world_size())
    path = run_folder(cfg)
    state, notes = checkpoint.resume(path / cfg.checkpointing.checkpoints_dir, cfg)
    dataset = stream.open_dataset(cfg, state["step"] if state else 0, state["data"] if state else None)
    evaluation = evaluate.Evaluation(cfg, dataset.folder.parent, device)
    folder = RunFolder(cfg, path)
    precision = cfg.training.fabric.precision
    if device.type == "cpu" and precision != "32-true":
        folder.say(f"precision {precision} is slow on a CPU: training in 32-true")
        precision = "32-true"
    uploader = None
    if cfg.checkpointing.save_to_hf and dist.rank() == 0:
        uploader = upload.Uploader(path, cfg.checkpointing, folder.say)
    saver = checkpoint.Saver(cfg.checkpointing, path, uploader.kick if uploader else lambda: None)
    t = Trainer(cfg, device, precision, folder, dataset, evaluation, saver, uploader, Progress(device))
    for words in notes + config.warnings(cfg, dist.world_size(), device.type):
        folder.say(words, "WARNING")
    if state is None:
        start = cfg.training.start_from
        weights = export.load_plain(start)[1] if start else None
        build(t, adapters=cfg.model.relora is not None and cfg.model.relora.warm_start_steps == 0, weights=weights)
        folder.rewind_metrics(0)  # of a run that ended before its first checkpoint
        describe(t)
    else:
        adapters = any(name.endswith("lora_A") for name in state["model"])
        build(t, adapters, weights=state["model"], optimizer_state=state["optimizer"])
        t.step = t.resumed_at = state["step"]
        t.progress.load(state["progress"])
        folder.rewind_metrics(state["metrics_bytes"])
        describe(t)
        folder.say(f"resumed at step {t.step}")
    folder.start_wandb()
    if uploader is not None:
        uploader.start()
    return t


def build(t: Trainer, adapters: bool, weights: dict[str, Tensor] | None = None,
          optimizer_state: dict[str, dict] | None = None) -> None:
    """Make model, wrapping and optimizers; `weights` with adapters go in after these are made, plain ones before."""
    torch.manual_seed(t.cfg.training.seed)
    model = PicoDecoder(t.cfg.model)
    plain = weights is not None and not any(name.endswith("lora_A") for name in weights)
    if plain:
        checkpoint.load_model_state(model, weights, "the weights to start from")
    if adapters:
        apply_relora(model, t.cfg.model.relora, t.cfg.training.seed)
    if weights is not None and not plain:
        checkpoint.load_model_state(model, weights, "the checkpoint")
    t.model = model.to(t.device)
    t.wrapped = parallelize(t.model, t.cfg, t.device)
    t.optimizers = make_optimizers(t.model, t.cfg)
    if optimizer_state is not None:
        checkpoint.load_optimizer_state(t.model, t.optimizers, optimizer_state)


def parallelize(model: PicoDecoder, cfg: Config, device: torch.device) -> nn.Module:
    """What to train through: the model itself, DDP around it, or FSDP2 in it; blocks compiled where asked.

    FSDP2 shards each block as a group; embedding, norm and head stay with the root, whose forward needs the whole
    head weight for the chunked loss.
    """
    compiled = cfg.training.compile if cfg.training.compile is not None else device.type == "cuda"
    if compiled:
        for layer in model.layers:
            layer.compile()
    if dist.world_size() == 1:
        return model
    if cfg.training.strategy != "fsdp":
        new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # torch >= 2.13
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None,
                                       gradient_as_bucket_view=True,
                                       **{"forward_sync_buffers" if new else "broadcast_buffers": False})
    mesh = init_device_mesh(device.type, (dist.world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def make_optimizers(model: nn.Module, cfg: Config) -> list[torch.optim.Optimizer]:
    """The optimizers of the trainable parameters; Muon takes the blocks' matrices and leaves the rest to AdamW."""
    o = cfg.training.optimization
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trainable if o.optimizer == "muon" and p.dim() == 2 and name.startswith("layers.")]
    rest = [p for _, p in trainable if not any(p is m for m in matrices)]
    common = {"lr": o.lr, "weight_decay": o.weight_decay}
    if o.optimizer == "sgd":
        return [torch.optim.SGD(rest, momentum=o.momentum, fused=True, **common)]
    adam = torch.optim.Adam if o.optimizer == "adam" else torch.optim.AdamW
    optimizers: list[torch.optim.Optimizer] = [adam(rest, betas=tuple(o.betas), fused=True, **common)]
    if matrices:  # match_rms_adamw: steps as large as AdamW's, so that one learning rate serves both
        optimizers.append(torch.optim.Muon(matrices, momentum=o.momentum, adjust_lr_fn="match_rms_adamw", **common))
    return optimizers


def describe(t: Trainer) -> None:
    micro, accumulation = t.cfg.micro_batches(dist.world_size())
    strategy = type(t.wrapped).__name__.replace("DistributedDataParallel", "DDP").replace("PicoDecoder", "no wrapping")
    t.folder.say(f"{t.model.num_parameters():,} parameters, {t.model.num_parameters(trainable_only=True):,} trainable; "
                 f"{dist.world_size()} x {t.device.type}, {strategy}, {t.precision}")
    t.folder.say(f"{t.dataset.folder}: {len(t.dataset):,} rows of {t.dataset.row_length} tokens; an update takes "
                 f"{dist.world_size()} ranks x {accumulation} x {micro} rows; run folder {t.folder.path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a YAML file, such as config/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="options on top of it")
    args = parser.parse_args()
    cfg = load_config(args.config, args.overrides)
    timeout = cfg.data.dataset.patience_minutes + 30  # a rank may wait that long for data while the others wait for it
    with dist.session(cfg.training.fabric.accelerator, timeout) as device:
        train(cfg, device)


if __name__ == "__main__":
    dist.command(main)
