"""What no run could use, and what is allowed but rarely meant."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from config.reading import ConfigError, flat

if TYPE_CHECKING:
    from config import Config

_MAY_BE_ZERO = {  # every other number must be above 0
    "data.dataset.prefetch_shards", "data.dataset.keep_shards", "training.seed", "training.optimization.lr_warmup_steps",
    "training.optimization.restart_warmup_steps", "training.optimization.min_lr_ratio",
    "training.optimization.weight_decay", "training.optimization.momentum", "model.relora.lora_dropout",
    "model.relora.warm_start_steps", "model.relora.optimizer_reset.ratio",
}
_AT_MOST = {  # what no machine could hold or count
    "model.d_model": 2 ** 20, "model.n_layers": 10_000, "model.vocab_size": 2 ** 31 - 1, "model.max_seq_len": 2 ** 24,
    "model.activation_hidden_dim": 2 ** 22, "model.relora.r": 2 ** 20, "model.relora.lora_alpha": 1e9,
    "training.hang_timeout_minutes": 1e6, "data.dataset.patience_minutes": 1e6, "checkpointing.upload_grace_seconds": 1e8,
}
_FOLDERS = ("checkpoints_dir", "logs_dir", "fabric_checkpoint_dir", "fabric_checkpoint_filename", "learning_dynamics_dir",
            "evaluation.eval_results_dir")  # names inside of a run, and no paths out of it
_MAY_BE_NEGATIVE = {"checkpointing.learning_dynamics.sequence_idx"}


def _plain(name: str) -> bool:
    """Whether it can be the name of one folder or file on any system."""
    return (name not in ("", ".", "..") and not set(name) & set("/\\:\0\n") and name.isprintable()
            and len(name.encode("utf-8", "replace")) <= 200)


def check(cfg: Config, values: dict[str, Any]) -> None:
    """Raise ConfigError for values that no run could use; `values` are all of cfg's by their dotted keys."""
    def need(holds: bool, key: str, why: str) -> None:
        if not holds:
            raise ConfigError(f"{key}: {values.get(key)!r} {why}")

    for key, value in values.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key not in _MAY_BE_NEGATIVE:
            need(value >= 0, key, "must not be negative")
            need(value > 0 or key in _MAY_BE_ZERO, key, "must be above 0")
            most = _AT_MOST.get(key, 2 ** 63 - 1 if isinstance(value, int) else math.inf)
            need(value <= most, key, f"is more than {most:g}")
    m, o, relora = cfg.model, cfg.training.optimization, cfg.model.relora
    need(m.d_model % m.attention_n_heads == 0, "model.d_model",
         f"must be a multiple of attention_n_heads {m.attention_n_heads}")
    need(m.d_model // m.attention_n_heads % 2 == 0, "model.d_model",
         f"gives heads of odd size over {m.attention_n_heads} heads; rotary positions need pairs")
    need(m.attention_n_heads % m.attention_n_kv_heads == 0, "model.attention_n_kv_heads",
         f"must divide attention_n_heads {m.attention_n_heads}")
    need(0 <= o.min_lr_ratio <= 1, "training.optimization.min_lr_ratio", "must lie between 0 and 1")
    need(len(o.betas) == 2 and all(0 <= b < 1 for b in o.betas), "training.optimization.betas",
         "must be two numbers from 0 up to, but not including, 1")
    need(0 <= o.momentum < 1, "training.optimization.momentum", "must lie from 0 up to, but not including, 1")
    if (dynamics := cfg.checkpointing.learning_dynamics) is not None:
        need(-m.max_seq_len <= dynamics.sequence_idx < m.max_seq_len, "checkpointing.learning_dynamics.sequence_idx",
             f"is no position of {m.max_seq_len} tokens")
        need(bool(dynamics.layer_suffixes), "checkpointing.learning_dynamics.layer_suffixes",
             "names no layers; use null for none")
    need(cfg.evaluation.paloma.max_length >= 2, "evaluation.paloma.max_length", "holds no input and label; use 2 or more")
    if cfg.checkpointing.run_name is not None:
        need(_plain(cfg.checkpointing.run_name), "checkpointing.run_name", "must be one plain folder name")
    folders = [f"checkpointing.{name}" for name in _FOLDERS]
    for key in folders:
        need(_plain(values[key]), key, "must be one plain name inside of the run's folder")
        need([values[other] for other in folders].count(values[key]) == 1, key, "is the name of another part of the run too")
    if cfg.checkpointing.save_to_hf:
        need(re.fullmatch(r"[\w.-]+/[\w.-]+", cfg.checkpointing.hf_checkpoint.repo_id) is not None,
             "checkpointing.hf_checkpoint.repo_id", "is needed for save_to_hf, as owner/name")
        need(re.fullmatch(r"[\w.-]+", cfg.checkpointing.run_name or "x") is not None, "checkpointing.run_name",
             "is the branch's name on the Hub; use letters, digits, '.', '_' and '-'")
    if o.lr_scheduler == "relora_jagged_cosine":
        need(relora is not None, "training.optimization.lr_scheduler", "needs a model.relora section: it restarts at merges")
        need(o.min_lr_ratio > 0, "training.optimization.min_lr_ratio", "must be above 0 for relora_jagged_cosine")
        need(o.restart_warmup_steps > 0, "training.optimization.restart_warmup_steps",
             "must be above 0 for relora_jagged_cosine")
    if relora is not None:
        need(bool(relora.target_modules), "model.relora.target_modules", "names no layers; try [attention, swiglu]")
        need(0 <= relora.lora_dropout < 1, "model.relora.lora_dropout", "must lie from 0 up to, but not including, 1")
        need(0 <= relora.optimizer_reset.ratio <= 1, "model.relora.optimizer_reset.ratio", "must lie between 0 and 1")
        need(not (relora.lora_only and relora.keep_original_weights), "model.relora.lora_only",
             "contradicts keep_original_weights: true; drop one of them")
        warm = relora.warm_start_steps > 0 or cfg.training.start_from is not None
        need(relora.has_initial_weights or not warm, "model.relora.keep_original_weights",
             "throws away the weights that a warm start provides; drop one of them")


