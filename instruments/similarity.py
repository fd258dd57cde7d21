"""Measures of two things: representations of the same examples, X (n, p) and Y (n, q), and updates of one weight.

CKA (Kornblith et al., arXiv 1905.00414), without the bias of few examples too (Nguyen et al., 2010.15327), PWCCA (Morcos et
al., 1806.05759), principal angles. As in measures.py, what is undefined raises Undefined.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from instruments.measures import SINGLE, Measure, Undefined, measured, tolerance

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


# ---- two updates ------------------------------------------------------------------------------------------------------

def directions(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases (m, k), (n, k) of what an update B A, (m, r) (r, n), writes to and reads from; k its numerical rank."""
    if not (B.isfinite().all() and A.isfinite().all()):
        raise Undefined("the update is not finite")
    left, right = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().mT)
    u, values, v = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    if values[0] == 0:
        raise Undefined("the update is zero")
    kept = values > tolerance(values, (len(B), A.shape[1]))
    return left.Q @ u[:, kept], right.Q @ v.mT[:, kept]


def leading(update: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Factors (m, k), (k, n) of an update's best approximation of rank k <= count (Eckart and Young 1936)."""
    if not update.isfinite().all():
        return update, torch.eye(update.shape[1], dtype=update.dtype)  # told by who measures it
    u, values, v = torch.linalg.svd(update.double(), full_matrices=False)
    return u[:, :count] * values[:count], v[:count]


def overlap(a: Tensor, b: Tensor) -> float:
    """Mean squared cosine of the principal angles between the spans of orthonormal (m, k) and (m, l) (Bjorck and Golub 1973).

    1 where one lies within the other, 0 where they are orthogonal, max(k, l) / m on average where they are unrelated.
    """
    return ((a.mT @ b).square().sum() / min(a.shape[1], b.shape[1])).item()


# ---- the tables ------------------------------------------------------------------------------------------------------

PAIRED: dict[str, Measure] = {
    "cka": Measure(cka, "CKA", "fraction", "linear centred kernel alignment |X'Y|^2 / (|X'X| |Y'Y|), columns centred"),
    "cka_of_chance": Measure(cka_of_chance, "CKA of unrelated examples", "fraction",
                             "the mean of cka over all pairings of examples"),
    "cka_debiased": Measure(cka_debiased, "debiased CKA", "similarity", "CKA of unbiased estimates: 0 for unrelated examples"),
    "pwcca": Measure(pwcca, "PWCCA", "fraction", "canonical correlations, weighted by how much of X each direction accounts for"),
}
OVERLAPS: dict[str, Measure] = {
    "overlap_out": Measure(lambda now, before: overlap(now[0], before[0]), "overlap of output directions", "fraction",
                           "mean squared cosine of the principal angles between two updates' column spaces"),
    "overlap_in": Measure(lambda now, before: overlap(now[1], before[1]), "overlap of input directions", "fraction",
                          "the same of their row spaces"),
}
MEASURES = SINGLE | PAIRED | OVERLAPS


def of_pair(x: Tensor, y: Tensor, metrics: Iterable[str] = tuple(PAIRED)) -> dict[str, tuple[float | None, str | None]]:
    """{metric: (value, None)}, or (None, why it is undefined), of activations (n, p) and (n, q) on the same n examples."""
    try:
        pair = Pair(Examples(x), Examples(y))
    except Undefined as why:
        return dict.fromkeys(metrics, (None, str(why)))
    return {name: measured(lambda: PAIRED[name].function(pair), x.new_zeros(0)) for name in metrics}


def of_updates(now: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor],
               metrics: Iterable[str] = tuple(OVERLAPS)) -> dict[str, tuple[float | None, str | None]]:
    """{metric: (value, None)}, or (None, why it is undefined), of the factors (B, A) of two updates."""
    try:
        found = directions(*now), directions(*before)
    except Undefined as why:
        return dict.fromkeys(metrics, (None, str(why)))
    return {name: measured(lambda: OVERLAPS[name].function(*found), now[0].new_zeros(0)) for name in metrics}
