"""Model folders: our weights as a plain Llama, adapters merged, no remote code; and read back.

LlamaForCausalLM is the same architecture with rotary positions over half-split instead of interleaved pairs, so the
rows of q_proj and k_proj are permuted head by head; everything else is a change of names. A decoder that somebody
edited until it computes something else is kept under our own names: `not_llama` says why, by measuring.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import model as model_code
from checkpoint import CheckpointError, Writer, compare_states, tensor_bytes
from config import ConfigError, ModelConfig, config_from_dict
from hub.architecture import llama_names, llama_shapes, llama_state, not_llama, skeleton
from hub.folders import read_folder, resolve, write_safetensors
from hub.tokenizers import END_OF_TEXT, ByteTokenizer, Tokenizer, load_tokenizer, tokenizer_config
from model import PicoDecoder
from relora import has_adapters, relora_layers
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
    changed = tuple(path.stat().st_mtime_ns for path in sorted(tokenizer_folder.glob("*.json")))
    tokenizer, known = tokenizer_of(tokenizer_folder, changed), tokenizer_folder / "tokenizer.json"
    eos, pad = (i if i is not None and i < cfg.vocab_size else None for i in (tokenizer.eos, tokenizer.pad))

    def as_json(value: dict) -> Writer:
        return Writer(lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))

    def weights(file: HashingFile) -> None:
        plain = plain_state(state, cfg)
        chosen = plain if not_llama else llama_state(plain, cfg)
        write_safetensors(file, {name: as_dtype(name, tensor, dtype) for name, tensor in chosen.items()})

    names = {"eos_token": tokenizer.text_of(eos), "pad_token": tokenizer.text_of(pad)}
    return {
        "config.json": as_json(own_config(cfg, not_llama) if not_llama else llama_config(cfg, eos, pad, dtype)),
        "generation_config.json": as_json({"eos_token_id": eos, "pad_token_id": pad, "do_sample": True}),
        "model.safetensors": Writer(weights, tensor_bytes(state)),
        "tokenizer.json": (Writer(lambda file: file.write(known.read_bytes())) if known.exists()
                           else as_json(byte_tokenizer_json())),
        "tokenizer_config.json": as_json(tokenizer_config(tokenizer) | names | {"model_max_length": cfg.max_seq_len}),
    }


@functools.lru_cache(maxsize=1)
def tokenizer_of(folder: Path, changed: tuple[int, ...]) -> Tokenizer:
    """load_tokenizer, once while its files have not `changed`: a run asks at every save, and OLMo's takes 0.1 s."""
    return load_tokenizer(folder)


def as_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of numbers as `dtype`; counts stay. Raises CheckpointError where float16 is too narrow."""
    result = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if dtype == torch.float16 and not result.isfinite().all():
        raise CheckpointError(f"{name} holds {tensor.abs().max():.3g}, and float16 ends at 65504; use bfloat16")
    return result


def plain_state(state: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """The plain decoder's state dict from one that may hold adapters: every weight is the effective one."""
    return merged_state(skeleton(cfg), state) if has_adapters(state) else state


