"""What our decoder is called elsewhere, and whether it still computes what a Llama does: measured, not declared."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import compare_states
from config import ConfigError, ModelConfig, ReLoRAConfig
from model import PicoDecoder
from relora import ReLoRALinear, apply_relora

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
    """Rows (heads * head_dim, in) from interleaved pairs (0, 1), (2, 3), ... to halves: all firsts, all seconds."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def llama_shapes(cfg: ModelConfig) -> dict[str, Tensor]:
    """{our parameter name: an empty tensor of the shape that it has in a Llama}."""
    width, hidden = cfg.d_model, cfg.activation_hidden_dim
    kv_width = width // cfg.attention_n_heads * cfg.attention_n_kv_heads
    shapes = {"embedding_proj": (cfg.vocab_size, width), "de_embedding_proj": (cfg.vocab_size, width),
              "k_proj": (kv_width, width), "v_proj": (kv_width, width), "w_0": (hidden, width), "w_1": (hidden, width),
              "w_2": (width, hidden), "q_proj": (width, width), "o_proj": (width, width)}
    return {name: torch.empty(shapes.get(name.split(".")[-2], (width,)), device="meta") for name in llama_names(cfg)}


def llama_state(state: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """A plain decoder's state dict under Llama's names and layout. Raises CheckpointError for what has no place there."""
    compare_states(llama_shapes(cfg), state, "model.py's decoder (it is no Llama)")
    heads = {"q_proj": cfg.attention_n_heads, "k_proj": cfg.attention_n_kv_heads}
    result = {}
    for ours, theirs in llama_names(cfg).items():
        leaf = ours.split(".")[-2]
        result[theirs] = half_split(state[ours], heads[leaf]) if leaf in heads else state[ours]
    return result


def skeleton(cfg: ModelConfig) -> PicoDecoder:
    """The model without numbers, adapters included."""
    with torch.device("meta"):
        model = PicoDecoder(cfg)
        if cfg.relora is not None:
            apply_relora(model, cfg.relora)
    return model


# ---- is it a Llama? --------------------------------------------------------------------------------------------

def not_llama(cfg: ModelConfig, tokens: int = 2048) -> str | None:
    """Why model.py, as it is now, does not compute what LlamaForCausalLM does; None where it does.

    Measured, not declared: by names and shapes of its parameters, and by the logits of a small twin (the same layers, heads
    and positions, but narrow) beside an independent Llama with the same weights, on one row of up to `tokens` tokens.
    """
    found, known = skeleton(dataclasses.replace(cfg, relora=None)).state_dict(), llama_shapes(cfg)
    bent = [f"{name} {tuple(found[name].shape)}" for name in found if name in known and found[name].shape != known[name].shape]
    told = [f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''} {'have' if names[1:] else 'has'} {what}"
            for names, what in ((sorted(found.keys() - known), "no place in a Llama"), (bent, "another shape there"),
                                (sorted(known.keys() - found), "no counterpart here")) if names]
    if told:
        return " and ".join(told)
    twin = dataclasses.replace(cfg, d_model=8 * cfg.attention_n_heads, activation_hidden_dim=64, vocab_size=64, relora=None,
                               max_seq_len=min(cfg.max_seq_len, tokens))
    try:
        deviation = twin_deviation(twin)
    except Exception as error:  # of somebody's edit
        return f"a small twin of it cannot be computed ({type(error).__name__}: {error})"
    return None if deviation < 1e-3 else f"its logits differ from a Llama's by {deviation:.1e} of their size"


@torch.no_grad()
def twin_deviation(cfg: ModelConfig) -> float:
    """The largest difference between the logits of model.py and of a Llama with the same weights, relative to their size.

    Rounding gives some 4e-6. Norms differ from 1, rows of the embedding are down to a thousandth, so that eps counts, and
    queries are long, so that attention is sharp.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PicoDecoder(cfg).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            if name.endswith("q_proj.weight"):
                parameter.mul_(8)
        model.embedding_proj.weight.mul_(torch.logspace(-3, 0, cfg.vocab_size)[:, None])
        ids = torch.randint(cfg.vocab_size, (1, cfg.max_seq_len))
        found, expected = model(ids), llama_logits(llama_state(model.state_dict(), cfg), cfg, ids)
    return ((found - expected).abs().max() / expected.abs().max()).nan_to_num(torch.inf).item()


def llama_logits(tensors: dict[str, Tensor], cfg: ModelConfig, ids: Tensor) -> Tensor:
    """Logits (B, T, V) of LlamaForCausalLM with these tensors, in plain formulas: half-split rotary positions."""
    B, T, heads, size = *ids.shape, cfg.attention_n_heads, cfg.d_model // cfg.attention_n_heads
    angles = torch.outer(torch.arange(T), cfg.position_emb_theta ** -(torch.arange(0, size, 2) / size)).repeat(1, 2)  # (T, size)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + cfg.norm_eps).rsqrt() * tensors[f"{name}.weight"]

    def split(x: Tensor, name: str, count: int) -> Tensor:  # (B, count, T, size)
        return F.linear(x, tensors[f"{name}.weight"]).view(B, T, count, size).transpose(1, 2)

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    x = tensors["model.embed_tokens.weight"][ids]
    for i in range(cfg.n_layers):
        block = f"model.layers.{i}"
        h = norm(x, f"{block}.input_layernorm")
        q = turn(split(h, f"{block}.self_attn.q_proj", heads))
        k, v = (split(h, f"{block}.self_attn.{name}", cfg.attention_n_kv_heads) for name in ("k_proj", "v_proj"))
        k, v = (y.repeat_interleave(heads // cfg.attention_n_kv_heads, 1) for y in (turn(k), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1)
        x = x + F.linear(y, tensors[f"{block}.self_attn.o_proj.weight"])
        h = norm(x, f"{block}.post_attention_layernorm")
        gate, up = (F.linear(h, tensors[f"{block}.mlp.{name}.weight"]) for name in ("gate_proj", "up_proj"))
        x = x + F.linear(F.silu(gate) * up, tensors[f"{block}.mlp.down_proj.weight"])
    return F.linear(norm(x, "model.norm"), tensors["lm_head.weight"])


def check_effective_weight(cfg: ReLoRAConfig) -> None:
    """Raise ConfigError unless an adapted layer computes what its effective weight says: merges and exports rely on it."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        layer = ReLoRALinear(torch.nn.Linear(24, 16, bias=False), cfg, "probe", seed=0).eval()
        for parameter in layer.factors().values():
            parameter.uniform_(-1, 1)
        x = torch.randn(5, 24)
        found, expected = layer(x), F.linear(x, layer.effective_weight())
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()):
        raise ConfigError(f"relora.py: ReLoRALinear.forward and effective_weight() differ by {(found - expected).abs().max():.1e}"
                          "; merges and exports would not be what trains: make the two agree")


def check_code(cfg: ModelConfig) -> str | None:
    """What a run asks of model.py and relora.py as they are now: `not_llama`, and `check_effective_weight`."""
    if cfg.relora is not None:
        check_effective_weight(cfg.relora)
    return not_llama(cfg)
