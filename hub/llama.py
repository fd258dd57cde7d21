"""Model folders: our weights as a plain Llama, adapters merged, no remote code; and read back.

LlamaForCausalLM is the same architecture with rotary positions over half-split instead of interleaved pairs, so the
rows of q_proj and k_proj are permuted head by head; everything else is a change of names. A decoder that somebody
edited until it computes something else is kept under our own names: `not_llama` says why, by measuring.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

import model as model_code
from checkpoint import CheckpointError, Writer, compare_states, load_model_state, read_manifest, step_folders, tensor_bytes
from config import CheckpointingConfig, ConfigError, ModelConfig, UserError, config_from_dict, load_config
from hub.architecture import llama_names, llama_state, not_llama, skeleton
from hub.tokenizers import END_OF_TEXT, ByteTokenizer, load_tokenizer, tokenizer_config
from model import PicoDecoder
from relora import has_adapters, relora_layers
from runtime import files
from runtime.files import HashingFile, sha256
from runtime.log import log

OWN = "not_llama"  # the key of config.json that makes a folder one under our own names


def llama_config(cfg: ModelConfig, eos: int | None, pad: int | None, dtype: torch.dtype) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": cfg.d_model, "intermediate_size": cfg.activation_hidden_dim,
        "num_hidden_layers": cfg.n_layers, "num_attention_heads": cfg.attention_n_heads,
        "num_key_value_heads": cfg.attention_n_kv_heads, "head_dim": cfg.d_model // cfg.attention_n_heads,
        "rms_norm_eps": cfg.norm_eps, "rope_theta": cfg.position_emb_theta,
        "max_position_embeddings": cfg.max_seq_len, "vocab_size": cfg.vocab_size, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, "bos_token_id": None, "eos_token_id": eos, "pad_token_id": pad,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def own_config(cfg: ModelConfig, reason: str) -> dict:
    """config.json of a folder under our own names: what model.py was told, and which model.py it was."""
    return dataclasses.asdict(dataclasses.replace(cfg, relora=None)) | {OWN: reason, "model_py": model_py()}


def model_py() -> str:
    return sha256(Path(model_code.__file__))[:16]


def byte_tokenizer_json() -> dict:
    """ByteTokenizer as a tokenizer.json: a BPE without merges over GPT-2's printable names of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    vocab = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end = {"id": ByteTokenizer.eos, "content": END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False,
           "normalized": False, "special": True}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
            "pre_tokenizer": level, "post_processor": None, "decoder": level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "vocab": vocab | {END_OF_TEXT: ByteTokenizer.eos}, "merges": []}}


def writers(state: dict[str, Tensor], cfg: ModelConfig, tokenizer_folder: Path,
            dtype: torch.dtype = torch.float32, not_llama: str | None = None) -> dict[str, Writer]:
    """The files of a plain Llama folder, {name: writer}, from a decoder's state dict, adapters or not.

    With `not_llama`, the reason: of a folder of our own, which only this lab reads.
    """
    tokenizer, known = load_tokenizer(tokenizer_folder), (tokenizer_folder / "tokenizer.json")
    eos, pad = (i if i is not None and i < cfg.vocab_size else None for i in (tokenizer.eos, tokenizer.pad))

    def as_json(value: dict) -> Writer:
        return Writer(lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))

    def weights(file: HashingFile) -> None:
        plain = plain_state(state, cfg)
        chosen = plain if not_llama else llama_state(plain, cfg)
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in chosen.items()}
        file.write(save(tensors, metadata={"format": "pt"}))

    names = {"eos_token": tokenizer.text_of(eos), "pad_token": tokenizer.text_of(pad)}
    return {
        "config.json": as_json(own_config(cfg, not_llama) if not_llama else llama_config(cfg, eos, pad, dtype)),
        "generation_config.json": as_json({"eos_token_id": eos, "pad_token_id": pad, "do_sample": True}),
        "model.safetensors": Writer(weights, tensor_bytes(state)),
        "tokenizer.json": (Writer(lambda file: file.write(known.read_bytes())) if known.exists()
                           else as_json(byte_tokenizer_json())),
        "tokenizer_config.json": as_json(tokenizer_config(tokenizer) | names | {"model_max_length": cfg.max_seq_len}),
    }


# ---- reading a Llama folder back -----------------------------------------------------------------------------

def interleaved(weight: Tensor, heads: int) -> Tensor:
    """The inverse of half_split."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def resolve(path: str | Path) -> Path:
    """A step or model folder as it is; for a run folder its newest whole step. Raises UserError."""
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    run = path / "training_config.yaml"
    options = load_config(run).checkpointing if run.is_file() else CheckpointingConfig()
    for step in (step for folder in (path, path / options.checkpoints_dir) for step in step_folders(folder)):
        if problem := lacks(step):
            log.warning(f"{problem}; an older step is taken, if there is one")
        else:
            return step
    raise CheckpointError(f"{path}: neither a run, nor a checkpoint's step_N, nor a model folder{files.did_you_mean(path)}")


def lacks(step: Path) -> str | None:
    """What a step folder lacks of its model, by its manifest, where it has one."""
    if not (step / "manifest.json").is_file():
        return None if (step / "config.json").is_file() else f"{step}: holds no model"
    try:
        entries = read_manifest(step)
        wrong = [name for name, entry in entries.items()
                 if not ((step / name).is_file() and (step / name).stat().st_size == entry["size"])]
    except UserError as error:
        return str(error)
    return f"{step}: {wrong[0]} is not as its manifest says" if wrong else None


def load_plain(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The decoder in a run's newest step, a step folder, or a Llama folder of the same architecture.

    Returns its configuration and its float32 state dict under our names, adapters merged. Raises CheckpointError
    listing what is missing, unexpected or misshapen.
    """
    folder = resolve(path)
    found, tensors = read_folder(folder)
    if OWN in found:
        return _load_own(found, tensors, folder)
    cfg = _our_config(found, folder)
    if reason := not_llama(cfg, tokens=64):
        log.warning(f"{folder}: holds a Llama, and model.py as it is now computes something else with its weights ({reason})")
    compare_states(llama_state(skeleton(cfg).state_dict(), cfg), tensors, folder)
    heads = {"q_proj": cfg.attention_n_heads, "k_proj": cfg.attention_n_kv_heads}
    state = {}
    for ours, theirs in llama_names(cfg).items():
        leaf, tensor = ours.split(".")[-2], tensors[theirs].float()
        state[ours] = interleaved(tensor, heads[leaf]) if leaf in heads else tensor
    return cfg, state


