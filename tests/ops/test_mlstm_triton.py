"""The Triton kernels of the mLSTM, interpreted: their cases beside those of every backend, and what surrounds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.mlstm_cases import (
    assert_equal_under_autocast,
    check_case,
    gradients,
    make_inputs,
    make_resets,
    run,
    super_chunks_of,
)
from tests.ops.stand_ins import replace_backend
from xlstm_lm.ops.backend import make_call
from xlstm_lm.ops.mlstm import MLSTM
from xlstm_lm.ops.operation import verify

pytest.importorskip("triton", reason="Triton is not installed (pip install 'xlstm-lm[gpu]')")

HOPPER = {"dtype": torch.float16, "T": 40, "chunks": 1, "architecture": "sm_90"}
CASES = {
    "plain": {"T": 70},
    "two halves": {"T": 50, "cut": 21},
    "no state": {"state": False, "resets": None},
    "sigmoid": {"input_gate": "sigmoid", "T": 70, "B": 1},
    "not normalized": {"normalize": False},
    "sigmoid, not normalized": {"input_gate": "sigmoid", "normalize": False},
    "no eps": {"eps": 0.0},
    "float16": {"dtype": torch.float16, "T": 70},
    "as on Hopper": HOPPER | {"K": 40, "V": 96},
    "one step": {"T": 1, "resets": None},
    "shorter than a chunk": {"T": 5, "resets": (2,)},
    "whole chunks": {"T": 64, "resets": (0, 16, 32, 63)},
    "one super-chunk": {"chunks": 3},
    "one super-chunk, no state": {"T": 20, "chunks": 3, "state": False},
    "several blocks and parts": {"K": 80, "V": 48, "T": 35, "B": 1},
    "narrow": {"K": 8, "V": 5, "T": 35},
    "large input gates": {"input_mean": 10.0},
    "small input gates": {"input_mean": -10.0},
    "closed forget gates": {"forget_mean": -20.0},
    "open forget gates": {"forget_mean": 20.0},
}


SLOW_CASES = {
    "as on Hopper, several blocks and parts": HOPPER | {"K": 96, "V": 160},
    "as on Blackwell, unaligned": HOPPER | {"architecture": "sm_100", "K": 72, "V": 24},
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW_CASES)])
def test_values_and_gradients(interpreted: Callable, name: str) -> None:
    interpreted(check_case, "triton", **{"B": 1, "H": 1} | (CASES | SLOW_CASES)[name])


def in_small_gate_blocks(**case: Any) -> float:
    """Check a case where the kernels of the gates run over blocks of 32 steps instead of 512.

    Returns:
        the largest error of h where the input gates of the first block are e^100 times those of the others.
    """
    from xlstm_lm.ops.mlstm import triton_gates

    inputs = {name: x.detach() for name, x in make_inputs(1, 70, 1, 16, 16, forget_mean=10.0).items()}
    inputs["i"][:, :32] += 100.0
    with mock.patch.object(triton_gates, "BLOCK", 32):
        check_case("triton", B=1, H=1, T=70, chunks=3, **case)
        found = run({name: x.float() for name, x in inputs.items()}, backend="triton")[0]
    right = run(inputs, backend="recurrence")[0]
    return float((found - right).abs().max() / right.abs().max())


@pytest.mark.parametrize("case", [{}, {"input_gate": "sigmoid", "resets": None}], ids=str)
def test_gates_pass_from_block_to_block(interpreted: Callable, case: dict[str, Any]) -> None:
    assert interpreted(in_small_gate_blocks, **case) < 1e-4


def large_states() -> dict[str, float]:
    """Largest errors of h and all gradients in float16, of the largest entry, where C, n and the gradient of C are far
    beyond what it holds."""
    inputs = make_inputs(1, 40, 1, 16, 24, state=True, gate_spread=1.0)
    sizes = {"q": 1.0, "k": 1e-3, "v": 1e-3, "C": 1e6, "n": 1e6}
    inputs = {name: x.detach() * sizes.get(name, 1.0) for name, x in inputs.items()}
    inputs |= {name: inputs[name].abs() for name in "qn"}  # the normalizers are then as large as the states
    inputs = {name: x.to(torch.float16 if name in "qkv" else torch.float32) for name, x in inputs.items()}

    def everything(backend: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        leaves = {name: x.to(dtype or x.dtype).requires_grad_(name != "m") for name, x in inputs.items()}
        h, C, n, _ = run(leaves, backend=backend)
        return {"h": h.detach()} | gradients((h, 1e6 * C, n), leaves)

    with super_chunks_of(1):
        found = everything("triton", None)
    right = everything("recurrence", torch.float64)
    return {name: float((found[name] - x).abs().max() / x.abs().max()) for name, x in right.items()}


def test_states_that_float16_cannot_hold(interpreted: Callable) -> None:
    found = interpreted(large_states)
    assert all(error < 5e-3 for error in found.values()), found  # NaN fails too


def gradients_of_later_documents() -> list[float]:
    """Largest gradients, beside those of the second document, of the first one, on which the loss does not depend."""
    inputs = {name: x.detach() for name, x in make_inputs(1, 56, 1, 16, 16).items()}
    leaves = {
        name: x.to(torch.float16 if name in "qkv" else torch.float32).requires_grad_() for name, x in inputs.items()
    }
    with super_chunks_of(2):
        h = run(leaves, resets=make_resets(1, 56, 40), backend="triton")[0]
        found = torch.autograd.grad(h[:, 40:].float().square().sum(), list(leaves.values()))
    assert all(x[:, 41:].abs().max() > 1e-3 for x in found)
    return [float(x[:, :40].abs().max()) for x in found]


def test_nothing_of_a_later_document_reaches_an_earlier_one(interpreted: Callable) -> None:
    """Not even the rounding of its sums, in the gradient of f."""
    assert interpreted(gradients_of_later_documents) == [0.0] * 5


def under_autocast() -> None:
    with super_chunks_of(1):
        assert_equal_under_autocast(backend="triton")


def test_autocast_does_not_reach_the_products(interpreted: Callable) -> None:
    interpreted(under_autocast)


def as_operators() -> None:
    from torch.utils.checkpoint import checkpoint

    from xlstm_lm.ops.mlstm import triton_op

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 20, 1, 16, requires_grad=True) for _ in range(3))
    i, f = (torch.randn(1, 20, 1, requires_grad=True) for _ in range(2))
    state = (
        torch.randn(1, 1, 16, 16).mT.requires_grad_(),  # of other strides than its gradient
        torch.randn(1, 1, 16, requires_grad=True),
        torch.zeros(1, 1),
    )
    leaves = (q, k, v, i, f, *state[:2])

    def function(q, k, v, i, f, C, n):
        h, last = triton_op.mlstm_triton(q, k, v, i, f, initial_state=(C, n, state[2]), return_state=True)
        return (h * h).sum() + (last[0] * last[0]).sum() + last[1].sum()

    expected = torch.autograd.grad(function(*leaves), leaves)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    rebuilt = lambda *each: checkpoint(function, *each, use_reentrant=False)
    for wrapped in (compiled, rebuilt):
        for found, right in zip(torch.autograd.grad(wrapped(*leaves), leaves), expected):
            torch.testing.assert_close(found, right)
    resets = torch.zeros(1, 20, dtype=torch.bool)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for before, options in ((state, (True, False, True, 1e-6)), ((None,) * 3, (False, True, False, 0.0))):
        arguments = (q, k, v, i, f, resets, *before, *options)
        torch.library.opcheck(triton_op.forward, arguments, test_utils=tests)
        h, C, n, _m, *kept = (x.detach() for x in triton_op.forward(*arguments))
        inputs = [None if x is None else x.detach() for x in arguments[:8]]
        last = (C, n) if options[0] else (None, None)
        torch.library.opcheck(triton_op.backward, (*inputs, h, *kept, h, *last, *options[1:]), test_utils=tests)


def test_the_operators_are_traced_and_rebuilt(interpreted: Callable) -> None:
    """No graph break under torch.compile, the same gradients in activation checkpointing, shapes without running."""
    interpreted(as_operators)


class ShapesOfZeros(TorchDispatchMode):
    """Keeps the shapes of tensors of zeros that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, function: Callable, types: Any, arguments: tuple = (), options: dict | None = None
    ) -> Any:
        out = function(*arguments, **(options or {}))
        if "zeros" in str(function):
            self.shapes.append(tuple(out.shape))
        return out


