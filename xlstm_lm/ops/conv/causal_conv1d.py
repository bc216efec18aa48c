"""The causal convolution by the package causal_conv1d, on a GPU."""

from __future__ import annotations

import importlib

import torch

from xlstm_lm.ops.compiling import not_compiled


@not_compiled("causal_conv1d")  # torch.compile cannot look into the package
def conv_causal_conv1d(
    x_BTD: torch.Tensor, weight_DW: torch.Tensor, bias_D: torch.Tensor | None, documents_BT: torch.Tensor | None
) -> torch.Tensor:
    """The same as `conv_shifts`. The package supports documents where the channels are contiguous."""
    # Not an import: this file goes with exports, and transformers refuses code whose imports are not installed.
    kernel = importlib.import_module("causal_conv1d").causal_conv1d_fn
    stride_B, stride_T, stride_D = x_BTD.stride()
    if stride_D != 1 or any(each % 8 for each in (stride_B, stride_T, x_BTD.storage_offset())):
        x_BTD = x_BTD.clone(memory_format=torch.contiguous_format)  # it reads eight channels at once
    bias_D = None if bias_D is None else bias_D.to(weight_DW.dtype)
    documents_BT = None if documents_BT is None else documents_BT.to(torch.int32)
    return kernel(x_BTD.transpose(1, 2), weight_DW, bias_D, seq_idx=documents_BT).transpose(1, 2)
