"""The fields of a document that make up its text: one of them, or several in a template."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

from xlstm_lm.data.sources.config import SourceConfig


@dataclass(frozen=True)
class Fields:
    """The fields to be read, and how they become a text."""

    names: tuple[str, ...]
    """Names of the fields or columns, each once."""
    parts: tuple[tuple[str, str | None], ...] = ()
    """Template as pairs of fixed text and the field after it, None at the end; empty without a template."""

    @classmethod
    def of(cls, config: SourceConfig) -> Fields:
        """The fields that a source names.

        Raises:
            ValueError: the template has no field, or anything in braces but the name of a field.
        """
        if config.template is None:
            return cls((config.text_field,))
        try:
            parsed = list(string.Formatter().parse(config.template))
        except ValueError as error:
            raise _bad_template(config.template, str(error)) from None
        for _, name, specification, conversion in parsed:
            if name == "" or specification or conversion:
                raise _bad_template(config.template, "braces must hold the name of a field alone")
        names = tuple(dict.fromkeys(name for _, name, _, _ in parsed if name is not None))
        if not names:
            raise _bad_template(config.template, "it names no field")
        return cls(names, tuple((text, name) for text, name, _, _ in parsed))

    def text(self, values: dict[str, Any]) -> tuple[str, str | None]:
        """The text of a document with these fields, or what is wrong with it."""
        if not self.parts:
            return text_of(values, self.names[0])
        filled = {}
        for name in self.names:
            value = values.get(name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            filled[name], problem = (str(value), None) if is_number else text_of(values, name, "template")
            if problem is not None:
                return "", problem
        return "".join(text + (filled[name] if name is not None else "") for text, name in self.parts), None


def text_setting(config: SourceConfig) -> str:
    """Name of the setting that names the fields of a source."""
    return "text_field" if config.template is None else "template"


def text_identity(config: SourceConfig) -> dict[str, str]:
    """The settings of a source that say how fields become a text, as they stand in its identity."""
    return {"text_field": config.text_field} | ({} if config.template is None else {"template": config.template})


def text_of(fields: dict[str, Any], text_field: str, setting: str = "text_field") -> tuple[str, str | None]:
    """The text among a document's fields, or what is wrong with it."""
    text = fields.get(text_field)
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError:
            return "", f"field {text_field!r} holds half a surrogate pair, which is no character"
        return text, None
    if text_field not in fields:
        return "", f"no field {text_field!r} among {', '.join(fields) or 'none'}; the setting is {setting}"
    return "", f"field {text_field!r} holds {type(text).__name__}, not text"


def _bad_template(template: str, reason: str) -> ValueError:
    return ValueError(
        f"template {template!r} cannot be used: {reason}; write fields in braces, such as '{{title}}: {{text}}', and "
        "double braces for braces in the text"
    )
