"""The decoder against transformers' Llama, a float64 decoder written out here, and torch's own counters."""

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from config import ConfigError, ModelConfig, ReLoRAConfig
from model import KVCache, PicoDecoder, sample
from relora import apply_relora
from runtime import cpu_kernels, kernels

GQA = ModelConfig(d_model=32, n_layers=2, vocab_size=97, max_seq_len=128, attention_n_heads=4, attention_n_kv_heads=2,
                  activation_hidden_dim=48)  # head_dim 8
SHAPES = {"gqa": (32, 4, 2), "mha": (32, 4, 4), "one_kv_head": (48, 6, 1), "wide_heads": (64, 2, 1)}  # D, H, K


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(kernels, "CPU_CHUNK", 4 * 97 * 512)  # 512 tokens of the loss at once
    monkeypatch.setattr(cpu_kernels, "SCORES", 1 << 16)


def shaped(name):
    D, H, K = SHAPES[name]
    return ModelConfig(d_model=D, n_layers=2, vocab_size=97, max_seq_len=128, attention_n_heads=H,
                       attention_n_kv_heads=K, activation_hidden_dim=80, position_emb_theta=500.0, norm_eps=1e-5)


def decoder(cfg=GQA):
    model = PicoDecoder(cfg).eval()
    for p in model.parameters():
        if p.dim() == 1:  # norms start at 1, where one in the wrong place would not show
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def tokens(B, T, cfg=GQA):
    return torch.randint(cfg.vocab_size, (B, T))


