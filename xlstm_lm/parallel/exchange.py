"""Exchanges between processes through which gradients flow back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Group = dist.ProcessGroup | None
"""Process group; None for that of all processes."""
# Newer names, from torch 2.13 on, of the functions that follow them.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        size = dist.get_world_size(group)
        gathered = x.new_empty(size * x.numel())
        _gather_into(gathered, x.flatten(), group=group)
        return gathered.view(size, *x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = gradient.new_empty(gradient[0].numel())
        _reduce_scatter_into(own, gradient.flatten(), group=ctx.group)
        return own.view(gradient.shape[1:]), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _swapped(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _swapped(gradient, ctx.group), None


def _swapped(x: Tensor, group: Group) -> Tensor:
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, x.contiguous(), group=group)
    return received


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, template: Tensor, source: int, group: Group) -> Tensor:
        ctx.source, ctx.group = source, group
        received = torch.empty_like(template, memory_format=torch.contiguous_format)
        dist.recv(received, group=group, group_src=source)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        dist.send(gradient.contiguous(), group=ctx.group, group_dst=ctx.source)
        return torch.zeros_like(gradient), None, None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passed: Tensor, sent: Tensor, target: int, group: Group) -> Tensor:
        ctx.target, ctx.group = target, group
        ctx.template = sent.new_empty(sent.shape)
        dist.send(sent.contiguous(), group=group, group_dst=target)
        return passed.view_as(passed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_sent = ctx.template
        dist.recv(of_sent, group=ctx.group, group_src=ctx.target)
        return gradient, of_sent, None, None


def all_gather(x: Tensor, group: Group) -> Tensor:
    """Equal tensors of all processes, in rank order: (...) -> (S, ...). In the backward pass their gradients are summed
    over the processes. Every process must use the result in its loss, with a weight of zero at least."""
    return _AllGather.apply(x, group)


def all_to_all(x: Tensor, group: Group) -> Tensor:
    """Part r of (S, ...) goes to process r; part j of the result comes from process j, in both directions."""
    return _AllToAll.apply(x, group)


def receive(template: Tensor, source: int, group: Group) -> Tensor:
    """A tensor in the shape and type of `template` from process `source`, to which its gradient goes back.

    Args:
        template: Tensor that needs a gradient, which is zero: it connects the received one to the graph.
        source: Rank of the sender in `group`.
        group: Process group.
    """
    return _Receive.apply(template, source, group)


def send(passed: Tensor, sent: Tensor, target: int, group: Group) -> Tensor:
    """Send a tensor and return `passed`; the backward pass waits for the gradient of `sent` when it reaches `passed`.

    Args:
        passed: Tensor that the loss depends on.
        sent: Tensor to send.
        target: Rank of the receiver in `group`.
        group: Process group.
    """
    return _Send.apply(passed, sent, target, group)
