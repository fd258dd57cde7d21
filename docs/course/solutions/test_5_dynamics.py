"""Lesson 5, solutions: energy of the first directions; what noise scores; whether cycles find new directions."""

import pytest
import torch

from instruments.measures import SINGLE, Matrix, Measure, of_matrix, singular_values
from instruments.similarity import of_pair

# ---- exercise 1 --------------------------------------------------------------------------------------------------

def energy(values, k):
    """Share of the squared Frobenius norm in the k largest singular values. In the lab: a line of SINGLE, in measures.py."""
    squares = values.square()
    return (squares[:k].sum() / squares.sum()).item()


def test_energy(monkeypatch):
    assert energy(torch.tensor([2.0, 1.0, 1.0]), 1) == pytest.approx(4 / 6)
    assert energy(singular_values(torch.randn(64, 4) @ torch.randn(4, 256)), 4) == pytest.approx(1)
    monkeypatch.setitem(SINGLE, "energy_4", Measure(lambda matrix: energy(matrix.spectrum, 4), "energy of 4", "fraction"))
    assert of_matrix(torch.eye(8), metrics=["energy_4"])["energy_4"][0] == pytest.approx(0.5)
    assert Matrix(torch.eye(8), singular_values(torch.eye(8))).shape == (8, 8)


# ---- exercise 2 --------------------------------------------------------------------------------------------------

def null(metric, n, p, q, draws=3):
    return sum(of_pair(torch.randn(n, p), torch.randn(n, q), [metric])[metric][0] for _ in range(draws)) / draws


def test_noise_is_less_alike_with_more_examples():
    by_size = [null("cka", n, 64, 64) for n in (64, 256, 1024)]
    assert by_size[0] > 2 * by_size[1] > 4 * by_size[2]
    assert null("pwcca", 2 * (64 + 64), 64, 64) == pytest.approx(0.45, abs=0.05)


# ---- exercise 3 --------------------------------------------------------------------------------------------------

def overlap(one, other, r):
    """Mean squared cosine between the first r left singular directions of two updates: 1 the same, r / out chance.

    Neighbouring cycles of runs/course: 0.066, 0.073, 0.058, 0.047, 0.052, beside 4 / 64 = 0.0625: each cycle begins elsewhere.
    """
    U, V = (torch.linalg.svd(update, full_matrices=False).U[:, :r] for update in (one, other))
    return torch.linalg.svdvals(U.T @ V).square().mean().item()


def test_overlap():
    updates = [torch.randn(64, 4) @ torch.randn(4, 256) for _ in range(40)]
    assert overlap(updates[0], 3 * updates[0], 4) == pytest.approx(1, abs=1e-4)
    chance = sum(overlap(a, b, 4) for a, b in zip(updates, updates[1:])) / 39
    assert chance == pytest.approx(4 / 64, abs=0.015)
