"""The fast paths of every device, each an autograd function beside the plain formula that it must equal.

    effective_linear   ReLoRA without dropout: x (W + s B A)', the adapter's gradients without the weight's
    causal_attention   the back-end that is fastest for the device and the shapes
    cross_entropy      mean loss of x W' a chunk of tokens at a time: the logits never exist as a whole

The plain formulas stand in relora.py and model.py; `model.fast_paths: false` turns these off, and docs/performance.md tells what
each brings. N tokens, H heads, K key/value heads, D width, V vocabulary, r rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from runtime import cpu_kernels
from runtime.cpu_kernels import plain_cpu, product, weight_gradient

IGNORE = -100  # a label that is not scored, as in torch's cross_entropy
CPU_CHUNK = 1 << 25  # bytes of logits at once; larger blocks glibc maps anew each time, page by page: twice as slow
GPU_CHUNK = 1 << 29
GPU_NARROW = 512  # in * out / (in + out) of a layer: up to here a GPU makes W's gradient faster than it reads x and dy twice

_compiled_softmax: Callable | None = None  # softmax_gradient, once compile_loss has compiled it


def matmul_dtype(x: Tensor) -> torch.dtype:
    """What a product of x is computed in: the autocast dtype inside of autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# ---- ReLoRA's layer --------------------------------------------------------------------------------------------

class _EffectiveLinear(torch.autograd.Function):
    """With W_eff = W + s B A:  dx = dy W_eff,  dB = s dy' (x A'),  dA = s (dy B)' x,  ds = sum(B * dB / s)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: Tensor | float) -> Tensor:
        ctx.dtype, ctx.scale = matmul_dtype(x), scale
        with torch.autocast(x.device.type, enabled=False):
            tokens = x.flatten(0, -2).to(ctx.dtype)
            whole = effective_weight(weight, A, B, scale, ctx.dtype)
            narrow = whole.dtype != weight.dtype  # kept for the backward where it is half as large; else made again
            ctx.save_for_backward(tokens, A, B, whole if narrow else weight)
            y = product(tokens, whole)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (tokens, A, B, weight), scale = ctx.saved_tensors, ctx.scale
        shape, dy = dy.shape[:-1], dy.flatten(0, -2).to(ctx.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            whole = weight if weight.dtype != A.dtype else effective_weight(weight, A, B, scale, ctx.dtype)
            dx = product(dy, whole.T).unflatten(0, shape)
        (r, n_in), n_out = A.shape, len(B)
        if n_in * n_out <= max(4 * r, GPU_NARROW if dy.is_cuda else 0) * (n_in + n_out):  # one wide product, not four thin ones
            dW = weight_gradient(dy, tokens)
            dB, dA = (dW @ A.to(ctx.dtype).T).to(B.dtype), (B.to(ctx.dtype).T @ dW).to(A.dtype)
        else:
            dB = weight_gradient(dy, product(tokens, A.to(ctx.dtype))).to(B.dtype)
            dA = weight_gradient(product(dy, B.T.to(ctx.dtype)), tokens).to(A.dtype)
        d_scale = (dB * B).sum().view_as(scale) if ctx.needs_input_grad[4] else None
        return dx, None, dA * scale, dB * scale, d_scale


def effective_weight(weight: Tensor, A: Tensor, B: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """W + s B A, to be multiplied in `dtype`; in bf16 the product's own rounding is below that of the sum."""
    if dtype == weight.dtype and not isinstance(scale, Tensor):
        return torch.addmm(weight, B, A, alpha=scale)
    return (weight + scale * (B.to(dtype) @ A.to(dtype))).to(dtype)


def effective_linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: Tensor | float) -> Tensor:
    """x (..., in) times (W + s B A)', with W (out, in) frozen, A (r, in), B (out, r), and s a number or a trained tensor (1,)."""
    return _EffectiveLinear.apply(x, weight, A, B, scale)


# ---- attention -------------------------------------------------------------------------------------------------

