"""`xlstm-lm flops` prints what a model costs, and names what it cannot account for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from xlstm_lm.cli import main
from xlstm_lm.models.accounting import count_parameters, training_flops_per_token
from xlstm_lm.models.presets import preset

RECIPE = str(Path(__file__).parents[1] / "configs" / "train" / "node-400m.yaml")


def test_a_recipe_has_a_row_for_each_part_and_its_totals(capsys):
    main(["flops", "--config", RECIPE])
    out = capsys.readouterr().out
    for part in ("embedding", "mlstm: projections", "mlstm: mlstm", "mlstm: feed-forward", "mlstm: norms", "head"):
        assert any(line.startswith(f"{part}  ") for line in out.splitlines()), part
    config = preset("xlstm-400m")
    assert f"Parameters: {count_parameters(config):,};" in out
    flops = training_flops_per_token(config, 2048)
    assert re.search(r"Kept for the backward pass: 1,2\d\d,\d{3} bytes a token", out)
    assert f"Training, in a row of 2,048 tokens: {flops:.4e} FLOPs a token, {2048 * flops:.4e} a row" in out


def test_the_flags_win_over_the_recipe_and_json_has_the_same_numbers(capsys):
    main(["flops", "--config", RECIPE, "--model", "transformer-400m", "--context", "100", "--json"])
    found = json.loads(capsys.readouterr().out)
    config = preset("transformer-400m")
    assert found["context_length"] == 100
    assert found["training_flops_per_token"] == training_flops_per_token(config, 100)
    assert found["parameters"] == sum(part["parameters"] for part in found["parts"]) == count_parameters(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a recipe"),
        (["--model", "xlstm-401m"], "Did you mean xlstm-400m"),
        (["--model", "xlstm-400m", "--context", "0"], "--context"),
    ],
)
def test_a_mistake_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["flops", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
