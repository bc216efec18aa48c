"""Muon orthogonalizes matrices as published, at every ZeRO stage that can hold it, and continues exactly."""

from __future__ import annotations

import json

import pytest
import torch

from tests.training import runs
from tests.training.equivalence import compare, compare_with_faults
from tests.training.layouts import continued_run, whole_run
from tests.training.muon_layouts import OPTIMIZER, STACKED
from tests.training.processes import run_ranks
from xlstm_lm.models import build_model
from xlstm_lm.parallel.process_group import World, join_world
from xlstm_lm.training import memory
from xlstm_lm.training.loop import train
from xlstm_lm.training.memory import check_memory, planned_shapes
from xlstm_lm.training.optimizer.config import build_optimizer, parameter_groups
from xlstm_lm.training.optimizer.muon import COEFFICIENTS, Muon, MuonConfig, flat_update, matrix_update, orthogonalized
from xlstm_lm.training.run_config import load_run_config

TOLERANCE = 2e-6


@pytest.fixture
def folder(tmp_path):
    runs.write_text(tmp_path)
    return tmp_path


@pytest.mark.parametrize("shape", [(7, 7), (4, 9), (9, 4), (3, 5, 6), (2, 3, 6, 5)])
def test_the_polynomial_acts_on_the_singular_values_alone(shape):
    matrices = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        s = sum(coefficient * s**power for coefficient, power in zip(COEFFICIENTS, (1, 3, 5), strict=True))
    torch.testing.assert_close(orthogonalized(matrices, 5), u @ torch.diag_embed(s) @ v)
    assert s.max() < 1.3


def test_a_step_is_that_of_torchs_muon():
    """torch iterates in bfloat16: the direction agrees to its precision, momentum and decay to float32's."""
    config = MuonConfig(learning_rate=0.1, weight_decay=0.2)
    for shape in ((12, 20), (20, 12), (16, 16)):
        weights = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        ours, theirs = (torch.nn.Parameter(weights.clone()) for _ in range(2))
        muon = build_optimizer(config, [("up.weight", ours)], set())
        oracle = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
        muon.param_groups[0]["lr"] = 0.1
        generator = torch.Generator().manual_seed(2)
        for _ in range(3):
            ours.grad = torch.randn(shape, generator=generator)
            theirs.grad = ours.grad.clone()
            muon.step()
            oracle.step()
        torch.testing.assert_close(
            muon.state[ours]["momentum_buffer"], oracle.state[theirs]["momentum_buffer"], rtol=1e-6, atol=1e-6
        )
        assert (ours - theirs).norm() < 0.02 * (ours - weights).norm()


