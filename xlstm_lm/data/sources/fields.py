"""The fields of a document that make up its text: one of them, several in a template, or the messages of a chat."""

from __future__ import annotations

import json
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
    is_chat: bool = False
    """Whether the field holds messages of a chat, whose text is a JSON array until a tokenizer renders it."""

    @classmethod
    def of(cls, config: SourceConfig) -> Fields:
        """The fields that a source names.

        Raises:
            ValueError: the template has no field, or anything in braces but the name of a field.
        """
        if config.chat is not None:
            return cls((config.chat,), is_chat=True)
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
        if self.is_chat:
            return messages_of(values, self.names[0])
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
    return "chat" if config.chat is not None else "text_field" if config.template is None else "template"


def text_identity(config: SourceConfig) -> dict[str, str]:
    """The settings of a source that say how fields become a text, as they stand in its identity."""
    others = {"template": config.template, "chat": config.chat}
    return {"text_field": config.text_field} | {name: value for name, value in others.items() if value is not None}


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


def messages_of(fields: dict[str, Any], name: str) -> tuple[str, str | None]:
    """The chat in a document's field as a JSON array, empty without messages, or what is wrong with it.

    Entries of a message that are null are left out, as columns of parquet have them for all messages.
    """
    messages = fields.get(name)
    if name not in fields:
        return "", f"no field {name!r} among {', '.join(fields) or 'none'}; the setting is chat"
    if not isinstance(messages, list):
        return "", f"field {name!r} holds {type(messages).__name__}, not a list of messages"
    kept = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            return "", f"message {number} of field {name!r} is not an object with role and content"
        kept.append({key: value for key, value in message.items() if value is not None or key == "content"})
    try:
        text = json.dumps(kept, ensure_ascii=False) if kept else ""
        text.encode()
    except UnicodeEncodeError:
        return "", f"field {name!r} holds half a surrogate pair, which is no character"
    except (TypeError, ValueError) as error:
        return "", f"field {name!r} holds what JSON cannot express ({error})"
    return text, None


def _bad_template(template: str, reason: str) -> ValueError:
    return ValueError(
        f"template {template!r} cannot be used: {reason}; write fields in braces, such as '{{title}}: {{text}}', and "
        "double braces for braces in the text"
    )
