"""Means, deviations and intervals over seeds, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.study.spread import T_975, Difference, difference, spread

HALF_WIDTH = 4.303 * 0.1 / math.sqrt(3)
"""Half width for the differences mean - 0.1, mean, mean + 0.1: two degrees of freedom, deviation 0.1: 0.2484."""


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def around(mean: float) -> Difference:
    """Three seeds whose differences are 0.1 apart."""
    return difference(by_seed(mean + 1.9, mean + 5.0, mean + 3.1), by_seed(2.0, 5.0, 3.0))


def test_quantiles_have_their_closed_values():
    assert T_975[0] == pytest.approx(math.tan(math.pi * 0.475), abs=5e-4)  # Cauchy
    assert T_975[1] == pytest.approx(0.95 / math.sqrt(2 * 0.975 * 0.025), abs=5e-4)
    root = math.sqrt(4 * 0.975 * 0.025)
    assert T_975[3] == pytest.approx(2 * math.sqrt(math.cos(math.acos(root) / 3) / root - 1), abs=5e-4)


@pytest.mark.parametrize("freedom", range(1, 11))
def test_quantiles_leave_a_fortieth_of_the_density_above(freedom):
    x = np.linspace(0, T_975[freedom - 1], 200_001)
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    assert np.trapezoid(scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x) == pytest.approx(0.475, abs=2e-5)


def test_deviation_is_that_of_a_sample():
    found = spread([1.0, 2.0, 4.0, 5.0])
    assert (found.mean, found.count) == (3.0, 4)
    assert found.deviation == pytest.approx(math.sqrt(10 / 3))  # squares 4 + 1 + 1 + 4 over three, not four
    assert found.band == pytest.approx((3 - math.sqrt(10 / 3), 3 + math.sqrt(10 / 3)))
    assert spread([7.0]).deviation is None and spread([7.0]).band == (7.0, 7.0) and spread([]) is None


@pytest.mark.parametrize("sign", [1, -1])
def test_difference_counts_from_its_whole_interval_on(sign):
    """Half the interval, the deviation of a population, one degree too many and a one-sided quantile are all below
    0.24; one seed too few under the root is above 0.26."""
    assert not around(sign * 0.24).is_beyond_spread
    assert around(sign * 0.26).is_beyond_spread
    assert around(sign * 0.24).half_width == pytest.approx(HALF_WIDTH)


def test_difference_is_first_minus_second():
    found = around(0.26)
    assert found.mean == pytest.approx(0.26)
    assert (found.low, found.high) == pytest.approx((0.26 - HALF_WIDTH, 0.26 + HALF_WIDTH))
    assert around(-0.26).high == pytest.approx(HALF_WIDTH - 0.26)


def test_interval_that_ends_at_zero_tells_nothing_apart():
    assert not Difference(mean=0.5, half_width=0.5, count=3).is_beyond_spread
    assert not Difference(mean=0.5, half_width=None, count=1).is_beyond_spread
    assert Difference(mean=0.5, half_width=0.0, count=2).is_beyond_spread  # two equal differences


def test_two_seeds_have_one_degree_of_freedom():
    assert difference(by_seed(1.0, 3.0), by_seed(0.0, 0.0)).half_width == pytest.approx(12.706)


@pytest.mark.parametrize(("seeds", "quantile"), [(11, 2.228), (12, 2.228), (40, 2.228), (10, 2.262)])
def test_many_seeds_use_the_last_quantile(seeds, quantile):
    values = by_seed(*(float(seed % 2) for seed in range(seeds)))
    found = difference(values, dict.fromkeys(range(seeds), 0.0))
    assert found.half_width == pytest.approx(quantile * np.std([*values.values()], ddof=1) / math.sqrt(seeds))


def test_seeds_are_paired_and_those_of_one_model_left_out():
    found = difference({0: 1.0, 1: 12.0, 2: 103.0, 7: 9e9}, {2: 100.0, 1: 10.0, 0: 0.0, 8: -9e9})
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half_width == pytest.approx(4.303 / math.sqrt(3))
    assert difference({0: 1.0}, {1: 1.0}) is None