def test_matrices_of_blocks_are_muons_and_the_rest_is_adamws():
    overrides = {"model.num_blocks": 3, "model.pattern": ["mlstm", "slstm", "mlstm_paper"]}
    run = load_run_config([], {"model": {}, "data": {}, "optimizer.kind": "muon", **overrides})
    with torch.device("meta"):
        model = build_model(run.model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    matrices, decayed, kept = parameter_groups(run.optimizer, shapes, model.no_decay_parameter_names())
    assert set(decayed.names) == {"head.weight", "blocks.1.mixer.conv.weight", "blocks.2.mixer.conv.weight"}
    assert {"embedding.weight", "blocks.1.mixer.bias", "blocks.0.mixer.gates.bias"} <= set(kept.names)
    stacked = {name.split(".", 2)[2] for name in matrices.names if len(shapes[name]) > 2}
    names = {"mixer.input_weight", "mixer.recurrent_weight", "mixer.query.weight", "mixer.key.weight"}
    assert stacked == names | {"mixer.value.weight"}
    moments = planned_shapes(run)[1]
    assert f"{matrices.names[0]}.momentum_buffer" in moments and "head.weight.exp_avg_sq" in moments
    assert len(moments) == len(matrices.names) + 2 * len(decayed.names) + 2 * len(kept.names)


@pytest.mark.parametrize(("stage", "offload"), [(0, False), (1, False), (2, False), (2, True)])
def test_steps_equal_a_plain_loop(stage, offload):
    for name, difference in compare(join_world(), stage, False, offload, **STACKED).items():
        assert difference < TOLERANCE, name


@pytest.mark.parametrize("stage", [0, 1])
def test_a_step_that_is_not_finite_changes_nothing(stage):
    for name, difference in compare_with_faults(join_world(), stage, "loss", OPTIMIZER).items():
        assert difference < TOLERANCE, name


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16")])
def test_same_layout_continues_to_the_last_digit(stage, precision, tmp_path):
    world = join_world()
    expected = whole_run(world, stage, tmp_path, precision, **STACKED)
    assert continued_run(world, stage, tmp_path, precision, **STACKED) == expected


def test_two_processes_compute_and_continue_what_one_does(tmp_path):
    single = whole_run(join_world(), 0, tmp_path / "single", **STACKED)
    run_ranks(2, "muon_layouts", tmp_path)
    report, differences, flat = json.loads((tmp_path / "report.json").read_text())
    assert flat < TOLERANCE
    for case, found in differences.items():
        for name, difference in found.items():
            assert difference < TOLERANCE, (case, name)
    assert len(report) == 3 + 3 * 3
    for case, losses in report.items():
        assert losses == pytest.approx(single, abs=1e-5), case
    for stage in range(3):
        assert report[f"pair{stage} at {stage}"] == report[f"whole {stage}"]
        assert continued_run(join_world(), stage, tmp_path / "pair1", **STACKED) == pytest.approx(single, abs=1e-5)


def test_a_run_learns_and_another_optimizer_does_not_continue_it(folder):
    train(runs.configure(folder, optimizer__kind="muon", training__steps=30))
    losses = [record["loss"] for record in runs.records(folder / "run") if record["split"] == "train"]
    assert sum(losses[-5:]) < sum(losses[:5]) - 5
    branch = {"training__run_dir": str(folder / "branch"), "training__resume": str(folder / "run")}
    with pytest.raises(ValueError, match=r"optimizer.kind 'muon' there, 'adamw' now"):
        train(runs.configure(folder, **branch))
    with pytest.raises(ValueError, match=r"optimizer.kind: 'muon' there, 'adamw' now"):
        train(runs.configure(folder))


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 3}, r"optimizer.kind = 'muon' cannot be used at .*stage 3, .*: choose a stage up to 2, or another"),
    ],
)
def test_layouts_that_cannot_hold_it_are_refused_before_any_work(zero, message, folder):
    with pytest.raises(ValueError, match=message):
        train(runs.configure(folder, optimizer__kind="muon", deepspeed={"zero_optimization": zero}))
    assert not (folder / "run").exists()


def test_its_state_is_counted(monkeypatch):
    run = load_run_config([], {"model.num_blocks": 2, "data": {}, "optimizer.kind": "muon"})
    shapes, moments = planned_shapes(run)
    parameters, state = (sum(shape.numel() for shape in each.values()) for each in (shapes, moments))
    assert parameters < state < 2 * parameters
    tokens = run.data.context_length
    needed = 4 * (2 * parameters + state) + tokens * 768 * 4 * 3 + 17 * run.data.global_batch_size * tokens
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    monkeypatch.setattr(memory, "memory_bytes", lambda device: needed)
    check_memory(run, world, "fp32", micro_batch_size=1)
    monkeypatch.setattr(memory, "memory_bytes", lambda device: needed - 1)
    with pytest.raises(ValueError, match="needs at least"):
        check_memory(run, world, "fp32", micro_batch_size=1)


def test_only_matrices_that_a_partition_cuts_are_sent(monkeypatch):
    """Partitions of 12: a matrix that fills one, one that reaches an element into the next, one short of its end."""
    shapes = [torch.Size(shape) for shape in ((3, 4), (1, 13), (2, 5), (3, 3))]
    matrices = [torch.randn(shape, generator=torch.Generator().manual_seed(4)) for shape in shapes]
    whole = torch.cat([*(each.flatten() for each in matrices), torch.zeros(4)])
    expected = torch.cat([*(matrix_update(each, 5).flatten() for each in matrices), torch.zeros(4)])
    for rank in range(4):
        sent = []

        def all_reduce(matrix, sent=sent):
            sent.append(matrix.numel())
            matrix.copy_(next(each.flatten() for each in matrices if each.numel() == matrix.numel()))

        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        own = slice(12 * rank, 12 * (rank + 1))
        torch.testing.assert_close(flat_update(whole[own], shapes, 5), expected[own])
        assert sent == [13, 9]


def test_parameters_without_a_gradient_stay():
    weight = torch.nn.Parameter(torch.ones(3, 3))
    muon = build_optimizer(OPTIMIZER, [("up.weight", weight)], set())
    assert isinstance(muon, Muon)
    muon.param_groups[0]["lr"] = 1.0
    muon.step()
    assert torch.equal(weight, torch.ones(3, 3)) and not muon.state[weight]