def merged_state(model: torch.nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state`, of a model without numbers like `model`, with the effective weight in place of what each adapted layer holds."""
    model.load_state_dict(state, assign=True)
    layers = relora_layers(model)
    plain = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in layers}
    return plain | {f"{name}.weight": layer.effective_weight() for name, layer in layers.items()}


# ---- reading a Llama folder back -----------------------------------------------------------------------------

def interleaved(weight: Tensor, heads: int) -> Tensor:
    """The inverse of half_split."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def load_plain(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The decoder in a run's newest step, a step folder, or a Llama folder of the same architecture.

    Returns its configuration and its float32 state dict under our names, adapters merged. Raises CheckpointError
    listing what is missing, unexpected or misshapen.
    """
    folder = resolve(path)
    found, tensors = read_folder(folder)
    if OWN in found:
        return _load_own(found, tensors, folder)
    cfg = llama_model_config(found, folder)
    tensors = untied(without_frequencies(tensors, cfg, folder), found, folder)
    expected, names = llama_shapes(cfg), llama_names(cfg)
    compare_states({names[ours]: tensor for ours, tensor in expected.items()}, tensors, folder)
    if reason := not_llama(cfg, tokens=64):
        log.warning(f"{folder}: holds a Llama, and model.py as it is now computes something else with its weights ({reason})")
    heads = {"q_proj": cfg.attention_n_heads, "k_proj": cfg.attention_n_kv_heads}
    state = {}
    for ours, theirs in names.items():
        leaf, tensor = ours.split(".")[-2], as_float32(theirs, tensors[theirs], folder)
        state[ours] = interleaved(tensor, heads[leaf]) if leaf in heads else tensor
    return cfg, state


def as_float32(name: str, tensor: Tensor, folder: Path) -> Tensor:
    """A weight for computing. Raises CheckpointError for packed ones, and for NaN and infinities."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise CheckpointError(f"{folder}: {name} is of {str(tensor.dtype).removeprefix('torch.')}; packed weights cannot be read")
    tensor = tensor.float()
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise CheckpointError(f"{folder}: {name} holds numbers that are not finite; its training diverged, or it is damaged")
    return tensor


def without_frequencies(tensors: dict[str, Tensor], cfg: ModelConfig, folder: Path) -> dict[str, Tensor]:
    """Without the rotary frequencies that older folders hold. Raises CheckpointError where they are not rope_theta's."""
    size = cfg.d_model // cfg.attention_n_heads
    expected = cfg.position_emb_theta ** -(torch.arange(0, size, 2) / size)
    extra = [name for name in tensors if name.endswith("rotary_emb.inv_freq")]
    for name in extra:
        found = tensors[name].float()
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0.01):  # they may be bfloat16
            raise CheckpointError(f"{folder}: {name} holds other frequencies than rope_theta {cfg.position_emb_theta:g} gives")
    if extra:
        log.info(f"{folder}: {len(extra)} tensors rotary_emb.inv_freq are left out; they follow from rope_theta")
    return {name: tensor for name, tensor in tensors.items() if name not in extra}


def untied(tensors: dict[str, Tensor], found: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """With a head of its own, where the embedding serves as head too."""
    embedding = tensors.get("model.embed_tokens.weight")
    if not found.get("tie_word_embeddings") or embedding is None:
        return tensors
    if not torch.equal(tensors.get("lm_head.weight", embedding), embedding):
        raise CheckpointError(f"{folder}: has tie_word_embeddings in config.json, and an lm_head.weight of its own")
    log.info(f"{folder}: its embedding is its head too; here they are two tensors, equal now, which would train apart")
    return tensors | {"lm_head.weight": embedding}


def _load_own(found: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """As load_plain, of a folder under our own names."""
    try:
        cfg = config_from_dict({"model": {k: v for k, v in found.items() if k not in (OWN, "model_py")}}).model
    except ConfigError as error:
        raise CheckpointError(f"{folder}: config.json does not describe a model that this code builds ({error})") from None
    check_layers(cfg, tensors, folder)
    compare_states(skeleton(cfg).state_dict(), tensors, folder)
    if found.get("model_py") != model_py():
        log.warning(f"{folder}: was made by another model.py; where their formulas differ, so does what it computes")
    return cfg, {name: as_float32(name, tensor, folder) if tensor.is_floating_point() else tensor
                 for name, tensor in tensors.items()}


def check_layers(cfg: ModelConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    """Before a model is built as a stranger says: one of a million layers takes hours."""
    if cfg.n_layers > len(tensors):
        raise CheckpointError(f"{folder}: config.json tells of {cfg.n_layers} layers, and there are {len(tensors)} tensors")


def llama_model_config(found: dict[str, Any], folder: Path) -> ModelConfig:
    """The configuration that a Llama config.json describes. Raises CheckpointError for what would compute otherwise."""
    names = {"d_model": "hidden_size", "n_layers": "num_hidden_layers", "vocab_size": "vocab_size",
             "max_seq_len": "max_position_embeddings", "attention_n_heads": "num_attention_heads",
             "activation_hidden_dim": "intermediate_size"}
    if "pico" in str(found.get("model_type")):
        raise CheckpointError(f"{folder}: is a published Pico model; make it one of ours with: "
                              f"python export.py import {folder} OUT")
    try:
        tree = {ours: found[theirs] for ours, theirs in names.items()}
        theta = {t for t in (found.get("rope_theta"), (found.get("rope_parameters") or {}).get("rope_theta")) if t is not None}
        kv_heads = found.get("num_key_value_heads")
        tree |= {"attention_n_kv_heads": found["num_attention_heads"] if kv_heads is None else kv_heads,
                 "norm_eps": found.get("rms_norm_eps", 1e-6), "position_emb_theta": max(theta, default=10000.0)}  # transformers'
        if text := next((key for key, value in tree.items() if isinstance(value, str)), None):
            raise ConfigError(f"{names.get(text, text)} is the text {tree[text]!r}")
        cfg = config_from_dict({"model": tree}).model
        differing = what_differs(found, cfg)
        differing += [f"two values of rope_theta, {min(theta)} and {max(theta)}"] if len(theta) > 1 else []
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{folder}: config.json is not of a plain Llama ({error})") from None
    if differing:
        raise CheckpointError(f"{folder}: config.json is not of a model that this lab builds: it has {', '.join(differing)}")
    return cfg


def what_differs(found: dict[str, Any], cfg: ModelConfig) -> list[str]:
    """What in a Llama's config.json makes it compute something else than the decoder of `cfg`."""
    needed = llama_config(cfg, None, None, torch.float32) | {"partial_rotary_factor": 1.0}
    same = ("model_type", "hidden_act", "head_dim", "attention_bias", "mlp_bias", "partial_rotary_factor")
    differing = [f"{key} {found[key]!r} instead of {needed[key]!r}" for key in same
                 if found.get(key) not in (None, needed[key]) and (key, found[key]) != ("hidden_act", "swish")]  # silu's old name
    differing += [f"{key}, {why}" for key, why in (("quantization_config", "packed weights"), ("auto_map", "code of its own"))
                  if found.get(key)]
    for key in ("rope_parameters", "rope_scaling"):
        rope = dict(found.get(key) or {})
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        rest = {k: v for k, v in rope.items() if k not in ("type", "rope_theta") and (k, v) != ("partial_rotary_factor", 1.0)}
        if kind != "default" or rest:
            differing.append(f"scaled rotary positions ({key} of type {kind!r})")
    return differing


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


class WithoutDraws(TorchFunctionMode):
    """Modules made inside are not initialised: until weights take their place, their memory is never touched."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("kaiming_uniform_", "uniform_", "normal_"):  # of torch.nn.init, or a tensor's own
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def load_decoder(path: str | Path) -> PicoDecoder:
    """The plain decoder of `path` (see load_plain) with its weights, which stay in the file until they are used."""
    cfg, state = load_plain(path)
    with WithoutDraws():
        model = PicoDecoder(cfg)
    compare_states(model.state_dict(), state, path)
    model.load_state_dict(state, assign=True)
    return model
