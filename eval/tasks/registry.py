"""The tasks there are, by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter, ValidationError

from eval.tasks.formal import LANGUAGES, FormalLanguage
from eval.tasks.recall import AssociativeRecall
from eval.tasks.task import Task

TASKS: dict[str, type] = {**dict.fromkeys(LANGUAGES, FormalLanguage), "associative_recall": AssociativeRecall}


def build_task(values: dict[str, Any]) -> Task:
    """The task of that `name` with those settings.

    Raises:
        ValueError: there is no such task or setting, or a value is not allowed.
    """
    name = values.get("name")
    if name not in TASKS:
        raise ValueError(f"task.name is {name!r}: there is no such task. {nearest(str(name), TASKS)}")
    task_class = TASKS[name]
    for key in values:
        if key not in task_class.__dataclass_fields__:
            hint = nearest(key, task_class.__dataclass_fields__)
            raise ValueError(f"task.{key} = {values[key]!r}: {name} has no such setting. {hint}")
    try:
        return TypeAdapter(task_class).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":
            raise ValueError(str(first["ctx"]["error"])) from None
        where = ".".join(map(str, ("task", *first["loc"])))
        raise ValueError(f"{where} = {first['input']!r}: {first['msg']}.") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """'Did you mean ...?', or all that there are where nothing is near."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]}?" if close else f"There are {', '.join(known)}."
