"""What a run consists of, and how it is put together or taken up again: data, model, wrapping, optimizers, checkpoint.

train.py says what is done with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import checkpoint
import config
import evaluate
from config import Config, ConfigError
from data import TokenDataset
from hub import llama, streaming, uploads
from instruments import snapshots
from model import PicoDecoder
from relora import apply_relora, repeat_reset
from runtime import dist, kernels
from runtime.run_folder import Progress, RunFolder
from runtime.wrap import make_optimizers, parallelize, wrapping


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
    uploader: uploads.Uploader | None
    progress: Progress
    step: int = 0
    saved: int | None = None  # the step of the newest checkpoint
    model: PicoDecoder | None = None
    wrapped: nn.Module | None = None
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)


def setup(cfg: Config, device: torch.device, folder: RunFolder) -> Trainer:
    """Open data, run folder and evaluation; resume, or start. Raises UserError before anything is trained."""
    check_names(cfg)
    state, notes = checkpoint.resume(folder.path / cfg.checkpointing.checkpoints_dir, cfg)
    dataset = streaming.open_dataset(cfg, state["step"] if state else 0, state["data"] if state else None)
    evaluation = evaluate.Evaluation(cfg, dataset.folder.parent, device)
    weights = starting_weights(cfg) if cfg.training.start_from and state is None else None
    folder.open()
    precision = cfg.training.fabric.precision
    if device.type == "cpu" and precision != "32-true":
        folder.say(f"precision {precision} is slow on a CPU: training in 32-true")
        precision = "32-true"
    uploader = None
    if cfg.checkpointing.save_to_hf and dist.rank() == 0:
        uploader = uploads.Uploader(folder.path, cfg.checkpointing, folder.say, fresh=state is None)
    saver = checkpoint.Saver(cfg.checkpointing, folder.path, folder.say, uploader.kick if uploader else lambda: None)
    t = Trainer(cfg, device, precision, folder, dataset, evaluation, saver, uploader, Progress(device))
    for words in notes + config.warnings(cfg, dist.world_size(), device.type):
        folder.say(words, "WARNING")
    if state is None:
        build(t, adapters=cfg.model.relora is not None and cfg.model.relora.warm_start_steps == 0, weights=weights)
        if notes:
            folder.set_metrics_aside()
        folder.rewind_metrics(0)  # of a run that ended before its first checkpoint
        describe(t)
    else:
        adapters = any(name.endswith("lora_A") for name in state["model"])
        build(t, adapters, weights=state["model"], optimizer_state=state["optimizer"])
        t.step = state["step"]
        t.saved = t.step if state.get("whole", True) else None  # its evaluation and snapshots may be due still
        t.progress.load(state["progress"])
        if t.progress.merged_at == t.step:
            repeat_reset(t.model, cfg.training.seed, t.step)
        folder.rewind_metrics(state["metrics_bytes"])
        describe(t)
        folder.say(f"resumed at step {t.step}")
    folder.start_wandb()
    if uploader is not None:
        uploader.start()
    return t


def check_names(cfg: Config) -> None:
    """Raise ConfigError where an option names layers that the model does not have."""
    with torch.device("meta"):
        model = PicoDecoder(cfg.model)
        if cfg.model.relora is not None:
            apply_relora(model, cfg.model.relora)
    if cfg.checkpointing.learning_dynamics is not None:
        snapshots.chosen_layers(model, cfg.checkpointing.learning_dynamics.layer_suffixes)


def starting_weights(cfg: Config) -> dict[str, Tensor]:
    """Those of training.start_from. Raises ConfigError unless they are of the very model that is trained."""
    found, weights = llama.load_plain(cfg.training.start_from)
    for key in ("d_model", "n_layers", "vocab_size", "attention_n_heads", "attention_n_kv_heads", "activation_hidden_dim",
                "norm_eps", "position_emb_theta"):
        theirs, ours = getattr(found, key), getattr(cfg.model, key)
        if theirs != ours:
            raise ConfigError(f"training.start_from: {cfg.training.start_from} has {key} {theirs!r}, and model.{key} is "
                              f"{ours!r}; use model.{key}={theirs}")
    return weights


def build(t: Trainer, adapters: bool, weights: dict[str, Tensor] | None = None,
          optimizer_state: dict[str, dict] | None = None) -> None:
    """Make model, wrapping and optimizers; `weights` with adapters go in after these are made, plain ones before."""
    torch.manual_seed(t.cfg.training.seed)
    if t.device.type == "cpu" and t.cfg.model.fast_paths:
        kernels.keep_freed_memory()
    model = PicoDecoder(t.cfg.model)
    plain = weights is not None and not any(name.endswith("lora_A") for name in weights)
    if plain:
        checkpoint.load_model_state(model, weights, "the plain weights")
    if adapters:
        apply_relora(model, t.cfg.model.relora, t.cfg.training.seed)
    if weights is not None and not plain:
        checkpoint.load_model_state(model, weights, "the checkpoint")
    t.model = model.to(t.device)
    t.wrapped = parallelize(t.model, t.cfg, t.device)
    t.optimizers = make_optimizers(t.model, t.cfg)
    if optimizer_state is not None:
        checkpoint.load_optimizer_state(t.model, t.optimizers, optimizer_state)


def describe(t: Trainer) -> None:
    micro, accumulation = t.cfg.micro_batches(dist.world_size())
    t.folder.say(f"{t.model.num_parameters():,} parameters, {t.model.num_parameters(trainable_only=True):,} trainable; "
                 f"{dist.world_size()} x {t.device.type}, {wrapping(t.wrapped)}, {t.precision}")
    t.folder.say(f"{t.dataset.folder}: {len(t.dataset):,} rows of {t.dataset.row_length} tokens; an update takes "
                 f"{dist.world_size()} ranks x {accumulation} micro-batches x {micro} rows; run folder {t.folder.path}")
