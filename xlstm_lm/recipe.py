"""Read a YAML recipe together with the recipes that it includes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from xlstm_lm.base.paths import user_path


class _Loader(yaml.SafeLoader):
    """YAML as in version 1.2 where it counts: 1e-3 is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """The value that a YAML text stands for, 1e-3 read as a number."""
    return yaml.load(text, Loader=_Loader)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A new mapping with the keys of both; `over` wins, mappings are merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        both_are_mappings = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = merge(merged[key], value) if both_are_mappings else value
    return merged


def dotted_items(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model.num_blocks": 4, ...}`: every value that is no mapping, by the path of keys that leads to it."""
    items = {}
    for key, value in values.items():
        items |= (
            dotted_items(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
        )
    return items


def read_recipe(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a recipe, and the file that each dotted key comes from.

    A recipe's key `include` lists further recipes, relative to it; they are read first, in order, and what the
    recipe says itself wins.

    Raises:
        ValueError: the file is missing, is no YAML, or is no mapping; two files include each other.
    """
    return _read(user_path(path), ())


def _read(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    if path.resolve() in above:
        raise ValueError(f"{path} includes itself through {above[-1]}; take one of the two includes out.")
    if not path.is_file():
        wanted_by = f", which {above[-1]} includes," if above else ""
        there = sorted(other.name for other in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = f"that folder has {', '.join(there)}" if there else "there is no recipe in that folder"
        raise ValueError(f"The recipe {path}{wanted_by} does not exist; {hint}.")
    try:
        own = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(own, dict):
        raise ValueError(
            f"{path} holds {type(own).__name__}, but a recipe is a mapping such as 'model: {{num_blocks: 4}}'."
        )
    includes = own.pop("include", [])
    if not isinstance(includes, list) or not all(isinstance(include, str) for include in includes):
        raise ValueError(f"{path}: include is {includes!r}, but must be a list of files relative to this one.")
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for include in includes:
        included, included_origins = _read(path.parent / include, (*above, path.resolve()))
        values, origins = merge(values, included), origins | included_origins
    return merge(values, own), origins | dict.fromkeys(dotted_items(own), str(path))
