"""A function of tensors as a captured CUDA graph: many small kernels for the cost of launching one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEPT = 16
"""Graphs kept at a time, those used last."""


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]


_graphs: OrderedDict[tuple[Any, ...], _Captured] = OrderedDict()


def run(
    function: Callable[..., None],
    *,
    inputs: tuple[Tensor | None, ...],
    outputs: tuple[Tensor, ...],
    capture: bool,
) -> None:
    """`function(*inputs, *outputs)`, which reads `inputs` and changes `outputs` in place.

    With `capture`, for sizes that come again and again, it is captured on a GPU the first time and replayed from then
    on, on tensors of its own that are copied to and from. Within someone else's capture it just runs.
    """
    if not (capture and outputs[0].is_cuda) or torch.cuda.is_current_stream_capturing():
        function(*inputs, *outputs)
        return
    device = outputs[0].device
    sizes = [None if x is None else (x.shape, x.dtype) for x in (*inputs, *outputs)]
    key = (function, device, torch.cuda.current_stream(device), *sizes)
    with torch.cuda.device(device):
        captured = _graphs.pop(key, None) or _capture(function, inputs, outputs)
        _graphs[key] = captured
        if len(_graphs) > KEPT:
            _graphs.popitem(last=False)
        for own, given in zip((*captured.inputs, *captured.outputs), (*inputs, *outputs), strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        captured.graph.replay()
        for own, given in zip(captured.outputs, outputs, strict=True):
            given.copy_(own)


def _capture(
    function: Callable[..., None], inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor, ...]
) -> _Captured:
    with torch.inference_mode(False), torch.no_grad():  # what is captured serves training too
        own_inputs = tuple(None if x is None else x.clone() for x in inputs)
        own_outputs = tuple(x.clone() for x in outputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function(*own_inputs, *own_outputs)  # compiles kernels and makes libraries allocate workspaces, before
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # On the same stream, for which libraries keep their workspaces; other threads may pin memory meanwhile.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            function(*own_inputs, *own_outputs)
    return _Captured(graph, own_inputs, own_outputs)
