"""What no run could use, and what is allowed but rarely meant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from config.reading import ConfigError

if TYPE_CHECKING:
    from config import Config

_MAY_BE_ZERO = {  # every other number must be above 0
    "data.dataset.prefetch_shards", "data.dataset.keep_shards", "training.seed", "training.optimization.lr_warmup_steps",
    "training.optimization.restart_warmup_steps", "training.optimization.min_lr_ratio",
    "training.optimization.weight_decay", "training.optimization.momentum", "model.relora.lora_dropout",
    "model.relora.warm_start_steps", "model.relora.optimizer_reset.ratio",
}
_MAY_BE_NEGATIVE = {"checkpointing.learning_dynamics.sequence_idx"}


def check(cfg: Config, values: dict[str, Any]) -> None:
    """Raise ConfigError for values that no run could use; `values` are all of cfg's by their dotted keys."""
    def need(holds: bool, key: str, why: str) -> None:
        if not holds:
            raise ConfigError(f"{key}: {values.get(key)!r} {why}")

    for key, value in values.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key not in _MAY_BE_NEGATIVE:
            need(value >= 0, key, "must not be negative")
            need(value > 0 or key in _MAY_BE_ZERO, key, "must be above 0")
    m, o, relora = cfg.model, cfg.training.optimization, cfg.model.relora
    need(m.d_model % m.attention_n_heads == 0, "model.d_model",
         f"must be a multiple of attention_n_heads {m.attention_n_heads}")
    need(m.d_model // m.attention_n_heads % 2 == 0, "model.d_model",
         f"gives heads of odd size over {m.attention_n_heads} heads; rotary positions need pairs")
    need(m.attention_n_heads % m.attention_n_kv_heads == 0, "model.attention_n_kv_heads",
         f"must divide attention_n_heads {m.attention_n_heads}")
    need(m.vocab_size < 2 ** 31, "model.vocab_size", "is more than shards can hold")
    need(0 <= o.min_lr_ratio <= 1, "training.optimization.min_lr_ratio", "must lie between 0 and 1")
    need(len(o.betas) == 2 and all(0 <= b < 1 for b in o.betas), "training.optimization.betas",
         "must be two numbers from 0 up to, but not including, 1")
    need(0 <= o.momentum < 1, "training.optimization.momentum", "must lie from 0 up to, but not including, 1")
    need(bool(cfg.checkpointing.hf_checkpoint.repo_id) or not cfg.checkpointing.save_to_hf,
         "checkpointing.hf_checkpoint.repo_id", "is needed for save_to_hf; set it to owner/name")
    if (dynamics := cfg.checkpointing.learning_dynamics) is not None:
        need(-m.max_seq_len <= dynamics.sequence_idx < m.max_seq_len, "checkpointing.learning_dynamics.sequence_idx",
             f"is no position of {m.max_seq_len} tokens")
    name = cfg.checkpointing.run_name
    need(name is None or (name not in ("", ".", "..") and not set(name) & set("/\\\0\n")),
         "checkpointing.run_name", "must be one plain folder name")
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
