"""Designs of ladders, grids and sweeps, and the learning rates that follow from a sweep."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from eval.scaling_laws.__main__ import main
from eval.scaling_laws.cost import cost_as_markdown
from eval.scaling_laws.design import Designer, DesignOptions, Span
from eval.scaling_laws.designed import DESIGN, read_design
from eval.scaling_laws.points import LossPoint
from eval.scaling_laws.rates import fit_rates
from eval.scaling_laws.sizes import find_architecture
from tests.eval.small_ladder import BATCH_TOKENS, design_small, write_recipe
from xlstm_lm.models.accounting import count_parameters, training_flops_per_token
from xlstm_lm.training.schedule import learning_rate_ratio

SCALING_RECIPES = Path(__file__).parents[2] / "configs" / "scaling"


@pytest.mark.parametrize("name", ["xlstm", "transformer", "mamba2", "gated-delta", "lstm", "gru"])
@pytest.mark.parametrize("params", [1.5e5, 1.2e6])
def test_models_of_any_size_are_near_it(name, params):
    model = find_architecture(name, {"vocab_size": 257}, on_bytes=True).model(params)
    assert model.params == count_parameters(model.config) == pytest.approx(params, rel=0.25)
    assert 0 < model.params_non_embedding < model.params - 257 * model.config.embedding_dim


def test_a_size_that_heads_do_not_allow_is_refused_with_the_nearest():
    wide_heads = find_architecture("mine=mamba2-cpu-1m", {}, on_bytes=True)  # 64 wide
    assert wide_heads.model(8e4).params == 111_864
    with pytest.raises(ValueError, match=r"mine: the nearest model to 70,000 parameters has 111,864. .*factor of 1.5"):
        wide_heads.model(7e4)


def test_a_preset_is_scaled_to_its_own_width():
    assert find_architecture("mine=xlstm-400m", {}, on_bytes=False).model(4.06e8).config.embedding_dim == 1024


@pytest.mark.parametrize("recipe", sorted(SCALING_RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_a_study_gives_a_ladder(recipe, tmp_path):
    sizes, tokens = Span(1.5e5, 1.2e6, 4), Span(1e6, 8e6, 4)
    options = DesignOptions(architectures=["xlstm"], recipes=[recipe], out=tmp_path, sizes=sizes, tokens=tokens)
    assert [run.kind for run in Designer(options).design().runs].count("branch") == 16


def test_a_budgets_size_spends_it():
    model = find_architecture("transformer", {}, on_bytes=False).at_budget(1e20, 20, 2048)
    assert training_flops_per_token(model.config, 2048) * 20 * model.params == pytest.approx(1e20, rel=0.15)


def test_a_ladder_has_a_trunk_for_each_size_and_branches_from_it(tmp_path):
    design = design_small(tmp_path, seeds=2)
    assert read_design(design.folder) == design
    kinds = [run.kind for run in design.runs]
    assert [kinds.count(kind) for kind in ("trunk", "branch", "check", "seed")] == [3, 9, 1, 1]
    branches = [run for run in design.runs if run.kind == "branch"]
    assert [run.tokens for run in branches[:3]] == [1280, 2560, 5120]
    assert design.runs[-9:] == branches, "branches come last"
    for branch in branches:
        trunk, config = design.config(design.named(branch.trunk)), design.config(branch)
        assert branch.branch_step == round(0.8 * branch.steps) and branch.branch_step in trunk.training.keep_at
        assert config.training.resume.endswith(f"runs/{branch.trunk}/checkpoints/step_{branch.branch_step:08}")
        assert branch.flops == training_flops_per_token(config.model, 16) * branch.tokens
        assert branch.own_flops == pytest.approx(0.2 * branch.flops)
        # The learning rates of trunk and branch are those of one straight run.
        for step in range(branch.branch_step):
            of_trunk = learning_rate_ratio(trunk.schedule, step, trunk.training.steps)
            assert of_trunk == learning_rate_ratio(config.schedule, step, branch.steps)
    check = next(run for run in design.runs if run.kind == "check")
    assert design.config(check).schedule == design.config(branches[0]).schedule
    assert len((design.folder / "launch.txt").read_text().splitlines()) == 5
    first = (design.folder / "launch-branches.txt").read_text().splitlines()[0]
    assert first == f"{design.run_folder(branches[0].run)} --config {design.recipe(branches[0].run)}"


@pytest.mark.parametrize(("of_recipe", "chosen", "used"), [("1-sqrt", None, "1-sqrt"), ("1-sqrt", "linear", "linear")])
def test_cooldowns_have_the_recipes_shape_or_the_chosen_one(tmp_path, of_recipe, chosen, used):
    values = json.loads(write_recipe(tmp_path).read_text())
    values["schedule"]["cooldown_shape"] = of_recipe
    (tmp_path / "other.yaml").write_text(json.dumps(values))
    spans = {"sizes": Span(1e4, 2e4, 2), "tokens": Span(1280, 2560, 2)}
    recipes = [tmp_path / "other.yaml"]
    options = DesignOptions(
        architectures=["lstm"], recipes=recipes, out=tmp_path / "out", cooldown_shape=chosen, **spans
    )
    designer = Designer(options)
    design = designer.design()
    assert {run.cooldown_shape for run in design.runs} == {used}
    assert {config.schedule.cooldown_shape for config in designer.configs.values()} == {used}
    assert f"then a {used} cooldown over the last 20.0% of a run's steps." in cost_as_markdown(design)


def test_a_design_of_an_earlier_version_has_linear_cooldowns(tmp_path):
    design = design_small(tmp_path)
    path = design.folder / DESIGN
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "cooldown_shape"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    assert read_design(design.folder) == design


def test_a_grid_spends_each_budget_at_several_sizes(tmp_path):
    budgets = Span(2e9, 8e9, 2)
    design = design_small(tmp_path, mode="isoflop", budgets=budgets, sizes=None, tokens=None, center=0.2)
    assert {run.kind for run in design.runs} == {"straight"} and len(design.runs) >= 8
    for run in design.runs:
        assert min(abs(math.log(run.flops / flops)) for flops in budgets.values) < 0.05
    sizes = [run.params for run in design.runs[:4]]
    assert max(sizes) / min(sizes) < 5  # widths of tiny models are coarse


def test_a_sweep_has_rates_at_the_smallest_sizes_alone(tmp_path):
    design = design_small(tmp_path, lr_sweep=3)
    assert [run.learning_rate for run in design.runs] == [0.005, 0.01, 0.02] * 2
    assert {run.kind for run in design.runs} == {"sweep"} and {run.tokens for run in design.runs} == {1280}


def swept(law, sizes, tokens=1e6) -> list[LossPoint]:
    """Points with a parabola in log lr around the law's rate."""
    return [
        LossPoint(
            run=f"{params:g}-{factor}", params=params, tokens=tokens * place, flops=1.0,
            learning_rate=law(params, tokens * place) * factor, loss=3 + 0.1 * math.log(factor / 1.1) ** 2,
        )
        for place, params in enumerate(sizes, 1)
        for factor in (0.5, 1.0, 2.0)
    ]  # fmt: skip


