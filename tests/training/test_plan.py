"""A plan: arithmetic by hand, traffic and held bytes as in a dry run, advice that helps, and mistakes by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.training.processes import run_alone
from xlstm_lm.cli import main
from xlstm_lm.models.accounting import count_parameters, training_flops_per_token
from xlstm_lm.training.plan import Assumptions, Collective, make_plan
from xlstm_lm.training.plan_page import page
from xlstm_lm.training.run_config import load_run_config

CONFIGS = Path(__file__).parents[2] / "configs" / "train"
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def plan_of(recipe: str, gpus: int, device: str = "h100", assumed: Assumptions | None = None, **overrides):
    run = load_run_config([CONFIGS / recipe], {name.replace("__", "."): value for name, value in overrides.items()})
    return make_plan(run, gpus, device, assumed or Assumptions())


def test_time_and_money_are_flops_over_what_the_gpus_do():
    plan = plan_of("cluster-7b.yaml", 256, assumed=Assumptions(mfu=0.5, price=2.0))
    tokens = 548_000 * 512 * 8192
    assert plan.tokens == tokens
    flops = tokens * training_flops_per_token(plan.run.model, 8192)
    seconds = flops * 4 / 3 / (256 * 0.5 * 989e12)  # the recipe recomputes activations
    assert plan.hours == pytest.approx(seconds / 3600)
    assert plan.gpu_hours == pytest.approx(256 * seconds / 3600)
    assert f"Cost at 2 for a GPU-hour: {2 * 256 * seconds / 3600:,.0f}." in page(plan)
    without = plan_of("cluster-7b.yaml", 256, assumed=Assumptions(mfu=0.5), training__activation_checkpointing=False)
    assert without.hours == pytest.approx(plan.hours * 3 / 4)


def test_a_checkpoint_holds_weights_and_moments_in_float32():
    plan = plan_of("cluster-7b.yaml", 256)
    assert plan.checkpoint_bytes == 12 * count_parameters(plan.run.model)
    assert plan.write_seconds == pytest.approx(plan.checkpoint_bytes / (32 * 2e9))
    assert plan.stall_seconds == pytest.approx(plan.checkpoint_bytes / 256 / 10e9)
    assert plan.restart_seconds == pytest.approx(120 + plan.write_seconds)
    saves = 548_000 / plan.run.training.checkpoint_every
    assert saves == int(saves)
    assert f"({plan.stall_seconds * saves / 3600:.2g} hours in all)" in "\n".join(page(plan))


def test_a_ring_sends_the_tensors_twice_for_an_all_reduce_and_once_for_the_others():
    assert Collective("all-reduce", "float32", 800).sent(4) == 1200
    assert Collective("all-gather", "float32", 800).sent(4) == 600


def test_gradients_are_summed_once_a_step_at_stage_1_and_in_each_micro_batch_at_stage_2():
    N = count_parameters(plan_of("cluster-1.3b.yaml", 32).run.model)
    for stage, times in ((1, 1), (2, 4)):
        plan = plan_of("cluster-1.3b.yaml", 32, deepspeed={"zero_optimization": {"stage": stage}})
        assert plan.layout.micro_batches == 4
        assert [each.bytes for each in plan.collectives] == [times * 4 * N, 2 * N]
    narrow = plan_of("cluster-1.3b.yaml", 32, deepspeed={"communication_data_type": "bf16"})
    assert narrow.collectives[0] == Collective("all-reduce", "bfloat16", 2 * N)


@pytest.mark.slow
def test_traffic_and_held_bytes_are_those_of_a_dry_run():
    for stage, found in json.loads(run_alone("planned_dry_runs").splitlines()[-1]).items():
        counted = {}
        for line in found["lines"]:
            if match := re.match(r" +\d+ (\S+) +(bfloat16|float32) +([\d.,]+) (\w+)$", line):
                kind, dtype, number, unit = match.groups()
                counted[kind, dtype] = float(number.replace(",", "")) * UNITS[unit]
        planned = {(each["kind"], each["dtype"]): each["bytes"] for each in found["collectives"]}
        assert planned == pytest.approx(counted, rel=0.05), stage
        held = next(line for line in found["lines"] if line.startswith("Held after a step"))
        names = {"weights": "step: weights", "master weights": "master weights", "moments": "optimizer state"}
        for name, text in names.items():
            number, unit = re.search(rf"{text} ([\d.,]+) (\w+)", held).groups()
            measured = float(number.replace(",", "")) * UNITS[unit]
            assert found["held"].get(name, 0) == pytest.approx(measured, rel=0.04), (stage, name)


def test_every_stage_is_shown_and_higher_ones_need_less():
    plan = plan_of("cluster-7b.yaml", 256)
    peaks = [choice.memory.peak for choice in plan.choices if choice.checkpointing]
    assert [choice.stage for choice in plan.choices] == [1, 1, 2, 2, 3, 3]  # in bf16 stage 0 is run as stage 1
    assert peaks == sorted(peaks, reverse=True)
    assert plan.configured.fits and (plan.configured.stage, plan.configured.checkpointing) == (2, True)
    assert "The recipe fits." in page(plan)


def test_the_advice_for_a_recipe_that_does_not_fit_makes_it_fit():
    without = {"training__activation_checkpointing": False}
    advice = next(line for line in page(plan_of("cluster-7b.yaml", 256, **without)) if "does not fit" in line)
    assert advice.endswith("Change: training.activation_checkpointing true; or training.micro_batch_size 1.")
    assert plan_of("cluster-7b.yaml", 256).configured.fits
    assert plan_of("cluster-7b.yaml", 256, training__micro_batch_size=1, **without).configured.fits
    small = "\n".join(page(plan_of("cluster-7b.yaml", 1, "rtx 4090")))
    assert "The recipe does not fit. Change: more GPUs at ZeRO 3" in small


def test_an_optimizer_shows_only_the_stages_that_it_works_at():
    plan = plan_of("node-400m.yaml", 8, optimizer__kind="muon")
    assert [choice.memory is None for choice in plan.choices] == [False] * 4 + [True] * 2
    assert "optimizer.kind muon does not work at the other stages." in page(plan)


def test_hub_requests_are_those_of_each_opening_and_of_each_lane():
    plan = plan_of("node-400m.yaml", 8)
    opened = len(plan.run.data.sources) + len(plan.run.data.validation)
    assert plan.hub_requests == 13 * opened + 2 * 256
    assert plan_of("demo.yaml", 1).hub_requests == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8", "--device", "h1000"], "no GPU in the table of devices: choose one of h100 pcie"),
        (["--gpus", "7", "--device", "h100"], "which 7 processes cannot share evenly"),
        (["--gpus", "8", "--device", "h100", "--mfu", "0"], "--mfu"),
        (["--gpus", "8", "--device", "h100", "--price", "-1"], "--price"),
        (["--gpus", "3", "--device", "h100", "--training.sequence_parallel", "2"], "does not divide"),
    ],
)
def test_a_mistake_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--config", str(CONFIGS / "node-400m.yaml"), *arguments])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_command_prints_every_section_and_every_assumption(capsys):
    recipe = str(CONFIGS / "node-400m.yaml")
    main(["plan", "--config", recipe, "--gpus", "8", "--device", "h100", "--price", "2.5", "--training.steps", "1000"])
    out = capsys.readouterr().out
    for beginning in (
        "The run: 1,000 steps",
        "ZeRO stage",
        "Network, a step:",
        "Time: ",
        "Cost at 2.5",
        "A checkpoint: ",
    ):
        assert f"\n{beginning}" in out
    for assumption in ("mfu 0.4", "price 2.5", "reserved bytes 3e+09", "requests per lane 2"):
        assert assumption in out
