"""The kernels for GPUs on a real one, against the definition in float64: values and all gradients.

Where there is none, the tests beside have Triton interpret the same cases, and the CUDA kernels emulated.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ops.mlstm_cases import check_case
from tests.ops.slstm_cases import assert_right, errors
from tests.ops.test_mlstm_proof import GRID, grid
from tests.ops.test_mlstm_step import CASES as STEP_CASES
from tests.ops.test_mlstm_step import check, split, step_by_step
from tests.ops.test_mlstm_triton import CASES as MLSTM_CASES
from tests.ops.test_mlstm_triton import SLOW_CASES as LARGER_MLSTM_CASES
from xlstm_lm.ops.backend import make_call
from xlstm_lm.ops.operation import why_impossible
from xlstm_lm.ops.slstm import SLSTM

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)

SIXTEEN_BITS = ("plain", "two halves", "no state", "sigmoid", "not normalized", "several blocks and parts", "narrow")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Allowed error of the sLSTM, of the largest entry: 1e-5, because a float32 product is three on tensor cores."""
SLSTM_SIZES = (8, 24, 32, 64, 80, 128, 136, 256)
SLSTM_CASES = {
    "plain": {},
    "no state, no resets": {"state": False, "resets": (), "T": 129},
    "one step": {"T": 1, "resets": (0,)},
    "more than a tile": {"B": 19, "H": 3, "T": 67},
    "long": {"T": 300, "resets": (1, 63, 64, 65, 129, 299)},
}


@pytest.mark.parametrize("name", [*MLSTM_CASES, *LARGER_MLSTM_CASES])
def test_mlstm(name: str) -> None:
    case = {"B": 1, "H": 1} | (MLSTM_CASES | LARGER_MLSTM_CASES)[name]
    check_case("triton", **case | {"architecture": None}, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_mlstm_in_sixteen_bits(name: str, dtype: torch.dtype) -> None:
    check_case("triton", **MLSTM_CASES[name] | {"dtype": dtype}, device="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", GRID)
def test_mlstm_in_all_sizes_and_lengths(index: int, dtype: torch.dtype) -> None:
    check_case("triton", **grid(index), dtype=dtype, device="cuda")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", STEP_CASES)
def test_mlstm_step_by_step(name: str, overwrite: bool) -> None:
    error = step_by_step("triton_step", overwrite=overwrite, device="cuda", **split(STEP_CASES[name]))
    check(error, STEP_CASES[name].get("dtype", torch.float32))


def check_slstm(backend: str, D: int, dtype: torch.dtype, **case: Any) -> None:
    call = make_call(torch.device("cuda", torch.cuda.current_device()), dtype, {"D": D})
    reason = why_impossible(SLSTM, SLSTM[backend], call)
    if reason is not None:
        pytest.skip(reason)
    case = {"B": 3, "T": 70, "H": 2, "D": D, "resets": (0, 31, 64)} | case
    assert_right(errors(**case, backend=backend, dtype=dtype, tile=None, device="cuda"), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", SLSTM_SIZES)
@pytest.mark.parametrize("backend", ["triton", "cluster", "batched"])
def test_slstm_in_all_sizes(backend: str, D: int, dtype: torch.dtype) -> None:
    check_slstm(backend, D, dtype)


@pytest.mark.parametrize("name", SLSTM_CASES)
@pytest.mark.parametrize("backend", ["triton", "cluster", "batched"])
def test_slstm(backend: str, name: str) -> None:
    check_slstm(backend, 64, torch.bfloat16, **SLSTM_CASES[name])
