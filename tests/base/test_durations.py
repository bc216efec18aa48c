"""Durations read as the two largest units that they have."""

from __future__ import annotations

import pytest

from xlstm_lm.base.durations import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (60, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (3725, "1 h 2 min"),
        (86399, "23 h 59 min"),
        (86400, "1 d 0 h"),
        (5 * 86400 + 7 * 3600 + 3599, "5 d 7 h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds, text):
    assert duration(seconds) == text