def of_one_output() -> None:
    inputs = make_inputs(1, 5, 1, 4, 6, dtype=torch.float32, state=True)
    for index, shape in enumerate(((1, 5, 1, 6), (1, 1, 4, 6), (1, 1, 4))):
        leaves = [inputs[name] for name in ("qkvifCn", "kvifC", "kifn")[index]]
        expected = torch.autograd.grad(run(inputs, backend="recurrence")[index].sin().sum(), leaves)
        output = run(inputs, backend="triton")[index].sin().sum()
        with ShapesOfZeros() as zeros:
            found = torch.autograd.grad(output, leaves)
        for one, right in zip(found, expected, strict=True):
            torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-5)
        assert shape not in zeros.shapes
        # Nothing but the gradients of the other outputs, if those are needed.
        assert len(zeros.shapes) == (0 if index == 0 else 2), zeros.shapes


def test_a_gradient_of_one_output_only(interpreted: Callable) -> None:
    """Beside it there are no zeros for what the forward keeps for the backward."""
    interpreted(of_one_output)


def test_what_the_kernels_cannot_take_is_named() -> None:
    from xlstm_lm.ops.mlstm.triton_op import mlstm_triton

    inputs = [torch.zeros(1, 4, 1, 8)] * 3 + [torch.zeros(1, 4, 1)] * 2
    with pytest.raises(ValueError, match="takes tensors of a GPU, got cpu: use 'chunkwise'"):
        mlstm_triton(*inputs)
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16, got torch.float64"):
        mlstm_triton(*(x.double() for x in inputs))


