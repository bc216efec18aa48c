"""Stand-ins for backends of operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from xlstm_lm.ops import operation as operations
from xlstm_lm.ops.operation import Operation


def replace_backend(
    monkeypatch: pytest.MonkeyPatch, operation: Operation, name: str, function: Callable | None = None, **changes: Any
) -> None:
    """Have another function, or other properties, stand for a backend in one test; forget earlier choices.

    The fixture `fresh_choices` of tests/conftest.py forgets them again after the test.
    """
    backend = operation[name]
    if function is not None:
        changes |= {"function": function, "loaded": None}
    for field, value in changes.items():
        monkeypatch.setattr(backend, field, value)
    operations.forget()
