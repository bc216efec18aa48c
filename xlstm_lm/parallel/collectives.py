"""Count the collectives of a piece of work: how many, in which type, how many bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "reduce_scatter_": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "gather_": "gather",
    "scatter_": "scatter",
    "alltoall_": "all-to-all",
    "alltoall_base_": "all-to-all",
    "send": "send",
    "recv_": "receive",
    "barrier": "barrier",
}
"""Usual name of each operator in torch's namespace c10d."""


class Collective(NamedTuple):
    """Kind of a collective and type of its numbers."""

    kind: str
    """Usual name, such as all-reduce."""
    dtype: torch.dtype | None
    """Type of the numbers that travel; None for a barrier."""


@dataclass
class Amount:
    """Number and bytes of calls of a collective."""

    calls: int = 0
    bytes: int = 0
    """Size of the whole tensors, on one rank: what an all-gather yields, what a reduce-scatter begins with."""


class CountCollectives(TorchDispatchMode):
    """A context that counts the collectives that this thread starts inside, those of a backward pass on a CPU too."""

    def __init__(self) -> None:
        super().__init__()
        self.amounts: dict[Collective, Amount] = {}
        """The collectives so far, in the order of first use."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func.__name__.split(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _count(self, operator: str, args: tuple[Any, ...]) -> None:
        # The whole tensor stands on one side of a collective, this rank's part of it on the other.
        sizes: list[Counter[torch.dtype]] = []
        for value in args:
            size: Counter[torch.dtype] = Counter()
            for tensor in _tensors(value):
                size[tensor.dtype] += tensor.nbytes
            sizes.append(size)
        largest = max(sizes, key=lambda size: size.total(), default=Counter())
        for dtype, count in (largest or {None: 0}).items():
            amount = self.amounts.setdefault(Collective(KINDS.get(operator, operator), dtype), Amount())
            amount.calls += 1
            amount.bytes += count


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in _tensors(each)]
    return []
