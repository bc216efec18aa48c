"""The Triton kernels of the mLSTM against its definition in float64, in Triton's interpreter.

The interpreter has to be switched on before the kernels are imported, and an access outside a tensor can corrupt its
process, so all cases run in a process beside pytest. Inputs lie in larger tensors full of NaN, which shows such an
access too.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (pip install 'xlstm-lm[gpu]')", allow_module_level=True)

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3}  # of the largest entry of a value or gradient
BASE = {"B": 1, "T": 70, "H": 2, "K": 16, "V": 16}
CASES = {
    "plain": {"B": 2},
    "no state": {"state": False, "resets": (), "T": 40},
    "sigmoid": {"input_gate": "sigmoid"},
    "not normalized": {"normalize": False, "T": 40},
    "sigmoid, not normalized": {"input_gate": "sigmoid", "normalize": False, "T": 40},
    "no eps": {"eps": 0.0, "T": 40},
    "float16": {"dtype": torch.float16},
    "one step": {"T": 1, "resets": ()},
    "shorter than a chunk": {"T": 5, "resets": (2,)},
    "whole chunks": {"T": 64, "resets": (0, 16, 32, 63)},
    "one super-chunk": {"T": 40, "chunks": 3},
    "one super-chunk, no state": {"T": 20, "chunks": 3, "state": False},
    "several blocks and parts": {"K": 40, "V": 48, "T": 35, "H": 1},
    "narrow": {"K": 8, "V": 5, "T": 35},
    "large input gates": {"input_mean": 10.0, "T": 40, "tolerance": 1e-3},  # near-zero normalizers without a bound
    "small input gates": {"input_mean": -10.0, "T": 40},
    "closed forget gates": {"forget_mean": -20.0, "T": 40, "tolerance": 1e-3},  # sums of -20 a step, in float32
    "open forget gates": {"forget_mean": 20.0, "T": 40},
}


def in_nan(x: Tensor) -> Tensor:
    """The same values as a view with odd strides, surrounded by NaN."""
    storage = x.new_full([size + 2 for size in x.shape], float("nan"))
    inner = storage[tuple(slice(1, -1) for _ in x.shape)]
    inner.copy_(x)
    return inner.requires_grad_(x.requires_grad)


def small_kernels(chunks: int) -> None:
    """Have sequences of a few steps take several chunks, super-chunks, blocks and parts."""
    from xlstm_lm.ops.mlstm import triton_launch, triton_op

    walk = triton_launch.Launch(block_k=16, block_v=16, warps=4, stages=1)
    launches = triton_launch.Launches(16, "ieee", *(walk,) * 5)
    triton_op.launches = lambda *_: launches
    triton_op.make_plan = lambda *_: triton_launch.Plan(16, chunks, "ieee")


def errors(
    B: int,
    T: int,
    H: int,
    K: int,
    V: int,
    *,
    dtype: torch.dtype = torch.float32,
    state: bool = True,
    resets: tuple[int, ...] = (0, 16, 21, 39),
    input_mean: float = 0.0,
    forget_mean: float = 2.0,
    chunks: int = 2,
    **options: Any,
) -> dict[str, float]:
    """How far each value and gradient is from the definition, relative to the largest entry that it should have."""
    from xlstm_lm.ops.mlstm.recurrence import mlstm_recurrence
    from xlstm_lm.ops.mlstm.triton_op import mlstm_triton

    small_kernels(chunks)
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, H, V), "i": (B, T, H), "f": (B, T, H)}
    if state:
        shapes |= {"C": (B, H, K, V), "n": (B, H, K), "m": (B, H)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs["i"] = 2 * inputs["i"] + input_mean
    inputs["f"] = 2 * inputs["f"] + forget_mean
    inputs = {name: x.to(dtype) if name in "qkv" else x for name, x in inputs.items()}
    resets_BT = None
    if resets:
        resets_BT = torch.zeros(B, T, dtype=torch.bool)
        resets_BT[0, [step for step in resets if step < T]] = True

    def run(function: Callable, x: dict[str, Tensor]) -> dict[str, Tensor]:
        initial = (x["C"], x["n"], x["m"]) if state else None
        h, last = function(
            *(x[name] for name in "qkvif"), resets_BT=resets_BT, initial_state=initial, return_state=state, **options
        )
        outputs = {"h": h} | (dict(zip(("C", "n"), last)) if state else {})
        leaves = {name: each for name, each in x.items() if name != "m"}
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(each.shape, generator=generator).to(each.dtype) for each in outputs.values()]
        gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream)
        values = outputs | {f"d{name}": each for name, each in zip(leaves, gradients)}
        return values | ({"m": last[2]} if state else {})

    expected = run(mlstm_recurrence, {name: x.double().requires_grad_(name != "m") for name, x in inputs.items()})
    found = run(mlstm_triton, {name: in_nan(x.requires_grad_(name != "m")) for name, x in inputs.items()})
    assert found["h"].dtype == dtype
    largest = {name: float(x.detach().abs().max()) for name, x in expected.items()}
    largest["df"] = max(largest["df"], largest["di"])  # it is a difference of sums of such terms
    return {
        name: float((found[name].detach().double() - x).abs().max()) / max(largest[name], 1e-30)
        for name, x in expected.items()
    }


def interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def beside() -> Iterator[ProcessPoolExecutor]:
    """A process where Triton interprets its kernels."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=interpret) as pool:
        yield pool


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(beside: ProcessPoolExecutor, name: str) -> None:
    case = BASE | CASES[name]
    tolerance = case.pop("tolerance", TOLERANCE[case.get("dtype", torch.float32)])
    found = beside.submit(errors, **case).result()
    assert max(found.values()) <= tolerance, found  # NaN fails too: nothing is below it
    assert all(error == error for error in found.values()), found


