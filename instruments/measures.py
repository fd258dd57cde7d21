"""Measures of matrices and of pairs of representations: pure functions of float32 or float64 tensors.

One matrix (weights, gradients, updates, activations): rank, conditioning, sparsity, norms. Two representations of the
same examples, X (n, p) and Y (n, q): CKA (Kornblith et al., arXiv 1905.00414), without the bias of few examples too (Nguyen
et al., 2010.15327), and PWCCA (Morcos et al., 1806.05759).
A measure that is undefined raises Undefined with the reason; it never returns NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float32).eps  # of what snapshots are kept in


class Undefined(Exception):
    """Why a measure has no value here."""


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values in falling order, float64: (..., m, n) -> (..., min(m, n)); NaN for a matrix that is not finite.

    Those of its triangular factor, to rounding of the largest: up to 4 times as fast where m and n differ, and as accurate.
    Eigenvalues of A A' would take half of that again, but square the condition (docs/measures.md).
    """
    matrix = matrix.double()
    finite = matrix.isfinite().all(-1).all(-1)[..., None]
    if not finite.all():
        matrix = torch.where(finite[..., None], matrix, 0.0)
    tall = matrix.mT if matrix.shape[-1] > matrix.shape[-2] else matrix
    square = torch.linalg.qr(tall, mode="r").R if tall.shape[-2] > tall.shape[-1] else tall
    values = torch.linalg.svdvals(square)
    return values if finite.all() else values.where(finite, torch.nan)


def singular_values_of_product(left: Tensor, right: Tensor) -> Tensor:
    """Those of left @ right, from small triangular factors: (..., m, k), (..., k, n) -> (..., min(m, n)), k <= m, n."""
    finite = left.isfinite().all(-1).all(-1) & right.isfinite().all(-1).all(-1)
    left, right = (torch.where(finite[..., None, None], t.double(), 0.0) for t in (left, right))
    core = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.mT, mode="r").R.mT  # (..., k, k)
    values = torch.linalg.svdvals(core).where(finite[..., None], torch.nan)
    return torch.nn.functional.pad(values, (0, min(left.shape[-2], right.shape[-1]) - values.shape[-1]))


def tolerance(values: Tensor, shape: tuple[int, ...], noise: float = 0.0) -> float:
    """Below this a singular value counts as 0: max(m, n) times float32's epsilon times the largest, and `noise`."""
    return max(max(shape[-2:]) * EPSILON * values.max().item(), noise)


def nonzero(values: Tensor, shape: tuple[int, ...], noise: float = 0.0) -> Tensor:
    kept = values[values > tolerance(values, shape, noise)]
    if not len(kept):
        raise Undefined("the matrix is zero")
    return kept


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007): 1 for rank one, n for the identity."""
    total = values.sum()
    if total <= 0:
        raise Undefined("the matrix is zero")
    p = values / total
    return torch.exp(-(p * p.clamp(min=1e-300).log()).sum()).item()


def proportional_effective_rank(values: Tensor) -> float:
    """effective_rank over the number of singular values: 1 for the identity."""
    return effective_rank(values) / len(values)


def condition_number(values: Tensor, shape: tuple[int, ...], noise: float = 0.0) -> float:
    """Largest over smallest singular value, of those that are not 0."""
    kept = nonzero(values, shape, noise)
    return (kept.max() / kept.min()).item()


def numerical_rank(matrix: Matrix) -> float:
    """Singular values that are not 0; of a matrix of zeros none."""
    values = matrix.spectrum
    return float((values > tolerance(values, matrix.shape, matrix.noise)).sum()) if values.sum() else 0.0


def gini(matrix: Tensor) -> float:
    """Gini coefficient of the absolute entries: 0 where all are equal, near 1 where one holds all."""
    x = in_order(matrix.abs().flatten()).double()
    total, n = x.sum(), len(x)
    if total == 0:
        raise Undefined("all entries are zero")
    rank = torch.arange(1, n + 1, dtype=torch.float64, device=x.device)
    return (2 * (rank @ x) / (n * total) - (n + 1) / n).item()


def in_order(x: Tensor) -> Tensor:
    """Sorted (n,), in its own precision; by NumPy on a CPU, which takes a twentieth of torch's time."""
    return x.sort().values if x.is_cuda or x.dtype not in (torch.float32, torch.float64) else torch.from_numpy(np.sort(x.numpy()))


