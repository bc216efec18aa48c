"""The sLSTM's Triton kernels against the definition in float64, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.ops.slstm_cases import TOLERANCE, assert_right, errors, small_kernels

BASE = {"B": 2, "T": 6, "H": 1, "D": 8}
CASES = {
    "plain": {},
    "no state, no resets": {"state": False, "resets": (), "T": 5},
    "one step": {"T": 1, "resets": ()},
    "one step, a reset": {"T": 1, "resets": (0,)},
    "two steps": {"T": 2, "resets": (1,)},
    "one step before a checkpoint": {"T": 3, "resets": (2,)},
    "at a checkpoint": {"T": 4, "resets": (3,)},
    "resets at checkpoints": {"T": 9, "resets": (0, 3, 4, 8)},
    "three heads": {"H": 3, "T": 3},
    "more than a tile": {"B": 9, "T": 3, "H": 2},
    "a tile of 16": {"B": 17, "T": 2, "tile": 16},
    "D 24": {"D": 24, "T": 5},
    "D 64": {"D": 64, "T": 5},
    "D 80": {"D": 80, "T": 4},
    "D 128": {"D": 128, "T": 4},
    "float16": {"dtype": torch.float16, "T": 5},
    "float16, D 64": {"dtype": torch.float16, "D": 64, "T": 5},
    "large gates": {"scale": 40.0, "T": 5, "tolerance": 2e-5},  # a gate near 100 is itself rounded by 4e-6
    "pointwise, a product a step": {"backend": "batched", "H": 2, "T": 9, "resets": (0, 3, 4, 8)},
    "pointwise, several blocks": {"backend": "batched", "D": 130, "T": 3},
    "pointwise, no state, no resets": {"backend": "batched", "state": False, "resets": ()},
    "pointwise, float16": {"backend": "batched", "dtype": torch.float16},
}
SLOW = {
    "long": {"T": 300, "steps": 64, "resets": (1, 63, 64, 65, 129, 299), "B": 3, "D": 24},
    "a checkpoint and a step": {"T": 65, "steps": 64, "resets": (64,)},
    "float16, D 128": {"dtype": torch.float16, "D": 128, "T": 20, "B": 9, "H": 2},
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)])
def test_values_and_gradients(interpreted, name):
    case = BASE | (CASES | SLOW)[name]
    tolerance = case.pop("tolerance", TOLERANCE[case.get("dtype", torch.float32)])
    assert_right(interpreted(errors, **case), tolerance)


def open_forget_gates(backend: str) -> float:
    """How far, relatively, m is from the sum of a few log forget gates that are nearly 0."""
    from xlstm_lm.ops.slstm import slstm

    small_kernels(8, 4, backend)
    wx = torch.zeros(1, 4, 4, 1, 8)
    wx[:, :, 0], wx[:, :, 1] = -50.0, 15.0
    state = (torch.zeros(1, 1, 8), *torch.ones(2, 1, 1, 8), torch.zeros(1, 1, 8))
    _, (*_, m) = slstm(
        wx, torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8), initial_state=state, return_state=True, backend=backend
    )
    expected = 4 * torch.nn.functional.logsigmoid(torch.tensor(15.0, dtype=torch.float64))
    return float((m / expected - 1).abs().max())


@pytest.mark.parametrize("backend", ["triton", "batched"])
def test_forget_gates_that_are_nearly_open_are_exact(interpreted, backend):
    assert interpreted(open_forget_gates, backend) < 1e-5


def halves_and_whole() -> float:
    from xlstm_lm.ops.slstm import slstm

    small_kernels(8, 4, "triton")
    torch.manual_seed(0)
    wx, r, bias = (torch.randn(shape, requires_grad=True) for shape in ((1, 7, 4, 1, 16), (4, 1, 16, 16), (4, 1, 16)))
    resets = torch.zeros(1, 7, dtype=torch.bool)
    resets[:, [2, 5]] = True
    whole, last = slstm(wx, r, bias, resets=resets, return_state=True, backend="triton")
    first, state = slstm(wx[:, :3], r, bias, resets=resets[:, :3], return_state=True, backend="triton")
    second, state = slstm(
        wx[:, 3:], r, bias, resets=resets[:, 3:], initial_state=state, return_state=True, backend="triton"
    )
    ours, theirs = (torch.cat((first, second), 1), *state[:3]), (whole, *last[:3])
    upstream = [torch.randn_like(each) for each in theirs]
    gradients = (torch.autograd.grad(each, (wx, r, bias), upstream) for each in (ours, theirs))
    pairs = [*zip(ours, theirs, strict=True), *zip(*gradients, strict=True)]
    return max(float((one - other).detach().abs().max()) for one, other in pairs)


def test_two_halves_are_one_whole(interpreted):
    assert interpreted(halves_and_whole) < 1e-5


def launches() -> list[tuple[int, int]]:
    from xlstm_lm.ops.slstm import triton_loops

    device = torch.device("cpu")  # stands for one with 132 processors
    return [triton_loops.launch_for(B, 12, 64, torch.bfloat16, device)[:2] for B in (16, 88, 96, 1024)]


def triton_rows(B: int) -> int:
    from xlstm_lm.ops.slstm import triton_loops

    return triton_loops.rows(B, 12, 64, torch.bfloat16, torch.device("cpu"))


def test_the_batch_is_cut_as_fine_as_there_are_processors():
    pytest.importorskip("triton", reason="Triton is not installed (pip install 'xlstm-lm[gpu]')")
    assert launches() == [(8, 4), (8, 4), (16, 4), (16, 4)]
    assert [triton_rows(B) for B in (88, 96)] == [8, 16]


def test_heads_that_do_not_fit_are_refused_by_name(interpreted):
    assert "up to 128 units in torch.bfloat16" in interpreted(refusal, 129, torch.bfloat16)
    assert "not torch.float64" in interpreted(refusal, 8, torch.float64)
    assert interpreted(refusal, 128, torch.float16) is None


def refusal(D: int, dtype: torch.dtype) -> str | None:
    from xlstm_lm.ops.slstm import triton_loops

    return triton_loops.why_not(torch.device("cpu"), D, dtype)