def test_rates_follow_a_law_of_size_and_horizon():
    def law(params: float, tokens: float) -> float:
        return 0.5 * params**-0.25 * tokens**-0.3

    found = fit_rates(swept(law, [1e5, 2e5, 4e5]))
    assert found.exponent == pytest.approx(-0.25) and found.notes == []
    assert found.rate(1e6, 1e9) == pytest.approx(1.1 * law(1e6, 1e9))
    with pytest.raises(ValueError, match=r"13,000,000 parameters are 32.5 times the largest size of the sweep"):
        found.rate(1.3e7, 1e9)
    assert found.rate(1.3e7, 1e9, force=True) == pytest.approx(1.1 * law(1.3e7, 1e9))
    two = fit_rates(swept(law, [1e5, 2e5]))
    assert two.exponent == 0 and "2 sizes were swept" in two.notes[0]


def test_a_best_rate_at_the_end_of_its_sweep_is_named():
    points = swept(lambda params, tokens: 1e-3, [1e5])
    falling = [dataclasses.replace(point, loss=3 - point.learning_rate) for point in points]
    assert "at the end of its sweep" in fit_rates(falling).notes[0]
    with pytest.raises(ValueError, match="no size at several learning rates"):
        fit_rates(points[:1])


def test_a_flat_end_of_a_sweep_does_not_make_its_last_rate_the_best():
    """The parabola of all rates has its minimum inside, although the noise of a run puts the lowest loss at the end."""
    points = swept(lambda params, tokens: 1e-3, [1e5])
    flat = [dataclasses.replace(point, loss=loss) for point, loss in zip(points, (2.03, 2.002, 2.0))]
    law = fit_rates(flat)
    assert not any("at the end" in note for note in law.notes)
    steps = (2.03 - 2.0) / 2 / (2.03 - 2 * 2.002 + 2.0)
    assert law.rate(1e5, flat[0].tokens) == pytest.approx(1e-3 * 2**steps)


