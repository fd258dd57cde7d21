"""The fast paths of training, each an autograd function beside the plain formula that it must equal.

    product            a b', through oneDNN where MKL leaves half of the processor unused
    linear             x W', and its gradients through `product`
    effective_linear   ReLoRA without dropout: x (W + s B A)', the adapter's gradients without the weight's
    causal_attention   attention on CPUs in blocks of queries, with small heads stored so that products run along memory
    cross_entropy      mean loss of x W' a chunk of tokens at a time: the logits never exist as a whole
    keep_freed_memory  each step's buffers find their pages in place

`model.fast_paths: false` turns them off; docs/performance.md tells what each brings. B batch, T time, N tokens, H heads,
K key/value heads, D width, V vocabulary, r rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORE = -100  # a label that is not scored, as in torch's cross_entropy
CPU_CHUNK = 1 << 25  # bytes of logits at once; larger blocks glibc maps anew each time, page by page: twice as slow
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
GPU_CHUNK = 1 << 29
QUERY_ROWS = 144  # of a block of attention, over the heads that share a key: the fastest of 72 to 384, head_dim 8 to 64
SCORES = 1 << 21  # numbers in a block's scores: what the caches hold
ZEN_5 = 26  # the family of AMD's processors
WIDE = 1 << 14  # a vocabulary
FEW_ROWS = 32  # below, a call's overhead outweighs oneDNN's gain
LARGEST_HEAD = 64  # head_dim up to which causal_attention beats SDPA on a CPU


# ---- products --------------------------------------------------------------------------------------------------

@functools.cache
def zen() -> int:
    """The generation of AMD's processor, 3 standing for it and those before; 0 of another maker, or without oneDNN."""
    info, width = Path("/proc/cpuinfo"), torch.backends.cpu.get_cpu_capability()
    words = info.read_text() if info.exists() else ""
    if ("AuthenticAMD" not in words or not hasattr(torch.ops.mkldnn, "_linear_pointwise")
            or not torch.backends.mkldnn.is_available()):
        return 0
    if width == "AVX512":
        return 5 if int(re.search(r"cpu family\s*: (\d+)", words)[1]) >= ZEN_5 else 4
    return 3 if width == "AVX2" else 0


def prefers_onednn(rows: int, columns: int, depth: int) -> bool:
    """Whether oneDNN makes a product (rows, depth) x (depth, columns) faster than MKL, which holds AMD's processors back.

    On Zen 5, whose AVX-512 is twice as wide as Zen 4's, any; there, those of the head; before, those with a result as wide.
    """
    return {0: False, 3: max(rows, columns) >= WIDE, 4: max(rows, columns, depth) >= WIDE, 5: True}[zen()]


def plain_cpu(x: Tensor) -> bool:
    """Whether x is float32 on a CPU, and what is done with it is not being compiled."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) times the transpose of b (N, K): (M, N). No gradients."""
    if len(a) >= FEW_ROWS and plain_cpu(a) and plain_cpu(b) and prefers_onednn(len(a), *b.shape):
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.T


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy' x, (out, in) from dy (N, out) and x (N, in); oneDNN wants the wider side to run along memory."""
    turn = dy.size(1) >= x.size(1) and plain_cpu(dy) and prefers_onednn(x.size(1), dy.size(1), len(x))
    return product(x.T, dy.T).T.contiguous() if turn else product(dy.T, x.T)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """What a product of x is computed in: the autocast dtype inside of autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad
        dy = dy.flatten(0, -2)
        return (product(dy, weight.T).view_as(x) if need_x else None,
                weight_gradient(dy, x.flatten(0, -2)) if need_weight else None)


class Linear(nn.Linear):
    """nn.Linear without bias whose products are `product`'s."""

    def forward(self, x: Tensor) -> Tensor:
        if plain_cpu(x) and prefers_onednn(x[..., 0].numel(), *self.weight.shape):
            return _Linear.apply(x, self.weight)
        return F.linear(x, self.weight)


