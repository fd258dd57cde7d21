"""Every fast path against the plain formula in float64, and against the plain model as a whole."""

import platform
import subprocess
import sys

import lab
import pytest
import torch
import torch.nn.functional as F

from config import config_from_dict
from model import PicoDecoder
from relora import apply_relora
from runtime import cpu_kernels, kernels

SHAPES = [(1, 1, 1, 1, 8), (2, 12, 4, 100, 8), (2, 4, 4, 37, 16), (1, 6, 1, 300, 32), (3, 2, 2, 145, 64), (1, 3, 1, 49, 2)]


def leaves(*shapes, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def close(found, expected, tolerance=2e-6):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


def gradients(function, inputs, dtype):
    """(result, gradients of its sum with fixed weights) computed in dtype."""
    inputs = [x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for x in inputs]
    result = function(*inputs)
    weights = torch.linspace(-1, 1, result.numel(), dtype=dtype).view_as(result)
    return [t.float() for t in (result, *torch.autograd.grad((result * weights).sum(), [x for x in inputs if x.requires_grad]))]


def softmax_attention(q, k, v):
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) / q.size(-1) ** 0.5
    return scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("scores", [1 << 21, 1], ids=["whole batch", "one by one"])
@pytest.mark.parametrize("B, H, K, T, d", SHAPES)
def test_attention_in_blocks_is_softmax_attention(monkeypatch, scores, B, H, K, T, d):
    monkeypatch.setattr(cpu_kernels, "SCORES", scores)
    inputs = leaves((B, H, T, d), (B, K, T, d), (B, K, T, d))
    found = gradients(kernels.causal_attention, inputs, torch.float32)
    close(found, gradients(softmax_attention, inputs, torch.float64))


def test_attention_of_great_scores_is_finite():
    q, k, v = leaves((1, 2, 200, 8), (1, 1, 200, 8), (1, 1, 200, 8))
    found = gradients(cpu_kernels._CausalAttention.apply, [200 * q.detach(), 200 * k.detach(), v], torch.float32)
    close(found[:1], gradients(softmax_attention, [200 * q.detach(), 200 * k.detach(), v], torch.float64)[:1], 1e-3)
    assert all(t.isfinite().all() for t in found)


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def onednn(request, monkeypatch):
    """Both ways to multiply, whatever this processor would choose."""
    monkeypatch.setattr(cpu_kernels, "prefers_onednn", lambda rows, columns, depth: request.param)


@pytest.mark.parametrize("batch, rows, cols", [((2, 50), 96, 32), ((70,), 8, 200), ((1, 1), 16, 16), ((3, 5, 7), 33, 65)])
def test_linear_is_the_linear_of_torch(onednn, batch, rows, cols):
    layer = cpu_kernels.Linear(cols, rows, bias=False)
    x, = leaves((*batch, cols))
    for frozen in (False, True):
        layer.weight.requires_grad_(not frozen)
        y = layer(x)
        assert torch.equal(y, layer(x)), "the same every time"
        dx, = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        expected = F.linear(x.double(), layer.weight.double())
        close([y, dx], [expected.float(), torch.autograd.grad(expected.square().sum(), x)[0]])
        if not frozen:
            close([torch.autograd.grad(y.square().sum(), layer.weight)[0]],
                  [torch.autograd.grad(F.linear(x.double(), layer.weight.double()).square().sum(), layer.weight)[0]])


@pytest.mark.parametrize("scale", [2.0, torch.tensor([0.7])], ids=["constant", "trained"])
@pytest.mark.parametrize("rank, rows, cols", [(1, 48, 96), (4, 96, 48), (64, 40, 40)])
def test_the_effective_weight_has_the_gradients_of_the_two_paths(onednn, scale, rank, rows, cols):
    trained = [scale] if isinstance(scale, torch.Tensor) else []
    x, A, B = leaves((2, 40, cols), (rank, cols), (rows, rank))
    weight = torch.randn(rows, cols)

    def effective(x, A, B, s=scale):
        return kernels.effective_linear(x, weight, A, B, s)

    def two_paths(x, A, B, s=scale):
        return F.linear(x, weight.to(x.dtype)) + s * F.linear(F.linear(x, A), B)
    inputs = [x, A, B, *trained]
    close(gradients(effective, inputs, torch.float32), gradients(two_paths, inputs, torch.float64), tolerance=2e-5)


@pytest.mark.parametrize("tokens, vocab", [(1, 50), (300, 50), (700, 50304), (65, 257)])
def test_the_chunked_loss_is_cross_entropy(onednn, monkeypatch, tokens, vocab):
    monkeypatch.setattr(kernels, "CPU_CHUNK", 4 * vocab * 64)  # several chunks, the last of them short
    hidden, head = leaves((tokens, 24), (vocab, 24))
    labels = torch.randint(vocab, (tokens,))
    labels[::3] = -100 if tokens > 1 else labels[::3]
    found = gradients(kernels.cross_entropy, [hidden, head, labels], torch.float32)
    close(found, gradients(lambda h, w, y: F.cross_entropy(h @ w.T, y), [hidden, head, labels], torch.float64))


def test_the_loss_of_a_token_that_is_held_for_impossible_is_exact():
    """Its probability, e^-2000, is 0 in float32."""
    hidden, head = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [2000.0, 0.0]], requires_grad=True)
    assert kernels.cross_entropy(hidden, head, torch.tensor([0])).item() == 2000.0
    assert kernels.cross_entropy(hidden, head, torch.tensor([-100])).item() == 0.0


@pytest.mark.parametrize("relora", [None, 0.0, 0.1], ids=["full-rank", "ReLoRA", "ReLoRA with dropout"])
def test_a_model_computes_the_same_with_and_without_the_fast_paths(dataset, relora):
    results = []
    for fast in (True, False):
        tree = lab.tiny_tree(dataset, "runs")
        tree["model"] |= {"fast_paths": fast, "max_seq_len": 200}
        tree["model"]["relora"] = None if relora is None else tree["model"]["relora"] | {"lora_dropout": relora}
        cfg = config_from_dict(tree, ["training.optimization.lr_scheduler=cosine_with_warmup"])
        torch.manual_seed(0)
        model = PicoDecoder(cfg.model)
        if relora is not None:
            apply_relora(model, cfg.model.relora)
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
        ids = torch.randint(64, (3, 181), generator=torch.Generator().manual_seed(2))
        torch.manual_seed(3)
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    close(*results, tolerance=1e-5)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another system's allocator")
@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_keeps_its_pages(kept):
    """Blocks asked of the C library itself: how soon tensors, aligned and of odd sizes, settle depends on the heap's layout."""
    code = f"""
import ctypes, resource
from runtime import cpu_kernels, kernels
if {kept}:
    cpu_kernels.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def faults(size=7 << 22):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [ctypes.c_void_p(libc.malloc(size)) for _ in range(8)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in reversed(blocks):
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(), faults()
print(faults())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=lab.ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert (int(done.stdout) < 1000) == kept  # of 57,344 pages
