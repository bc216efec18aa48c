"""The mLSTM's fast forms held to its definition, in values and gradients, over shapes, gates, types and layouts."""

from __future__ import annotations

import pytest
import torch

from tests.ops.mlstm_cases import (
    FAST,
    assert_equal_to_definition,
    assert_equal_under_autocast,
    gradients,
    make_inputs,
    make_resets,
    run,
)
from xlstm_lm.ops.mlstm import block, gates, mlstm

EACH_FAST_BACKEND = pytest.mark.parametrize("backend", FAST)


@EACH_FAST_BACKEND
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("T", [1, 2, 7, 63, 64, 65, 100, 257])
def test_it_equals_the_definition_at_every_length(T: int, input_gate: str, backend: str) -> None:
    inputs = make_inputs(T=T, K=3, V=5, state=True)
    assert_equal_to_definition(inputs, input_gate=input_gate, backend=backend)
    assert_equal_to_definition(
        inputs, input_gate=input_gate, resets=make_resets(2, T, 0, 63, 70, 71, 128), backend=backend
    )


@EACH_FAST_BACKEND
@pytest.mark.parametrize("chunk_length", [1, 2, 5, 16, 64, 100, 1000])
@pytest.mark.parametrize("normalize", [True, False])
def test_it_equals_the_definition_at_every_chunk_length(chunk_length: int, normalize: bool, backend: str) -> None:
    inputs = make_inputs(T=83, H=3, K=7, V=1)
    resets = make_resets(2, 83, 5, 9, 16, 64)
    assert_equal_to_definition(inputs, chunk_length=chunk_length, normalize=normalize, backend=backend)
    assert_equal_to_definition(inputs, chunk_length=chunk_length, normalize=normalize, resets=resets, backend=backend)


@EACH_FAST_BACKEND
def test_many_blocks_of_chunks_equal_the_definition(backend: str) -> None:
    inputs = make_inputs(T=300, K=2, V=3, state=True)
    assert_equal_to_definition(inputs, chunk_length=4, backend=backend)
    assert_equal_to_definition(
        inputs, chunk_length=4, resets=make_resets(2, 300, 3, 64, 128, 129, 200), backend=backend
    )


@EACH_FAST_BACKEND
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("input_mean", [-10.0, 0.0, 10.0])
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_input_gates_far_from_zero(input_mean: float, eps: float, input_gate: str, backend: str) -> None:
    inputs = make_inputs(T=70, input_mean=input_mean, state=True)
    assert_equal_to_definition(inputs, eps=eps, chunk_length=16, input_gate=input_gate, backend=backend)


@EACH_FAST_BACKEND
@pytest.mark.parametrize("forget_mean", [-30.0, 0.0, 30.0])
def test_saturated_forget_gates(forget_mean: float, backend: str) -> None:
    inputs = make_inputs(T=130, forget_mean=forget_mean, gate_spread=5.0, state=True)
    assert_equal_to_definition(inputs, backend=backend)
    assert_equal_to_definition(inputs, input_gate="sigmoid", backend=backend)


@EACH_FAST_BACKEND
def test_alternating_forget_gates_do_not_wash_each_other_out(backend: str) -> None:
    inputs = make_inputs(T=130, state=True)
    with torch.no_grad():
        inputs["f"][:, ::7] = -40.0
        inputs["f"][:, 1::7] = 40.0
    assert_equal_to_definition(inputs, backend=backend)


@EACH_FAST_BACKEND
def test_padding_steps_change_nothing(backend: str) -> None:
    """An input gate of -1e30 beside a forget gate of 1e30 is a step that did not happen."""
    for dtype in (torch.float32, torch.float64):
        inputs = make_inputs(T=75, dtype=dtype)
        with torch.no_grad():
            inputs["i"][:, :70] = -1e30
            inputs["f"][:, :70] = 1e30
        h = run(inputs, chunk_length=16, backend=backend)[0]
        alone = run({name: x[:, 70:] for name, x in inputs.items()}, chunk_length=16, backend=backend)[0]
        assert torch.equal(h[:, :70], torch.zeros_like(h[:, :70]))
        torch.testing.assert_close(h[:, 70:], alone)
        assert all(torch.isfinite(g).all() for g in gradients((h,), inputs).values())


@EACH_FAST_BACKEND
def test_an_input_gate_of_minus_infinity_lets_nothing_in(backend: str) -> None:
    inputs = make_inputs(T=20)
    with torch.no_grad():
        inputs["i"][:, :3] = float("-inf")
        inputs["i"][0, 10] = float("-inf")
    assert_equal_to_definition(inputs, chunk_length=8, backend=backend)
    with torch.no_grad():
        names = ("recurrence", "step", backend)
        step = [mlstm(*(inputs[name][:, :1] for name in "qkvif"), backend=name) for name in names]
    assert all(torch.equal(h, torch.zeros_like(h)) for h in step)