def reference(p, cfg, ids):
    """Logits in float64 from the papers: complex rotation, explicit softmax. `p` is {name: float64 tensor}."""
    T, size = ids.size(1), cfg.d_model // cfg.attention_n_heads
    pairs = torch.arange(0, size, 2, dtype=torch.float64)
    angles = torch.arange(T)[:, None] * cfg.position_emb_theta ** (-pairs / size)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # (T, 1, size / 2)
    future = torch.ones(T, T).triu(1).bool()

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * p[f"{name}.weight"]

    def turned(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    x = p["embedding_proj.weight"][ids]
    for i in range(cfg.n_layers):
        W = {n.split(".")[-2]: w for n, w in p.items() if n.startswith(f"layers.{i}.")}
        h = norm(x, f"layers.{i}.attention_norm")
        q, k, v = ((h @ W[f"{n}_proj"].T).unflatten(-1, (-1, size)) for n in "qkv")  # (B, T, heads, size)
        k, v = (t.repeat_interleave(cfg.attention_n_heads // cfg.attention_n_kv_heads, 2) for t in (turned(k), v))
        scores = torch.einsum("bthd,bshd->bhts", turned(q), k) / size ** 0.5
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        x = x + torch.einsum("bhts,bshd->bthd", weights, v).flatten(2) @ W["o_proj"].T
        h = norm(x, f"layers.{i}.swiglu_norm")
        x = x + (F.silu(h @ W["w_0"].T) * (h @ W["w_1"].T)) @ W["w_2"].T
    return norm(x, "output_norm") @ p["de_embedding_proj.weight"].T


def doubles(model):
    return {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}


def llama(model, dtype):
    """transformers' Llama with the decoder's weights; q and k rows from interleaved pairs to halves."""
    cfg, own = model.cfg, model.state_dict()
    size = cfg.d_model // cfg.attention_n_heads
    twin = LlamaForCausalLM(LlamaConfig(
        hidden_size=cfg.d_model, intermediate_size=cfg.activation_hidden_dim, num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.attention_n_heads, num_key_value_heads=cfg.attention_n_kv_heads,
        rms_norm_eps=cfg.norm_eps, max_position_embeddings=cfg.max_seq_len, vocab_size=cfg.vocab_size,
        tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": cfg.position_emb_theta}))
    state = {"model.embed_tokens": own["embedding_proj.weight"], "model.norm": own["output_norm.weight"],
             "lm_head": own["de_embedding_proj.weight"]}
    for i in range(cfg.n_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        for n, heads in (("q", cfg.attention_n_heads), ("k", cfg.attention_n_kv_heads)):
            rows = [h * size + first + j for h in range(heads) for first in (0, 1) for j in range(0, size, 2)]
            state[f"{theirs}self_attn.{n}_proj"] = own[f"{ours}attention.{n}_proj.weight"][rows]
        for n in "vo":
            state[f"{theirs}self_attn.{n}_proj"] = own[f"{ours}attention.{n}_proj.weight"]
        for n, m in (("gate", "w_0"), ("up", "w_1"), ("down", "w_2")):
            state[f"{theirs}mlp.{n}_proj"] = own[f"{ours}swiglu.{m}.weight"]
        state[f"{theirs}input_layernorm"] = own[f"{ours}attention_norm.weight"]
        state[f"{theirs}post_attention_layernorm"] = own[f"{ours}swiglu_norm.weight"]
    twin.load_state_dict({f"{name}.weight": w for name, w in state.items()})
    return twin.to(dtype).eval()


# ---- what it is ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("D, count", [(96, 11_282_784), (384, 64_595_328), (768, 181_095_168), (1536, 569_808_384)])
def test_published_sizes(D, count):
    with torch.device("meta"):
        assert PicoDecoder(ModelConfig(d_model=D, activation_hidden_dim=4 * D)).num_parameters() == count


def test_parameter_names_are_the_published_ones():
    per_layer = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "swiglu.w_0",
                 "swiglu.w_1", "swiglu.w_2", "attention_norm", "swiglu_norm"]
    names = {f"layers.{i}.{n}.weight" for i in range(2) for n in per_layer}
    names |= {"embedding_proj.weight", "output_norm.weight", "de_embedding_proj.weight"}
    model = decoder()
    assert {n for n, _ in model.named_parameters()} == set(model.state_dict()) == names


def test_initialisation_is_torchs_default():
    torch.manual_seed(3)
    embedding = torch.nn.Embedding(97, 32).weight
    torch.manual_seed(3)
    model = PicoDecoder(GQA)
    assert torch.equal(model.embedding_proj.weight, embedding)
    w = model.layers[1].swiglu.w_2.weight
    assert 0.98 / 48 ** 0.5 < w.abs().max() <= 1 / 48 ** 0.5 and (model.output_norm.weight == 1).all()


def test_unknown_model_type_is_refused():
    with pytest.raises(ConfigError, match="model_type"):
        PicoDecoder(ModelConfig(model_type="pico_encoder"))


# ---- logits --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("T", [1, 7, 128])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.float64, 2e-6)])
def test_logits_are_llamas(shape, T, dtype, bound):
    model, ids = decoder(shaped(shape)), tokens(2, T)
    with torch.no_grad():
        expected, logits = llama(model, dtype)(ids).logits, model.to(dtype)(ids)
    assert logits.shape == (2, T, 97) and logits.dtype == torch.float32
    assert (logits - expected).abs().max() < bound


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_a_float64_decoder(shape):
    model, ids = decoder(shaped(shape)), tokens(3, 50)
    assert (model(ids) - reference(doubles(model), model.cfg, ids)).abs().max() < 1e-5


@pytest.mark.parametrize("t", [1, 20, 39])
def test_a_token_changes_no_logits_before_it(t):
    model, ids = decoder(), tokens(2, 40)
    changed = ids.clone()
    changed[:, t] = (ids[:, t] + 1) % 97
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :t], after[:, :t]) and (before[:, t] != after[:, t]).any()


def test_autocast_keeps_float32_logits_and_nearly_the_loss():
    model, ids = decoder(), tokens(2, 40)
    exact = model(ids, ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(ids).dtype == torch.float32
        assert model(ids, ids).item() == pytest.approx(exact.item(), abs=0.03)


# ---- the loss ------------------------------------------------------------------------------------------------

def some_ignored(ids, share=0.3):
    return ids.masked_fill(torch.rand(ids.shape) < share, -100)


@pytest.mark.parametrize("B, T", [(1, 1), (3, 37), (4, 128), (9, 57), (11, 100)])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_loss_and_all_gradients_are_those_of_float64(B, T, share):
    model, ids = decoder(), tokens(B, T)
    labels = some_ignored(tokens(B, T), share)
    labels[-1, -1] = 5
    loss = model(ids, labels)
    (loss * 3.7).backward()
    exact = doubles(model)
    expected = F.cross_entropy(reference(exact, GQA, ids).flatten(0, 1), labels.flatten())
    (expected * 3.7).backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, p in model.named_parameters():
        error, size = (p.grad - exact[name].grad).norm(), exact[name].grad.norm()
        assert error <= (1e-5 * size or 1e-6), f"{name}: {error:.1e} of {size:.1e}"  # T = 1: the scores have no gradient


def test_nothing_scored_is_a_loss_and_gradients_of_zero():
    model, ids = decoder(), tokens(2, 9)
    loss = model(ids, torch.full_like(ids, -100))
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("frozen", ["de_embedding_proj", "embedding_proj layers output_norm"])
def test_freezing_one_side_of_the_head_leaves_the_others_gradients(frozen):
    model, ids = decoder(), tokens(2, 30)
    whole, part = model, copy.deepcopy(model)
    for name in frozen.split():
        part.get_submodule(name).requires_grad_(False)
    for m in (whole, part):
        m(ids, ids).backward()
    for p, q in zip(whole.parameters(), part.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad) if q.requires_grad else q.grad is None


def test_losses_a_token_are_cross_entropys_without_gradients():
    model, ids, labels = decoder(), tokens(11, 100), some_ignored(tokens(11, 100))
    losses = model(ids, labels, reduction="none")
    expected = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="none").view(11, 100)
    assert losses.dtype == torch.float32 and not losses.requires_grad and (losses[labels == -100] == 0).all()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


def test_extreme_logits_stay_finite_and_right():
    model, ids = decoder(), tokens(2, 40)
    model.output_norm.weight.data *= 1e3
    loss = model(ids, ids)
    loss.backward()
    logits = model(ids)
    assert logits.abs().max() > 200  # whose exp overflows
    assert loss.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), ids.flatten()).item(), rel=1e-5)
    assert all(p.grad.isfinite().all() for p in model.parameters())


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operator, forward or backward, returned."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_never_holds_all_logits(reduction):
    model, ids = decoder(dataclasses.replace(GQA, fast_paths=True)), tokens(64, 128)
    with Largest() as full:
        model(ids)
    with Largest() as largest:
        loss = model(ids, ids, reduction=reduction)
        if reduction == "mean":
            loss.backward()
    assert full.numel == ids.numel() * 97  # what the recorder sees where they are held
    assert largest.numel < full.numel / 2


