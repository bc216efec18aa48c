"""The gated delta rule: fast forms against the recurrence, the recurrence against transformers', states and resets."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from xlstm_lm.ops.gated_delta import gated_delta
from xlstm_lm.ops.gated_delta.chunkwise import gated_delta_chunkwise
from xlstm_lm.ops.gated_delta.slice_effect import gated_delta_slice_effect
from xlstm_lm.ops.selfcheck import compare
from xlstm_lm.ops.slices import delta_effect

FAST = ("chunkwise", "compiled")  # the backends that are made for training


def make_inputs(B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q, k, v, log decays, write strengths and a state; k has a length of 1."""
    torch.manual_seed(T)
    q, k, v = (torch.randn(B, T, H, width) for width in (K, K, V))
    decay, beta = torch.randn(B, T, H), torch.randn(B, T, H)
    state = torch.randn(B, H, K, V)
    inputs = [q, F.normalize(k, dim=-1), v, -F.softplus(2 * decay), beta.sigmoid(), state]
    return [each.to(dtype) for each in inputs]


def run(*inputs: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    *inputs, state = inputs
    return gated_delta(*inputs, initial_state=state, return_state=True, **options)


@pytest.mark.parametrize(
    ("T", "K", "V", "chunk_length"), [(1, 4, 3, 8), (7, 5, 9, 8), (16, 8, 16, 8), (37, 3, 5, 1), (130, 24, 17, 64)]
)
@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("backend", FAST)
def test_the_fast_forms_equal_the_recurrence(backend, T, K, V, chunk_length, with_resets):
    inputs = make_inputs(2, T, 3, K, V)
    resets = torch.rand(2, T) < 0.2 if with_resets else None
    ours, definition = (
        functools.partial(run, resets=resets, chunk_length=chunk_length, backend=name)
        for name in (backend, "recurrence")
    )
    assert compare(ours, definition, inputs) < 1e-11
    assert compare(ours, definition, [each.float() for each in inputs]) < 1e-4
    assert compare(ours, definition, [each.bfloat16() for each in inputs]) < 5e-2


def effect(*inputs: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    columns, (kept,) = delta_effect(*inputs, **options)
    return columns, kept


@pytest.mark.parametrize(
    ("T", "K", "V", "chunk_length"), [(1, 4, 3, 8), (7, 5, 9, 8), (16, 8, 16, 8), (37, 3, 5, 1), (130, 24, 17, None)]
)
@pytest.mark.parametrize("share_of_resets", [None, 0.02, 0.2])
@pytest.mark.parametrize("backend", FAST)
def test_the_effect_of_a_slice_equals_that_of_the_recurrence(backend, T, K, V, chunk_length, share_of_resets):
    _, *inputs, _ = make_inputs(2, T, 3, K, V)
    inputs[2] *= 0.05  # after faster decays, float32 would have nothing left of the state before
    resets = None if share_of_resets is None else torch.rand(2, T) < share_of_resets
    ours, definition = (
        functools.partial(effect, resets_BT=resets, chunk_length=chunk_length, backend=name)
        for name in (backend, "recurrence")
    )
    assert compare(ours, definition, inputs) < 1e-11
    assert compare(ours, definition, [each.float() for each in inputs]) < 1e-4
    assert compare(ours, definition, [each.bfloat16() for each in inputs]) < 5e-2


def test_the_effect_of_a_slice_with_a_reset_has_no_part_of_the_state_before():
    _, *inputs, _ = make_inputs(1, 20, 2, 4, 3)
    resets = torch.zeros(1, 20, dtype=torch.bool)
    resets[0, 9] = True
    assert effect(*inputs, resets_BT=resets, chunk_length=8, backend="chunkwise")[1].eq(0).all()


def test_the_recurrence_equals_that_of_transformers():
    q, k, v, log_decay, beta, state = make_inputs(2, 23, 3, 8, 5, torch.float32)
    h, last = run(q, k, v, log_decay, beta, state, backend="recurrence")
    theirs = torch_recurrent_gated_delta_rule(
        q, k, v, log_decay, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=False
    )
    torch.testing.assert_close(h, theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, theirs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [*FAST, "recurrence"])
def test_two_calls_equal_one_and_documents_equal_themselves_alone(backend):
    *inputs, state = make_inputs(2, 41, 2, 6, 4)
    call = functools.partial(gated_delta, return_state=True, chunk_length=8, backend=backend)
    h, last = call(*inputs, initial_state=state)
    first, middle = call(*(each[:, :19] for each in inputs), initial_state=state)
    second, end = call(*(each[:, 19:] for each in inputs), initial_state=middle)
    torch.testing.assert_close(torch.cat((first, second), 1), h)
    torch.testing.assert_close(end, last)
    resets = torch.zeros(2, 41, dtype=torch.bool)
    resets[:, 19] = True
    packed, packed_last = call(*inputs, initial_state=state, resets=resets)
    alone, alone_last = call(*(each[:, 19:] for each in inputs))
    torch.testing.assert_close(packed, torch.cat((first, alone), 1))
    torch.testing.assert_close(packed_last, alone_last)


@pytest.mark.parametrize("backend", FAST)
def test_a_long_memory_and_none_at_all_stay_finite(backend):
    *inputs, state = make_inputs(1, 200, 2, 8, 8, torch.float32)
    for log_decay in (0.0, -1e-6, -80.0, -1e4):
        inputs[3] = torch.full_like(inputs[3], log_decay)
        ours, definition = (functools.partial(run, backend=name) for name in (backend, "recurrence"))
        forgets = log_decay < -1  # whose own gradient is nothing but rounding then
        assert compare(ours, definition, [*inputs, state], gradients=not forgets) < 1e-4
        leaves = [each.detach().requires_grad_() for each in (*inputs, state)]
        assert all(each.isfinite().all() for each in torch.autograd.grad(ours(*leaves)[0].sum(), leaves))


def test_each_is_one_operator():
    """Trace each in one chunk, because every further one takes seconds."""
    *inputs, state = make_inputs(1, 20, 2, 4, 3, torch.float32)
    leaves = [each.requires_grad_() for each in inputs]
    resets = torch.zeros(1, 20, dtype=torch.bool)
    torch.library.opcheck(gated_delta_chunkwise.operator, (*leaves, resets, state.requires_grad_(), 20))
    torch.library.opcheck(gated_delta_slice_effect.operator, (*leaves[1:], resets, 20))


def test_strided_inputs_and_any_number_of_threads_give_the_compiled_form_the_same_result():
    *inputs, state = make_inputs(3, 70, 2, 6, 11, torch.float32)
    packed = torch.cat([each.flatten(2) for each in inputs], dim=-1)
    strided = [
        part.unflatten(-1, each.shape[2:])
        for part, each in zip(packed.split([each.flatten(2).shape[-1] for each in inputs], dim=-1), inputs, strict=True)
    ]
    resets = (torch.rand(70, 3) < 0.1).T
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(*strided, state.mT.contiguous().mT, resets=resets, backend="compiled"))
    finally:
        torch.set_num_threads(before)
    expected = run(*inputs, state, resets=resets.contiguous(), backend="compiled")
    assert all(torch.equal(each, of) for result in results for each, of in zip(result, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 3, 2, 5)}, r"k must be \(1, 3, 2, 4\)"),
        ({"beta": torch.zeros(1, 3)}, r"beta must be \(1, 3, 2\)"),
        ({"resets": torch.zeros(1, 3)}, "resets must be bool"),
        ({"initial_state": torch.zeros(1, 2, 4, 5)}, r"initial_state must be \(1, 2, 4, 6\)"),
        ({"chunk_length": 0}, "chunk_length must be at least 1"),
        ({"backend": "mine"}, "unknown gated_delta backend 'mine'"),
        ({"q": torch.zeros(1, 0, 2, 4)}, "at least one step"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    q, v, gate = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2, 6), torch.zeros(1, 3, 2)
    arguments = {"q": q, "k": q, "v": v, "log_decay": gate, "beta": gate} | change
    with pytest.raises(ValueError, match=message):
        gated_delta(**arguments)
