"""Whether the decoder is still a Llama: the yardstick against transformers, and what it catches."""

import dataclasses
import time

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import model
from checkpoint import CheckpointError
from config import ConfigError, ModelConfig, ReLoRAConfig, load_config
from hub.architecture import check_effective_weight, llama_logits, llama_state, not_llama, twin_deviation
from lab import ROOT
from relora import ReLoRALinear

SHAPES = {"gqa": (4, 2), "mha": (3, 3), "one key": (4, 1)}


def config(heads, kv_heads, **more):
    return ModelConfig(**{"d_model": 8 * heads, "n_layers": 3, "vocab_size": 61, "max_seq_len": 40, "attention_n_heads": heads,
                          "attention_n_kv_heads": kv_heads, "activation_hidden_dim": 36, "norm_eps": 1e-5,
                          "position_emb_theta": 500.0} | more)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_yardstick_is_the_llama_of_transformers(shape):
    cfg = config(*SHAPES[shape])
    theirs = LlamaForCausalLM(LlamaConfig(
        hidden_size=cfg.d_model, intermediate_size=36, num_hidden_layers=3, num_attention_heads=cfg.attention_n_heads,
        num_key_value_heads=cfg.attention_n_kv_heads, rms_norm_eps=1e-5, rope_theta=500.0, max_position_embeddings=40,
        vocab_size=61, tie_word_embeddings=False, attn_implementation="eager")).eval()
    for name, parameter in theirs.named_parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5) if "norm" in name else torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(61, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(llama_logits(theirs.state_dict(), cfg, ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_our_decoder_is_one_at_any_shape(shape):
    assert not_llama(config(*SHAPES[shape])) is None
    ours = model.PicoDecoder(config(*SHAPES[shape])).eval()
    ids = torch.randint(61, (2, 40))
    with torch.no_grad():
        expected = llama_logits(llama_state(ours.state_dict(), ours.cfg), ours.cfg, ids)
        torch.testing.assert_close(ours(ids), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pico-relora-tiny", "pico-decoder-large"])
def test_every_size_is_asked_in_seconds(name):
    begun = time.perf_counter()
    assert not_llama(load_config(ROOT / f"config/{name}.yaml").model) is None
    assert time.perf_counter() - begun < 20


def window(monkeypatch):
    """Attention to the last 16 tokens only: a short text would not show it."""
    def near(q, k, v):
        T, group = q.size(2), q.size(1) // k.size(1)
        seen = torch.ones(T, T, dtype=torch.bool).tril().triu(-15)
        return F.scaled_dot_product_attention(q, *(x.repeat_interleave(group, 1) for x in (k, v)), attn_mask=seen)
    monkeypatch.setattr(model.kernels, "causal_attention", near)


def soft_cap(monkeypatch):
    """Scores that saturate at 50, as Gemma's: most of them are small."""
    def capped(q, k, v):
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
        scores = 50 * (q @ k.transpose(-1, -2) / q.size(-1) ** 0.5 / 50).tanh()
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    monkeypatch.setattr(model.kernels, "causal_attention", capped)


def other_eps(monkeypatch):
    """An eps of its own, ten times the configured one: only tokens with small embeddings show it."""
    init = model.RMSNorm.__init__
    monkeypatch.setattr(model.RMSNorm, "__init__", lambda self, dim, eps: init(self, dim, 10 * eps))


def other_theta(monkeypatch):
    table = model.rope_table
    monkeypatch.setattr(model, "rope_table", lambda length, size, theta: table(length, size, 1.1 * theta))


EDITS = {
    "a window": window, "a soft cap": soft_cap, "another eps": other_eps, "another theta": other_theta,
    "the activation": lambda m: m.setattr(model.SwiGLU, "forward", lambda self, x: self.w_2(F.gelu(self.w_0(x)) * self.w_1(x))),
    "the norm": lambda m: m.setattr(model.RMSNorm, "forward", lambda self, x: F.layer_norm(x, x.shape[-1:]) * self.weight),
    "no positions": lambda m: m.setattr(model, "rotate", lambda x, cos, sin: x),
    "post-norm": lambda m: m.setattr(model.Block, "forward", lambda self, x, cos, sin, cache=None: self.swiglu_norm(
        x + self.attention(self.attention_norm(x), cos, sin, cache))),
}


@pytest.mark.parametrize("what", EDITS)
def test_another_formula_is_measured(monkeypatch, what):
    EDITS[what](monkeypatch)
    assert "logits differ from a Llama's by" in not_llama(config(4, 2))


def test_another_parameter_is_named(monkeypatch):
    init = model.Attention.__init__

    def with_norm(self, cfg, layer):
        init(self, cfg, layer)
        self.q_norm = model.RMSNorm(self.head_dim, cfg.norm_eps)
    monkeypatch.setattr(model.Attention, "__init__", with_norm)
    assert not_llama(config(4, 2)) == ("layers.0.attention.q_norm.weight, layers.1.attention.q_norm.weight, "
                                       "layers.2.attention.q_norm.weight have no place in a Llama")


def test_another_shape_is_named(monkeypatch):
    init = model.SwiGLU.__init__
    monkeypatch.setattr(model.SwiGLU, "__init__", lambda self, cfg: init(self, dataclasses.replace(
        cfg, activation_hidden_dim=-(-cfg.activation_hidden_dim // 64) * 64)))  # rounded up, as others do
    assert not_llama(config(4, 2, n_layers=1)) == (
        "layers.0.swiglu.w_0.weight (64, 32), layers.0.swiglu.w_1.weight (64, 32), layers.0.swiglu.w_2.weight (32, 64) have "
        "another shape there")


def test_a_missing_parameter_is_named(monkeypatch):
    init = model.PicoDecoder.__init__

    def without_norm(self, cfg):
        init(self, cfg)
        self.output_norm = torch.nn.Identity()
    monkeypatch.setattr(model.PicoDecoder, "__init__", without_norm)
    assert not_llama(config(4, 2)) == "output_norm.weight has no counterpart here"


def test_an_edit_that_a_small_twin_cannot_run_is_no_llama(monkeypatch):
    def wide_only(self, x):
        raise ValueError("needs 1024 features")
    monkeypatch.setattr(model.SwiGLU, "forward", wide_only)
    assert not_llama(config(4, 2)) == "a small twin of it cannot be computed (ValueError: needs 1024 features)"


@pytest.mark.parametrize("more", [{"n_layers": 64}, {"norm_eps": 1e-12}, {"position_emb_theta": 5e5}, {"max_seq_len": 1},
                                  {"n_layers": 1}, {"fast_paths": False}], ids=str)
def test_rounding_is_far_from_the_bound(more):
    cfg = config(4, 2, **more)
    assert twin_deviation(cfg) < 1e-4


def test_to_ask_draws_nothing():
    before = torch.get_rng_state()
    assert not_llama(config(4, 2)) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tensor_that_llama_has_no_name_for_is_never_dropped():
    cfg = config(4, 2)
    state = model.PicoDecoder(cfg).state_dict()
    assert len(llama_state(state, cfg)) == len(state)
    with pytest.raises(CheckpointError, match="layers.0.attention.q_norm.weight is unexpected"):
        llama_state(state | {"layers.0.attention.q_norm.weight": torch.ones(8)}, cfg)


@pytest.mark.parametrize("changes", [{}, {"trainable_scaling": True}, {"lora_only": True}, {"keep_original_weights": False}])
def test_the_layer_computes_what_its_effective_weight_says(changes):
    check_effective_weight(ReLoRAConfig(["x"], 5, r=4, **changes))


def test_a_layer_whose_merge_would_be_another_function_is_refused(monkeypatch):
    without_s = lambda self, x: F.linear(x, self.weight + self.lora_B @ self.lora_A)  # noqa: E731
    monkeypatch.setattr(ReLoRALinear, "forward", without_s)
    with pytest.raises(ConfigError, match="forward and effective_weight.. differ"):
        check_effective_weight(dataclasses.replace(ReLoRAConfig(["x"], 5, r=4), lora_alpha=32))
