"""A run that begins with another one's whole state, and with whatever is changed on purpose (training.fork_from).

Carried over: weights, moments, counters, the position in the data. Where the adapters change their shape or scale, the delta so
far is merged, so that the function stays the same, and the new ones begin at 0; what cannot be carried over is refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoint import CheckpointError, read_state, step_folders, verify
from config import Config, ConfigError, config_from_dict, flat, to_dict
from hub.llama import plain_state
from relora import has_adapters
from runtime import dist
from runtime.files import did_you_mean
from runtime.log import log

IS_THE_MODEL = ("d_model", "n_layers", "vocab_size", "max_seq_len", "attention_n_heads", "attention_n_kv_heads",
                "activation_hidden_dim", "norm_eps", "position_emb_theta")
IS_THE_ADAPTER = ("target_modules", "r", "lora_alpha", "lora_only", "trainable_scaling")
ONE_KIND_OF_MOMENTS = ({"adam", "adamw"},)  # optimizers that take over each other's state
NOT_OF_THE_COURSE = ("checkpointing.", "monitoring.", "training.fork_from", "training.fabric.num_")


def find(source: Path, cfg: Config) -> Path:
    """The step folder that `source` names, or the newest whole one with a training state of the run that it names."""
    options = cfg.checkpointing
    found = step_folders(source / options.checkpoints_dir) or [source]
    for folder in found:
        state = folder / options.fabric_checkpoint_dir / options.fabric_checkpoint_filename
        if state.is_file():
            verify(folder)
            return state
    raise CheckpointError(f"training.fork_from: {source} holds no training state; give a run, or a step folder that has "
                          f"{options.fabric_checkpoint_dir}/{did_you_mean(source)}")


def fork(cfg: Config) -> dict[str, Any] | None:
    """The state that cfg.training.fork_from gives to a run of `cfg`, with what differs as its "fork"; None where it is null.

    Says what differs and what was begun anew. Every rank must call it. Raises UserError naming what cannot be carried over.
    """
    if cfg.training.fork_from is None:
        return None
    source = Path(cfg.training.fork_from)
    path = dist.on_rank0(lambda: find(source, cfg))
    saved = read_state(path)
    before = config_from_dict(saved["config"])
    begun_anew = _carry_model(saved, before, cfg) + _carry_optimizer(saved, before, cfg)
    _check_position(saved, cfg)
    old, new = flat(to_dict(before)), flat(to_dict(cfg))
    changes = {key: [old.get(key), new.get(key)] for key in sorted(old.keys() | new.keys())
               if old.get(key) != new.get(key) and not key.startswith(NOT_OF_THE_COURSE)}
    saved["fork"] = {"from": str(source.resolve()), "step": saved["step"], "changes": changes, "begun_anew": begun_anew}
    told = "; ".join(f"{key}: {one!r} -> {other!r}" for key, (one, other) in changes.items()) or "nothing"
    log.info(f"forked from {source} at step {saved['step']}; changed: {told}")
    for note in begun_anew:
        log.warning(note)
    if saved["step"] >= cfg.last_step:
        log.warning(f"step {saved['step']} of {source} is the last of this configuration already: nothing is left to train")
    return saved


def _carry_model(saved: dict[str, Any], before: Config, cfg: Config) -> list[str]:
    """Make the weights those of cfg's model."""
    for key in IS_THE_MODEL:
        theirs, ours = getattr(before.model, key), getattr(cfg.model, key)
        if theirs != ours:
            raise ConfigError(f"model.{key}: {ours!r} cannot take the weights over from training.fork_from, whose model has "
                              f"{theirs!r}; use model.{key}={theirs}")
    old, new = before.model.relora, cfg.model.relora
    same = old is not None and new is not None and all(getattr(old, key) == getattr(new, key) for key in IS_THE_ADAPTER)
    if same and old.has_initial_weights == new.has_initial_weights:
        return []
    if new is not None and not new.has_initial_weights:
        key = "lora_only" if new.lora_only else "keep_original_weights"
        raise ConfigError(f"model.relora.{key}: {getattr(new, key)} throws the weights of training.fork_from away; leave it out")
    if not has_adapters(saved["model"]):
        return []
    saved["model"] = plain_state(saved["model"], before.model)
    saved["optimizer"] = {name: values for name, values in saved["optimizer"].items() if name in saved["model"]}
    return ["the adapters' delta was merged at the fork: " + ("their matrices train in full, with moments begun anew"
                                                              if new is None else "new ones begin at 0, their moments too")]


def _carry_optimizer(saved: dict[str, Any], before: Config, cfg: Config) -> list[str]:
    names = {before.training.optimization.optimizer, cfg.training.optimization.optimizer}
    if len(names) == 1 or any(names <= kind for kind in ONE_KIND_OF_MOMENTS):
        return []
    saved["optimizer"] = {}
    return ["the optimizer's state was begun anew: another optimizer keeps other moments"]


def _check_position(saved: dict[str, Any], cfg: Config) -> None:
    """Raise ConfigError unless the next batch begins at the row where the original's would."""
    loader, wanted = cfg.data.dataloader, saved["data"].get("next_row")
    row = loader.first_row + saved["step"] * loader.batch_size
    if wanted is not None and row != wanted:
        first = wanted - saved["step"] * loader.batch_size
        remedy = f"set data.dataloader.first_row={first} too" if first >= 0 else "use its batch_size and first_row"
        raise ConfigError(f"data.dataloader.batch_size: {loader.batch_size} rows a step would go on at row {row} of the data, "
                          f"and training.fork_from is at row {wanted}; {remedy}")
