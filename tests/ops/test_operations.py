"""Every operation: its table, its samples, its cost, its choice, and that the one check finds what is wrong."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from tests.ops.stand_ins import replace_backend
from xlstm_lm.ops.backend import make_call
from xlstm_lm.ops.mlstm import MLSTM
from xlstm_lm.ops.mlstm.chunkwise import mlstm_chunkwise
from xlstm_lm.ops.operation import choose, refuse, verify, why_impossible
from xlstm_lm.ops.operations import OPERATIONS

pytestmark = pytest.mark.usefixtures("fresh_choices")
CPU = torch.device("cpu")
each_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
BACKENDS = [
    pytest.param(operation, backend.name, id=f"{operation.name}-{backend.name}")
    for operation in OPERATIONS.values()
    for backend in operation.backends
    if "cpu" in (backend.devices or ("cpu",))
]
COSTS = {
    "mlstm": {"B": 1, "T": 8, "H": 2, "K": 4, "V": 8},
    "slstm": {"B": 1, "T": 8, "H": 2, "D": 4},
    "convolution": {"B": 1, "T": 8, "D": 4, "W": 4},
    "selective scan": {"B": 1, "T": 8, "E": 4, "N": 4},
    "ssd": {"B": 1, "T": 8, "H": 2, "P": 4, "N": 4},
    "gated_delta": {"B": 1, "T": 8, "H": 2, "K": 4, "V": 8},
    "attention": {"B": 1, "T": 8, "H": 2, "K": 4},
    "loss": {"B": 1, "T": 8, "D": 4, "V": 32},
}
COUNTED = {
    # Six tokens: sizes, FLOPs, bytes of 16-bit numbers (gates and logits have 4).
    "mlstm": ({"H": 5, "K": 7, "V": 11, "L": 2}, 6 * 5 * (2 * 18 + 4 * 77 + 4 * 2 + 4 * 7), 30 * (2 * 36 + 8)),
    "slstm": ({"H": 5, "D": 7}, 30 * (8 * 49 + 140), 30 * 10 * 7 + 10 * (4 * 49 + 28)),
    "convolution": ({"D": 5, "W": 4}, 240, 2 * (30 + 30 + 20)),
    "selective scan": ({"E": 5, "N": 7}, 9 * 210, 6 * 2 * 29),
    "ssd": ({"H": 5, "P": 7, "N": 11, "L": 2}, 6 * 5 * (2 * 18 + 4 * 77 + 4 * 2), 6 * (2 * 92 + 20)),
    "gated_delta": ({"H": 5, "K": 7, "V": 11, "L": 2}, 30 * (2 * 43 + 6 * 77 + 12), 30 * (2 * 36 + 8)),
    "attention": ({"H": 5, "K": 7}, 2 * 5 * 28 * 4.5, 2 * 6 * 4 * 35),
    "loss": ({"D": 5, "V": 7}, 420, 2 * (30 + 35) + 4 * 42),
}


def example(operation, dtype=torch.float32):
    return make_call(CPU, dtype, operation.examples[0], operation.options)


@each_operation
def test_the_reference_is_last_and_runs_everywhere(operation):
    reference = operation.backends[-1]
    assert operation.reference == reference.name
    assert reference.devices is reference.dtypes is reference.package is reference.limits is None
    assert reference.gradients and not reference.native


@each_operation
def test_samples_are_the_same_for_one_seed(operation):
    def samples():
        torch.manual_seed(0)
        return [sample.inputs for sample in operation.samples(example(operation), operation.backends[-2].name)]

    torch.testing.assert_close(samples(), samples(), rtol=0, atol=0)


@each_operation
def test_the_cost_doubles_with_the_rows(operation):
    sizes = COSTS[operation.name]
    one, two = operation.cost(**sizes), operation.cost(**{**sizes, "B": 2})
    assert one.flops > 0 and two.flops == 2 * one.flops
    assert one.moved_bytes < two.moved_bytes <= 2 * one.moved_bytes


@each_operation
def test_costs_are_those_counted_by_hand(operation):
    sizes, flops, moved_bytes = COUNTED[operation.name]
    assert operation.cost(B=2, T=3, **sizes) == (flops, moved_bytes)


@each_operation
def test_a_missing_package_of_a_backend_is_named(operation, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    call = make_call(torch.device("cuda", 0), torch.bfloat16, operation.examples[0], operation.options)
    for backend in operation.backends:
        if backend.package is not None:
            reason = why_impossible(operation, backend, call)
            assert f"{backend.package} is not installed" in reason.lower()


@each_operation
def test_a_cpu_has_a_backend_where_triton_is_not_installed(operation, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    monkeypatch.setitem(sys.modules, "triton", None)  # an import fails
    backends = {each.name: each for each in operation.backends}
    assert backends[choose(operation, example(operation)).backend].package != "triton"


@pytest.mark.parametrize(("operation", "backend"), BACKENDS)
def test_every_backend_for_a_cpu_is_right(operation, backend):
    assert verify(operation, backend, example(operation)) is None


@each_operation
def test_a_choice_gives_a_reason_for_each_backend_passed_over(operation):
    choice = choose(operation, example(operation))
    names = list(operation.names)
    assert [name for name, _ in choice.passed_over] == names[: names.index(choice.backend)]
    assert all(reason for _, reason in choice.passed_over)


@each_operation
def test_a_backend_that_is_wrong_is_found(operation, monkeypatch):
    on_cpu = [each for each in operation.backends[:-1] if "cpu" in (each.devices or ("cpu",)) and each.gradients]
    backend = on_cpu[0]
    right = backend.load()

    def wrong(*inputs, **options):
        result = right(*inputs, **options)
        return (1.01 * result[0], *result[1:]) if isinstance(result, tuple) else 1.01 * result

    replace_backend(monkeypatch, operation, backend.name, wrong, arguments={})
    assert "its values or gradients are wrong (error" in verify(operation, backend.name, example(operation))


@pytest.mark.parametrize("right_chunks", [3, 17])
def test_a_miscompiled_software_pipeline_is_not_chosen(right_chunks, monkeypatch):
    """Wrong from the fourth chunk of 32 steps on, later than a short check reaches; or where no sample reaches."""

    def miscompiled(*inputs, super_chunk=None, **options):
        h_BTHV, state = mlstm_chunkwise(*inputs, **options)
        later_T = torch.arange(h_BTHV.shape[1]) >= 32 * right_chunks
        return torch.where(later_T[:, None, None], 1.01 * h_BTHV, h_BTHV), state

    on_a_cpu = {"devices": None, "package": None, "limits": None, "checked_on": ("cpu",)}
    replace_backend(monkeypatch, MLSTM, "triton", miscompiled, **on_a_cpu)
    choice = choose(MLSTM, example(MLSTM))
    assert (choice.backend == "triton") == (right_chunks == 17)
    reason = dict(choice.passed_over).get("triton", "")
    assert ("its values or gradients are wrong (error" in reason) == (right_chunks == 3)


@each_operation
def test_a_refused_backend_is_not_chosen_for_any_type_nor_where_it_is_named(operation):
    call = example(operation)
    first = choose(operation, call).backend
    refuse(operation, first, call, "another rank found it wrong")
    for other in (call, call._replace(dtype=torch.bfloat16, needs_gradient=False)):
        for backend in ("auto", first):
            choice = choose(operation, other, backend)
            assert choice.backend != first
            assert dict(choice.passed_over)[first] == "another rank found it wrong"


@each_operation
def test_an_unknown_backend_is_refused_with_the_names_that_there_are(operation):
    with pytest.raises(ValueError, match=f"unknown {operation.name} backend 'fast': choose 'auto' or one of '"):
        choose(operation, example(operation), "fast")


def test_a_backend_for_another_device_is_refused_by_name():
    assert why_impossible(MLSTM, MLSTM["triton"], example(MLSTM)) == "it takes GPU tensors, but q is on cpu"
    with pytest.raises(ValueError, match="the mlstm backend 'triton' cannot compute this: it takes GPU tensors"):
        choose(MLSTM, example(MLSTM), "triton")