class _EffectiveLinear(torch.autograd.Function):
    """With W_eff = W + s B A:  dx = dy W_eff,  dB = s dy' (x A'),  dA = s (dy B)' x,  ds = sum(B * dB / s)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: Tensor | float) -> Tensor:
        ctx.dtype, ctx.scale = matmul_dtype(x), scale
        with torch.autocast(x.device.type, enabled=False):
            tokens = x.flatten(0, -2).to(ctx.dtype)
            ctx.save_for_backward(tokens, weight, A, B)
            y = product(tokens, effective_weight(weight, A, B, scale).to(ctx.dtype))
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (tokens, weight, A, B), scale = ctx.saved_tensors, ctx.scale
        shape, dy = dy.shape[:-1], dy.flatten(0, -2).to(ctx.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = product(dy, effective_weight(weight, A, B, scale).to(ctx.dtype).T).unflatten(0, shape)
        (r, n_in), n_out = A.shape, len(B)
        if n_in * n_out <= 4 * r * (n_in + n_out):  # a narrow layer: one wide product is faster than four thin ones
            dW = weight_gradient(dy, tokens).to(A.dtype)
            dB, dA = dW @ A.T, B.T @ dW
        else:
            dB = weight_gradient(dy, product(tokens, A.to(ctx.dtype))).to(B.dtype)
            dA = weight_gradient(product(dy, B.T.to(ctx.dtype)), tokens).to(A.dtype)
        d_scale = (dB * B).sum().view_as(scale) if ctx.needs_input_grad[4] else None
        return dx, None, dA * scale, dB * scale, d_scale


def effective_weight(weight: Tensor, A: Tensor, B: Tensor, scale: Tensor | float) -> Tensor:
    return weight + scale * (B @ A) if isinstance(scale, Tensor) else torch.addmm(weight, B, A, alpha=scale)


def effective_linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: Tensor | float) -> Tensor:
    """x (..., in) times (W + s B A)', with W (out, in) frozen, A (r, in), B (out, r), and s a number or a trained tensor (1,)."""
    return _EffectiveLinear.apply(x, weight, A, B, scale)


# ---- attention -------------------------------------------------------------------------------------------------

