"""Models of known sizes by name, a table a family: `xlstm-400m`, `transformer-400m`, `mamba2-400m` and so on.

A preset is fields of a recipe's section `model`. The models of a size agree in parameters within one percent. A name
says the kind of block: `xlstm-*` has the mLSTM blocks of xLSTM-7B, `xlstm-paper-*` those of the first paper.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from xlstm_lm.models import FAMILIES, ModelConfig
from xlstm_lm.models.presets import hybrid, lstm, mamba, transformer, xlstm

PRESETS: dict[str, dict[str, Any]] = {
    **xlstm.PRESETS,
    **transformer.PRESETS,
    **mamba.PRESETS,
    **lstm.PRESETS,
    **hybrid.PRESETS,
}


def preset_names() -> list[str]:
    """Names of all presets, family by family, small sizes last."""
    return list(PRESETS)


def preset_fields(name: str) -> dict[str, Any]:
    """Fields of the section `model` that a name stands for.

    Raises:
        ValueError: There is no such preset; the message has the nearest name.
    """
    if not isinstance(name, str) or name not in PRESETS:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.5) if isinstance(name, str) else []
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(PRESETS)}."
        raise ValueError(f"{name!r} is no preset. {hint}")
    return deepcopy(PRESETS[name])


def preset(name: str) -> ModelConfig:
    """Configuration of a preset.

    Raises:
        ValueError: There is no such preset; the message has the nearest name.
    """
    fields = preset_fields(name)
    return FAMILIES[fields["family"]][0](**fields)


def with_preset_fields(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section `model` with the fields of its key `preset` written out; those beside it win.

    Raises:
        ValueError: There is no such preset, or the fields beside it are another family's or leave none of its own.
    """
    own = {name: value for name, value in section.items() if name != "preset"}
    if "preset" not in section:
        return own
    name = section["preset"]
    try:
        fields = preset_fields(name)
    except ValueError as error:
        raise ValueError(f"model.preset = {error}") from None
    if own.get("family", fields["family"]) != fields["family"]:
        raise ValueError(
            f"model.preset = {name!r} is of the family {fields['family']}, but model.family is {own['family']!r}: "
            "remove one of the two."
        )
    if fields.keys() <= own.keys() and any(own[key] != value for key, value in fields.items()):
        raise ValueError(
            f"model.preset = {name!r} has no effect, because a recipe or flag sets every field of it: remove the "
            "preset, or the section model of that recipe."
        )
    return fields | own
