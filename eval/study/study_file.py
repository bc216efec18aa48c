"""Check a study's file and report every mistake in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from xlstm_lm.base.mistakes import explain

Config = TypeVar("Config")


def check_section(
    config_class: type[Config],
    section: dict[str, Any],
    *,
    name: str = "",
    origins: dict[str, str] | None = None,
    path: Path | None = None,
) -> Config:
    """The dataclass that a section of a file describes.

    Args:
        config_class: a dataclass that forbids other fields.
        section: what was read.
        name: of the section, dotted; nothing for a whole file.
        origins: the file that each dotted key comes from (`read_recipe`).
        path: the file to name where no key's is known.

    Raises:
        ValueError: a field is unknown, missing or not allowed; all of them are named, each with its file and value.
    """
    try:
        return TypeAdapter(config_class).validate_json(json.dumps(section, default=str), strict=True)
    except ValidationError as error:
        places = ({name: str(path)} if path else {}) | (origins or {})
        raise ValueError(explain(error, config_class, section, places, section=name)) from None
