"""Models that pico-train and relora-pico have published, as model folders of ours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor

from checkpoint import CheckpointError, compare_states, publish
from config import ConfigError, DatasetConfig, ModelConfig, ReLoRAConfig, config_from_dict
from hub.architecture import TOP_NAMES, skeleton
from hub.client import fetch_folder
from hub.datasets import find_local
from hub.llama import load_plain, plain_state, read_folder, writers
from hub.tokenizers import ByteTokenizer


def load_published(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A model published by pico-train or relora-pico, as load_plain gives it, adapters merged.

    Its tensors are `PREFIX.` + our names; a ReLoRA layer adds `.A_lora.weight`, `.B_lora.weight` and, with trainable
    scaling, `.s`.
    """
    found, tensors = read_folder(folder)
    try:
        if not str(found.get("model_type")).startswith("pico"):
            raise ConfigError(f"model_type {found.get('model_type')!r} is neither llama nor pico_decoder")
        if missing := {"d_model", "n_layers", "vocab_size"} - found.keys():
            raise ConfigError(f"{', '.join(sorted(missing))} missing")
        known = {f.name for f in dataclasses.fields(ReLoRAConfig)}
        relora = {k: v for k, v in (found.get("relora") or {}).items() if k in known} or None
        fields = {f.name for f in dataclasses.fields(ModelConfig)} - {"relora", "model_type"}
        cfg = config_from_dict({"model": {k: v for k, v in found.items() if k in fields} | {"relora": relora}}).model
    except (AttributeError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{folder}: config.json is not of a published Pico model ({error})") from None
    ours = {}
    for name, tensor in tensors.items():
        if name.split(".")[0] not in ("layers", *TOP_NAMES):
            name = name.split(".", 1)[-1]  # the prefix
        for theirs, leaf in ((".A_lora.weight", ".lora_A"), (".B_lora.weight", ".lora_B"), (".s", ".scaling")):
            name = name.removesuffix(theirs) + leaf if name.endswith(theirs) else name
        ours[name] = tensor.float()
    compare_states(skeleton(cfg).state_dict(), ours, folder)
    return dataclasses.replace(cfg, relora=None), plain_state(ours, cfg)


def import_model(source: str, out: Path, revision: str | None, tokenizer: Path | None) -> None:
    """A published Pico model or a Llama folder, from disk or the Hub, as a model folder of ours."""
    folder = find_local(source, owner=False) or fetch_folder(source, "model", ["*.json", "*.safetensors", "*.bin"],
                                                             DatasetConfig.patience_minutes, revision)
    found, _ = read_folder(folder)
    cfg, state = load_plain(folder) if found.get("model_type") == "llama" else load_published(folder)
    words = folder if tokenizer is None else tokenizer if tokenizer.is_dir() else tokenizer.parent
    if cfg.vocab_size > ByteTokenizer.vocab_size and not (words / "tokenizer.json").is_file():
        raise CheckpointError(f"{words}: has no tokenizer.json for {cfg.vocab_size:,} ids; name one with --tokenizer")
    publish(out, writers(state, cfg, words))
