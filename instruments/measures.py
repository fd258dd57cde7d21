"""Measures of one matrix (weights, gradients, updates, activations): rank, conditioning, sparsity, norms.

Pure functions of float32 or float64 tensors. One that is undefined raises Undefined with the reason; it never returns NaN.
Measures of two things are in similarity.py; definitions, sources and accuracy in docs/measures.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
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


def condition_number_all(values: Tensor) -> float:
    """Largest over smallest singular value, however small: of a matrix of lower rank this measures rounding alone."""
    if values.min() <= 0:
        raise Undefined("a singular value is zero")
    return (values.max() / values.min()).item()


def stable_rank(values: Tensor) -> float:
    """|A|_F^2 / |A|_2^2 (Rudelson and Vershynin 2007): at most the rank, and hardly moved by small singular values."""
    if values.max() <= 0:
        raise Undefined("the matrix is zero")
    return (values / values.max()).square().sum().item()


def participation_ratio(values: Tensor) -> float:
    """(sum s^2)^2 / sum s^4: how many directions share the energy; 1 for rank one, n for the identity (Gao et al. 2017)."""
    if values.max() <= 0:
        raise Undefined("the matrix is zero")
    energy = (values / values.max()).square()
    return (energy.sum() ** 2 / energy.square().sum()).item()


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
    """How something is measured, what it is called in a figure, how it is drawn there, and its definition in a line."""
    function: Callable[..., float]  # of a Matrix, a Pair, or the directions of two updates; may raise Undefined
    label: str
    scale: str = "from zero"  # or `fraction`, from 0 to 1, `similarity`, at most 1, or `log`
    definition: str = ""


# one more measure is one more line
SINGLE: dict[str, Measure] = {
    "effective_rank": Measure(lambda m: effective_rank(m.spectrum), "effective rank", "from zero",
                              "exp of the entropy of the singular values over their sum"),
    "numerical_rank": Measure(lambda m: numerical_rank(m), "numerical rank", "from zero",
                              "singular values above rounding: max(m, n) 2^-23 of the largest, or what a difference leaves"),
    "stable_rank": Measure(lambda m: stable_rank(m.spectrum), "stable rank", "from zero", "|A|_F^2 / |A|_2^2"),
    "participation_ratio": Measure(lambda m: participation_ratio(m.spectrum), "participation ratio", "from zero",
                                   "(sum s^2)^2 / sum s^4 of the singular values s"),
    "per": Measure(lambda m: proportional_effective_rank(m.spectrum), "proportional effective rank", "fraction",
                   "effective rank over the number of singular values"),
    "condition_number": Measure(lambda m: condition_number(m.spectrum, m.shape, m.noise), "condition number", "log",
                                "largest over smallest singular value above rounding (see numerical_rank)"),
    "condition_number_all": Measure(lambda m: condition_number_all(m.spectrum), "condition number, rounding included", "log",
                                    "largest over smallest singular value of all, as pico-analyze has it"),
    "gini": Measure(lambda m: gini(m.entries), "Gini coefficient", "from zero",
                    "of the entries' sizes: 0 where all are equal, near 1 where one holds all"),
    "hoyer": Measure(lambda m: hoyer(m.entries), "Hoyer sparsity", "fraction",
                     "(sqrt N - |x|_1 / |x|_2) / (sqrt N - 1) of N entries"),
    "norm_frobenius": Measure(lambda m: m.spectrum.square().sum().sqrt().item(), "Frobenius norm", "from zero",
                              "sqrt of the sum of the squared singular values"),
    "norm_nuclear": Measure(lambda m: m.spectrum.sum().item(), "nuclear norm", "from zero", "sum of the singular values"),
    "norm_spectral": Measure(lambda m: m.spectrum.max().item(), "spectral norm", "from zero", "largest singular value"),
    "norm_inf": Measure(lambda m: m.entries.abs().max().item(), "largest entry", "from zero", "largest absolute entry"),
}

def of_matrix(entries: Tensor, spectrum: Tensor | None = None, noise: float = 0.0,
              metrics: Iterable[str] = tuple(SINGLE)) -> dict[str, tuple[float | None, str | None]]:
    """{metric: (value, None)}, or (None, why it is undefined), of one matrix (m, n) whose spectrum may be known already."""
    matrix = Matrix(entries, singular_values(entries) if spectrum is None else spectrum, noise)
    return {name: measured(lambda: SINGLE[name].function(matrix), matrix.spectrum) for name in metrics}


def measured(measure: Callable[[], float], spectrum: Tensor) -> tuple[float | None, str | None]:
    try:
        if not spectrum.isfinite().all():
            raise Undefined("the matrix is not finite")
        value = float(measure())
        if not math.isfinite(value):
            raise Undefined(f"the measure gave {value}")
    except Undefined as why:
        return None, str(why)
    return value, None
