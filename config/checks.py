"""Options that do not go together, what is allowed but rarely meant, and what a resumed run may change."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import TYPE_CHECKING, Any

from config.reading import ConfigError, build, flat, show

if TYPE_CHECKING:
    from config import Config

_FOLDERS = ("checkpoints_dir", "logs_dir", "fabric_checkpoint_dir", "fabric_checkpoint_filename", "learning_dynamics_dir",
            "evaluation.eval_results_dir")  # names inside of a run, and no paths out of it
_CHANGE_ROUNDING = ("training.strategy", "training.compile", "training.deterministic", "model.fast_paths",
                    "training.fabric.precision")
_CHANGE_RESULTS = ("training.grad_clip", "training.max_steps")


def _is_plain_name(name: str) -> bool:
    """Whether it can be the name of one folder or file on any system."""
    return (name not in ("", ".", "..") and not set(name) & set("/\\:\0\n") and name.isprintable()
            and len(name.encode("utf-8", "replace")) <= 200)


def check(cfg: Config) -> None:
    """Raise ConfigError for options that do not go together in any run."""
    values = flat(dataclasses.asdict(cfg))

    def require(holds: bool, key: str, why: str) -> None:
        if not holds:
            raise ConfigError(f"{key}: {show(values.get(key))} {why}")

    _check_model(cfg, require)
    _check_names(cfg, values, require)
    require(len(cfg.training.optimization.betas) == 2, "training.optimization.betas", "must be two numbers, such as [0.9, 0.999]")
    require(None in (cfg.training.fork_from, cfg.training.start_from), "training.fork_from",
            "begins with another weights than start_from; drop one of them")
    optimization, relora = cfg.training.optimization, cfg.model.relora
    if optimization.lr_scheduler == "relora_jagged_cosine":
        require(relora is not None, "training.optimization.lr_scheduler", "needs a model.relora section: it restarts at merges")
        require(optimization.min_lr_ratio > 0, "training.optimization.min_lr_ratio", "must be above 0 for relora_jagged_cosine")
        require(optimization.restart_warmup_steps > 0, "training.optimization.restart_warmup_steps",
                "must be above 0 for relora_jagged_cosine")
    if relora is not None:
        require(bool(relora.target_modules), "model.relora.target_modules", "names no layers; try [attention, swiglu]")
        require(not (relora.lora_only and relora.keep_original_weights), "model.relora.lora_only",
                "contradicts keep_original_weights: true; drop one of them")
        warm = relora.warm_start_steps > 0 or cfg.training.start_from is not None
        require(relora.has_initial_weights or not warm, "model.relora.keep_original_weights",
                "throws away the weights that a warm start provides; drop one of them")


def _check_model(cfg: Config, require: Any) -> None:
    model, dynamics = cfg.model, cfg.checkpointing.learning_dynamics
    require(model.d_model % model.attention_n_heads == 0, "model.d_model",
            f"must be a multiple of attention_n_heads {model.attention_n_heads}")
    require(model.d_model // model.attention_n_heads % 2 == 0, "model.d_model",
            f"gives heads of odd size over {model.attention_n_heads} heads; rotary positions need pairs")
    require(model.attention_n_heads % model.attention_n_kv_heads == 0, "model.attention_n_kv_heads",
            f"must divide attention_n_heads {model.attention_n_heads}")
    if dynamics is not None:
        positions = dynamics.sequence_idx if isinstance(dynamics.sequence_idx, list) else [dynamics.sequence_idx]
        require(bool(positions) and all(-model.max_seq_len <= position < model.max_seq_len for position in positions),
                "checkpointing.learning_dynamics.sequence_idx", f"is no position of {model.max_seq_len} tokens")
        require(bool(dynamics.layer_suffixes), "checkpointing.learning_dynamics.layer_suffixes",
                "names no layers; use null for none")


def _check_names(cfg: Config, values: dict[str, Any], require: Any) -> None:
    run_name, folders = cfg.checkpointing.run_name, [f"checkpointing.{name}" for name in _FOLDERS]
    require(run_name is None or _is_plain_name(run_name), "checkpointing.run_name", "must be one plain folder name")
    for key in folders:
        require(_is_plain_name(values[key]), key, "must be one plain name inside of the run's folder")
        require([values[other] for other in folders].count(values[key]) == 1, key, "is the name of another part of the run too")
    if cfg.checkpointing.save_to_hf:
        require(re.fullmatch(r"([\w.-]+/)?[\w.-]+", cfg.checkpointing.hf_checkpoint.repo_id) is not None,
                "checkpointing.hf_checkpoint.repo_id", "is needed for save_to_hf, as owner/name")
        require(re.fullmatch(r"[\w.-]+", run_name or "x") is not None, "checkpointing.run_name",
                "is the branch's name on the Hub; use letters, digits, '.', '_' and '-'")


def check_strategy(cfg: Config, world: int) -> None:
    """Raise ConfigError for what torch cannot do on `world` ranks."""
    relora, local = cfg.model.relora, int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if cfg.training.strategy == "hsdp" and world % local:
        raise ConfigError(f"training.strategy: hsdp wants as many ranks on each machine, and {world} are not a multiple of the "
                          f"{local} here; use fsdp")
    shards = {"fsdp": world, "hsdp": local}.get(cfg.training.strategy, 1)
    if cfg.training.optimization.optimizer == "muon" and relora and relora.r < shards:
        raise ConfigError(f"model.relora.r: {relora.r} rows cannot be sharded over {shards} ranks for muon; use r={shards} or "
                          f"more, or training.strategy=ddp")


def warnings(cfg: Config, world: int, device: str) -> list[str]:
    """What is allowed but rarely meant, one sentence each, on `world` ranks of `device` (cuda, cpu, mps)."""
    optimization, relora, fabric, found = cfg.training.optimization, cfg.model.relora, cfg.training.fabric, []
    if fabric.num_nodes * fabric.num_devices not in (1, world):
        found.append(f"training.fabric: {fabric.num_nodes} x {fabric.num_devices} devices are configured, and "
                     f"{world} process{'es were' if world > 1 else ' was'} started: these are used")
    if fabric.accelerator not in ("auto", device):
        found.append(f"training.fabric.accelerator: no {fabric.accelerator} here; training on {device}")
    if optimization.lr_warmup_steps >= cfg.training.max_steps:
        found.append(f"lr_warmup_steps {optimization.lr_warmup_steps} >= max_steps {cfg.training.max_steps}: all is warm-up")
    steps = cfg.checkpointing.learning_dynamics and cfg.checkpointing.learning_dynamics.steps
    if isinstance(steps, list) and max(steps, default=0) > cfg.last_step:
        found.append(f"checkpointing.learning_dynamics.steps: {max(steps)} is never reached; the run ends at {cfg.last_step}")
    if relora is not None:
        jagged = optimization.lr_scheduler == "relora_jagged_cosine"
        if jagged and relora.reset_frequency == 1:
            found.append("model.relora.reset_frequency 1: the learning rate is 0 at every restart, and so at every step after "
                         "warm-up; nothing is learnt then")
        elif jagged and optimization.restart_warmup_steps >= relora.reset_frequency:
            found.append(f"restart_warmup_steps {optimization.restart_warmup_steps} >= reset_frequency {relora.reset_frequency}: "
                         "a cycle ends before it reaches its learning rate")
        if relora.reference_faults:
            found.append(f"known faults of the reference are switched on: {', '.join(relora.reference_faults)}")
    return found


# ---- a run taken up again ----------------------------------------------------------------------------------------

def _resolved(tree: dict[str, Any]) -> dict[str, Any]:
    """A saved config by its dotted keys, with defaults for options that were added since. Raises ConfigError."""
    from config import Config
    return flat(dataclasses.asdict(build(Config, tree)))


def check_resume(saved: dict[str, Any], cfg: Config, world: int, source: Any) -> list[str]:
    """What a run taken up on `world` ranks at the checkpoint `source`, whose state is `saved`, changes of its course.

    One sentence each. Raises ConfigError where `cfg` is of another run.
    """
    try:
        before = flat(dataclasses.asdict(_rebuild(saved["config"])))
    except (ConfigError, TypeError, AttributeError) as error:
        raise ConfigError(f"{source}: holds no configuration of this lab ({error})") from None
    now = flat(dataclasses.asdict(cfg))
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    told = {key: f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in differing}
    if fixed := [told[key] for key in differing if _is_fixed(key)]:
        raise ConfigError(f"{source}: is of another run ({'; '.join(fixed)}); put these back, or choose another "
                          f"checkpointing.run_name")
    notes = [f"{told[key]} bends the course of the run from here on" for key in differing if key in _CHANGE_RESULTS]
    if saved["step"] > cfg.last_step:
        notes.append(f"{source} is past the last step of this configuration, {cfg.last_step}: nothing is left to train")
    before_rows, rows = saved["data"].get("micro_rows"), cfg.micro_batches(world)[0]
    if cfg.model.relora is not None and cfg.model.relora.lora_dropout and before_rows not in (None, rows):
        notes.append(f"micro-batches of {before_rows} rows -> {rows}: dropout is drawn for each, so from here on the run is "
                     f"another draw; training.micro_batch_size={before_rows} goes on as it was")
    notes += [f"{told[key]} changes the rounding of the run from here on" for key in differing if key in _CHANGE_ROUNDING]
    return notes


def _rebuild(tree: dict[str, Any]) -> Config:
    """A saved configuration, with the defaults of options that were added since."""
    from config import Config
    return build(Config, tree)


def _is_fixed(key: str) -> bool:
    """Whether a run cannot change it when it is resumed."""
    if key in ("model.batch_size", "model.fast_paths", "training.optimization.gradient_accumulation_steps"):
        return False
    return key.startswith(("model.", "training.optimization.", "data.dataloader.")) or key == "training.seed"