# ---- cache and generation ------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pieces", [(5, *[1] * 25), (1, 29), (7, 1, 9, 4, 1, 8), (30,)])
@torch.no_grad()
def test_cached_pieces_give_the_logits_of_the_whole(shape, pieces):
    model, ids = decoder(shaped(shape)), tokens(2, 30)
    cache = KVCache(model.cfg, 2, 30, like=model.rope_cos)
    whole = model(ids)
    for start, end in itertools.pairwise(itertools.accumulate(pieces, initial=0)):
        last = model(ids[:, start:end], cache=cache)
        assert last.shape == (2, 1, 97) and (last[:, 0] - whole[:, end - 1]).abs().max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_greedy_generation_is_recomputation(shape):
    model, ids = decoder(shaped(shape)), tokens(2, 5)
    expected = ids
    for _ in range(64):
        expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(ids, 64, temperature=0, seed=1), expected)


def test_top_k_draws_all_of_the_likeliest_and_nothing_else():
    logits = torch.randn(1, 97).expand(2000, 97)
    drawn = sample(logits, 5.0, 4, torch.Generator().manual_seed(0))
    assert set(drawn.flatten().tolist()) == set(logits[0].topk(4).indices.tolist())


def test_sampling_follows_the_softmax_at_its_temperature():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    drawn = sample(logits.expand(40_000, 3), 2.0, None, torch.Generator().manual_seed(0)).flatten()
    expected = (logits[0] / 2).exp() / (logits[0] / 2).exp().sum()
    assert (torch.bincount(drawn, minlength=3) / 40_000 - expected).abs().max() < 0.01


