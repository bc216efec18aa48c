"""The cells of an exported folder: xlstm-lm's, with all their kernels, where it is installed, else in plain PyTorch."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from xlstm_lm.ops.announce import announce_once
from xlstm_lm.ops.mlstm.chunkwise import mlstm_chunkwise
from xlstm_lm.ops.mlstm.recurrence import Options, mlstm_recurrence
from xlstm_lm.ops.mlstm.step import mlstm_step
from xlstm_lm.ops.selective_scan.recurrence import scan_recurrence
from xlstm_lm.ops.slstm.recurrence import slstm_recurrence

State = tuple[Tensor, ...]


def _plain_mlstm(
    *inputs: Tensor,
    resets: Tensor | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    overwrite_state: bool = False,
    backend: str = "auto",
    **options: Any,
) -> Tensor | tuple[Tensor, State]:
    """The mLSTM cell over a sequence: inputs, options and returns are those of `xlstm_lm.ops.mlstm.mlstm`."""
    del backend
    tensors = (*inputs, *(initial_state or ()))
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    cell = mlstm_chunkwise
    if torch.compiler.is_exporting() and needs_gradient:  # torch.export does not trace a hand-written backward
        cell = mlstm_recurrence
    elif inputs[0].shape[1] == 1 and not needs_gradient:
        cell = functools.partial(mlstm_step, overwrite_state=overwrite_state)
    h_BTHV, state = cell(
        *inputs, resets_BT=resets, initial_state=initial_state, return_state=return_state, options=Options(**options)
    )
    return (h_BTHV, state) if return_state else h_BTHV


def _plain_slstm(
    *inputs: Tensor, resets: Tensor | None = None, backend: str = "auto", **options: Any
) -> Tensor | tuple[Tensor, State]:
    """The sLSTM cell over a sequence: inputs, options and returns are those of `xlstm_lm.ops.slstm.slstm`."""
    del backend
    return slstm_recurrence(*inputs, resets_BT=resets, **options)


def _plain_selective_scan(
    x_BTE: Tensor,
    dt_BTE: Tensor,
    a_EN: Tensor,
    *inputs: Tensor,
    resets: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Mamba-1's scan: inputs, options and returns are those of `xlstm_lm.ops.selective_scan.selective_scan`."""
    del backend
    dtype = torch.promote_types(x_BTE.dtype, torch.float32)
    options = {"resets_BT": resets, "initial_state_BEN": initial_state, "return_state": return_state}
    return scan_recurrence(x_BTE, dt_BTE.to(dtype), a_EN.to(dtype), *inputs, **options)


try:
    mlstm = importlib.import_module("xlstm_lm.ops.mlstm").mlstm
    slstm = importlib.import_module("xlstm_lm.ops.slstm").slstm
    selective_scan = importlib.import_module("xlstm_lm.ops.selective_scan").selective_scan
except ImportError:
    mlstm, slstm, selective_scan = _plain_mlstm, _plain_slstm, _plain_selective_scan
    announce_once(
        "xlstm-lm is not installed, so this model runs in plain PyTorch: the mLSTM as batched matrix products "
        "(`chunkwise`), the sLSTM step by step (`recurrence`), which is slower."
    )
