"""The model of memory: held to the live tensors of real steps, and used to refuse a run that cannot fit on its GPU."""

from __future__ import annotations

import json

import pytest
import torch

from tests.training.memory_steps import LENGTH, compare
from tests.training.processes import run_alone, run_ranks
from tests.training.test_memory import run_of
from xlstm_lm.base.machine import memory_bytes
from xlstm_lm.parallel.process_group import World, join_world
from xlstm_lm.training import loop, memory, memory_check, out_of_memory
from xlstm_lm.training.layout import Layout
from xlstm_lm.training.memory import elements_of, rank_layout
from xlstm_lm.training.memory_model import RankLayout, activation_bytes, divided_bytes, memory_plan

ROWS = Layout(rows=4, micro_batches=1, stage=1)
GPU = World(rank=0, size=1, local_rank=0, device=torch.device("cuda", 0))


def check(output: str) -> None:
    """Every case of `memory_steps` is within 10 %."""
    for case, found in json.loads(output.splitlines()[-1]).items():
        assert found["parameters"] > 20e6
        assert found["planned"] == pytest.approx(found["live"], rel=0.1), (case, found)


def test_a_step_needs_what_is_planned():
    case = "1:fp32:xlstm:1:1:0"
    check(json.dumps({case: compare(join_world(), case)}))


@pytest.mark.slow
def test_steps_of_one_process_need_what_is_planned():
    families = [f"0:fp32:{family}:4:1:{checkpointing}" for family in ("xlstm", "transformer") for checkpointing in "01"]
    stages = [
        "1:fp32:xlstm:2:1:0",
        "2:fp32:xlstm:2:1:0",
        "1:bf16:xlstm:1:1:0",
        "2:bf16:xlstm:2:1:0",
        "3:fp32:xlstm:2:1:0",
    ]
    check(run_alone("memory_steps", "0:fp32:mamba:4:1:0", *families, *stages))


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_steps_of_two_processes_need_what_is_planned_at_every_stage(stage):
    cases = [f"{stage}:fp32:xlstm:2:1:0", f"{stage}:{'bf16' if stage else 'fp32'}:xlstm:2:2:1"]
    check(run_ranks(2, "memory_steps", *cases))


def layout(**changes) -> RankLayout:
    given = {
        "stage": 2,
        "processes": 8,
        "precision": "bf16",
        "rows": 2,
        "micro_batches": 1,
        "context_length": LENGTH,
        "checkpointing": False,
        "device": "cuda",
        "zero": {"reduce_bucket_size": 1000},
    }
    return RankLayout(**given | changes)


@pytest.mark.parametrize(
    ("stage", "expected"), [(0, (2, 0, 8)), (1, (2, 0.5, 1)), (2, (2, 0.5, 1)), (3, (0.25, 0.5, 1))]
)
def test_zero_divides_what_its_stage_names(stage, expected):
    found = divided_bytes(8000, 16000, "bf16", stage, 8)
    assert tuple(value / 8000 for value in found.values()) == expected


def test_the_update_at_stage_2_has_a_float32_gradient_of_the_ranks_share():
    run = run_of()
    elements = elements_of(run)
    found = memory_plan(run.model, elements, layout(stage=2)).phases["update"]
    assert found["gradients"] == 4 * elements.parameters // 8


def test_offloaded_items_are_on_the_host():
    run = run_of()
    there = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}, "stage": 3}
    plan = memory_plan(run.model, elements_of(run), layout(stage=3, zero=there))
    assert set(plan.host) == {"weights", "master weights", "moments"}
    assert not set(plan.host) & set(plan.held)
    assert sum(plan.host.values()) == sum(divided_bytes(*sizes(run), "bf16", 3, 8).values())


def sizes(run) -> tuple[int, int]:
    elements = elements_of(run)
    return elements.parameters, elements.state


def test_checkpointing_keeps_the_blocks_inputs_and_one_block():
    model = run_of(model__num_blocks=10).model
    whole, less = (activation_bytes(model, layout(checkpointing=each)) for each in (False, True))
    inputs = 2 * LENGTH * 11 * 768 * 2
    assert less == pytest.approx(inputs + whole / 10, rel=1e-6)


def test_twice_the_rows_are_twice_the_activations():
    model = run_of().model
    assert activation_bytes(model, layout(rows=4)) == 2 * activation_bytes(model, layout(rows=2))


def test_states_are_held_where_the_run_carries_them():
    run = run_of()
    without, carrying = (
        memory_plan(run.model, elements_of(run), layout(micro_batches=3, carries_state=each)) for each in (False, True)
    )
    assert "states" not in without.held
    assert carrying.held["states"] == 2 * 3 * run.model.state_bytes(2, LENGTH)


@pytest.fixture
def gpu_of(monkeypatch):
    """Give the GPU that a test names a size, in GiB; the host keeps its own."""

    def give(gigabytes: float) -> None:
        def size(device: torch.device) -> int:
            return int(gigabytes * 2**30) if device.type == "cuda" else memory_bytes(device)

        for module in (memory, memory_check, out_of_memory):
            monkeypatch.setattr(module, "memory_bytes", size)

    return give


def test_a_run_that_cannot_fit_on_its_gpu_is_refused_with_the_plans_numbers(gpu_of, monkeypatch, tmp_path):
    run = run_of(
        training__micro_batch_size=4,
        data__global_batch_size=4,
        data__context_length=8192,
        training__run_dir=str(tmp_path / "run"),
        training__precision="bf16",
    )
    monkeypatch.setattr(loop, "join_world", lambda: GPU)
    monkeypatch.setattr(loop, "Trainer", lambda *_: pytest.fail("the run was built"))
    planned = memory_plan(run.model, elements_of(run), rank_layout(run, 1, "bf16", ROWS, "cuda"))
    gpu_of(planned.peak / 2**30 / 1.2)
    with pytest.raises(ValueError) as refused:
        loop.train(run)
    message = str(refused.value)
    assert message.startswith(f"By its plan the run needs {planned.peak / 2**30:,.1f} GiB on each GPU (weights 0.3, ")
    assert f"activations {planned.items['activations'] / 2**30:,.1f}" in message
    assert "Change, the most useful first: training.activation_checkpointing true" in message
    assert not (tmp_path / "run").exists()


def test_a_run_that_may_fit_is_warned_of_and_one_that_fits_is_not(gpu_of, caplog):
    run = run_of(training__micro_batch_size=4, data__global_batch_size=4, data__context_length=8192)
    planned = memory_plan(run.model, elements_of(run), rank_layout(run, 1, "bf16", ROWS, "cuda"))
    gpu_of(planned.peak / 2**30 / 1.05)
    memory_check.check_run_memory(run, GPU, "bf16", ROWS)
    assert "The run may not fit. By its plan" in caplog.text
    caplog.clear()
    gpu_of(planned.peak / 2**30 * 1.05)
    memory_check.check_run_memory(run, GPU, "bf16", ROWS)
    assert not caplog.text
