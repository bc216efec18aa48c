"""The causal convolution as a compiled CPU loop, given to autograd."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from xlstm_lm.ops.native import load_kernels


def conv_compiled(
    x_BTD: torch.Tensor, weight_DW: torch.Tensor, bias_D: torch.Tensor | None, documents_BT: torch.Tensor | None
) -> torch.Tensor:
    """As `xlstm_lm.ops.conv.shifts.conv_shifts`, for CPU tensors.

    Raises:
        RuntimeError: there is no compiled kernel and none could be built here.
    """
    load_kernels()
    return _CompiledConv.apply(x_BTD, weight_DW, bias_D, documents_BT)


class _CompiledConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD, weight_DW, bias_D, documents_BT):
        ctx.save_for_backward(x_BTD, weight_DW, documents_BT)
        ctx.bias_dtype = None if bias_D is None else bias_D.dtype
        x, taps_WD = _readable(x_BTD), _taps(x_BTD, weight_DW)
        bias_D = None if bias_D is None else bias_D.to(x.dtype).contiguous()
        return torch.ops.xlstm_lm.conv_forward(x, taps_WD, bias_D, documents_BT).to(x_BTD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTD):
        x_BTD, weight_DW, documents_BT = ctx.saved_tensors
        dx_BTD, dtaps_BWD, dbias_BD = torch.ops.xlstm_lm.conv_backward(
            _readable(x_BTD), _taps(x_BTD, weight_DW), documents_BT, _readable(dy_BTD)
        )
        dbias_D = None if ctx.bias_dtype is None else dbias_BD.sum(0).to(ctx.bias_dtype)
        return dx_BTD.to(x_BTD.dtype), dtaps_BWD.sum(0).t().to(weight_DW.dtype), dbias_D, None


def _readable(x_BTD: torch.Tensor) -> torch.Tensor:
    """As the kernel reads it: in float32 at least, any strides, but channels side by side."""
    x_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
    return x_BTD if x_BTD.stride(-1) == 1 else x_BTD.contiguous()


def _taps(x_BTD: torch.Tensor, weight_DW: torch.Tensor) -> torch.Tensor:
    return weight_DW.t().to(torch.promote_types(x_BTD.dtype, torch.float32)).contiguous()
