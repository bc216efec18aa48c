"""Learning rates at the corners of every schedule."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlstm_lm.training.schedule import ScheduleConfig, learning_rate_ratio


def ratios(config: ScheduleConfig, steps: int) -> list[float]:
    return [learning_rate_ratio(config, step, steps) for step in range(steps)]


def test_warm_up_is_linear_and_ends_at_the_peak():
    found = ratios(ScheduleConfig(kind="constant", warmup=4), 10)
    assert found == [0.25, 0.5, 0.75] + [1.0] * 7


def test_cosine_passes_the_middle_and_ends_at_the_final_ratio():
    found = ratios(ScheduleConfig(kind="cosine", warmup=0, final_ratio=0.1), 100)
    assert found[49] == pytest.approx(0.55) and found[-1] == pytest.approx(0.1)
    assert found[24] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


def test_exponential_falls_by_the_same_factor_each_step():
    found = ratios(ScheduleConfig(kind="exponential", warmup=0, final_ratio=0.01), 50)
    factors = {round(after / before, 9) for before, after in itertools.pairwise(found)}
    assert len(factors) == 1 and found[-1] == pytest.approx(0.01)


def test_cool_down_is_linear_to_zero_from_where_the_middle_ends():
    found = ratios(ScheduleConfig(kind="exponential", warmup=2, final_ratio=0.1, cooldown=4), 20)
    assert found[15] == pytest.approx(0.1)
    assert found[16:] == pytest.approx([0.08, 0.06, 0.04, 0.02])  # and 0 behind the last step


@pytest.mark.parametrize("kind", ["wsd", "exponential"])
def test_a_1_sqrt_cool_down_is_that_of_its_paper(kind):
    """1 - sqrt((n - (N - N_decay)) / N_decay) of arXiv 2405.18392 falls from 1 at step N - N_decay to 0 at step N."""
    cooldown, steps = 8, 40
    found = ratios(ScheduleConfig(kind=kind, warmup=2, cooldown=cooldown, cooldown_shape="1-sqrt"), steps)
    decay = cooldown + 1  # counted from the last step of the middle part, which has its full rate
    peak = found[steps - decay]
    expected = [peak * (1 - math.sqrt((step - (steps - decay)) / decay)) for step in range(steps - decay, steps)]
    assert found[steps - decay :] == pytest.approx(expected)
    linear = ratios(ScheduleConfig(kind=kind, warmup=2, cooldown=cooldown), steps)
    assert found[:-cooldown] == linear[:-cooldown] and all(np.less(found[-cooldown:], linear[-cooldown:]))


def test_wsd_is_flat_between_warm_up_and_decay():
    found = ratios(ScheduleConfig(kind="wsd", warmup=3, cooldown=5), 20)
    assert found[2:15] == [1.0] * 13 and found[15] < 1 and found[-1] > 0


@given(
    st.sampled_from(["cosine", "exponential", "wsd", "constant"]),
    st.integers(0, 40),
    st.integers(1, 40),
    st.integers(0, 100),
    st.floats(0.01, 1),
    st.sampled_from(["linear", "1-sqrt"]),
)
def test_rises_then_never_rises_again_and_stays_between_zero_and_one(
    kind, warmup, cooldown, middle, final_ratio, shape
):
    config = ScheduleConfig(kind=kind, warmup=warmup, cooldown=cooldown, final_ratio=final_ratio, cooldown_shape=shape)
    found = ratios(config, warmup + middle + cooldown)
    assert all(0 < ratio <= 1 for ratio in found)
    falling = found[max(warmup - 1, 0) :]
    assert all(before >= after - 1e-12 for before, after in itertools.pairwise(falling))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warmup": -1}, "warmup is -1; it must be a whole number from 0 to"),
        ({"final_ratio": 1.5}, "final_ratio is 1.5; it must be a number from 0 to 1"),
        ({"kind": "exponential", "final_ratio": 0.0}, "above 0 where schedule.kind is exponential"),
        ({"kind": "wsd"}, "cooldown is 0: give the decay steps or a share"),
        ({"cooldown_shape": "sqrt"}, "cooldown_shape is 'sqrt'; it must be one of linear, 1-sqrt"),
    ],
)
def test_what_cannot_be_scheduled_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**values)


SHARES = st.floats(0, 1, exclude_max=True, allow_subnormal=False)  # other tests have such numbers flushed to zero


@given(SHARES, SHARES, st.integers(1, 10**6))
def test_shares_of_the_run_fit_it_whatever_its_length(warmup, cooldown, steps):
    config = ScheduleConfig(warmup=warmup, cooldown=cooldown)
    if warmup + cooldown <= 1:
        config.check_steps(steps)
        lengths = config.lengths(steps)
        assert sum(lengths) <= steps and abs(lengths[0] - warmup * steps) <= 0.5
        assert abs(lengths[1] - cooldown * steps) <= 1


def test_shares_are_the_same_schedule_as_their_steps():
    shares, steps = ScheduleConfig(warmup=0.1, cooldown=0.25), ScheduleConfig(warmup=4, cooldown=10)
    assert ratios(shares, 40) == ratios(steps, 40)
    assert shares.lengths(400) == (40, 100) and steps.lengths(400) == (4, 10)


def test_a_run_too_short_for_its_schedule_is_refused():
    with pytest.raises(ValueError, match=r"together exceed training.steps \(100\)"):
        ScheduleConfig(warmup=60, cooldown=60).check_steps(100)
    with pytest.raises(ValueError, match=r"warmup \(0.5, 50 steps\) and schedule.cooldown \(60\) together exceed"):
        ScheduleConfig(warmup=0.5, cooldown=60).check_steps(100)
