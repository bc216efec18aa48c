"""A mark for functions that torch.compile must call while it traces, without following their code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_result(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, which sets this attribute and does nothing else, without torch."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined] # functions have no attribute of that name yet
    return function
