"""The compiled mLSTM at sizes around its tiles and vectors, with any number of threads, and without a compiler."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from tests.ops.mlstm_cases import assert_equal_to_definition, gradients, make_inputs, make_resets, run
from xlstm_lm.ops import native
from xlstm_lm.ops.backend import make_call
from xlstm_lm.ops.mlstm import MLSTM, mlstm
from xlstm_lm.ops.operation import choose


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    native.load_kernels()  # not being able to build them is a failure here, with the reason


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("K", "V"), [(8, 16), (16, 32), (24, 48), (48, 96), (64, 128), (80, 64), (128, 256), (1, 1), (13, 37), (33, 15)]
)
def test_heads_of_any_size(K: int, V: int, dtype: torch.dtype) -> None:
    tolerance = {"rtol": 3e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    inputs = make_inputs(B=1, T=75, H=2, K=K, V=V, dtype=dtype, gate_spread=1.0, state=True)
    for resets in (None, make_resets(1, 75, 20, 21, 60)):
        assert_equal_to_definition(inputs, backend="compiled", resets=resets, **tolerance)


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 31, 32, 33, 64, 127, 128, 129, 1000])
def test_any_length_in_float32(T: int) -> None:
    inputs = make_inputs(B=1, T=T, H=1, K=16, V=24, dtype=torch.float32, gate_spread=1.0, state=True)
    for resets in (None, make_resets(1, T, 0, 31, 32, 100, 228, 999)):
        assert_equal_to_definition(inputs, rtol=3e-5, atol=1e-6, backend="compiled", resets=resets)


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize(("input_mean", "forget_mean"), [(60.0, 3.0), (-60.0, 3.0), (0.0, 60.0), (0.0, -60.0)])
def test_extreme_gates_in_float32(input_mean: float, forget_mean: float, input_gate: str) -> None:
    inputs = make_inputs(T=70, K=8, V=8, dtype=torch.float32, input_mean=input_mean, forget_mean=forget_mean)
    # In float32 the definition itself is off by as much: at 60, d is a small difference of large numbers.
    assert_equal_to_definition(inputs, rtol=6e-3, atol=1e-5, backend="compiled", input_gate=input_gate)


def test_a_reset_at_every_step() -> None:
    inputs = make_inputs(B=2, T=40, state=True)
    assert_equal_to_definition(inputs, backend="compiled", resets=torch.ones(2, 40, dtype=torch.bool))


def test_results_do_not_depend_on_the_number_of_threads(threads: None) -> None:
    inputs = make_inputs(B=3, T=150, H=3, K=16, V=24, dtype=torch.float32, state=True)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        outputs = run(inputs, backend="compiled", resets=make_resets(3, 150, 40))
        results.append([*outputs, *gradients(outputs[:3], inputs).values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_values_that_are_not_finite_stay_within_their_document() -> None:
    inputs = make_inputs(B=1, T=60, dtype=torch.float32)
    resets = make_resets(1, 60, 25, 50)
    expected = run(inputs, backend="compiled", resets=resets)[0]
    with torch.no_grad():
        inputs["v"][0, 30] = float("nan")
        inputs["k"][0, 31] = float("inf")
    h = run(inputs, backend="compiled", resets=resets)[0]
    assert h[:, 31:50].isnan().all()
    for part in (slice(0, 25), slice(50, 60)):
        assert torch.equal(h[:, part], expected[:, part])


def test_only_tensors_of_the_cpu() -> None:
    inputs = [x.to("meta") for x in make_inputs(T=4).values()]
    with pytest.raises(
        ValueError, match="'compiled' cannot compute this: it takes CPU tensors, but q is on meta; choose 'auto'"
    ):
        mlstm(*inputs, backend="compiled")


@pytest.mark.usefixtures("fresh_choices")
def test_without_the_kernels_the_batched_products_run(caplog: pytest.LogCaptureFixture) -> None:
    call = make_call(torch.device("cpu"), torch.float32, {"K": 8, "V": 8}, MLSTM.options)
    with mock.patch.object(native, "_load_once", return_value="no compiler"):
        assert choose(MLSTM, call).backend == "chunkwise"
    assert "(`chunkwise`), which is slower" in caplog.text and "no compiled CPU kernels: no compiler" in caplog.text
