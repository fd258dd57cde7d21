"""Lesson 2, solutions: counting parameters and cache; a window; q/k norm."""

import pytest
import torch

from config import load_config
from hub.architecture import skeleton
from model import Attention, KVCache, PicoDecoder, RMSNorm, rotate
from runtime import kernels


@pytest.fixture(scope="module")
def cfg():
    return load_config("docs/course/course.yaml").model


# ---- exercise 1 --------------------------------------------------------------------------------------------------

def parameters(cfg):
    head_dim = cfg.d_model // cfg.attention_n_heads
    attention = 2 * cfg.d_model ** 2 + 2 * cfg.attention_n_kv_heads * head_dim * cfg.d_model
    layer = attention + 3 * cfg.activation_hidden_dim * cfg.d_model + 2 * cfg.d_model
    return 2 * cfg.vocab_size * cfg.d_model + cfg.n_layers * layer + cfg.d_model


def cache_bytes(cfg, length):
    """Keys and values of `length` tokens in float32. Without grouped queries: H / K times as much."""
    head_dim = cfg.d_model // cfg.attention_n_heads
    return 2 * cfg.n_layers * cfg.attention_n_kv_heads * length * head_dim * 4


def test_counts(cfg):
    medium = load_config("config/pico-decoder-medium.yaml").model
    assert parameters(medium) == skeleton(medium).num_parameters() == 181_095_168
    cache = KVCache(cfg, 1, 30, like=torch.zeros(()))
    assert cache_bytes(cfg, 30) == cache.keys.nbytes + cache.values.nbytes
    assert cache_bytes(medium, 2048) * 3 == 2 * 12 * 768 * 2048 * 4  # 12 heads on 4


# ---- exercise 2 --------------------------------------------------------------------------------------------------

def windowed(q, k, v, window):
    """Causal attention of q, k, v (B, H, T, head_dim) over the latest `window` places, one's own among them."""
    T = q.size(2)
    hidden = torch.ones(T, T).triu(1) + torch.ones(T, T).tril(-window) > 0
    scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ v


def test_a_window():
    q, k, v = torch.randn(3, 2, 4, 10, 8)
    torch.testing.assert_close(windowed(q, k, v, 10), kernels.causal_attention(q, k, v))
    torch.testing.assert_close(windowed(q, k, v, 1), v)

    def reach(x, layers=2, window=3):
        for _ in range(layers):
            x = windowed(x, x, x, window)
        return x
    other = q.clone()
    other[:, :, 2] += 1
    moved = (reach(other) - reach(q)).abs().amax((0, 1, 3)) > 0
    assert moved.tolist() == [False] * 2 + [True] * 5 + [False] * 3  # 2 layers x (3 - 1) places further on


# ---- exercise 3 --------------------------------------------------------------------------------------------------

class NormedAttention(Attention):
    """Queries and keys have one length whatever their weights are, so scores cannot grow without bound."""

    def __init__(self, cfg, layer):
        super().__init__(cfg, layer)
        self.q_norm, self.k_norm = RMSNorm(self.head_dim, cfg.norm_eps), RMSNorm(self.head_dim, cfg.norm_eps)

    def forward(self, x, cos, sin, cache=None):
        B, T, D = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.heads, -1))
        k = self.k_norm(self.k_proj(x).view(B, T, self.kv_heads, -1))
        q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.kv_heads, -1).transpose(1, 2)
        return self.o_proj(kernels.causal_attention(q, k, v).transpose(1, 2).reshape(B, T, D))


@pytest.mark.parametrize("kind, same", [(Attention, False), (NormedAttention, True)])
def test_normed_queries_do_not_grow(cfg, kind, same):
    model, layer = PicoDecoder(cfg), kind(cfg, 0)
    x, tables = torch.randn(1, 20, cfg.d_model), (model.rope_cos[:20], model.rope_sin[:20])
    with torch.no_grad():
        before = layer(x, *tables, None)
        layer.q_proj.weight.mul_(7)
        assert torch.allclose(layer(x, *tables, None), before, atol=1e-4) == same