def hoyer(matrix: Tensor) -> float:
    """Hoyer's sparsity of the entries (2004): 0 where all are equal in size, 1 where one is not zero."""
    if matrix.numel() < 2:
        raise Undefined("a single entry")
    if not matrix.any():
        raise Undefined("all entries are zero")
    root, (one, two) = matrix.numel() ** 0.5, (torch.linalg.vector_norm(matrix, p, dtype=torch.float64) for p in (1, 2))
    return ((root - one / two) / (root - 1)).item()


# ---- two representations ---------------------------------------------------------------------------------------------

class Examples:
    """Activations (n, p) of n examples, centred, float64; what several measures want of them is computed once."""

    def __init__(self, activations: Tensor):
        if not activations.isfinite().all():
            raise Undefined("the activations are not finite")
        self.x = activations.double() - activations.double().mean(0)

    @cached_property
    def gram(self) -> Tensor:
        return self.x @ self.x.T

    @cached_property
    def size(self) -> float:
        """|X'X| = |K|, the square root of tr K K; positive."""
        size = math.sqrt(alignment(self, self))
        if size == 0:
            raise Undefined("the activations are the same for every example")
        return size

    @cached_property
    def squares(self) -> Tensor:
        """The diagonal of K: (n,)."""
        return self.x.square().sum(1)

    @cached_property
    def basis(self) -> Tensor:
        """An orthonormal basis (n, rank) of the columns.

        By eigenvectors of the smaller Gram matrix, in a third of the time, where all singular values that count lie above 3e-3
        of the largest: there they are as good as an SVD's to 1e-10. Otherwise by the SVD.
        """
        n, p = self.x.shape
        values, vectors = torch.linalg.eigh(self.gram if n <= p else self.x.T @ self.x)
        relative = values / values[-1].clamp(min=1e-300)
        kept = relative > 1e-5
        if kept.any() and (relative[~kept] < (tolerance(torch.ones(1), (n, p)) / 10) ** 2).all():
            return vectors[:, kept] if n <= p else self.x @ (vectors[:, kept] / values[kept].sqrt())
        u, s, _ = torch.linalg.svd(self.x, full_matrices=False)
        if not len(s) or s[0] == 0:
            raise Undefined("the activations are the same for every example")
        return u[:, s > tolerance(s, (n, p))]


def alignment(a: Examples, b: Examples) -> float:
    """|X'Y|^2 = tr K L of (n, p) and (n, q), by whichever is smaller, features or examples."""
    few = len(a.x) < min(a.x.shape[1], b.x.shape[1])
    return (torch.dot(a.gram.flatten(), b.gram.flatten()) if few else (a.x.T @ b.x).square().sum()).item()


class Pair:
    """Two representations of the same n examples."""

    def __init__(self, x: Examples, y: Examples):
        self.x, self.y, self.n = x, y, len(x.x)

    @cached_property
    def alignment(self) -> float:
        return alignment(self.x, self.y)


def cka(pair: Pair) -> float:
    """Linear centred kernel alignment, in feature space: 1 up to rotation and scale, 0 where nothing is shared."""
    return pair.alignment / (pair.x.size * pair.y.size)


def cka_of_chance(pair: Pair) -> float:
    """What cka gives on average over all pairings of the examples of x with those of y: what unrelated ones score.

    tr K tr L / ((n - 1) |K| |L|) of the centred Gram matrices K and L; near 1 where there are fewer examples than dimensions.
    """
    sizes = pair.x.size * pair.y.size
    return pair.x.squares.sum().item() * pair.y.squares.sum().item() / sizes / (pair.n - 1)


def cka_debiased(pair: Pair) -> float:
    """Linear CKA of unbiased estimates of HSIC: 0 on average for unrelated examples, however few; may be negative.

    Song et al. (JMLR 13, 2012, eq. 4), where K and L are Gram matrices without their diagonals; with centred columns the sums
    over their rows are those diagonals' own. The factor n (n - 3) of all three estimates drops out.
    """
    if pair.n < 4:
        raise Undefined(f"{pair.n} examples are too few: the estimate needs 4")

    def unbiased(a: Examples, b: Examples, product: float) -> float:
        sums = (a.squares.sum() * b.squares.sum()).item()
        return product - (a.squares @ b.squares).item() * pair.n / (pair.n - 2) + sums / ((pair.n - 1) * (pair.n - 2))
    sizes = [unbiased(one, one, one.size ** 2) for one in (pair.x, pair.y)]
    if min(sizes) <= 0:
        raise Undefined("the activations hardly differ between the examples")
    return unbiased(pair.x, pair.y, pair.alignment) / math.sqrt(sizes[0] * sizes[1])


