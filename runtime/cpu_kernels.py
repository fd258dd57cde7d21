"""What makes training fast on CPUs: products through oneDNN, attention in blocks, rotary positions as complex products.

Each equals a plain formula that stands in model.py or in kernels.py, which choose these where they pay: float32 on a CPU.
docs/performance.md tells what each brings. B batch, T time, H heads, K key/value heads, D width.
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

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
QUERY_ROWS = 144  # of a block of attention, over the heads that share a key: the fastest of 72 to 384, head_dim 8 to 64
SCORES = 1 << 21  # numbers in a block's scores: what the caches hold
ZEN_5 = 26  # the family of AMD's processors
WIDE = 1 << 14  # a vocabulary
FEW_ROWS = 32  # below, a call's overhead outweighs oneDNN's gain
LARGEST_HEAD = 64  # head_dim up to which causal_attention beats SDPA on a CPU


# ---- products --------------------------------------------------------------------------------------------------

def plain_cpu(x: Tensor) -> bool:
    """Whether x is float32 on a CPU, and what is done with it is not being compiled."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


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


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) times the transpose of b (N, K): (M, N). No gradients."""
    if len(a) >= FEW_ROWS and plain_cpu(a) and plain_cpu(b) and prefers_onednn(len(a), *b.shape):
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.T


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy' x, (out, in) from dy (N, out) and x (N, in); oneDNN wants the wider side to run along memory."""
    turn = dy.size(1) >= x.size(1) and plain_cpu(dy) and prefers_onednn(x.size(1), dy.size(1), len(x))
    return product(x.T, dy.T).T.contiguous() if turn else product(dy.T, x.T)


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


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As kernels.causal_attention, in blocks; as many sequences at a time as the caches hold."""
    pieces = zip(*(x.split(_Blocks.batch(q, k)) for x in (q, k, v)))
    return torch.cat([_CausalAttention.apply(*piece) for piece in pieces])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As model.rotate, each pair one complex number: the same bits in a quarter of the time."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


# ---- memory ----------------------------------------------------------------------------------------------------

def keep_freed_memory() -> None:
    """Have glibc keep what is freed instead of unmapping it, so that each step's buffers find their pages in place."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another system's library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the most that every version takes
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
