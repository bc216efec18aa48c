"""Every form of the sLSTM that trains against the definition in float64, values and all gradients, on cases drawn at
random from all that they are meant for: 1 to 300 steps, any width, resets at and between checkpoints, states handed
over, gates far on either side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops.slstm_cases import TOLERANCE, assert_right, errors

SIZES = (8, 16, 24, 48, 64, 80, 96, 128)


@st.composite
def cases(draw: Callable, longest: int, most: int) -> dict[str, Any]:
    """Any case of at most `longest` steps and `most` multiplications of a weight with an entry."""
    B, H = draw(st.integers(1, 10), label="B"), draw(st.integers(1, 3), label="H")
    D = draw(st.sampled_from(SIZES) | st.integers(1, 20), label="D")
    T = draw(st.integers(1, max(1, min(longest, most // (B * H * D * D)))), label="T")
    resets = draw(st.lists(st.integers(0, T - 1), max_size=6, unique=True), label="resets")
    return {
        "B": B,
        "T": T,
        "H": H,
        "D": D,
        "state": draw(st.booleans(), label="state"),
        "resets": tuple(sorted(resets)),
        "input_mean": draw(st.sampled_from([-10.0, 0.0, 10.0]), label="input_mean"),
        "forget_mean": draw(st.sampled_from([-30.0, 0.0, 5.0, 30.0]), label="forget_mean"),
        "scale": draw(st.sampled_from([0.1, 1.5]), label="scale"),
        "seed": draw(st.integers(0, 2**31), label="seed"),
    }


@settings(max_examples=20, deadline=None)
@given(case=cases(longest=300, most=2**22), backend=st.sampled_from(["compiled", "batched"]))
def test_any_case(case: dict[str, Any], backend: str) -> None:
    assert_right(errors(**case, backend=backend, dtype=torch.float64, tile=None), TOLERANCE[torch.float64])


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(case=cases(longest=300, most=2**25), backend=st.sampled_from(["compiled", "batched"]))
def test_very_many_cases(case: dict[str, Any], backend: str) -> None:
    assert_right(errors(**case, backend=backend, dtype=torch.float64, tile=None), TOLERANCE[torch.float64])


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=cases(longest=70, most=2**19),  # longer ones are among the cases of test_slstm_triton.py
    backend=st.sampled_from(["triton", "batched"]),
    tile=st.sampled_from([8, 16]),
    steps=st.sampled_from([4, 16, 64]),
)
def test_many_cases_in_triton(interpreted: Callable, case: dict[str, Any], backend: str, tile: int, steps: int) -> None:
    assert_right(interpreted(errors, **case, backend=backend, tile=tile, steps=steps), 1e-5)
