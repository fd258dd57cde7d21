"""The Pico decoder: a LLaMA-style language model in one file.

RMSNorm (arXiv 1910.07467), rotary positions over interleaved pairs (2104.09864), grouped-query
attention (2305.13245) with a KV cache, SwiGLU (2002.05202), untied embeddings, no biases. Parameter
names are those of the published Pico models. It knows nothing of ReLoRA, ranks or files.

Each formula stands here. Where there is a faster way to the same numbers, the line before it takes
that way (runtime/kernels.py says how); `model.fast_paths=false` leaves all of them out. Edit what
you like: a run says at its start whether the model is still a Llama to the rest of the world.

Dimensions: B batch, T time, D d_model, H heads, K key/value heads, V vocabulary.

    model = PicoDecoder(ModelConfig())
    logits = model(input_ids)            # (B, T) int64 -> (B, T, V) float32
    loss = model(input_ids, labels)      # mean cross-entropy, without ever holding (B, T, V)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ConfigError, ModelConfig
from runtime import cpu_kernels, kernels
from runtime.kernels import IGNORE


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()  # a mean of D squares in bf16 would keep 8 bits of it, and scale every feature by the error
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def rope_table(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency, each (length, 1, head_dim / 2): the 1 is for heads."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies)[:, None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[2i], x[2i+1]) of x (B, T, heads, head_dim) by its position's angle.

    Neighbours make a pair, as in the paper and in the published Pico weights; transformers pairs x[i] with
    x[i + head_dim / 2], the same function after a permutation of the rows of q_proj and k_proj (hub/llama.py).
    """
    if kernels.plain_cpu(x):
        return cpu_kernels.rotate(x, cos, sin)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)


def linear_type(cfg: ModelConfig) -> type[nn.Linear]:
    return cpu_kernels.Linear if cfg.fast_paths else nn.Linear


