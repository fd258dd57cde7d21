"""Means, intervals and paired differences: scipy's numbers, and a calculation by hand."""

import numpy as np
import pytest
from scipy import stats

from instruments.intervals import interval, paired_difference

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("count", [2, 3, 5, 30])
def test_intervals_are_scipys(count):
    values = RNG.normal(2.0, 0.1, count)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    found = interval(list(values))
    assert found == pytest.approx((values.mean(), expected.low, expected.high), rel=1e-12)


def test_an_interval_by_hand():
    """1, 2, 3: s = 1, and t of 2 degrees of freedom leaves 2.5 % above 4.303."""
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.302653 / 3 ** 0.5, 2 + 4.302653 / 3 ** 0.5), rel=1e-6)


def test_paired_differences_are_scipys_and_see_what_unpaired_ones_do_not():
    seeds = RNG.normal(0.0, 1.0, 6)  # what both arms share
    reference, values = seeds, seeds + 0.05 + RNG.normal(0.0, 0.01, 6)
    expected = stats.ttest_rel(values, reference)
    ci, found = expected.confidence_interval(0.95), paired_difference(list(values), list(reference))
    assert found == pytest.approx((np.mean(values - reference), ci.low, ci.high, expected.pvalue), rel=1e-9)
    assert found.p < 0.01 < stats.ttest_ind(values, reference).pvalue


def test_what_a_single_pair_or_equal_pairs_say():
    assert paired_difference([2.0], [1.5]) == (0.5, None, None, None)
    assert paired_difference([1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0, 0.0, None)
    with pytest.raises(ValueError, match="paired"):
        paired_difference([1.0], [1.0, 2.0])