def test_rates_of_a_sweep_are_used(tmp_path):
    law = fit_rates(swept(lambda params, tokens: 0.4 * tokens**-0.3, [1e4, 2e4, 4e4], tokens=1280))
    design = design_small(tmp_path, rates={"lstm": law})
    trunk = design.runs[0]
    expected = law.rate(trunk.params, 5120)
    rates = [run.learning_rate for run in design.runs if run.trunk == trunk.run]
    assert rates == pytest.approx([expected] * 4, rel=1e-3)
    assert design.config(trunk).optimizer.learning_rate == trunk.learning_rate


def test_an_architecture_without_a_sweep_is_refused(tmp_path):
    law = fit_rates(swept(lambda params, tokens: 1e-3, [1e4, 2e4, 4e4]))
    with pytest.raises(ValueError, match="--rates has no sweep of lstm; it has gru. Sweep that one too"):
        design_small(tmp_path, rates={"gru": law})


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"architectures": ["xlstn"]}, r"--architecture xlstn is no architecture with presets. Did you mean xlstm"),
        ({"architectures": ["lstm=lstm-cpu-2m"]}, r"'lstm-cpu-2m' is no preset"),
        ({"architectures": ["lstm", "lstm=gru-cpu-1m"]}, r"--architecture names lstm more than once"),
        ({"budgets": Span(1e9, 1e10, 2)}, r"Give either --sizes LOW:HIGH:COUNT \(parameters\) or --budgets"),
        ({"mode": "isoflop"}, r"--mode isoflop needs --budgets"),
        ({"tokens": Span(64, 128, 2)}, r"64 tokens are 1 steps of 64 tokens, too few for a warm-up and a cooldown"),
        ({"sizes": Span(1e9, 1e10, 2)}, r"the nearest model to 1,000,000,000 parameters has"),
    ],
)
def test_a_design_that_cannot_be_trained_is_refused(tmp_path, choices, message):
    with pytest.raises(ValueError, match=message):
        design_small(tmp_path, **choices)


def test_a_design_is_not_overwritten(tmp_path):
    design_small(tmp_path)
    with pytest.raises(ValueError, match="design.csv exists: choose another --out"):
        design_small(tmp_path)


def test_the_command_prints_costs_and_a_dry_run_writes_nothing(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    flags = ["--config", recipe, "--architecture", "lstm,gru", "--sizes", "10k:40k:2", "--tokens", "1280:2560:2"]
    flags += ["--out", tmp_path / "ladder", "--flops-per-second", "1e9", "--dry-run"]
    with pytest.raises(SystemExit, match="0"):
        main(["design", *map(str, flags)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:8]] == [
        "lstm",
        "lstm",
        "**lstm**",
        "gru",
        "gru",
        "**gru**",
    ]
    # A trunk to step 32, cooldowns of 4 and 8 steps, and the check of 20 steps.
    assert f"| 4 | 2,560 | {BATCH_TOKENS * (32 + 4 + 8 + 20):,} |" in lines[2]
    assert not (tmp_path / "ladder").exists()


@pytest.mark.parametrize("span", ["1:2", "0:1:2", "2:1:2", "1:2:0", "a:b:c", "1:2:3:4", "1:inf:2"])
def test_a_wrong_span_is_refused(span, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["design", "--config", "a", "--architecture", "a", "--out", "a", "--sizes", span])
    assert f"{span} must be LOW:HIGH:COUNT" in capsys.readouterr().err


def test_spans_are_in_equal_ratios():
    assert np.allclose(Span(1, 8, 4).values, [1, 2, 4, 8]) and Span(5, 5, 1).values == [5]


def test_a_recipe_without_held_out_data_is_refused(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('{"data": {"sources": [{"kind": "python_stdlib"}], "tokenizer": {"kind": "bytes"}}}')
    options = DesignOptions(architectures=["lstm"], recipes=[recipe], out=tmp_path / "d", sizes=Span(1e4, 1e5, 2))
    with pytest.raises(ValueError, match="data.validation is empty, but a loss point is the loss on held-out"):
        Designer(options)