def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q (B, H, T, head_dim) over k, v (B, K, T, head_dim), H a multiple of K: (B, H, T, head_dim)."""
    if q.size(-1) <= cpu_kernels.LARGEST_HEAD and plain_cpu(q):
        return cpu_kernels.causal_attention(q, k, v)
    gqa = q.size(1) != k.size(1)
    if gqa and (q.device.type != "cuda" or q.dtype == torch.float32):
        # MPS has no grouped kernel, CUDA's take no float32, and CPU's is 10 % slower than copies
        k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
        gqa = False
    # is_causal without a mask tensor: a mask can drop attention to the slow MATH backend unannounced
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1, enable_gqa=gqa)


# ---- the loss --------------------------------------------------------------------------------------------------

def chunk_rows(hidden: Tensor, vocab: int, itemsize: int = 4) -> int:
    """Tokens whose logits exist at once; a GPU is given a power of 2, so that all chunks of a batch have one shape."""
    if hidden.device.type == "cpu":
        return max(32, CPU_CHUNK // (itemsize * vocab) // 32 * 32)
    return 1 << max(5, (GPU_CHUNK // (itemsize * vocab)).bit_length() - 1)


@torch.no_grad()
def token_losses(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row: hidden (N, D), head (V, D), labels (N,) -> (N,) float32. No gradients."""
    dtype = matmul_dtype(hidden)
    hidden, head, size = hidden.to(dtype), head.to(dtype), chunk_rows(hidden, len(head))
    losses = []
    for h, y in zip(hidden.split(size), labels.split(size)):
        logits = product(h, head).float()  # (chunk, V)
        at_label = logits.gather(1, y.clamp(min=0)[:, None])[:, 0]
        losses.append(torch.where(y == IGNORE, 0.0, logits.logsumexp(-1) - at_label))  # a third of cross_entropy's passes
    return torch.cat(losses)


def softmax_gradient(logits: Tensor, targets: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the losses, its gradient in the logits' dtype) of logits (n, V), of which the rows with `scored` (n, 1) count.

    Written to be compiled: two passes over the logits, and nothing of their size in float32.
    """
    whole, label = logits.float(), targets[:, None]
    total = whole.logsumexp(-1, keepdim=True)
    loss = torch.where(scored, total - whole.gather(1, label), 0).sum()
    one_hot = (torch.arange(whole.size(1), device=whole.device) == label).float()
    return loss, torch.where(scored, (whole - total).exp() - one_hot, 0).to(logits.dtype)


def softmax_gradient_in_place(logits: Tensor, targets: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    """The same where nothing is compiled: each operation in the logits' own memory, as far as it can be.

    log sum exp = max - log(max p) leaves the softmax to be the only pass that takes an exponential.
    """
    whole, label = logits.float(), targets[:, None]
    at_label, peak = whole.gather(1, label), whole.amax(-1, keepdim=True)
    p = torch.softmax(whole, -1, out=whole)
    loss = torch.where(scored, peak - p.amax(-1, keepdim=True).log() - at_label, 0).sum()
    return loss, p.scatter_add_(1, label, p.new_full((len(label), 1), -1.0)).to(logits.dtype)


def compile_loss() -> None:
    """From here on GPUs take the compiled form, in a third of the time at d_model 96 (docs/performance.md)."""
    global _compiled_softmax
    _compiled_softmax = _compiled_softmax or torch.compile(softmax_gradient, dynamic=False)


class _CrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward, while a chunk's logits exist: p - onehot(label), times head and hidden.

    Tokens x V float32 logits are the largest tensor of a small model by far (3.3 GB at 8 x 2048 tokens).
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        dtype, on_cpu = matmul_dtype(hidden), hidden.device.type == "cpu"
        need_hidden, need_head = ctx.needs_input_grad[:2]
        compiled = _compiled_softmax if hidden.device.type == "cuda" else None
        with torch.autocast(hidden.device.type, enabled=False):
            h16, w16 = hidden.to(dtype), head.to(dtype)
            scored, targets = (labels != IGNORE)[:, None], labels.clamp(min=0)
            d_hidden = torch.empty_like(h16) if need_hidden else None
            turned = head.T if on_cpu else head  # (D, V) on a CPU, whose products want the long side along memory
            d_head = head.new_zeros(turned.shape, dtype=torch.float32) if need_head else None
            total = hidden.new_zeros((), dtype=torch.float32)
            size = chunk_rows(hidden, len(head), dtype.itemsize if compiled else 4)
            for i in range(0, len(labels), size):
                rows = slice(i, i + size)
                h, keep = h16[rows], scored[rows]
                logits = product(h, w16)  # (chunk, V)
                loss, d_logits = (compiled or softmax_gradient_in_place)(logits, targets[rows], keep)
                total += loss
                if need_hidden:
                    d_hidden[rows] = product(d_logits, w16.T) * keep
                if need_head:
                    d_head += product((h * keep).T, d_logits.T) if on_cpu else product(d_logits.T, (h * keep).T)
            count = scored.sum().clamp(min=1)
        ctx.save_for_backward(d_hidden, d_head, count)
        ctx.dtypes, ctx.turned = (hidden.dtype, head.dtype), on_cpu
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        d_hidden, d_head, count = ctx.saved_tensors
        scale = grad / count
        if d_head is not None:
            d_head = ((d_head.T if ctx.turned else d_head) * scale).to(ctx.dtypes[1])
        return None if d_hidden is None else (d_hidden * scale).to(ctx.dtypes[0]), d_head, None


def cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of hidden (N, D) times head (V, D)' against labels (N,), of which -100 are not scored; float32."""
    return _CrossEntropy.apply(hidden, head, labels)
