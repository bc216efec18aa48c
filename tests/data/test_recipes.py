"""The recipes in configs/data: short, and every key one that the data knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from xlstm_lm.data import DataConfig

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(path):
    text = path.read_text()
    recipe = yaml.safe_load(text)
    assert set(recipe) == {"data"} and len(text.splitlines()) <= 40
    assert known_keys(recipe["data"]) <= known_keys(TypeAdapter(DataConfig).json_schema())
    config = TypeAdapter(DataConfig).validate_python(recipe["data"])
    assert config.sources and config.validation


def known_keys(value: object) -> set[str]:
    """All keys in a tree of mappings and lists."""
    if isinstance(value, dict):
        return set(value) | {key for one in value.values() for key in known_keys(one)}
    return {key for one in value for key in known_keys(one)} if isinstance(value, list) else set()


def test_the_recipes_are_there():
    assert {"python_stdlib", "local_text", "chats", "slimpajama", "dclm"} <= {path.stem for path in RECIPES}
