"""DeepSpeed computes what a plain PyTorch loop computes, at every ZeRO stage, in one process and in two."""

from __future__ import annotations

import json

import pytest
import torch

from tests.training.equivalence import batches, build_engine, compare, compare_with_faults, engine_step
from tests.training.processes import run_ranks
from tests.training.tiny import VOCABULARY, TinyModel
from xlstm_lm.parallel.process_group import join_world
from xlstm_lm.training.deepspeed_config import choose_precision
from xlstm_lm.training.engine import TrainingEngine, TrainingModule
from xlstm_lm.training.optimizer import AdamWConfig

TOLERANCE = 2e-6


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_equal_a_plain_loop(stage, tied):
    for name, difference in compare(join_world(), stage, tied).items():
        assert difference < TOLERANCE, name


@pytest.mark.parametrize("stage", [2, 3])
def test_steps_equal_a_plain_loop_with_offload(stage):
    for name, difference in compare(join_world(), stage, tied=False, offload=True).items():
        assert difference < TOLERANCE, name


@pytest.mark.parametrize("fault", ["loss", "gradient"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_changes_nothing(stage, fault):
    for name, difference in compare_with_faults(join_world(), stage, fault).items():
        assert difference < TOLERANCE, name


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_weights_that_are_not_finite_are_found(stage, precision):
    world = join_world()
    _, engine = build_engine(world, stage, precision=precision)
    assert engine.weights_are_finite()
    engine_step(world, engine, batches()[0], 0)
    assert engine.weights_are_finite()
    weights = {name: value.clone() for name, value in engine.state.weights()}
    weights["up.bias"][-1] = torch.inf
    engine.state.load(lambda name, start, stop: weights[name].flatten()[start:stop], None, 1)
    assert not engine.weights_are_finite()
    engine.close()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"zero_optimization": {"stage": 1, "prefetch_bucket_size": 6, "stage3_prefetch_bucket_size": 5}}, "prefetch"),
        (
            {"zero_optimization": {"stage": 2}, "gradient_predivide_factor": 3.0, "prescale_gradients": True},
            "predivide",
        ),
    ],
)
def test_what_deepspeed_refuses_is_one_message(section, message):
    arguments = {"world": join_world(), "precision": "fp32", "micro_batch_size": 2, "accumulation_steps": 1}
    with pytest.raises(ValueError, match=f"^DeepSpeed refuses the section deepspeed: .*{message}.* remove") as refused:
        TrainingEngine(TinyModel(), AdamWConfig(), section, **arguments)
    assert "\n" not in str(refused.value)


def test_two_processes_equal_a_plain_loop(tmp_path):
    run_ranks(2, "equivalence", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report) == 14
    for case, differences in report.items():
        for name, difference in differences.items():
            assert difference < TOLERANCE, (case, name)


MATRIX = [
    *(f"{stage}-fp32" for stage in range(4)),
    *(f"{stage}-bf16" for stage in (1, 2, 3)),
    "3-fp32-checkpointing",
    "3-bf16-checkpointing",
]
ROUNDING = {
    # Float32 sums in another order; weights in units of the learning rate.
    "fp32": {"loss": 2e-6, "norm": 5e-6, "weights": 1e-3},
    # Activations and gradients of a micro batch in bf16, with 8 bits; three steps move a weight by up to three rates.
    "bf16": {"loss": 2e-3, "norm": 1e-2, "weights": 0.5},
}
"""Largest differences of a hybrid's three steps from a plain loop in float32."""


def check_matrix(ranks: int, cells: list[str]) -> None:
    found = json.loads(run_ranks(ranks, "matrix", *cells).splitlines()[-1])
    assert list(found) == cells
    for cell, differences in found.items():
        for name, difference in differences.items():
            assert difference < ROUNDING[cell.split("-")[1]][name], (cell, name)


