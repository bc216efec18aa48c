"""Every form of the mLSTM that trains against the definition in float64, values and all gradients, over all that they
are meant for: a grid of sizes, and cases drawn at random. Inputs are views of odd strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops.mlstm_cases import FAST, check_case

SIZES = (8, 16, 24, 48, 64, 80, 96, 128, 256)
LENGTHS = (1, 300, 2, 257, 15, 129, 16, 255, 17, 128, 63, 256, 64, 127, 65, 200, 100)
CHUNK_LENGTHS = (16, 32, 64, 128, 256)
RESETS = (None, (), (0, 15, 16, 31, 64, 65, 127, 128, 255), (5,), tuple(range(300)))
GATES = (
    {},
    {"input_mean": 10.0},
    {"input_mean": -10.0},
    {"forget_mean": 30.0},
    {"forget_mean": -30.0},
    {"gate_spread": 20.0},
    {"input_mean": 10.0, "forget_mean": -30.0},
)


def grid(index: int) -> dict[str, Any]:
    """One case for each pair of sizes; all else goes round with a period of its own."""
    T = LENGTHS[index % len(LENGTHS)]
    return {
        "B": 1 + index % 2,
        "T": T,
        "H": 1,
        "K": SIZES[index // len(SIZES)],
        "V": SIZES[index % len(SIZES)],
        "state": index % 3 > 0,
        "resets": RESETS[index % len(RESETS)],
        "input_gate": ("exp", "exp", "sigmoid")[index // 2 % 3],
        "normalize": index % 4 > 0,
        "chunk_length": CHUNK_LENGTHS[index // 3 % len(CHUNK_LENGTHS)],
        "chunks": 1 + index % 3,
        "seed": index,
        **GATES[index % len(GATES)],
    }


GRID = range(len(SIZES) ** 2)
SOME_OF_THE_GRID = [10 * index for index in range(len(SIZES))]  # each size once as K and once as V


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("index", SOME_OF_THE_GRID)
def test_sizes_and_lengths(index: int, backend: str) -> None:
    check_case(backend, dtype=torch.float64, **grid(index))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("index", GRID)
def test_all_sizes_and_lengths(index: int, backend: str, dtype: torch.dtype) -> None:
    check_case(backend, dtype=dtype, **grid(index))


@pytest.mark.slow
@pytest.mark.parametrize("index", GRID)
def test_all_sizes_and_lengths_in_triton(interpreted: Callable, index: int) -> None:
    case = grid(index)
    interpreted(check_case, "triton", **case | {"T": min(case["T"], 40), "B": 1})


@st.composite
def cases(draw: Callable, longest: int, entries: int) -> dict[str, Any]:
    """Any case of at most `longest` steps and `entries` entries of all states that the definition goes through."""
    B, H = draw(st.integers(1, 2), label="B"), draw(st.integers(1, 2), label="H")
    sizes = st.sampled_from(SIZES) | st.integers(1, 9)
    K, V = draw(sizes, label="K"), draw(sizes, label="V")
    T = draw(st.integers(1, max(1, min(longest, entries // (B * H * K * V)))), label="T")
    at_a_border = st.integers(0, T // 16).map(lambda chunk: 16 * chunk)
    resets = st.lists(at_a_border | st.integers(0, T), max_size=6).map(lambda steps: tuple(sorted(steps)))
    return {
        "B": B,
        "T": T,
        "H": H,
        "K": K,
        "V": V,
        "state": draw(st.booleans(), label="state"),
        "resets": draw(resets | st.none(), label="resets"),
        "input_mean": draw(st.sampled_from([-10.0, 0.0, 10.0]), label="input_mean"),
        "forget_mean": draw(st.sampled_from([-30.0, -5.0, 2.0, 30.0]), label="forget_mean"),
        "gate_spread": draw(st.sampled_from([0.1, 2.0, 20.0]), label="gate_spread"),
        "input_gate": draw(st.sampled_from(["exp", "sigmoid"]), label="input_gate"),
        "normalize": draw(st.booleans(), label="normalize"),
        "eps": draw(st.sampled_from([0.0, 1e-6, 1e-2]), label="eps"),
        "seed": draw(st.integers(0, 2**31), label="seed"),
    }


def check_on_the_cpu(data: st.DataObject, longest: int, entries: int) -> None:
    case = data.draw(cases(longest, entries))
    case["cut"] = data.draw(st.none() | st.integers(1, case["T"] - 1), label="cut") if case["T"] > 1 else None
    case["chunk_length"] = data.draw(st.sampled_from(CHUNK_LENGTHS) | st.integers(1, 45), label="chunk_length")
    check_case(data.draw(st.sampled_from(FAST), label="backend"), dtype=torch.float64, **case)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_case(data: st.DataObject) -> None:
    check_on_the_cpu(data, longest=300, entries=2**20)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_very_many_cases(data: st.DataObject) -> None:
    check_on_the_cpu(data, longest=300, entries=2**23)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_many_cases_in_triton(interpreted: Callable, data: st.DataObject) -> None:
    case = data.draw(cases(longest=300, entries=2**19))
    interpreted(check_case, "triton", **case, chunks=data.draw(st.integers(1, 4), label="chunks"))
