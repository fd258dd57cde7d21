"""Plain Hugging Face Llama folders from our weights, with adapters merged and no remote code.

LlamaForCausalLM is the same architecture with rotary positions over half-split instead of interleaved pairs, so the
rows of q_proj and k_proj are permuted head by head; everything else is a change of names.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import CheckpointError, Writer, load_model_state, step_folders
from config import Config, ModelConfig
from data import load_tokenizer
from model import PicoDecoder
from relora import merged_state

# our name below layers.{i} -> Llama's below model.layers.{i}
LAYER_NAMES = {
    "attention_norm": "input_layernorm", "swiglu_norm": "post_attention_layernorm",
    "attention.q_proj": "self_attn.q_proj", "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj", "attention.o_proj": "self_attn.o_proj",
    "swiglu.w_0": "mlp.gate_proj", "swiglu.w_1": "mlp.up_proj", "swiglu.w_2": "mlp.down_proj",
}
TOP_NAMES = {"embedding_proj": "model.embed_tokens", "output_norm": "model.norm", "de_embedding_proj": "lm_head"}


def llama_names(cfg: ModelConfig) -> dict[str, str]:
    """{our parameter name: Llama's} of a plain decoder."""
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in TOP_NAMES.items()}
    for i in range(cfg.n_layers):
        names |= {f"layers.{i}.{ours}.weight": f"model.layers.{i}.{theirs}.weight"
                  for ours, theirs in LAYER_NAMES.items()}
    return names


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads * head_dim, in) from interleaved pairs (0, 1), (2, 3), … to halves: all firsts, all seconds."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def llama_state(state: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """A plain decoder's state dict under Llama's names and layout."""
    heads = {"q_proj": cfg.attention_n_heads, "k_proj": cfg.attention_n_kv_heads}
    result = {}
    for ours, theirs in llama_names(cfg).items():
        leaf = ours.split(".")[-2]
        result[theirs] = half_split(state[ours], heads[leaf]) if leaf in heads else state[ours]
    return result


def llama_config(cfg: ModelConfig, eos: int | None, pad: int | None) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": cfg.d_model, "intermediate_size": cfg.activation_hidden_dim,
        "num_hidden_layers": cfg.n_layers, "num_attention_heads": cfg.attention_n_heads,
        "num_key_value_heads": cfg.attention_n_kv_heads, "head_dim": cfg.d_model // cfg.attention_n_heads,
        "rms_norm_eps": cfg.norm_eps, "rope_theta": cfg.position_emb_theta,
        "max_position_embeddings": cfg.max_seq_len, "vocab_size": cfg.vocab_size, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, "bos_token_id": None, "eos_token_id": eos, "pad_token_id": pad,
        "torch_dtype": "float32",
    }


def write_config(path: Path, cfg: ModelConfig, eos: int | None, pad: int | None) -> None:
    path.write_text(json.dumps(llama_config(cfg, eos, pad), indent=2) + "\n", encoding="utf-8")


def write_weights(path: Path, state: dict[str, Tensor], cfg: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
    """Write a plain decoder's state dict as model.safetensors."""
    from safetensors.torch import save_file
    save_file({name: t.to(dtype).contiguous() for name, t in llama_state(state, cfg).items()}, path,
              metadata={"format": "pt"})


def writers(state: dict[str, Tensor], cfg: Config, dataset: Path) -> dict[str, Writer]:
    """The files that make a checkpoint a plain Llama folder: {name: writer}; `state` may hold adapters."""
    tokenizer = load_tokenizer(dataset)
    plain = merged_state(state, cfg.model.relora)
    files: dict[str, Writer] = {
        "config.json": lambda path: write_config(path, cfg.model, tokenizer.eos, tokenizer.pad),
        "model.safetensors": lambda path: write_weights(path, plain, cfg.model),
    }
    if (dataset / "tokenizer.json").exists():
        files["tokenizer.json"] = lambda path: shutil.copy(dataset / "tokenizer.json", path)
    return files


# ---- reading a Llama folder back -----------------------------------------------------------------------------

def interleaved(weight: Tensor, heads: int) -> Tensor:
    """The inverse of half_split."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def resolve(path: str | Path) -> Path:
    """A step or model folder as it is; for a run folder its newest step. Raises CheckpointError."""
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    steps = [s for folder in (path, path / "checkpoints") for s in step_folders(folder)
             if (s / "config.json").is_file()]
    if not steps:
        raise CheckpointError(f"{path}: neither a run, nor a checkpoint's step_N, nor a model folder")
    return steps[0]


def load_plain(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The decoder in a run's newest step, a step folder, or a Llama folder of the same architecture.

    Returns its configuration and its float32 state dict under our names, adapters merged. Raises CheckpointError
    listing what is missing, unexpected or misshapen.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    folder = resolve(path)
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read as a model folder ({error})") from None
    cfg = _our_config(found, folder)
    expected = {theirs: ours for ours, theirs in llama_names(cfg).items()}
    problems = [f"{n} is missing" for n in expected.keys() - tensors.keys()]
    problems += [f"{n} is unexpected" for n in tensors.keys() - expected.keys()]
    if problems:
        raise CheckpointError(f"{folder}: {'; '.join(sorted(problems)[:8])}")
    heads = {"q_proj": cfg.attention_n_heads, "k_proj": cfg.attention_n_kv_heads}
    state = {}
    for theirs, ours in expected.items():
        leaf = ours.split(".")[-2]
        state[ours] = (interleaved(tensors[theirs], heads[leaf]) if leaf in heads else tensors[theirs]).float()
    return cfg, state


def _our_config(found: dict, folder: Path) -> ModelConfig:
    try:
        rope = found.get("rope_theta") or found["rope_parameters"]["rope_theta"]
        return ModelConfig(
            d_model=found["hidden_size"], n_layers=found["num_hidden_layers"], vocab_size=found["vocab_size"],
            max_seq_len=found["max_position_embeddings"], attention_n_heads=found["num_attention_heads"],
            attention_n_kv_heads=found["num_key_value_heads"], activation_hidden_dim=found["intermediate_size"],
            norm_eps=found["rms_norm_eps"], position_emb_theta=rope)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: config.json is not of a plain Llama ({error} is missing)") from None


def load_decoder(path: str | Path) -> PicoDecoder:
    """The plain decoder of `path` (see load_plain) with its weights."""
    cfg, state = load_plain(path)
    model = PicoDecoder(cfg)
    load_model_state(model, state, path)
    return model
