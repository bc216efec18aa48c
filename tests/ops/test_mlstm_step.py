"""The mLSTM's decode steps, in PyTorch and in Triton (interpreted): step after step they are the whole sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.mlstm_cases import in_nan, make_inputs, make_resets, run
from xlstm_lm.ops.backend import resolve
from xlstm_lm.ops.mlstm import mlstm

CASES = {
    "plain": {},
    "no state": {"state": False, "resets": False},
    "no resets": {"resets": False},
    "sigmoid": {"input_gate": "sigmoid"},
    "not normalized": {"normalize": False},
    "sigmoid, not normalized": {"input_gate": "sigmoid", "normalize": False},
    "eps": {"eps": 0.1},
    "odd sizes": {"K": 13, "V": 37, "H": 3, "B": 1},
    "several blocks": {"K": 24, "V": 80},
    "more rows than a program has at a time": {"K": 300, "V": 5, "H": 1, "T": 4},
    "large input gates": {"input_mean": 10.0},
    "small input gates": {"input_mean": -10.0},
    "closed forget gates": {"forget_mean": -30.0},
    "open forget gates": {"forget_mean": 30.0},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
}


def step_by_step(
    backend: str,
    B: int = 2,
    T: int = 6,
    H: int = 2,
    K: int = 16,
    V: int = 24,
    *,
    dtype: torch.dtype = torch.float32,
    resets: bool = True,
    state: bool = True,
    overwrite: bool = False,
    gates: dict[str, float] | None = None,
    device: str = "cpu",
    **options: Any,
) -> float:
    """Largest error of h and of the last state, of the largest entry of each and beyond what the definition itself is
    off by in the type of the state. Asserts on the way that only C is overwritten, and only if asked."""
    inputs = make_inputs(B, T, H, K, V, state=state, device=device, **gates or {})
    inputs = {name: x.detach() for name, x in inputs.items()}
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {name: x.to(dtype if name in "qkv" else wide) for name, x in inputs.items()}
    resets_BT = options["resets"] = make_resets(B, T, 0, 3, 4, device=device) if resets else None
    expected = run({name: x.double() for name, x in inputs.items()}, backend="recurrence", **options)
    rounded = run({name: x.to(wide) for name, x in inputs.items()}, backend="recurrence", **options)

    h, last = [], (inputs["C"], inputs["n"], inputs["m"]) if state else None
    for t in range(T):
        if resets:
            options["resets"] = resets_BT[:, t : t + 1]
        step = [in_nan(inputs[name][:, t : t + 1]) for name in "qkvif"]
        before, kept = last, None if last is None else [x.clone() for x in last]
        h_B1HV, last = mlstm(
            *step, initial_state=last, return_state=True, overwrite_state=overwrite, backend=backend, **options
        )
        h.append(h_B1HV)
        assert h_B1HV.dtype == dtype
        if before is not None:
            assert (last[0] is before[0] or last[0].data_ptr() == before[0].data_ptr()) == overwrite
            assert overwrite or torch.equal(before[0], kept[0])
            assert all(torch.equal(x, y) for x, y in zip(before[1:], kept[1:])), "other programs may still read n and m"
    found = (torch.cat(h, 1), *last)
    return max(
        float(((a.double() - e).abs() - 2 * (r.double() - e).abs()).max() / e.abs().max())
        for a, e, r in zip(found, expected, rounded, strict=True)
    )


def check(error: float, dtype: torch.dtype) -> None:
    """h is rounded to its type once; all else is float32 at least."""
    tolerance = 1e-12 if dtype == torch.float64 else max(torch.finfo(dtype).eps, 3e-6)
    assert error <= tolerance, error


def split(case: dict[str, Any]) -> dict[str, Any]:
    gates = {name: case[name] for name in ("input_mean", "forget_mean") if name in case}
    return {name: x for name, x in case.items() if name not in gates} | {"gates": gates}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_steps_in_pytorch_equal_the_whole_sequence(name: str, overwrite: bool) -> None:
    case = split(CASES[name])
    if overwrite:  # with resets C is copied first
        case["resets"] = False
    for dtype in (case.pop("dtype", torch.float32), torch.float64):
        check(step_by_step("step", overwrite=overwrite, dtype=dtype, **case), dtype)


@pytest.mark.parametrize("name", CASES)
def test_steps_in_triton_equal_the_whole_sequence(interpreted: Callable, name: str) -> None:
    case = split(CASES[name])
    check(interpreted(step_by_step, "triton_step", **case), case.get("dtype", torch.float32))


@pytest.mark.parametrize("name", ["plain", "no state", "sigmoid, not normalized"])
def test_steps_in_triton_in_place(interpreted: Callable, name: str) -> None:
    check(interpreted(step_by_step, "triton_step", overwrite=True, **split(CASES[name])), torch.float32)


@pytest.mark.parametrize("backend", ["step", "triton_step"])
def test_a_reset_empties_a_state_that_is_not_finite(interpreted: Callable, backend: str) -> None:
    assert interpreted(after_a_reset, backend)


def after_a_reset(backend: str) -> bool:
    inputs = {name: x.detach().float() for name, x in make_inputs(T=1, state=True).items()}
    resets = torch.ones(2, 1, dtype=torch.bool)
    expected = run(inputs, resets=resets, backend=backend)
    inputs |= {"C": inputs["C"] * float("inf"), "n": inputs["n"] * float("nan")}
    return all(torch.equal(a, b) for a, b in zip(run(inputs, resets=resets, backend=backend), expected, strict=True))


def as_operators() -> None:
    from xlstm_lm.ops.mlstm.triton_step import step, step_in_place

    inputs = {name: x.detach().float() for name, x in make_inputs(T=1, K=16, V=16, state=True).items()}
    leaves, state = [inputs[name] for name in "qkvif"], [inputs[name] for name in "Cnm"]
    resets = torch.tensor([[True], [False]])
    for operator in (step, step_in_place):
        torch.library.opcheck(operator, (*leaves, resets, *state, False, True, 1e-6))
    torch.library.opcheck(step, (*leaves, None, None, None, None, True, False, 1e-6))

    for overwrite in (False, True):
        decode = functools.partial(
            mlstm, return_state=True, overwrite_state=overwrite, backend="triton_step", resets=resets
        )
        expected = decode(*leaves, initial_state=[x.clone() for x in state])
        handed = [x.clone() for x in state]
        compiled = torch.compile(decode, backend="aot_eager", fullgraph=True)
        h, last = compiled(*leaves, initial_state=handed)
        for found, right in zip((h, *last), (expected[0], *expected[1])):
            torch.testing.assert_close(found, right)
        assert torch.equal(handed[0], last[0] if overwrite else state[0])


def test_the_step_is_traced_whole_and_in_place(interpreted: Callable) -> None:
    interpreted(as_operators)


@pytest.mark.parametrize("function", ["step:mlstm_step", "triton_step:mlstm_triton_step"])
def test_one_token_only(function: str) -> None:
    if "triton" in function:
        pytest.importorskip("triton")
    step = resolve(f"xlstm_lm.ops.mlstm.{function}")
    inputs = [x.detach() for x in make_inputs(T=2).values()]
    with pytest.raises(ValueError, match="takes one token, T = 1, got T = 2"):
        step(*inputs[:5])


def test_what_the_triton_step_cannot_take_is_named() -> None:
    pytest.importorskip("triton")
    step = resolve("xlstm_lm.ops.mlstm.triton_step:mlstm_triton_step")
    inputs: list[Tensor] = [x.detach() for x in make_inputs(T=1).values()]
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16, got torch.float64: use 'step'"):
        step(*inputs[:5])
    with pytest.raises(ValueError, match="takes tensors of a GPU, got cpu: use 'step'"):
        step(*(x.float() for x in inputs[:5]))