def two_halves_and_one_whole() -> float:
    from xlstm_lm.ops.mlstm.triton_op import mlstm_triton

    small_kernels(chunks=2)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 50, 1, 16, requires_grad=True) for _ in range(3))
    i, f = (torch.randn(1, 50, 1, requires_grad=True) for _ in range(2))
    leaves = (q, k, v, i, f)
    resets_BT = torch.zeros(1, 50, dtype=torch.bool)
    resets_BT[:, [3, 40]] = True
    h, (C, n, _m) = mlstm_triton(*leaves, resets_BT=resets_BT, return_state=True)
    first, state = mlstm_triton(*(x[:, :21] for x in leaves), resets_BT=resets_BT[:, :21], return_state=True)
    second, (C_handed, n_handed, _m) = mlstm_triton(
        *(x[:, 21:] for x in leaves), resets_BT=resets_BT[:, 21:], initial_state=state, return_state=True
    )
    whole, halves = (h, C, n), (torch.cat([first, second], 1), C_handed, n_handed)
    upstream = [torch.randn_like(x) for x in whole]
    pairs = [
        *zip(whole, halves),
        *zip(torch.autograd.grad(whole, leaves, upstream), torch.autograd.grad(halves, leaves, upstream)),
    ]
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def test_two_halves_are_one_whole(beside: ProcessPoolExecutor) -> None:
    assert beside.submit(two_halves_and_one_whole).result() < 1e-4


def as_operators() -> None:
    from torch.utils.checkpoint import checkpoint

    from xlstm_lm.ops.mlstm import triton_op

    small_kernels(chunks=1)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 20, 1, 16, requires_grad=True) for _ in range(3))
    i, f = (torch.randn(1, 20, 1, requires_grad=True) for _ in range(2))
    state = (
        torch.randn(1, 1, 16, 16, requires_grad=True),
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
    torch.library.opcheck(
        triton_op.forward,
        (q, k, v, i, f, torch.zeros(1, 20, dtype=torch.bool), *state, True, False, True, 1e-6),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_the_operators_are_traced_and_rebuilt(beside: ProcessPoolExecutor) -> None:
    """No graph break under torch.compile, the same gradients in activation checkpointing, shapes without running."""
    beside.submit(as_operators).result()


def test_what_the_kernels_cannot_take_is_named() -> None:
    from xlstm_lm.ops.mlstm.triton_op import mlstm_triton

    inputs = [torch.zeros(1, 4, 1, 8)] * 3 + [torch.zeros(1, 4, 1)] * 2
    with pytest.raises(ValueError, match="takes tensors of a GPU, got cpu: use 'chunkwise'"):
        mlstm_triton(*inputs)
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16, got torch.float64"):
        mlstm_triton(*(x.double() for x in inputs))


@pytest.mark.parametrize(("backend", "stand_in"), [("triton", "chunkwise"), ("triton_step", "step")])
def test_kernels_that_fail_or_are_wrong_are_not_taken(
    monkeypatch: pytest.MonkeyPatch, backend: str, stand_in: str
) -> None:
    """A guard of every GPU, shown on the CPU: here the kernels cannot run, and stand-ins are right or wrong."""
    from xlstm_lm.ops.mlstm import BACKENDS, dispatch

    said: list[str] = []
    monkeypatch.setattr(dispatch, "announce_once", said.append)
    check = lambda: dispatch.triton_is_right.__wrapped__(backend, torch.device("cpu"), torch.float32)
    state = torch.random.get_rng_state()
    assert not check()
    assert f"(`{backend}`) do not run on cpu" in said[-1]
    assert "takes tensors of a GPU" in said[-1]
    assert f"(`{stand_in}`), which is slower" in said[-1]
    monkeypatch.setitem(BACKENDS, backend, BACKENDS[stand_in])
    assert check()
    with torch.inference_mode():  # as where a model generates
        assert check()
    assert len(said) == 1

    def wrong(*inputs: Tensor, **options: Any) -> tuple[Tensor, Any]:
        h, state = BACKENDS[stand_in](*inputs, **options)
        forget = inputs[4]
        if backend == "triton":  # in a gradient only
            forget = forget - forget.detach()
        return h + 1e-3 * forget[..., None] * h.detach().abs().max(), state

    monkeypatch.setitem(BACKENDS, backend, wrong)
    assert not check()
    assert "are wrong on cpu" in said[-1]
    assert torch.equal(torch.random.get_rng_state(), state)