@EACH_FAST_BACKEND
@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_float32_is_close_to_the_exact_definition(input_gate: str, backend: str) -> None:
    for resets in (None, make_resets(2, 257, 0, 64, 100)):
        inputs = make_inputs(T=257, K=16, V=24, dtype=torch.float32, gate_spread=1.0, state=True)
        assert_equal_to_definition(inputs, rtol=2e-5, atol=1e-6, input_gate=input_gate, resets=resets, backend=backend)


@EACH_FAST_BACKEND
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_lose_only_the_rounding_of_outputs(dtype: torch.dtype, backend: str) -> None:
    inputs = make_inputs(T=100, K=16, V=24, dtype=torch.float32, gate_spread=1.0)
    for name in "qkv":
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()
    h, C, n, m = run(inputs, backend=backend)
    assert h.dtype == dtype
    assert C.dtype == n.dtype == m.dtype == torch.float32
    found = gradients((h,), inputs)
    assert all(found[name].dtype == inputs[name].dtype for name in found)
    assert_equal_to_definition(inputs, rtol=2 * torch.finfo(dtype).eps, atol=0.0, backend=backend)


@EACH_FAST_BACKEND
def test_autocast_does_not_reach_the_products(backend: str) -> None:
    assert_equal_under_autocast(backend=backend)


@EACH_FAST_BACKEND
def test_views_of_any_strides(backend: str) -> None:
    B, T, H, K, V = 2, 130, 2, 4, 6
    inputs = make_inputs(B, T, H, K, V)
    views = {
        "q": inputs["q"].detach().transpose(1, 2).contiguous().transpose(1, 2),
        "k": torch.cat([inputs["k"], inputs["v"]], -1).detach()[..., :K],
        "v": torch.cat([inputs["k"], inputs["v"]], -1).detach()[..., K:],
        "i": torch.stack([inputs["i"], inputs["f"]], -1).detach()[..., 0],
        "f": torch.stack([inputs["i"], inputs["f"]], -1).detach()[..., 1],
    }
    assert not any(x.is_contiguous() for x in views.values())
    for x in views.values():
        x.requires_grad_()
    h, h_views = run(inputs, backend=backend)[0], run(views, backend=backend)[0]
    torch.testing.assert_close(h_views, h)
    weight = torch.randn(B, H, V, T, dtype=torch.float64).permute(0, 3, 1, 2)  # so is dh no contiguous tensor either
    for expected, actual in zip(
        torch.autograd.grad(h, inputs.values(), weight), torch.autograd.grad(h_views, views.values(), weight)
    ):
        torch.testing.assert_close(actual, expected)
    one = torch.autograd.grad(run(views, backend=backend)[0].sum(), views.values())  # dh is an expanded scalar
    two = torch.autograd.grad(run(inputs, backend=backend)[0], inputs.values(), torch.ones_like(h))
    for expected, actual in zip(two, one):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("part_size", [1, 3 * 64 * 4, 6 * 64 * 4])
def test_how_a_block_is_cut_into_parts_does_not_show(part_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sequence a part; rows of one head, 3 and 2; all rows of one head."""
    monkeypatch.setattr(block, "CPU_PART_SIZE", part_size)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    inputs = make_inputs(B=5, T=64, H=3, K=2, V=2, state=True)
    assert_equal_to_definition(inputs, backend="chunkwise")
    assert_equal_to_definition(inputs, resets=make_resets(5, 64, 3, 40), backend="chunkwise")


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
@pytest.mark.parametrize("largest_rise", [-1.0, 40.0])
def test_one_stabilizer_a_segment_serves_as_well_as_one_a_step(
    largest_rise: float, input_gate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, with exponents as far apart as the shared stabilizer is used for."""
    monkeypatch.setattr(gates, "LARGEST_RISE", largest_rise)
    inputs = make_inputs(T=128, K=16, V=16, dtype=torch.float32, gate_spread=0.1)
    with torch.no_grad():
        if input_gate == "exp":
            inputs["i"] += torch.linspace(-19.0, 19.0, 64).repeat(2)[:, None]
            inputs["f"] += 5.0
        else:
            inputs["f"] -= 2.15  # 64 steps of it make exp(-39)
    resets = make_resets(1, 128, 64).expand(2, -1)
    h = run(inputs, input_gate=input_gate, resets=resets)[0]
    exact = {name: x.detach().double() for name, x in inputs.items()}
    expected = run(exact, input_gate=input_gate, resets=resets, backend="recurrence")[0]
    error = (h - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 1e-3  # where the normalizer nearly vanishes, as for the recurrence in float32
    assert error.median() < 3e-6
    assert_equal_to_definition(inputs, rtol=1e-3, input_gate=input_gate, resets=resets, backend="chunkwise")
