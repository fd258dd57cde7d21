"""Measures of matrices and of pairs of representations: pure functions of float32 or float64 tensors.

One matrix (weights, gradients, updates, activations): rank, conditioning, sparsity, norms. Two representations of the
same examples, X (n, p) and Y (n, q): CKA (Kornblith et al., arXiv 1905.00414), without the bias of few examples too (Nguyen
et al., 2010.15327), and PWCCA (Morcos et al., 1806.05759).
A measure that is undefined raises Undefined with the reason; it never returns NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float32).eps  # of what snapshots are kept in


class Undefined(Exception):
    """Why a measure has no value here."""


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values in falling order, float64: (..., m, n) -> (..., min(m, n)); NaN for a matrix that is not finite."""
    matrix = matrix.double()
    finite = matrix.isfinite().all(-1).all(-1)[..., None]
    return torch.linalg.svdvals(torch.where(finite[..., None], matrix, 0.0)).where(finite, torch.nan)


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
    x = matrix.double().abs().flatten().sort().values
    if x.sum() == 0:
        raise Undefined("all entries are zero")
    n = len(x)
    rank = torch.arange(1, n + 1, dtype=torch.float64)
    return (2 * (rank * x).sum() / (n * x.sum()) - (n + 1) / n).item()


def hoyer(matrix: Tensor) -> float:
    """Hoyer's sparsity of the entries (2004): 0 where all are equal in size, 1 where one is not zero."""
    x = matrix.double().flatten()
    if len(x) < 2:
        raise Undefined("a single entry")
    if not x.any():
        raise Undefined("all entries are zero")
    root = len(x) ** 0.5
    return ((root - x.abs().sum() / x.norm()) / (root - 1)).item()


def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment, in feature space: 1 up to rotation and scale, 0 where nothing is shared."""
    x, y = centred(x), centred(y)
    sizes = alignment(x, x) * alignment(y, y)
    if sizes == 0:
        raise Undefined("the activations are the same for every example")
    return alignment(x, y) / math.sqrt(sizes)


def alignment(x: Tensor, y: Tensor) -> float:
    """|X'Y|^2 = tr K L of (n, p) and (n, q), by whichever is smaller, features or examples."""
    product = (x @ x.T) * (y @ y.T) if len(x) < min(x.shape[1], y.shape[1]) else (x.T @ y).square()
    return product.sum().item()


def cka_of_chance(x: Tensor, y: Tensor) -> float:
    """What cka gives on average over all pairings of the examples of x with those of y: what unrelated ones score.

    tr K tr L / ((n - 1) |K| |L|) of the centred Gram matrices K and L; near 1 where there are fewer examples than dimensions.
    """
    x, y = centred(x), centred(y)
    sizes = alignment(x, x) * alignment(y, y)
    if sizes == 0:
        raise Undefined("the activations are the same for every example")
    return x.square().sum().item() * y.square().sum().item() / math.sqrt(sizes) / (len(x) - 1)


def cka_debiased(x: Tensor, y: Tensor) -> float:
    """Linear CKA of unbiased estimates of HSIC: 0 on average for unrelated examples, however few; may be negative."""
    x, y = centred(x), centred(y)
    if len(x) < 4:
        raise Undefined(f"{len(x)} examples are too few: the estimate needs 4")
    sizes = unbiased_hsic(x, x), unbiased_hsic(y, y)
    if min(sizes) <= 0:
        raise Undefined("the activations are the same for every example, or hardly differ")
    return unbiased_hsic(x, y) / math.sqrt(sizes[0] * sizes[1])


def unbiased_hsic(x: Tensor, y: Tensor) -> float:
    """n (n - 3) times Song et al.'s estimate (JMLR 13, 2012, eq. 4) for the linear kernel, of centred x (n, p), y (n, q).

    There K and L are Gram matrices without their diagonals; with centred columns their sums are those diagonals' own.
    """
    n, a, b = len(x), x.square().sum(1), y.square().sum(1)  # the diagonals of K and L
    return alignment(x, y) - (a @ b).item() * n / (n - 2) + (a.sum() * b.sum()).item() / ((n - 1) * (n - 2))


def pwcca(x: Tensor, y: Tensor) -> float:
    """Projection-weighted CCA: canonical correlations, each weighted by how much of x its direction accounts for.

    Not symmetric: the weights are x's. Undefined where the ranks p of x and q of y exceed n - 1 together: then
    p + q - n + 1 correlations are 1 whatever the data. Above that noise still scores: about 0.65 at n = p + q + 2 and 0.45
    at n = 2 (p + q).
    """
    x, y = centred(x), centred(y)
    basis_x, basis_y = span(x), span(y)
    p, q = basis_x.shape[1], basis_y.shape[1]
    if p + q > len(x) - 1:
        raise Undefined(f"{len(x)} examples are too few for ranks {p} and {q}: some correlations would be 1 in any case")
    u, correlations, _ = torch.linalg.svd(basis_x.T @ basis_y, full_matrices=False)
    weights = ((basis_x @ u).T @ x).abs().sum(1)  # of each canonical direction, over the features of x
    return ((weights * correlations.clamp(max=1)).sum() / weights.sum()).item()


def centred(x: Tensor) -> Tensor:
    if not x.isfinite().all():
        raise Undefined("the activations are not finite")
    return x.double() - x.double().mean(0)


def span(x: Tensor) -> Tensor:
    """An orthonormal basis (n, rank) of the columns of x (n, p)."""
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    if not len(s) or s[0] == 0:
        raise Undefined("the activations are the same for every example")
    return u[:, s > tolerance(s, tuple(x.shape))]


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
    function: Callable[..., float]  # of a Matrix, or of the activations (n, p) and (n, q) of two snapshots; may raise Undefined
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


def of_pair(x: Tensor, y: Tensor, metric: str) -> tuple[float | None, str | None]:
    """(value, None), or (None, why it is undefined), of activations (n, p) and (n, q) on the same n examples."""
    return _measured(lambda: PAIRED[metric].function(x, y), x.new_zeros(0))


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
