"""The causal convolution as a compiled CPU loop."""

from __future__ import annotations

import torch

from xlstm_lm.ops.native import load_kernels


def conv_compiled(
    x_BTD: torch.Tensor, weight_DW: torch.Tensor, bias_D: torch.Tensor | None, documents_BT: torch.Tensor | None
) -> torch.Tensor:
    """The same as `xlstm_lm.ops.conv.shifts.conv_shifts`, for CPU tensors. Differentiable once.

    Raises:
        RuntimeError: there is no compiled kernel and none could be built here.
    """
    load_kernels()
    dtype = torch.promote_types(x_BTD.dtype, torch.float32)
    bias_D = None if bias_D is None else bias_D.to(dtype).contiguous()
    return torch.ops.xlstm_lm.conv_forward(x_BTD, weight_DW.t().to(dtype).contiguous(), bias_D, documents_BT)
