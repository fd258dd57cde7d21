"""What several seeds say: means with intervals, and paired differences. Needs scipy, which nothing else here does.

Formulas: Student's t for the mean of n values, m +- t s / sqrt(n); the paired t-test for the difference of two arms that
ran with the same seeds (W. S. Gosset 1908).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from config import UserError

LEVEL = 0.95  # of every interval


class Interval(NamedTuple):
    """A mean, and between what the true one lies with probability LEVEL; None where one value says nothing of that."""
    mean: float
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """The mean of paired differences, its interval, and the p value of there being none; None where that is undefined."""
    mean: float
    low: float | None
    high: float | None
    p: float | None


def _scipy_stats():
    try:
        from scipy import stats
    except ImportError:
        raise UserError("scipy: is needed for statistics; pip install scipy") from None
    return stats


def interval(values: Sequence[float]) -> Interval:
    """Mean and Student's interval of independent values, such as one for each seed."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Interval(mean, None, None)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    reach = float(_scipy_stats().t.ppf((1 + LEVEL) / 2, count - 1)) * deviation / math.sqrt(count)
    return Interval(mean, mean - reach, mean + reach)


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """values - reference, pair by pair, with Student's interval and the two-sided p value of the paired t-test."""
    if len(values) != len(reference):
        raise ValueError(f"{len(values)} values cannot be paired with {len(reference)}")
    found = interval([value - other for value, other in zip(values, reference)])
    if found.low is None or found.low == found.high:  # one pair, or pairs that all differ by the same
        return Difference(*found, None)
    return Difference(*found, float(_scipy_stats().ttest_rel(values, reference).pvalue))
