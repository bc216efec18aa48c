"""Backends of operations, the calls that they accept, and the samples on which they are checked."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

IN_EXPORT = __package__ != "xlstm_lm.ops"
"""Whether this file is the copy in an exported folder, which brings along the backends in plain PyTorch."""


class Expected(str):
    """A reason to pass a backend over that needs no announcement: by design, or announced before."""


class Call(NamedTuple):
    """The properties of a call that decide which backend computes it."""

    device: torch.device
    dtype: torch.dtype
    """Type of the inputs; float64 if any input has that type."""
    sizes: tuple[tuple[str, int], ...] = ()
    """(letter, size) in the order of the letters; only sizes that a choice depends on."""
    options: Hashable = ()
    needs_gradient: bool = True
    has_resets: bool = True
    one_step: bool = False
    exporting: bool = False
    """Whether torch.export traces the call, for a program that runs without this package."""

    def size(self, letter: str, default: int | None = None) -> int:
        """The size of that letter; `default` where the call has none, and a KeyError without a default."""
        sizes = dict(self.sizes)
        return sizes[letter] if default is None else sizes.get(letter, default)

    def __str__(self) -> str:
        sizes = ", ".join(f"{letter} {size}" for letter, size in self.sizes)
        return f"on {self.device}, {self.dtype}" + (f", {sizes}" if sizes else "")


def make_call(
    device: torch.device, dtype: torch.dtype, sizes: dict[str, int], options: Hashable = (), **others: bool
) -> Call:
    """A `Call` with its sizes in order."""
    return Call(device, dtype, tuple(sorted(sizes.items())), options, **others)


class Sample(NamedTuple):
    """Inputs for a check and the backend that defines the right values for them, in float64."""

    inputs: list[Tensor]
    """Floating-point leaves, which are differentiated."""
    options: dict[str, Any]
    """Further arguments, such as resets, for `Operation.run`."""
    against: str


class Cost(NamedTuple):
    """Forward cost of an operation."""

    flops: float
    """Floating-point operations; a product of an m x k and a k x n matrix counts 2 m k n."""
    moved_bytes: float
    """Bytes that must be read or written at least."""


COUNTED_CHUNK = 64
"""Chunk length that FLOPs are counted with where the backend chooses its own."""


def linear_attention_flops(chunk: int, heads: int, K: int, V: int) -> int:
    """FLOPs of chunkwise linear attention for a token.

    Within a chunk of L tokens, a head takes 2 L (K + V) / 2 for the causal half of Q K^T and W V and 4 L for gates and
    row sums; 4 K V read the state and write it. A chunk of one token is a step of the recurrence.
    """
    return heads * (chunk * (K + V) + 4 * K * V + 4 * chunk)


class Choice(NamedTuple):
    """The backend for a call, and the faster ones passed over, each with the reason."""

    backend: str
    passed_over: tuple[tuple[str, str], ...] = ()


def _not_loaded(*_: Any, **__: Any) -> Any:
    raise AssertionError("a backend is loaded before its first call")


@dataclass(eq=False, kw_only=True)
class Backend:
    """One implementation of an operation."""

    name: str
    function: str | Callable[..., Any]
    """The implementation, or "module:name" of it, imported on first use."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the function besides those of the operation."""
    devices: tuple[str, ...] | None = None
    """Types of the devices it runs on; None for all."""
    dtypes: tuple[torch.dtype, ...] | None = None
    """Types of inputs it accepts; None for all."""
    package: str | None = None
    """Package it needs; None for none."""
    native: bool = False
    """Whether it needs the compiled C++ kernels."""
    gradients: bool = True
    one_step: bool = False
    """Whether it computes a single step only."""
    exports: Callable[[Call], bool] = lambda call: True
    """Whether torch.export can trace it for such a call into a program that runs anywhere."""
    limits: str | Callable[[Call], str | None] | None = None
    """Function or "module:name" of one that returns the reason why a call is not accepted, None if it is."""
    unsuited: Callable[[Call], str | None] = lambda call: None
    """Function that returns the reason why another backend is better for a call, None if none is. Ignored where the
    configuration names the backend."""
    same_code: Callable[[Call], Call] = lambda call: call
    """A call, the smallest, that runs the same compiled code: one verdict holds for both."""
    checked_on: tuple[str, ...] = ()
    """Types of the devices on which it is verified before its first use in a process."""
    slow: str | None = None
    """The way the operation runs with it, for the announcement; None if it is fast."""
    fast_on: tuple[str, ...] = ()
    """Types of the devices on which it is as fast as any."""
    loaded: Callable[..., Any] = field(default=_not_loaded, init=False, repr=False)
    """The function; set by `load`."""

    def load(self) -> Callable[..., Any]:
        """The function, imported if need be."""
        function = resolve(self.function) if isinstance(self.function, str) else self.function
        self.loaded = functools.partial(function, **self.arguments) if self.arguments else function
        return self.loaded


def resolve(path: str) -> Callable[..., Any]:
    """The function that "module:name" stands for.

    In an exported folder, whose modules are side by side, it is the folder's own or else that of an installed
    xlstm-lm.
    """
    module, _, name = path.partition(":")
    copy = f"{__package__}.{module.removeprefix('xlstm_lm.').replace('.', '_')}"
    if IN_EXPORT and importlib.util.find_spec(copy):
        module = copy
    return getattr(importlib.import_module(module), name)
