"""torch's LSTM, GRU or plain recurrent layer over packed documents as one operator, for graphs of torch.compile.

The number of sequences in a call of torch's kernel depends on where documents begin, which no graph can follow. The
backward runs the layer a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from xlstm_lm.ops.compiling import custom_operator

KERNELS: dict[str, Callable[..., Any]] = {"lstm": torch.lstm, "gru": torch.gru, "rnn": torch.rnn_tanh}


def compute(
    x_BTD: Tensor,
    resets_BT: Tensor,
    y_BH: Tensor,
    c_BH: Tensor | None,
    input_weight_GD: Tensor,
    recurrent_weight_GH: Tensor,
    bias_G: Tensor,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (B, T, H), and the last output and, in an LSTM, the last cell, else empty.

    Args:
        resets_BT: (B, T) bool, true where a document starts.
        y_BH, c_BH: output and cell (B, H) from which the first document of each row continues, unless the row starts
            with a reset; c_BH is None except in an LSTM.
        cell: a name of `KERNELS`.
    """
    (B, T), device = resets_BT.shape, x_BTD.device
    starts_BT = resets_BT.cpu().clone()
    starts_BT[:, 0] = True
    starts_M = starts_BT.flatten().nonzero().flatten().tolist()
    lengths = [end - start for start, end in zip(starts_M, [*starts_M[1:], B * T], strict=True)]
    documents_B = starts_BT.sum(1)
    last_B = (documents_B.cumsum(0) - 1).to(device)
    first_B = last_B + 1 - documents_B.to(device)

    packed = pack_sequence(x_BTD.flatten(0, 1).split(lengths), enforce_sorted=False)
    state = [each.masked_fill(resets_BT[:, :1], 0) for each in (y_BH, c_BH) if each is not None]
    state = [each.new_zeros(len(lengths), each.shape[1]).index_copy(0, first_B, each) for each in state]
    state = [each[packed.sorted_indices][None] for each in state]
    weights = [input_weight_GD, recurrent_weight_GH, bias_G, torch.zeros_like(bias_G)]
    options = {"num_layers": 1, "dropout": 0.0, "train": torch.is_grad_enabled(), "bidirectional": False}
    y, *last = KERNELS[cell](
        packed.data, packed.batch_sizes, state if cell == "lstm" else state[0], weights, has_biases=True, **options
    )
    y_BTH = torch.cat(unpack_sequence(PackedSequence(y, *packed[1:]))).unflatten(0, (B, T))
    last = [each[0][packed.unsorted_indices][last_B] for each in last]
    return y_BTH, last[0], last[1] if cell == "lstm" else y_BTH.new_empty(0)


def _shapes(
    x_BTD: Tensor, resets_BT: Tensor, y_BH: Tensor, c_BH: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T), H = resets_BT.shape, y_BH.shape[1]
    return x_BTD.new_empty(B, T, H), x_BTD.new_empty(B, H), x_BTD.new_empty(0 if c_BH is None else (B, H))


def compute_backward(
    x_BTD: Tensor,
    resets_BT: Tensor,
    y_BH: Tensor,
    c_BH: Tensor | None,
    input_weight_GD: Tensor,
    recurrent_weight_GH: Tensor,
    bias_G: Tensor,
    dy_BTH: Tensor,
    dy_BH: Tensor,
    dc_BH: Tensor,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, c (empty where there is none) and the weights."""
    with torch.enable_grad():
        x, y, weight, recurrent_weight, bias = (
            each.detach().requires_grad_() for each in (x_BTD, y_BH, input_weight_GD, recurrent_weight_GH, bias_G)
        )
        c = None if c_BH is None else c_BH.detach().requires_grad_()
        values = compute(x, resets_BT, y, c, weight, recurrent_weight, bias, cell)
    inputs = [each for each in (x, y, c, weight, recurrent_weight, bias) if each is not None]
    count = 2 if c is None else 3
    gradients = list(torch.autograd.grad(values[:count], inputs, (dy_BTH, dy_BH, dc_BH)[:count]))
    if c is None:
        gradients.insert(2, dy_BH.new_empty(0))
    dx, dy, dc, dweight, drecurrent_weight, dbias = (each.contiguous() for each in gradients)
    return dx, dy, dc, dweight, drecurrent_weight, dbias


def _backward_shapes(
    x_BTD: Tensor, resets_BT: Tensor, y_BH: Tensor, c_BH: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    c_BH = y_BH.new_empty(0) if c_BH is None else c_BH
    return tuple(each.new_empty(each.shape) for each in (x_BTD, y_BH, c_BH, *others[:3]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.cell = inputs
    ctx.save_for_backward(*tensors)
    ctx.has_cell = inputs[3] is not None


def _gradients(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    dx, dy, dc, *dweights = backward(*ctx.saved_tensors, *(each.contiguous() for each in upstream), ctx.cell)
    return dx, None, dy, dc if ctx.has_cell else None, *dweights, None


backward = custom_operator("document_rnn_backward", compute_backward, _backward_shapes)
document_rnn = custom_operator("document_rnn", compute, _shapes, gradients=_gradients, keep=_keep)
