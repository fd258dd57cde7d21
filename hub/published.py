"""Models that pico-train and relora-pico have published, and Llama folders, as model folders of ours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint import CheckpointError, compare_states, publish
from config import ConfigError, DatasetConfig, ModelConfig, config_from_dict
from hub.architecture import TOP_NAMES, not_llama
from hub.client import fetch_folder
from hub.datasets import find_local
from hub.folders import read_folder, read_json
from hub.llama import OWN, as_float32, check_layers, load_plain, merged_state, writers
from hub.tokenizers import ByteTokenizer, load_tokenizer
from model import PicoDecoder
from relora import ReLoRALinear, relora_layers
from runtime.log import log

MODEL_TYPES = ("pico", "pico_decoder", "relora-pico", "pico_relora_decoder")  # of earlier and of later versions
NEEDED = {f.name for f in dataclasses.fields(ModelConfig)} - {"model_type", "batch_size", "relora", "fast_paths"}
LEAVES = {".A_lora.weight": ".lora_A", ".B_lora.weight": ".lora_B", ".s": ".scaling"}


def load_published(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A model published by pico-train or relora-pico, as load_plain gives it, adapters merged.

    Its tensors are `PREFIX.` + our names; a ReLoRA layer adds `.A_lora.weight`, `.B_lora.weight` and, with trainable
    scaling, `.s`.
    """
    found, tensors = read_folder(folder)
    try:
        if missing := NEEDED - found.keys():
            raise ConfigError(f"{', '.join(sorted(missing))} missing")
        cfg = config_from_dict({"model": {key: found[key] for key in NEEDED} | {"relora": found.get("relora") or None}}).model
    except (AttributeError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{folder}: config.json is not of a published Pico model ({error})") from None
    check_layers(cfg, tensors, folder)
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.split(".")[0] not in ("layers", *TOP_NAMES):
            name = name.split(".", 1)[-1]  # the prefix
        ending = next((ending for ending in LEAVES if name.endswith(ending)), "")
        name = name.removesuffix(ending) + LEAVES.get(ending, "")
        if name in ours:
            raise CheckpointError(f"{folder}: holds {name} twice, under two prefixes")
        ours[name] = as_float32(name, tensor, folder)
    model = adapted_skeleton(cfg)
    unused = {f"{name}.weight" for name, layer in relora_layers(model).items() if layer.weight is None} & ours.keys()
    if unused:
        log.info(f"{folder}: {len(unused)} weights of layers that are lora_only are left out; nothing reads them")
    ours = {name: tensor for name, tensor in ours.items() if name not in unused}
    compare_states(model.state_dict(), ours, folder)
    return dataclasses.replace(cfg, relora=None), merged_state(model, ours)


def adapted_skeleton(cfg: ModelConfig) -> PicoDecoder:
    """The model without numbers, adapted as relora-pico does: targets in any case, and the head too where its name fits."""
    with torch.device("meta"):
        model = PicoDecoder(dataclasses.replace(cfg, relora=None))
        targets = [target.lower() for target in cfg.relora.target_modules] if cfg.relora else []
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and any(target in name for target in targets):
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, ReLoRALinear(layer, cfg.relora, name, seed=0))
    return model


def import_model(source: str, out: Path, revision: str | None, tokenizer: Path | None) -> None:
    """A published Pico model or a Llama folder, from disk or the Hub, as a model folder of ours."""
    folder = find_local(source, owner=False) or fetch_model(source, revision)
    found = read_json(folder / "config.json")
    kind = found.get("model_type")
    if OWN in found:
        raise CheckpointError(f"{folder}: is under this lab's own names already ({found[OWN]}); use it as it is")
    if kind not in ("llama", *MODEL_TYPES):
        raise CheckpointError(f"{folder}: its model_type {kind!r} is none of llama, {', '.join(MODEL_TYPES)}")
    cfg, state = load_plain(folder) if kind == "llama" else load_published(folder)
    tokenizer_folder = choose_tokenizer(tokenizer, folder, cfg)
    if found.get("bos_token_id") is not None:
        log.info(f"{folder}: has a token to begin texts with, id {found['bos_token_id']}; this lab puts none before a text")
    publish(out, writers(state, cfg, tokenizer_folder, not_llama=not_llama(cfg)), anew=True)


def fetch_model(name: str, revision: str | None) -> Path:
    """The files of a model on the Hub: its safetensors, or where it has none its .bin."""
    def fetch(*kinds: str) -> Path:
        return fetch_folder(name, "model", ["*.json", *kinds], DatasetConfig.patience_minutes, revision)
    folder = fetch("*.safetensors")
    return folder if any(folder.glob("*.safetensors")) else fetch("*.bin")


def choose_tokenizer(given: Path | None, folder: Path, cfg: ModelConfig) -> Path:
    """The folder of the tokenizer of an imported model: that of --tokenizer, or the model's. Raises CheckpointError."""
    if given is not None and not given.is_dir() and given.name != "tokenizer.json":
        raise CheckpointError(f"--tokenizer: {given} is neither a tokenizer.json nor a folder that has one")
    chosen = folder if given is None else given if given.is_dir() else given.parent
    if not (chosen / "tokenizer.json").is_file():
        if cfg.vocab_size > ByteTokenizer.vocab_size or given is not None:
            raise CheckpointError(f"{chosen}: has no tokenizer.json for {cfg.vocab_size:,} ids; name one with --tokenizer")
        log.info(f"{chosen}: has no tokenizer.json; its ids are taken for bytes")
    if (size := load_tokenizer(chosen).vocab_size) > cfg.vocab_size:
        log.warning(f"{chosen}: its tokenizer has {size:,} ids, and the model knows {cfg.vocab_size:,}; is it the model's own?")
    return chosen