@pytest.mark.parametrize("temperature, top_k", [(0, None), (1.0, None), (3.0, 50)])
def test_ids_at_or_above_vocab_size_are_never_drawn(temperature, top_k):
    model, ids = decoder(), torch.zeros(8, 1, dtype=torch.int64)
    assert model.generate(ids, 60, temperature, top_k, seed=0).max() >= 10
    assert model.generate(ids, 60, temperature, top_k, seed=0, vocab_size=10).max() < 10


def test_the_seed_decides_and_nothing_outside_is_touched():
    model, ids = decoder().train(), tokens(2, 5)
    rng = torch.get_rng_state()
    first = model.generate(ids, 40, seed=1)
    assert torch.equal(rng, torch.get_rng_state()) and model.training and model.layers[0].training
    torch.rand(3)
    assert torch.equal(first, model.generate(ids, 40, seed=1))
    assert not torch.equal(first, model.generate(ids, 40, seed=2))
    assert not model.eval().generate(ids, 2).requires_grad and not model.training


def test_the_context_is_the_limit():
    model, cache = decoder(), KVCache(GQA, 1, 130, like=torch.zeros(()))
    with torch.no_grad():
        model(tokens(1, 128), cache=cache)
    assert model.generate(tokens(1, 100), 28).shape == (1, 128)
    for call in (lambda: model.generate(tokens(1, 100), 29), lambda: model.generate(tokens(1, 129), 0),
                 lambda: model.generate(tokens(1, 0), 3), lambda: model(tokens(1, 129)),
                 lambda: model(tokens(1, 1), cache=cache)):
        with pytest.raises(ValueError, match="max_seq_len"):
            call()


# ---- what a token costs --------------------------------------------------------------------------------------

@pytest.mark.parametrize("targets", [None, ["attention", "swiglu"], ["w_"]])
def test_flops_are_those_that_torch_counts(targets):
    model, B, T = decoder(dataclasses.replace(GQA, fast_paths=False)).train(), 2, 64  # oneDNN's products it cannot count
    if targets:
        apply_relora(model, ReLoRAConfig(targets, 10, r=4))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it cannot count CPU's flash kernel
        model(tokens(B, T), tokens(B, T)).backward()
    counts = counter.get_flop_counts()["Global"]
    attention = counts.pop(torch.ops.aten.bmm)
    assert attention == B * T * 12 * GQA.n_layers * GQA.d_model * T  # PaLM's convention
    assert sum(counts.values()) + attention == B * T * model.flops_per_token(T)
    assert sum(counts.values()) + attention // 2 == B * T * model.flops_per_token(T, causal=True)


@pytest.mark.parametrize("D, r, palm, causal", [
    (96, None, 67.0, 52.9), (96, 16, 66.2, 52.0), (96, 128, 82.9, 68.8),
    (384, None, 384.9, 328), (384, 16, 342.5, 286), (384, 128, 409.6, 353),
    (768, None, 1081, 968), (768, 16, 893, 780), (768, 128, 1027, 914),
    (1536, None, 3408, 3182), (1536, 16, 2616, 2389), (1536, 128, 2884, 2658)])
def test_published_cost_of_a_token(D, r, palm, causal):
    with torch.device("meta"):
        model = PicoDecoder(ModelConfig(d_model=D, activation_hidden_dim=4 * D))
    if r:
        apply_relora(model, ReLoRAConfig(["attention", "swiglu"], 2000, r=r))
    for expected, flops in ((palm, model.flops_per_token()), (causal, model.flops_per_token(causal=True))):
        rounding = 0.05 if isinstance(expected, float) else 0.6  # 780 stands for 779.45: 893 less a rounded 113
        assert abs(flops / 1e6 - expected) <= rounding
