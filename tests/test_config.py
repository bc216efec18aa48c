"""Recipes and flags: how they compose, and what is said when one is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from xlstm_lm.config import as_recipe, fields, load_run_config
from xlstm_lm.recipe import parse_yaml, read_recipe

CONFIGS = Path(__file__).parents[1] / "configs"
DEMO = CONFIGS / "train" / "demo.yaml"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_includes_are_read_first_and_the_recipe_wins(tmp_path):
    write(tmp_path / "model" / "small.yaml", "model: {num_blocks: 2, embedding_dim: 64}\n")
    write(tmp_path / "base.yaml", "include: [model/small.yaml]\ntraining: {steps: 5, seed: 3}\n")
    top = write(
        tmp_path / "train" / "top.yaml", "include: [../base.yaml]\nmodel: {num_blocks: 3}\ntraining: {steps: 7}\n"
    )
    values, origins = read_recipe(top)
    assert values == {"model": {"num_blocks": 3, "embedding_dim": 64}, "training": {"steps": 7, "seed": 3}}
    assert origins["model.num_blocks"] == origins["training.steps"] == str(top)
    assert origins["model.embedding_dim"].endswith("small.yaml")


def test_later_recipes_and_flags_win(tmp_path):
    longer = write(tmp_path / "longer.yaml", "training: {steps: 77}\noptimizer: {learning_rate: 1e-4}\n")
    run = load_run_config([DEMO, longer], {"model.num_blocks": 6})
    assert (run.training.steps, run.optimizer.learning_rate, run.model.num_blocks) == (77, 1e-4, 6)
    assert run.model.embedding_dim == load_run_config([DEMO]).model.embedding_dim


def test_a_saved_run_reads_back_equal(tmp_path):
    run = load_run_config(
        [DEMO], {"optimizer.betas": [0.8, 0.9], "model.pattern": ["mlstm", "slstm"], "model.num_blocks": 2}
    )
    saved = write(tmp_path / "config.yaml", as_recipe(run))
    assert load_run_config([saved]) == run


@pytest.mark.parametrize("recipe", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_training_recipe_is_valid_and_short(recipe):
    load_run_config([recipe])
    assert len(recipe.read_text().splitlines()) <= 40


@pytest.mark.parametrize("recipe", sorted((CONFIGS / "data").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("zero", sorted((CONFIGS / "deepspeed").glob("*.yaml")), ids=lambda path: path.stem)
def test_data_and_deepspeed_recipes_compose(recipe, zero):
    run = load_run_config([CONFIGS / "model" / "xlstm-165m.yaml", recipe, zero])
    assert "zero_optimization" in run.deepspeed


def test_every_field_has_a_description():
    assert len(fields()) > 60
    assert not [field.name for field in fields() if not field.description.strip()]


def test_numbers_as_people_write_them():
    assert parse_yaml("1e-3") == 1e-3
    assert parse_yaml("-2.5E+4") == -2.5e4
    assert parse_yaml("e1") == "e1"
    assert parse_yaml("null") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {num_bloks: 4}",
            r"{file}: model.num_bloks = 4: there is no such field. Did you mean model.num_blocks\?",
        ),
        ("modle: {num_blocks: 4}", r"{file}: modle = .*: there is no such field"),
        (
            "training: {learning_rate: 0.1}",
            r"{file}: training.learning_rate = 0.1: .* Did you mean optimizer.learning_rate\?",
        ),
        ("model: {num_blocks: four}", r"{file}: model.num_blocks = 'four': Input should be a valid integer"),
        ("model: {num_blocks: true}", r"{file}: model.num_blocks = True: Input should be a number"),
        ("model: {num_blocks: 2.5}", r"{file}: model.num_blocks = 2.5: Input should be a valid integer"),
        ("model: {norm: batch}", r"{file}: model.norm = 'batch': Input should be 'rms' or 'layer'"),
        ("model: {pattern: 7}", r"{file}: model.pattern = 7: "),
        ("model: {num_heads: 3}", r"{file}.*: model: num_heads 3 does not divide"),
        ("training: {steps: 0}", r"{file}.*: training.steps is 0; it must be at least 1"),
        ("model: 3", r"{file}: model = 3: "),
    ],
)
def test_a_mistake_in_a_recipe_names_file_key_and_mend(tmp_path, text, message):
    recipe = write(tmp_path / "mine.yaml", text + "\n")
    with pytest.raises(ValueError, match=message.replace("{file}", ".*mine.yaml")):
        load_run_config([DEMO, recipe])


def test_all_mistakes_are_named_at_once(tmp_path):
    recipe = write(tmp_path / "mine.yaml", "model: {num_bloks: 4}\ntraining: {steps: x}\n")
    with pytest.raises(ValueError, match=r"(?s)model.num_bloks.*training.steps = 'x'"):
        load_run_config([DEMO, recipe])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.yaml", None, "missing.yaml does not exist; that folder has there.yaml"),
        ("list.yaml", "- 1\n", "list.yaml holds list, but a recipe is a mapping"),
        ("broken.yaml", "model: {num_blocks: 4\n", "(?s)broken.yaml is not valid YAML: .*line 2"),
        (
            "includes.yaml",
            "include: there.yaml\n",
            "includes.yaml: include is 'there.yaml', but must be a list of files",
        ),
        ("lost.yaml", "include: [nowhere.yaml]\n", "nowhere.yaml, which .*lost.yaml includes, does not exist"),
        ("circle.yaml", "include: [circle.yaml]\n", "circle.yaml includes itself"),
    ],
)
def test_a_recipe_that_cannot_be_read(tmp_path, name, text, message):
    write(tmp_path / "there.yaml", "training: {steps: 1}\n")
    if text is not None:
        write(tmp_path / name, text)
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path / name)


def test_each_family_has_its_own_fields(tmp_path):
    recipe = write(tmp_path / "mine.yaml", "model: {family: mamba, version: 1}\ndata: {sources: []}\n")
    with pytest.raises(ValueError, match=r"model.rope_theta = 5: there is no such field in the family mamba"):
        load_run_config([recipe], {"model.rope_theta": 5})
    with pytest.raises(ValueError, match=r"model.family = 'mmaba': the model families are xlstm, transformer"):
        load_run_config([recipe], {"model.family": "mmaba"})


def test_the_flags_say_which_family_has_them():
    by_name = {each.name: each for each in fields()}
    assert by_name["model.rope_theta"].families == ("transformer",)
    assert by_name["model.rope_theta"].description.endswith("(transformer).")
    assert by_name["model.num_blocks"].default == "12 (xlstm, transformer); 24 (mamba); 2 (lstm)"
