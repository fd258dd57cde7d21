"""Lesson 6, solutions: Student's interval from a table; how many seeds; a study's file."""

import math
import statistics

import numpy as np
import pytest

from config.study import Plan
from instruments.intervals import interval

# ---- exercise 1 --------------------------------------------------------------------------------------------------

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 95 %, of 1 to 9 degrees of freedom


def t_interval(values):
    reach = STUDENT[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - reach, statistics.fmean(values) + reach


@pytest.mark.parametrize("count", range(2, 11))
def test_t_interval(count):
    values = np.random.default_rng(count).normal(size=count).tolist()
    found = interval(values)
    assert t_interval(values) == pytest.approx((found.low, found.high), abs=1e-3)


# ---- exercise 2 --------------------------------------------------------------------------------------------------

def power(difference, spread, seeds, trials=4000):
    """How often the 95 % interval of the mean of `seeds` paired differences leaves out 0."""
    drawn = np.random.default_rng(0).normal(difference, spread, size=(trials, seeds))
    reach = STUDENT[seeds - 2] * drawn.std(axis=1, ddof=1) / math.sqrt(seeds)
    return float((abs(drawn.mean(axis=1)) > reach).mean())


def test_power():
    assert power(0, 1, 5) == pytest.approx(0.05, abs=0.015)  # no effect: wrong one time in twenty
    assert power(1, 1, 4) < 0.4 and power(1, 1, 10) == pytest.approx(0.8, abs=0.05)


# ---- exercise 3 --------------------------------------------------------------------------------------------------

STUDY = """
base: docs/course/course.yaml
overrides: [checkpointing.learning_dynamics=null]
reference: r4
rates: [5.0e-3, 1.0e-2, 2.0e-2]
seeds: [1, 2, 3, 4]
arms:
  r4: []
  r2-twice-as-often: [model.relora.r=2, model.relora.lora_alpha=4, model.relora.reset_frequency=50]
"""


def test_a_studys_arms_differ_in_one_thing(tmp_path):
    (tmp_path / "ranks.yaml").write_text(STUDY)
    plan = Plan(tmp_path / "ranks.yaml")
    scales = {arm.split("-")[0]: [word for word in plan.arms[arm].overrides] for arm in plan.arms}
    assert plan.reference == "r4" and set(scales) == {"r4", "r2"}  # s is 2 in both, and r x cycles too
