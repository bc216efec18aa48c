"""Helpers for torch.compile, autograd and autocast that leave torch._dynamo unimported: that import takes a second, and
most programs never compile."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Function = TypeVar("Function", bound=Callable[..., Any])
_libraries: list[torch.library.Library] = []  # an operator lives as long as its library


def not_compiled(package: str) -> Callable[[Function], Function]:
    """`torch.compiler.disable` for a function that calls `package`, where that is installed."""
    return torch.compiler.disable if importlib.util.find_spec(package) else lambda function: function


def needs_gradient(*inputs: Tensor | None) -> bool:
    """Whether autograd will need gradients from a function of these inputs."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type of products on the device of `x` under torch.autocast; None where it is off."""
    device = x.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which products have the type of their factors, on the device of `x`, also under torch.autocast."""
    if autocast_dtype(x) is None:  # entering one takes longer than a small product, and shows in exports
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def custom_operator(
    name: str,
    function: Callable[..., Any],
    shapes: Callable[..., Any],
    *,
    gradients: Callable[..., Any] | None = None,
    keep: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """A function of tensors as one operator of PyTorch for every device: one node for torch.compile.

    `torch.library.custom_op` does the same, but imports torch._dynamo at the first call.

    torch.export sees the function's own operations instead: exported programs run without this package.

    Args:
        name: name of the operator in the namespace xlstm_lm. A copy of the module, as exported models bring along,
            gets an operator of its own, under another name.
        function: annotated function with tensors, None and plain values as arguments and new tensors as results.
        shapes: function of the same arguments whose results have the right shapes and types, and no content.
        gradients: the `backward` of `torch.library.register_autograd`; None if not differentiable. Differentiable once.
        keep: its `setup_context`; None without `gradients`.
    """
    names = [name, *(f"{name}_{copy}" for copy in range(2, 100))]
    name = next(each for each in names if not hasattr(torch.ops.xlstm_lm, each))
    library = torch.library.Library("xlstm_lm", "FRAGMENT")
    _libraries.append(library)
    library.define(name + torch.library.infer_schema(function, mutates_args=()))
    library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"xlstm_lm::{name}", shapes, lib=library)
    if gradients is not None:
        torch.library.register_autograd(
            f"xlstm_lm::{name}", once_differentiable(gradients), setup_context=keep, lib=library
        )
    operator = getattr(torch.ops.xlstm_lm, name).default

    def call(*arguments: Any) -> Any:
        return (function if torch.compiler.is_exporting() else operator)(*arguments)

    call.operator, call.function = operator, function  # type: ignore[attr-defined] # for tests of the operators
    return call