def pwcca(pair: Pair) -> float:
    """Projection-weighted CCA: canonical correlations, each weighted by how much of x its direction accounts for.

    Not symmetric: the weights are x's. Undefined where the ranks p of x and q of y exceed n - 1 together: then
    p + q - n + 1 correlations are 1 whatever the data. Above that noise still scores: about 0.65 at n = p + q + 2 and 0.45
    at n = 2 (p + q).
    """
    basis_x, basis_y = pair.x.basis, pair.y.basis
    p, q = basis_x.shape[1], basis_y.shape[1]
    if p + q > pair.n - 1:
        raise Undefined(f"{pair.n} examples are too few for ranks {p} and {q}: some correlations would be 1 in any case")
    u, correlations, _ = torch.linalg.svd(basis_x.T @ basis_y, full_matrices=False)
    weights = ((basis_x @ u).T @ pair.x.x).abs().sum(1)  # of each canonical direction, over the features of x
    return ((weights * correlations.clamp(max=1)).sum() / weights.sum()).item()


# ---- the table -----------------------------------------------------------------------------------------------------

class Matrix(NamedTuple):
    """One matrix to measure."""
    entries: Tensor  # (m, n)
    spectrum: Tensor  # its singular values, float64, in falling order
    noise: float = 0.0  # singular values up to this may be rounding

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.entries.shape)


class Measure(NamedTuple):
    """How something is measured, what it is called in a figure, and how it is drawn there."""
    function: Callable[..., float]  # of a Matrix, or of a Pair; may raise Undefined
    label: str
    scale: str = "from zero"  # or `fraction`, from 0 to 1, `similarity`, at most 1, or `log`


# one more measure is one more line
SINGLE: dict[str, Measure] = {
    "effective_rank": Measure(lambda m: effective_rank(m.spectrum), "effective rank"),
    "numerical_rank": Measure(lambda m: numerical_rank(m), "numerical rank"),
    "per": Measure(lambda m: proportional_effective_rank(m.spectrum), "PER", "fraction"),
    "condition_number": Measure(lambda m: condition_number(m.spectrum, m.shape, m.noise), "condition number", "log"),
    "gini": Measure(lambda m: gini(m.entries), "Gini"),
    "hoyer": Measure(lambda m: hoyer(m.entries), "Hoyer", "fraction"),
    "norm_frobenius": Measure(lambda m: m.spectrum.square().sum().sqrt().item(), "Frobenius norm"),
    "norm_nuclear": Measure(lambda m: m.spectrum.sum().item(), "nuclear norm"),
    "norm_spectral": Measure(lambda m: m.spectrum.max().item(), "spectral norm"),
    "norm_inf": Measure(lambda m: m.entries.abs().max().item(), "largest |entry|"),
}
PAIRED: dict[str, Measure] = {
    "cka": Measure(cka, "CKA", "fraction"),
    "cka_of_chance": Measure(cka_of_chance, "CKA of unrelated examples", "fraction"),
    "cka_debiased": Measure(cka_debiased, "debiased CKA", "similarity"),
    "pwcca": Measure(pwcca, "PWCCA", "fraction"),
}
MEASURES = SINGLE | PAIRED


def of_matrix(entries: Tensor, spectrum: Tensor | None = None, noise: float = 0.0,
              metrics: Iterable[str] = tuple(SINGLE)) -> dict[str, tuple[float | None, str | None]]:
    """{metric: (value, None)}, or (None, why it is undefined), of one matrix (m, n) whose spectrum may be known already."""
    matrix = Matrix(entries, singular_values(entries) if spectrum is None else spectrum, noise)
    return {name: _measured(lambda: SINGLE[name].function(matrix), matrix.spectrum) for name in metrics}


def of_pair(x: Tensor, y: Tensor, metrics: Iterable[str] = tuple(PAIRED)) -> dict[str, tuple[float | None, str | None]]:
    """{metric: (value, None)}, or (None, why it is undefined), of activations (n, p) and (n, q) on the same n examples."""
    try:
        pair = Pair(Examples(x), Examples(y))
    except Undefined as why:
        return dict.fromkeys(metrics, (None, str(why)))
    return {name: _measured(lambda: PAIRED[name].function(pair), x.new_zeros(0)) for name in metrics}


def _measured(measure: Callable[[], float], spectrum: Tensor) -> tuple[float | None, str | None]:
    try:
        if not spectrum.isfinite().all():
            raise Undefined("the matrix is not finite")
        value = float(measure())
        if not math.isfinite(value):
            raise Undefined(f"the measure gave {value}")
    except Undefined as why:
        return None, str(why)
    return value, None
