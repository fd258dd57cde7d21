"""Measures of matrices and of pairs of representations: pure functions of float32 or float64 tensors.

One matrix (weights, gradients, updates, activations): rank, conditioning, sparsity, norms. Two representations of the
same examples, X (n, p) and Y (n, q): CKA (Kornblith et al., arXiv 1905.00414) and PWCCA (Morcos et al., 1806.05759).
A measure that is undefined raises Undefined with the reason; it never returns NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Undefined(Exception):
    """Why a measure has no value here."""


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values in falling order, float64: (..., m, n) -> (..., min(m, n)); NaN for a matrix that is not finite."""
    matrix = matrix.double()
    finite = matrix.isfinite().all(-1).all(-1)[..., None]
    return torch.linalg.svdvals(torch.where(finite[..., None], matrix, 0.0)).where(finite, torch.nan)


def tolerance(values: Tensor, shape: tuple[int, ...]) -> float:
    """Below this a singular value counts as 0: max(m, n) times float32's epsilon times the largest."""
    return max(shape[-2:]) * torch.finfo(torch.float32).eps * values.max().item()


def nonzero(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    kept = values[values > tolerance(values, shape)]
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


def condition_number(values: Tensor, shape: tuple[int, ...]) -> float:
    """Largest over smallest singular value, of those that are not 0."""
    kept = nonzero(values, shape)
    return (kept.max() / kept.min()).item()


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
    sizes = (x.T @ x).norm() * (y.T @ y).norm()
    if sizes == 0:
        raise Undefined("the activations are the same for every example")
    return ((x.T @ y).square().sum() / sizes).item()


def pwcca(x: Tensor, y: Tensor) -> float:
    """Projection-weighted CCA: canonical correlations, each weighted by how much of x its direction accounts for.

    Not symmetric: the weights are x's. Needs more examples than the rank of either.
    """
    x, y = centred(x), centred(y)
    basis_x, basis_y = span(x), span(y)
    if len(x) <= basis_x.shape[1] + 1 or len(x) <= basis_y.shape[1] + 1:
        raise Undefined(f"{len(x)} examples are too few for {max(basis_x.shape[1], basis_y.shape[1])} dimensions")
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


def of_matrix(matrix: Tensor, values: Tensor | None = None) -> dict[str, float | None | dict[str, str]]:
    """Every measure of one matrix (m, n); one that is undefined is None, with its reason under "undefined".

    `values` are its singular values, where they are known already.
    """
    values = singular_values(matrix) if values is None else values
    shape, total = tuple(matrix.shape), values.sum().item()
    measures = {
        "effective_rank": lambda: effective_rank(values), "per": lambda: proportional_effective_rank(values),
        "numerical_rank": lambda: float((values > tolerance(values, shape)).sum()) if total else 0.0,
        "condition_number": lambda: condition_number(values, shape),
        "gini": lambda: gini(matrix), "hoyer": lambda: hoyer(matrix),
        "norm_frobenius": lambda: values.square().sum().sqrt().item(), "norm_nuclear": lambda: total,
        "norm_spectral": lambda: values.max().item(), "norm_inf": lambda: matrix.abs().max().item(),
    }
    result: dict = {}
    for name, measure in measures.items():
        try:
            if not values.isfinite().all():
                raise Undefined("the matrix is not finite")
            result[name] = measure()
        except Undefined as why:
            result[name] = None
            result.setdefault("undefined", {})[name] = str(why)
    return result