class _CausalAttention(torch.autograd.Function):
    """softmax(q k') v in blocks of queries, recomputed in the backward (as in FlashAttention, arXiv 2205.14135).

    torch's CPU kernels multiply (T, head_dim) matrices, and at head_dim 8 spend their time on rows of 8 numbers. Keys,
    values and all that is accumulated for them lie here as (head_dim, T), so every product's long side runs along
    memory. Heads that share a key are one batch of queries. G groups = B K, g = H / K heads in a group.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (B, H, T, d), K = q.shape, k.size(1)
        G, g = B * K, H // K
        queries = (q * d ** -0.5).reshape(G, g, T, d)
        keys, values = (t.reshape(G, T, d).transpose(1, 2).contiguous() for t in (k, v))  # (G, d, T)
        out, blocks = torch.empty_like(queries), _Blocks(queries)
        for rows, n in blocks:
            p = blocks.probabilities(queries, keys, rows, n)  # (G, g b, n)
            out[:, :, rows] = (values[:, :, :n] @ p.transpose(1, 2)).unflatten(2, (g, -1)).permute(0, 2, 3, 1)
        ctx.save_for_backward(queries, keys, values, out)
        return out.view(B, H, T, d)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values, out = ctx.saved_tensors
        (G, g, T, d), (B, H, _, _) = queries.shape, d_out.shape
        d_out = d_out.reshape(G, g, T, d)
        # the gradient of the scores is p (d_out v' - sum(d_out out)): one product, with a column and a row more
        left = torch.cat((d_out, -(d_out * out).sum(-1, keepdim=True)), -1)
        right = torch.cat((values, values.new_ones(G, 1, T)), 1)
        d_queries, d_keys, d_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        blocks = _Blocks(queries)
        d_scores = torch.empty_like(blocks.buffer)
        for rows, n in blocks:
            p = blocks.probabilities(queries, keys, rows, n)
            side = left[:, :, rows].reshape(G, -1, d + 1)
            d_values[:, :, :n] += side[..., :d].transpose(1, 2).contiguous() @ p
            ds = torch.bmm(side, right[:, :, :n], out=blocks.shaped(d_scores, n, p.size(1))).mul_(p)
            d_keys[:, :, :n] += queries[:, :, rows].reshape(G, -1, d).transpose(1, 2).contiguous() @ ds
            d_queries[:, :, rows] = (keys[:, :, :n] @ ds.transpose(1, 2)).unflatten(2, (g, -1)).permute(0, 2, 3, 1)
        d_k, d_v = (t.transpose(1, 2).reshape(B, G // B, T, d) for t in (d_keys, d_values))
        return (d_queries * d ** -0.5).view(B, H, T, d), d_k, d_v


class _Blocks:
    """The blocks of queries, (slice of T, keys that they see), and a buffer for one block's scores."""

    def __init__(self, queries: Tensor):
        self.G, self.g, self.T, _ = queries.shape
        self.size = min(self.T, max(16, QUERY_ROWS // self.g))
        self.buffer = queries.new_empty(self.G * self.g * self.size * self.T)
        self.future = torch.full((self.size, self.size), -math.inf, dtype=queries.dtype).triu_(1)

    @staticmethod
    def batch(q: Tensor, k: Tensor) -> int:
        """Sequences whose blocks of scores fit into the caches together."""
        rows = min(q.size(2) * q.size(1) // k.size(1), QUERY_ROWS) * k.size(1)
        return max(1, SCORES // (rows * q.size(2)))

    def __iter__(self):
        for start in range(0, self.T, self.size):
            end = min(start + self.size, self.T)
            yield slice(start, end), end

    def shaped(self, buffer: Tensor, n: int, rows: int) -> Tensor:
        return buffer[:self.G * rows * n].view(self.G, rows, n)

    def probabilities(self, queries: Tensor, keys: Tensor, rows: slice, n: int) -> Tensor:
        """softmax of the block's scores, (G, g b, n), in the buffer."""
        block = queries[:, :, rows].flatten(1, 2)
        b = n - rows.start
        scores = torch.bmm(block, keys[:, :, :n], out=self.shaped(self.buffer, n, self.g * b))
        scores.view(self.G, self.g, b, n)[..., rows].add_(self.future[:b, :b])
        return torch.softmax(scores, -1, out=scores)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, fast: bool = True) -> Tensor:
    """Causal attention of q (B, H, T, head_dim) over k, v (B, K, T, head_dim), H a multiple of K: (B, H, T, head_dim)."""
    if fast and q.size(-1) <= LARGEST_HEAD and plain_cpu(q):
        pieces = zip(*(t.split(_Blocks.batch(q, k)) for t in (q, k, v)))
        return torch.cat([_CausalAttention.apply(*piece) for piece in pieces])
    gqa = q.size(1) != k.size(1)
    if gqa and (q.device.type != "cuda" or q.dtype == torch.float32):
        # MPS has no grouped kernel, CUDA's take no float32, and CPU's is 10 % slower than copies
        k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
        gqa = False
    # is_causal without a mask tensor: a mask can drop attention to the slow MATH backend unannounced
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1, enable_gqa=gqa)


# ---- the loss --------------------------------------------------------------------------------------------------

def chunk_rows(hidden: Tensor, vocab: int) -> int:
    """Tokens whose float32 logits exist at once."""
    return max(32, (CPU_CHUNK if hidden.device.type == "cpu" else GPU_CHUNK) // (4 * vocab) // 32 * 32)


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


class _CrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward, while a chunk's logits exist: p - onehot(label), times head and hidden.

    Tokens x V float32 logits are the largest tensor of a small model by far (3.3 GB at 8 x 2048 tokens). The softmax takes
    their place in memory; the loss is log sum exp - logit, with log sum exp = max - log(max p).
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        dtype = matmul_dtype(hidden)
        need_hidden, need_head = ctx.needs_input_grad[:2]
        with torch.autocast(hidden.device.type, enabled=False):
            h16, w16 = hidden.to(dtype), head.to(dtype)
            scored, targets = (labels != IGNORE)[:, None], labels.clamp(min=0)
            d_hidden = torch.empty_like(h16) if need_hidden else None
            d_head = head.new_zeros(head.size(1), head.size(0), dtype=torch.float32) if need_head else None  # (D, V)
            total, size = hidden.new_zeros((), dtype=torch.float32), chunk_rows(hidden, len(head))
            for i in range(0, len(labels), size):
                rows = slice(i, i + size)
                h, y, keep = h16[rows], targets[rows], scored[rows]
                logits = product(h, w16).float()  # (chunk, V)
                at_label, peak = logits.gather(1, y[:, None]), logits.amax(-1, keepdim=True)
                p = torch.softmax(logits, -1, out=logits)
                total += torch.where(keep, peak - p.amax(-1, keepdim=True).log() - at_label, 0).sum()
                d_logits = p.scatter_add_(1, y[:, None], p.new_full((len(y), 1), -1.0)).to(dtype)
                if need_hidden:
                    d_hidden[rows] = product(d_logits, w16.T) * keep
                if need_head:
                    d_head += product((h * keep).T, d_logits.T)
            count = scored.sum().clamp(min=1)
        ctx.save_for_backward(d_hidden, d_head, count)
        ctx.dtypes = hidden.dtype, head.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        d_hidden, d_head, count = ctx.saved_tensors
        scale = grad / count
        return (None if d_hidden is None else (d_hidden * scale).to(ctx.dtypes[0]),
                None if d_head is None else (d_head.T * scale).to(ctx.dtypes[1]), None)


def cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, fast: bool = True) -> Tensor:
    """Mean cross-entropy of hidden (N, D) times head (V, D)' against labels (N,), of which -100 are not scored; float32."""
    if fast:
        return _CrossEntropy.apply(hidden, head, labels)
    logits = F.linear(hidden, head).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / (labels != IGNORE).sum().clamp(min=1)


# ---- memory ----------------------------------------------------------------------------------------------------

def keep_freed_memory() -> None:
    """Have glibc keep what is freed instead of unmapping it, so that each step's buffers find their pages in place."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another system's library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the most that every version takes
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