def verdict(broken: str | None) -> str:
    """Verdict of the guard of every GPU on the interpreted kernels, with a part of the super-chunks' path `broken`."""
    from xlstm_lm.ops.mlstm import operation, triton_op, triton_states

    def zero_borders(*arguments: Any, reverse: bool = False, **options: Any) -> Tensor:
        C_BHSKV = border_states(*arguments, reverse=reverse, **options)
        if reverse == (broken == "gradients at borders"):
            C_BHSKV[:, :, 1:-1] = 0.0
        return C_BHSKV

    def no_products(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        products = arguments[5]
        products[..., :-1] = 0.0
        return gate_gradients(*arguments, **options)

    border_states, gate_gradients = triton_op.border_states, triton_op.gate_gradients
    changes = {
        None: (triton_op, "border_states", border_states),
        "states at borders": (triton_op, "border_states", zero_borders),
        "gradients at borders": (triton_op, "border_states", zero_borders),
        "join": (triton_states, "_join", lambda *_, **__: None),
        "products": (triton_op, "gate_gradients", no_products),
    }
    one_head = mock.patch.object(operation, "STATE_ENTRIES", 2 * 16 * 16)  # of two: the interpreter is slow
    short = mock.patch.object(operation, "LONG", 37)
    with mock.patch.object(*changes[broken]), one_head, short:
        call = make_call(torch.device("cpu"), torch.float32, {"K": 16, "V": 16}, operation.MLSTM.options)
        return verify(operation.MLSTM, "triton", call) or ""


SLOW_PARTS = [pytest.param(each, marks=pytest.mark.slow) for each in ("gradients at borders", "join")]


@pytest.mark.parametrize("broken", [None, "states at borders", "products", *SLOW_PARTS])
def test_the_guard_reaches_what_passes_between_super_chunks(interpreted: Callable, broken: str | None) -> None:
    said = interpreted(verdict, broken)
    assert ("values or gradients are wrong" in said) if broken else not said


@pytest.mark.parametrize(("backend", "stand_in"), [("triton", "chunkwise"), ("triton_step", "step")])
def test_kernels_that_fail_or_are_wrong_are_found(
    monkeypatch: pytest.MonkeyPatch, fresh_choices: None, backend: str, stand_in: str
) -> None:
    """A guard of every GPU, shown on the CPU: here the kernels cannot run, and stand-ins are right or wrong."""
    call = make_call(torch.device("cpu"), torch.float32, {"K": 8, "V": 12}, MLSTM.options)
    check = lambda: verify(MLSTM, backend, call)
    state = torch.random.get_rng_state()
    assert "it does not run" in check() and "takes tensors of a GPU" in check()
    plain = MLSTM[stand_in].load()

    def right(*inputs: Tensor, super_chunk: int | None = None, **options: Any) -> tuple[Tensor, Any]:
        return plain(*inputs, **options)

    replace_backend(monkeypatch, MLSTM, backend, right)
    assert check() is None
    with torch.inference_mode():  # as where a model generates
        assert check() is None

    def wrong(*inputs: Tensor, **options: Any) -> tuple[Tensor, Any]:
        h, state = right(*inputs, **options)
        forget = inputs[4]
        if backend == "triton":  # in a gradient only
            forget = forget - forget.detach()
        return h + 1e-3 * forget[..., None] * h.detach().abs().max(), state

    def wrong_last_state(*inputs: Tensor, **options: Any) -> tuple[Tensor, Any]:
        h, (C, n, m) = right(*inputs, **options)
        return h, (C, 1.01 * n, m)

    for each in (wrong, wrong_last_state):
        replace_backend(monkeypatch, MLSTM, backend, each)
        assert "its values or gradients are wrong" in check()
    assert torch.equal(torch.random.get_rng_state(), state)
