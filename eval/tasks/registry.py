"""The tasks there are, by name."""

from __future__ import annotations

from typing import Any

from eval.study.study_file import check_section
from eval.tasks.formal import LANGUAGES, FormalLanguage
from eval.tasks.recall import AssociativeRecall
from eval.tasks.task import Task
from xlstm_lm.base.mistakes import nearest

TASKS: dict[str, type] = {**dict.fromkeys(LANGUAGES, FormalLanguage), "associative_recall": AssociativeRecall}


def build_task(values: dict[str, Any]) -> Task:
    """The task of that `name` with those settings.

    Raises:
        ValueError: there is no such task or setting, or a value is not allowed.
    """
    name = values.get("name")
    if not isinstance(name, str) or name not in TASKS:
        hint = nearest(str(name), TASKS, otherwise="There are {known}.")
        raise ValueError(f"task.name is {name!r}: there is no such task. {hint}")
    return check_section(TASKS[name], values, name="task")