def _load_own(found: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """As load_plain, of a folder under our own names."""
    try:
        cfg = config_from_dict({"model": {k: v for k, v in found.items() if k not in (OWN, "model_py")}}).model
    except ConfigError as error:
        raise CheckpointError(f"{folder}: config.json does not describe a model that this code builds ({error})") from None
    compare_states(skeleton(cfg).state_dict(), tensors, folder)
    if found.get("model_py") != model_py():
        log.warning(f"{folder}: was made by another model.py; where their formulas differ, so does what it computes")
    return cfg, {name: tensor.float() for name, tensor in tensors.items()}


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, {name: tensor}) of a model folder whose weights are safetensors, in one file or several, or one .bin."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        index, old = folder / "model.safetensors.index.json", folder / "pytorch_model.bin"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            files = ["model.safetensors"]
        if not index.is_file() and not (folder / files[0]).is_file() and old.is_file():
            tensors = torch.load(old, map_location="cpu", weights_only=True)
        else:
            tensors = {name: tensor for file in files for name, tensor in load_file(folder / Path(file).name).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError, RecursionError, SafetensorError,
            pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder}: cannot be read as a model folder ({' '.join(str(error).split())[:200]})") from None
    if not (isinstance(found, dict) and isinstance(tensors, dict)
            and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items())):
        raise CheckpointError(f"{folder}: config.json is no object, or its weights are not tensors by name")
    return found, tensors


def plain_state(state: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """The plain decoder's state dict from one that may hold adapters: every weight is the effective one."""
    if not has_adapters(state):
        return state
    model = skeleton(cfg)
    model.load_state_dict(state, assign=True)
    adapted = {f"{name}.weight": layer.effective_weight() for name, layer in relora_layers(model).items()}
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in relora_layers(model)} | adapted


def _our_config(found: Any, folder: Path) -> ModelConfig:
    """The configuration that a Llama config.json describes. Raises CheckpointError for what would compute otherwise."""
    names = {"d_model": "hidden_size", "n_layers": "num_hidden_layers", "vocab_size": "vocab_size",
             "max_seq_len": "max_position_embeddings", "attention_n_heads": "num_attention_heads",
             "activation_hidden_dim": "intermediate_size"}
    if str(found.get("model_type")).startswith("pico"):
        raise CheckpointError(f"{folder}: is a published Pico model; make it one of ours with: "
                              f"python export.py import {folder} OUT")
    try:
        rope = found.get("rope_parameters") or {}
        tree = {ours: found[theirs] for ours, theirs in names.items()}
        tree |= {"attention_n_kv_heads": found.get("num_key_value_heads") or found["num_attention_heads"],
                 "norm_eps": found.get("rms_norm_eps", 1e-6),
                 "position_emb_theta": found.get("rope_theta") or rope.get("rope_theta", 10000.0)}  # transformers' defaults
        if text := next((key for key, value in tree.items() if isinstance(value, str)), None):
            raise ConfigError(f"{names.get(text, text)} is the text {tree[text]!r}")
        cfg = config_from_dict({"model": tree}).model
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{folder}: config.json is not of a plain Llama ({error})") from None
    needed = llama_config(cfg, None, None, torch.float32)
    same = ("model_type", "hidden_act", "tie_word_embeddings", "head_dim", "attention_bias", "mlp_bias")
    differing = [f"{key} {found[key]!r} instead of {needed[key]!r}" for key in same if found.get(key) not in (None, needed[key])]
    if found.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        differing.append("scaled rotary positions")
    if differing:
        raise CheckpointError(f"{folder}: config.json is not of a model that this lab builds: it has {', '.join(differing)}")
    return cfg


def starting_weights(source: str, cfg: ModelConfig) -> dict[str, Tensor]:
    """Those of `source`, training.start_from. Raises ConfigError unless they are of the very model that is trained."""
    found, weights = load_plain(source)
    for key in ("d_model", "n_layers", "vocab_size", "attention_n_heads", "attention_n_kv_heads", "activation_hidden_dim",
                "norm_eps", "position_emb_theta"):
        theirs, ours = getattr(found, key), getattr(cfg, key)
        if theirs != ours:
            raise ConfigError(f"training.start_from: {source} has {key} {theirs!r}, and model.{key} is "
                              f"{ours!r}; use model.{key}={theirs}")
    return weights


def load_decoder(path: str | Path) -> PicoDecoder:
    """The plain decoder of `path` (see load_plain) with its weights."""
    cfg, state = load_plain(path)
    model = PicoDecoder(cfg)
    load_model_state(model, state, path)
    return model


