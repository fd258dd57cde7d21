"""Lesson 3, solutions: AdamW by its formulas; one more schedule; micro-batches of unequal weight."""

import pytest
import torch

from config import load_config
from model import PicoDecoder
from optim import Span

# ---- exercise 1 --------------------------------------------------------------------------------------------------

def adamw(w, gradients, lr, betas, eps, decay):
    (b1, b2), m, v = betas, torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g ** 2
        w = w * (1 - lr * decay) - lr * (m / (1 - b1 ** t)) / ((v / (1 - b2 ** t)).sqrt() + eps)
    return w


def test_adamw():
    w, gradients = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, 6, 4, dtype=torch.float64)
    p = torch.nn.Parameter(w.clone())
    optimizer = torch.optim.AdamW([p], lr=0.03, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.1)
    for g in gradients:
        p.grad = g
        optimizer.step()
    torch.testing.assert_close(adamw(w, gradients, 0.03, (0.8, 0.95), 1e-7, 0.1), p.data)


# ---- exercise 2 --------------------------------------------------------------------------------------------------

def inverse_sqrt(step, span):
    """A function in optim.py, its line in SCHEDULES there, and its name among the choices in config/__init__.py."""
    return (max(1, span.warmup) / max(1, step)) ** 0.5


@pytest.mark.parametrize("step, expected", [(50, 1), (200, 0.5), (450, 1 / 3)])
def test_inverse_sqrt(step, expected):
    span = Span(warmup=50, horizon=600, floor=0.0, cycle=0, restart=0, decay=0)
    assert inverse_sqrt(step, span) == pytest.approx(expected)
    assert inverse_sqrt(51, span) > 0.98  # no jump behind the warm-up


# ---- exercise 3 --------------------------------------------------------------------------------------------------

def accumulate_by_tokens(model, parts):
    """Backward over (inputs, labels) of each micro-batch, each weighed by its share of the scored labels; the loss."""
    scored = [(labels != -100).sum() for _, labels in parts]
    total = torch.zeros(())
    for (inputs, labels), count in zip(parts, scored):
        loss = model(inputs, labels) * count / sum(scored)
        loss.backward()
        total += loss.detach()
    return total


def test_micro_batches_of_unequal_weight():
    def gradient(work):
        model.zero_grad()
        loss = work()
        return float(loss), torch.cat([p.grad.flatten() for p in model.parameters()])

    def whole():
        loss = model(ids[:, :-1], labels)
        loss.backward()
        return loss.detach()

    def mean_of_means():
        losses = [model(inputs, targets) / 2 for inputs, targets in parts]
        sum(losses).backward()
        return sum(losses).detach()

    torch.manual_seed(0)
    model, ids = PicoDecoder(load_config("docs/course/course.yaml").model), torch.randint(0, 256, (4, 33))
    labels = ids[:, 1:].clone()
    labels[2:] = -100
    labels[2, :5] = ids[2, 1:6]
    parts = [(ids[:2, :-1], labels[:2]), (ids[2:, :-1], labels[2:])]
    right, mine, wrong = gradient(whole), gradient(lambda: accumulate_by_tokens(model, parts)), gradient(mean_of_means)
    assert mine[0] == pytest.approx(right[0], rel=1e-5) and torch.allclose(mine[1], right[1], atol=1e-6)
    assert (wrong[1] - right[1]).norm() > 0.1 * right[1].norm()