def test_a_hybrid_of_recurrent_blocks_equals_a_plain_loop_on_two_ranks():
    check_matrix(2, ["3-bf16-checkpointing"])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_whole_matrix_equals_a_plain_loop(ranks):
    check_matrix(ranks, MATRIX)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "sequence"), [(2, 2), (4, 2), (4, 4)])
def test_divided_rows_equal_a_plain_loop_at_every_stage(ranks, sequence):
    """With buckets so small that ZeRO reduces gradients between the exchanges of a backward pass."""
    kept = [f"{stage}-fp32-kept-{sequence}" for stage in range(4)]
    check_matrix(ranks, [*kept, f"2-fp32-checkpointing-{sequence}", f"3-bf16-checkpointing-{sequence}"])


@pytest.mark.slow
def test_gradients_of_a_bf16_run_are_summed_in_float32_unless_the_recipe_says_otherwise():
    found = json.loads(run_ranks(2, "reducing").splitlines()[-1])
    for stage in (1, 2, 3):
        assert found[f"stage {stage}, default"] == ["torch.float32"]
        assert found[f"stage {stage}, bf16"] == ["torch.bfloat16"]


def test_the_z_loss_is_part_of_the_training_loss_alone():
    tokens_BT = torch.randint(0, VOCABULARY, (2, 5))
    plain, module = TrainingModule(TinyModel()), TrainingModule(TinyModel(), z_loss=0.1)
    plain.model.load_state_dict(module.model.state_dict())
    arguments = (tokens_BT, tokens_BT, torch.zeros(2, 5, dtype=torch.bool))
    logits_BTV = module.model.head(module.model(tokens_BT))
    penalty = 0.1 * logits_BTV.logsumexp(-1).square().sum()
    torch.testing.assert_close(module(*arguments), plain(*arguments) + penalty)
    torch.testing.assert_close(module.eval()(*arguments), plain(*arguments))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bf16_keeps_float32_weights_and_moments(stage):
    """Updates far below bf16's resolution add up, and training goes as in float32 but for rounding."""
    world = join_world()
    losses = {}
    for precision in ("fp32", "bf16"):
        model, engine = build_engine(world, stage, precision=precision)
        before = {name: value.clone() for name, value in engine.state.weights()}
        assert engine.stage == (1 if precision == "bf16" and stage == 0 else stage)
        losses[precision] = [engine_step(world, engine, batch, 1)[1] for batch in batches()]
        weights = dict(engine.state.weights())
        assert any((value != value.bfloat16()).any() for value in weights.values())
        assert all((weights[name] != before[name]).any() for name in weights)
        if precision == "bf16":
            assert next(model.parameters()).dtype == torch.bfloat16
        engine.close()
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


@pytest.mark.parametrize("stage", [0, 3])
def test_activation_checkpointing_changes_nothing(stage):
    world = join_world()
    losses = []
    for checkpointing in (False, True):
        model, engine = build_engine(world, stage)
        model.activation_checkpointing = checkpointing
        losses.append([engine_step(world, engine, batch, step)[1] for step, batch in enumerate(batches())])
        engine.close()
    assert losses[0] == losses[1]


@pytest.mark.parametrize("stage", [1, 3])
def test_weights_before_the_first_step_are_the_models(stage):
    """Setting up an optimizer must not step it: no decay, no step counted."""
    _, engine = build_engine(join_world(), stage)
    torch.manual_seed(0)
    expected = dict(TinyModel().named_parameters())
    for name, value in engine.state.weights():
        assert torch.equal(value, expected[name])
    assert all(not value.any() for _, value in engine.state.moments())
    assert engine.optimizer_steps == 0
    engine.close()


def test_half_of_a_launchers_variables_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2 but .*MASTER_ADDR.* is not set: start .* torchrun"):
        join_world()


def test_precision_is_taken_from_the_device(monkeypatch):
    device = torch.device("cpu")
    assert choose_precision("bf16", device) == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert choose_precision("auto", device) == "bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert choose_precision("auto", device) == "fp32"
