"""Marks for torch.compile without the import of torch._dynamo: it takes a second, and most programs never compile."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable)


def constant_result(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, which sets this attribute and does nothing else."""
    function._dynamo_marked_constant = True
    return function


def not_compiled(package: str) -> Callable[[Function], Function]:
    """`torch.compiler.disable` for a function that calls `package`, where that is installed."""
    return torch.compiler.disable if importlib.util.find_spec(package) else lambda function: function
