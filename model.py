"""The Pico decoder: a LLaMA-style language model in one file.

RMSNorm (arXiv 1910.07467), rotary positions over interleaved pairs (2104.09864), grouped-query
attention (2305.13245) with a KV cache, SwiGLU (2002.05202), untied embeddings, no biases. Parameter
names are those of the published Pico models. It knows nothing of ReLoRA, ranks or files.

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

IGNORE = -100  # a label that is not scored, as in torch's cross_entropy
LOSS_CHUNK = 512  # tokens whose logits exist at once: 103 MB of float32 at V = 50,304


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # computed in float32 whatever the input
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def rope_table(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency, each (length, 1, head_dim / 2): the 1 is for heads."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies)[:, None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[2i], x[2i+1]) of x (B, T, heads, head_dim) by its position's angle."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)


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
        self.layer = layer
        self.heads, self.kv_heads = cfg.attention_n_heads, cfg.attention_n_kv_heads
        self.head_dim = cfg.d_model // self.heads
        self.q_proj = nn.Linear(cfg.d_model, cfg.d_model, bias=False)
        self.k_proj = nn.Linear(cfg.d_model, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.d_model, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.d_model, cfg.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        B, T, D = x.shape
        q = rotate(self.q_proj(x).view(B, T, self.heads, -1), cos, sin).transpose(1, 2)  # (B, H, T, head_dim)
        k = rotate(self.k_proj(x).view(B, T, self.kv_heads, -1), cos, sin).transpose(1, 2)  # (B, K, T, head_dim)
        v = self.v_proj(x).view(B, T, self.kv_heads, -1).transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        gqa = self.kv_heads != self.heads
        if gqa and x.device.type != "cuda":  # MPS has no grouped kernel, and CPU's is 10 % slower than copies
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
            gqa = False
        # is_causal without a mask tensor: a mask can drop attention to the slow MATH backend unannounced.
        if T == 1 or k.size(2) == T:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=gqa)
        else:  # several tokens after a filled cache: row t sees all that was cached and itself
            mask = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - T)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, D))


class SwiGLU(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.w_0 = nn.Linear(cfg.d_model, cfg.activation_hidden_dim, bias=False)  # gate
        self.w_1 = nn.Linear(cfg.d_model, cfg.activation_hidden_dim, bias=False)  # up
        self.w_2 = nn.Linear(cfg.activation_hidden_dim, cfg.d_model, bias=False)  # down

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(F.silu(self.w_0(x)) * self.w_1(x))


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attention = Attention(cfg, layer)
        self.swiglu_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.swiglu = SwiGLU(cfg)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
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
        self.de_embedding_proj = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
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
        if reduction == "none":
            return token_losses(x.flatten(0, 1), self.de_embedding_proj.weight, labels.flatten()).view(B, T)
        return _ChunkedCrossEntropy.apply(x.flatten(0, 1), self.de_embedding_proj.weight, labels.flatten())

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


# ---- the loss, chunk by chunk -----------------------------------------------------------------------------

def _matmul_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@torch.no_grad()
def token_losses(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row: hidden (N, D), head (V, D), labels (N,) -> (N,) float32. No gradients."""
    dtype = _matmul_dtype(hidden)
    hidden, head = hidden.to(dtype), head.to(dtype)
    losses = []
    for h, y in zip(hidden.split(LOSS_CHUNK), labels.split(LOSS_CHUNK)):
        logits = (h @ head.T).float()  # (chunk, V)
        at_label = logits.gather(1, y.clamp(min=0)[:, None])[:, 0]
        losses.append(torch.where(y == IGNORE, 0.0, logits.logsumexp(-1) - at_label))  # a third of cross_entropy's passes
    return torch.cat(losses)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of hidden @ head.T, a chunk of tokens at a time; the gradients are made in the forward.

    Tokens x V float32 logits are the largest tensor of a small model by far (3.3 GB at 8 x 2048 tokens), and here
    never exist. With e = exp(logits - max) and s = sum(e), the gradient of the logits is e/s - onehot(label): the
    1/s is applied to the thin (chunk, D) sides of both products and the one-hot is a gather and a scatter, so the
    wide (chunk, V) buffer is read and written only twice besides the three products.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        dtype = _matmul_dtype(hidden)
        need_hidden, need_head = ctx.needs_input_grad[:2]
        with torch.autocast(hidden.device.type, enabled=False):
            h16, w16 = hidden.to(dtype), head.to(dtype)
            scored = labels != IGNORE
            targets = labels.clamp(min=0)
            d_hidden = torch.empty_like(h16) if need_hidden else None
            d_head = torch.zeros_like(head, dtype=torch.float32) if need_head else None
            total = hidden.new_zeros((), dtype=torch.float32)
            for i in range(0, len(labels), LOSS_CHUNK):
                rows = slice(i, i + LOSS_CHUNK)
                h, y, keep = h16[rows], targets[rows], scored[rows, None]
                logits = (h @ w16.T).float()  # (chunk, V)
                peak = logits.amax(-1, keepdim=True)
                at_label = logits.gather(1, y[:, None])
                exps = logits.sub_(peak).exp_()
                sums = exps.sum(-1, keepdim=True)
                total += torch.where(keep, sums.log() + peak - at_label, 0).sum()
                exps, weight = exps.to(dtype), torch.where(keep, 1 / sums, 0)  # weight (chunk, 1)
                if need_hidden:
                    d_hidden[rows] = (exps @ w16) * weight - w16[y] * keep
                if need_head:
                    d_head += exps.T @ (h * weight).to(dtype)
                    d_head.index_add_(0, y, (h * keep).float(), alpha=-1)
            count = scored.sum().clamp(min=1)
        ctx.save_for_backward(d_hidden, d_head, count)
        ctx.dtypes = hidden.dtype, head.dtype
        return total / count

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        d_hidden, d_head, count = ctx.saved_tensors
        scale = grad / count
        return (None if d_hidden is None else (d_hidden * scale).to(ctx.dtypes[0]),
                None if d_head is None else (d_head * scale).to(ctx.dtypes[1]), None)
