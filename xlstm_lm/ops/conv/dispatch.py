"""Causal depthwise convolution over time that restarts, exactly, where a document starts: one entry, which picks the
fastest form there is."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from xlstm_lm.ops.conv.operation import CONV


def causal_conv(
    x_BTD: torch.Tensor,
    weight_DW: torch.Tensor,
    bias_D: torch.Tensor | None = None,
    *,
    resets_BT: torch.Tensor | None = None,
    initial_state_BWD: torch.Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y_t = bias + sum_j weight[:, W-1-j] * x_{t-j}, each channel for itself, over the inputs of t's own document.

    This is the convolution in front of the cells' gates (arXiv 2405.04517, figures 10 and 11). The newest input meets
    the last weight, as in `torch.nn.Conv1d(groups=D)` with W - 1 zeros on the left.

    Args:
        x_BTD: (B, T, D).
        weight_DW: (D, W).
        bias_D: (D,) or None.
        resets_BT: (B, T) bool; true where a document starts: nothing before it is seen from there on; None for none.
        initial_state_BWD: (B, W - 1, D), the inputs before the first, oldest first; None means zeros.
        return_state: also return such a state for what follows, with what precedes the last reset set to zero.
        backend: "auto" or the name of a backend of `CONV`.

    Returns:
        y (B, T, D) in x's dtype and, with `return_state`, the state (B, W - 1, D). Half precisions are summed in
        float32. Gradients reach x, weight, bias and the initial state, also from the returned state.

    Raises:
        ValueError: shapes or dtypes that do not fit each other, or an unknown backend.
    """
    _check(x_BTD, weight_DW, bias_D, resets_BT, initial_state_BWD)
    D, W = weight_DW.shape
    chosen = CONV.backend_for((x_BTD, weight_DW, bias_D), backend, has_resets=resets_BT is not None, D=D, W=W)
    past = weight_DW.shape[1] - 1
    extended_BTD = x_BTD
    if initial_state_BWD is not None:
        extended_BTD = torch.cat((initial_state_BWD.to(x_BTD.dtype), x_BTD), dim=1)
        resets_BT = None if resets_BT is None else pad(resets_BT, (past, 0))
    documents_BT = None if resets_BT is None else resets_BT.cumsum(1)

    y_BTD = chosen.loaded(extended_BTD, weight_DW, bias_D, documents_BT)
    if initial_state_BWD is not None:
        y_BTD = y_BTD[:, past:]
    if not return_state:
        return y_BTD

    return y_BTD, last_inputs(extended_BTD, documents_BT, past)


def last_inputs(x_BTD: torch.Tensor, documents_BT: torch.Tensor | None, past: int) -> torch.Tensor:
    """The last `past` inputs (B, past, D), zero where they are of an earlier document, or where there are fewer.

    Args:
        x_BTD: inputs (B, T, D).
        documents_BT: number of each input's document in its row (B, T); None where a row is one document.
        past: number of inputs.
    """
    first = x_BTD.shape[1] - past
    last_BWD = x_BTD[:, max(first, 0) :]
    if documents_BT is not None:
        of_last_document_BW = documents_BT[:, max(first, 0) :] == documents_BT[:, -1:]
        last_BWD = torch.where(of_last_document_BW[:, :, None], last_BWD, 0.0)
    return pad(last_BWD, (0, 0, max(-first, 0), 0))


def _check(
    x_BTD: torch.Tensor,
    weight_DW: torch.Tensor,
    bias_D: torch.Tensor | None,
    resets_BT: torch.Tensor | None,
    initial_state_BWD: torch.Tensor | None,
) -> None:
    if x_BTD.ndim != 3 or x_BTD.numel() == 0:
        raise ValueError(f"x has shape {tuple(x_BTD.shape)}; expected (B, T, D), each at least 1")
    B, T, D = x_BTD.shape
    if weight_DW.ndim != 2 or weight_DW.shape[0] != D or weight_DW.shape[1] < 1:
        raise ValueError(f"weight has shape {tuple(weight_DW.shape)}; expected (D, W) with D = {D}, the width of x")
    past = weight_DW.shape[1] - 1
    if bias_D is not None and bias_D.shape != (D,):
        raise ValueError(f"bias has shape {tuple(bias_D.shape)}; expected ({D},), the width of x")
    if resets_BT is not None and (resets_BT.shape != (B, T) or resets_BT.dtype != torch.bool):
        raise ValueError(
            f"resets is {resets_BT.dtype} of shape {tuple(resets_BT.shape)}; expected torch.bool of shape {(B, T)}, "
            "true where a document starts"
        )
    if initial_state_BWD is not None and initial_state_BWD.shape != (B, past, D):
        raise ValueError(
            f"initial_state has shape {tuple(initial_state_BWD.shape)}; expected {(B, past, D)}, "
            f"the {past} inputs that a width of {past + 1} looks back on"
        )
