"""Checks what a study's file says, and tells every mistake in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from xlstm_lm.config import nearest

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
    adapter = TypeAdapter(config_class)
    try:
        return adapter.validate_json(json.dumps(section, default=str), strict=True)
    except ValidationError as error:
        explained = [_explain(each, section, name, adapter) for each in error.errors(include_url=False)]
    lines = []
    for where, message in explained:
        near = [
            file
            for key, file in (origins or {}).items()
            if f"{key}.".startswith(f"{where}.") or where.startswith(f"{key}.")
        ]
        file = near[0] if near else path
        lines.append(f"{file}: {message}" if file else message)
    raise ValueError("\n".join(dict.fromkeys(lines))) from None


def _explain(error: dict[str, Any], section: dict[str, Any], name: str, adapter: TypeAdapter) -> tuple[str, str]:
    """The dotted key of one mistake that pydantic found, and a line on it."""
    keys, node = [name] if name else [], section
    for part in error["loc"]:
        # A union adds the name of each alternative to the location.
        if part in node if isinstance(node, dict) else isinstance(node, list) and isinstance(part, int):
            keys.append(str(part))
            node = node[part]
    where = ".".join(keys)
    if error["type"] in ("missing", "missing_argument"):
        return where, f"{'.'.join([*keys, str(error['loc'][-1])])} is missing."
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        hint = nearest(keys[-1], _field_names(adapter), otherwise="It has {known}.")
        return where, f"{where} = {node!r}: there is no such field. {hint}"
    if error["type"] == "value_error":
        return where, f"{where}: {error['ctx']['error']}" if where else str(error["ctx"]["error"])
    return where, f"{where} = {node!r}: {error['msg']}."


def _field_names(adapter: TypeAdapter) -> list[str]:
    """Of a dataclass and of those in it."""
    schema = adapter.json_schema()
    return [name for part in (schema, *schema.get("$defs", {}).values()) for name in part.get("properties", ())]