def check_strategy(cfg: Config, world: int) -> None:
    """Raise ConfigError for what torch cannot do on `world` ranks."""
    relora = cfg.model.relora
    if (cfg.training.optimization.optimizer, cfg.training.strategy) == ("muon", "fsdp") and relora and relora.r < world:
        raise ConfigError(f"model.relora.r: {relora.r} rows cannot be sharded over {world} ranks for muon; use r={world} or "
                          f"more, or training.strategy=ddp")


def warnings(cfg: Config, world: int, device: str) -> list[str]:
    """What is allowed but rarely meant, one sentence each, on `world` ranks of `device` (cuda, cpu, mps)."""
    o, relora, fabric, found = cfg.training.optimization, cfg.model.relora, cfg.training.fabric, []
    if fabric.num_nodes * fabric.num_devices not in (1, world):
        found.append(f"training.fabric: {fabric.num_nodes} x {fabric.num_devices} devices are configured, but torchrun "
                     f"started {world}; these are used")
    if fabric.accelerator not in ("auto", device):
        found.append(f"training.fabric.accelerator: no {fabric.accelerator} here; training on {device}")
    if o.lr_warmup_steps >= cfg.training.max_steps:
        found.append(f"lr_warmup_steps {o.lr_warmup_steps} >= max_steps {cfg.training.max_steps}: all of it is warm-up")
    if o.lr_scheduler == "relora_jagged_cosine" and o.restart_warmup_steps >= relora.reset_frequency:
        found.append(f"restart_warmup_steps {o.restart_warmup_steps} >= reset_frequency {relora.reset_frequency}: "
                     "a cycle ends before it reaches its learning rate")
    if relora is not None and relora.reference_faults:
        found.append(f"known faults of the reference are switched on: {', '.join(relora.reference_faults)}")
    return found


def contradictions(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What makes the config `now` another run than the saved one's: "key: saved -> now", one each."""
    def facts(tree: dict[str, Any]) -> dict[str, Any]:
        optimization = {k: v for k, v in tree["training"]["optimization"].items() if k != "gradient_accumulation_steps"}
        model = {k: v for k, v in tree["model"].items() if k not in ("fast_paths", "batch_size")}
        return {"data.dataloader.batch_size": tree["data"]["dataloader"]["batch_size"], **flat(model, "model."),
                "training.seed": tree["training"]["seed"], **flat(optimization, "training.optimization.")}
    before, after = facts(saved), facts(now)
    return [f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key)]