class KVCache:
    """Keys and values of the positions seen so far: (layers, B, K, capacity, head_dim)."""

    def __init__(self, cfg: ModelConfig, batch: int, capacity: int, like: Tensor):
        shape = (cfg.n_layers, batch, cfg.attention_n_kv_heads, capacity, cfg.d_model // cfg.attention_n_heads)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, K, T, head_dim) for one layer; returns all of its keys and values."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length:end] = k
        self.values[layer, :, :, self.length:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.fast = layer, cfg.fast_paths
        Linear = linear_type(cfg)
        self.heads, self.kv_heads = cfg.attention_n_heads, cfg.attention_n_kv_heads
        self.head_dim = cfg.d_model // self.heads
        self.q_proj = Linear(cfg.d_model, cfg.d_model, bias=False)
        self.k_proj = Linear(cfg.d_model, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = Linear(cfg.d_model, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = Linear(cfg.d_model, cfg.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        B, T, D = x.shape
        q = rotate(self.q_proj(x).view(B, T, self.heads, -1), cos, sin).transpose(1, 2)  # (B, H, T, head_dim)
        k = rotate(self.k_proj(x).view(B, T, self.kv_heads, -1), cos, sin).transpose(1, 2)  # (B, K, T, head_dim)
        v = self.v_proj(x).view(B, T, self.kv_heads, -1).transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        S = k.size(2)  # keys to look at: T, or more behind a filled cache
        if self.fast and S == T:
            y = kernels.causal_attention(q, k, v)
        else:  # softmax(q k' / sqrt(head_dim)) v, where row t sees the S - T cached positions and its own first t
            k, v = (each.repeat_interleave(self.heads // self.kv_heads, dim=1) for each in (k, v))  # (B, H, S, head_dim)
            seen = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T) if 1 < T < S else None
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=1 < T == S)  # (B, H, T, head_dim)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, D))


class SwiGLU(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        Linear = linear_type(cfg)
        self.w_0 = Linear(cfg.d_model, cfg.activation_hidden_dim, bias=False)  # gate
        self.w_1 = Linear(cfg.d_model, cfg.activation_hidden_dim, bias=False)  # up
        self.w_2 = Linear(cfg.activation_hidden_dim, cfg.d_model, bias=False)  # down

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D), inside (B, T, activation_hidden_dim)
        return self.w_2(F.silu(self.w_0(x)) * self.w_1(x))


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attention = Attention(cfg, layer)
        self.swiglu_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.swiglu = SwiGLU(cfg)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        # pre-norm: what is added to the residual stream x is read from a normed copy, x itself is never scaled
        x = x + self.attention(self.attention_norm(x), cos, sin, cache)
        return x + self.swiglu(self.swiglu_norm(x))


class PicoDecoder(nn.Module):
    """The decoder of `cfg`, with PyTorch's default initialisation (seed it with torch.manual_seed)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        if cfg.model_type != "pico_decoder":
            raise ConfigError(f"model.model_type: {cfg.model_type!r} cannot be built; use pico_decoder")
        self.cfg = cfg
        self.embedding_proj = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.layers = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layers))
        self.output_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.de_embedding_proj = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)  # untied, as published
        # tables, not parameters: they follow from the configuration, so no checkpoint holds them
        cos, sin = rope_table(cfg.max_seq_len, cfg.d_model // cfg.attention_n_heads, cfg.position_emb_theta)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, *, cache: KVCache | None = None,
                reduction: str = "mean") -> Tensor:
        """Logits, or the loss where labels (B, T) are given.

        Without labels: (B, T, V) float32; with a `cache`, which is extended, only the last position's (B, 1, V).
        With labels: their mean cross-entropy, a float32 scalar; `reduction="none"` gives (B, T) losses without
        gradients. Labels of -100 are not scored (their loss is 0).
        """
        B, T = input_ids.shape
        start = cache.length if cache is not None else 0
        if start + T > self.cfg.max_seq_len:
            raise ValueError(f"{start + T} tokens are more than the model's max_seq_len {self.cfg.max_seq_len}")
        cos, sin = self.rope_cos[start:start + T], self.rope_sin[start:start + T]
        x = self.embedding_proj(input_ids)  # (B, T, D)
        for layer in self.layers:
            x = layer(x, cos, sin, cache)
        if cache is not None:
            cache.length += T
            x = x[:, -1:]
        x = self.output_norm(x)
        if labels is None:
            return self.de_embedding_proj(x).float()
        x, head, labels = x.flatten(0, 1), self.de_embedding_proj.weight, labels.flatten()  # (B T, D), (V, D), (B T)
        if reduction == "none":
            return kernels.token_losses(x, head, labels).view(B, T)
        if self.cfg.fast_paths:  # a chunk of tokens at a time: float32 logits of 8 x 2048 tokens would take 3.3 GB
            return kernels.cross_entropy(x, head, labels)
        logits = F.linear(x, head).float()  # (B T, V)
        scored = (labels != IGNORE).sum().clamp(min=1)  # as torch's mean, but 0 and not NaN where nothing is scored
        return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / scored

    # ---- generation -----------------------------------------------------------------------------------

    @torch.no_grad()
    def stream(self, input_ids: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
               seed: int = 0, vocab_size: int | None = None) -> Iterator[Tensor]:
        """Yield the next token of each row, (B, 1), one step at a time, continuing input_ids (B, T), T >= 1.

        temperature 0 takes the likeliest token. Only the `top_k` likeliest ids, and only ids below `vocab_size`
        (the tokenizer's: the rest is padding), are ever drawn.
        """
        B, T = input_ids.shape
        if T == 0 or T + max_new_tokens > self.cfg.max_seq_len:
            raise ValueError(f"a prompt of {T} tokens and {max_new_tokens} new ones must be between 1 and "
                             f"max_seq_len {self.cfg.max_seq_len} together; shorten one of them")
        generator = torch.Generator(input_ids.device).manual_seed(seed)
        cache, was_training = None, self.training
        self.eval()
        try:
            cache = KVCache(self.cfg, B, T + max_new_tokens, like=self.rope_cos)
            tokens = input_ids
            for _ in range(max_new_tokens):
                logits = self(tokens, cache=cache)[:, -1, :vocab_size]  # (B, V)
                tokens = sample(logits, temperature, top_k, generator)
                yield tokens
        finally:
            self.train(was_training)

    def generate(self, input_ids: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 seed: int = 0, vocab_size: int | None = None) -> Tensor:
        """input_ids (B, T) with max_new_tokens more, (B, T + max_new_tokens); options as in `stream`."""
        return torch.cat([input_ids, *self.stream(input_ids, max_new_tokens, temperature, top_k, seed, vocab_size)], 1)

    # ---- counts --------------------------------------------------------------------------------------

    def num_parameters(self, trainable_only: bool = False) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    def flops_per_token(self, seq_len: int | None = None, causal: bool = False) -> int:
        """Floating-point operations of one token, forward and backward, in a sequence of seq_len (max_seq_len).

        A matrix costs 2 per weight forward, 2 for the gradient of its input and, if it trains, 2 for its own.
        Attention is counted as in PaLM (2204.02311, appendix B), or at half of that, `causal`.
        """
        T = seq_len or self.cfg.max_seq_len
        matrices = [(n, p) for n, p in self.named_parameters() if p.dim() == 2 and n != "embedding_proj.weight"]
        attention = 12 * self.cfg.n_layers * self.cfg.d_model * T
        return sum((6 if p.requires_grad else 4) * p.numel() for _, p in matrices) + attention // (2 if causal else 1)


def sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """One id a row of logits (B, V), as (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        smallest_kept = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
