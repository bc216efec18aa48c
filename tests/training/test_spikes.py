"""The detector of loss spikes against scipy's statistics, and what may enter its history."""

from __future__ import annotations

import json
import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_lm.base.durable_files import RunError
from xlstm_lm.training.safeguards import SafeguardsConfig, SkipCounter
from xlstm_lm.training.spikes import SMALLEST_SPREAD, SpikeDetector

CPU = torch.device("cpu")
numbers = st.floats(0.125, 1000.0, width=32)


def fed(detector: SpikeDetector, pairs: list[tuple[float, float]]) -> SpikeDetector:
    for pair in pairs:
        detector.is_outlier(torch.tensor(pair))
        detector.accept()
    return detector


@settings(deadline=None, max_examples=100)
@given(
    pairs=st.lists(st.tuples(numbers, numbers), min_size=9, max_size=14),
    value=st.tuples(numbers, numbers),
    threshold=st.floats(0.5, 20),
)
def test_outliers_are_those_of_the_median_and_the_median_absolute_deviation(pairs, value, threshold):
    detector = fed(SpikeDetector(threshold, 9, CPU), pairs)
    distances = []
    for recent, new in zip(zip(*pairs[-9:]), value):
        center = sorted(recent)[4]
        spread = scipy.stats.median_abs_deviation(recent, scale="normal")
        distances.append((new - center) / max(spread, SMALLEST_SPREAD * center))
    if all(abs(each - threshold) > 1e-3 * threshold for each in distances):
        assert bool(detector.is_outlier(torch.tensor(value))) == any(each > threshold for each in distances)


def test_an_even_window_has_the_mean_of_the_middle_values_as_its_median():
    detector = fed(SpikeDetector(2.0, 8, CPU), [(float(n), 1.0) for n in (1, 2, 3, 4, 6, 7, 8, 9)])
    # The median is 5, deviations are 1, 1, 2, 2, 3, 3, 4, 4: their median 2.5, the spread 3.7065.
    assert not detector.is_outlier(torch.tensor([5 + 2 * 3.706, 1.0]))
    assert detector.is_outlier(torch.tensor([5 + 2 * 3.707, 1.0]))
    assert detector.report().startswith("its loss 12.41 is 2.0 deviations above the median 5 of 8 steps")


def test_each_quantity_is_judged_by_itself_and_only_upwards():
    detector = fed(SpikeDetector(5.0, 8, CPU), [(3.0 + 0.01 * (n % 3), 0.5 + 0.01 * (n % 4)) for n in range(8)])
    for value, expected in (((3.01, 0.5), False), ((4.0, 0.5), True), ((3.01, 0.9), True), ((1.0, 0.01), False)):
        assert bool(detector.is_outlier(torch.tensor(value))) == expected, value
    detector.is_outlier(torch.tensor((4.0, 0.9)))
    assert "its loss 4 is" in detector.report() and " and its gradient norm 0.9 is" in detector.report()


def test_nothing_is_an_outlier_before_the_window_is_full():
    detector = SpikeDetector(1.0, 8, CPU)
    for _ in range(8):
        assert not detector.is_ready and not detector.is_outlier(torch.tensor([1e6, 1e6]))
        fed(detector, [(1.0, 1.0)])
    assert detector.is_ready and detector.is_outlier(torch.tensor([1e6, 1.0]))


def test_equal_values_have_no_outliers_within_rounding():
    detector = fed(SpikeDetector(5.0, 8, CPU), [(2.0, 0.0)] * 8)
    assert not detector.is_outlier(torch.tensor([2.0 + 4 * 2.0 * SMALLEST_SPREAD, 0.0]))
    assert detector.is_outlier(torch.tensor([2.0 + 6 * 2.0 * SMALLEST_SPREAD, 0.0]))


def test_only_accepted_steps_enter_the_history_which_a_checkpoint_continues():
    pairs = [(3.0 + 0.01 * (n % 5), 0.5 + 0.003 * n) for n in range(11)]
    detector = fed(SpikeDetector(5.0, 8, CPU), pairs)
    before = detector.state()
    for value in ([9.0, 0.5], [math.nan, math.nan], [math.inf, 1.0]):
        assert bool(detector.is_outlier(torch.tensor(value))) == (not math.isnan(value[0]))
    assert detector.state() == before
    again = SpikeDetector(5.0, 8, CPU, json.loads(json.dumps(before)))
    assert again.state() == before and again.is_ready
    for each in (detector, again):
        fed(each, [(3.02, 0.6)])
    assert again.state() == detector.state() and again.state()[0][-1] == pytest.approx(3.02)
    shorter = SpikeDetector(5.0, 8, CPU, [values * 2 for values in before])
    assert shorter.state() == before
    longer = SpikeDetector(5.0, 9, CPU, before)
    assert not longer.is_ready and fed(longer, [(3.0, 0.5)]).is_ready


def test_an_outlier_ends_a_row_of_steps_that_are_not_finite():
    counter = SkipCounter(SafeguardsConfig(max_skipped_steps=1))

    def observe(step: int, outlier: str = "") -> str:
        return counter.observe(False, step, lambda: ["a.txt:1"], lambda: True, outlier)

    assert observe(1).startswith("Step 1 skipped: its loss or gradient is not finite")
    assert observe(2, "its loss 9 is high") == "Step 2 skipped: its loss 9 is high. Weights are unchanged."
    observe(3)
    assert counter.total == 3
    with pytest.raises(RunError, match="not finite for 2 steps in a row"):
        observe(4)


@pytest.mark.parametrize("field", ["spike_threshold", "spike_window", "spike_rollback_steps"])
def test_values_that_mean_nothing_are_refused(field):
    with pytest.raises(ValueError, match=rf"safeguards\.{field}"):
        SafeguardsConfig(**{field: 0})
