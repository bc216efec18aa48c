"""Token losses from hidden states and the head's weight, a chunk of tokens at a time: all logits never exist together.

For a mean or sum the gradients are formed along with the loss, while a chunk's logits are at hand, and only scaled in
the backward pass. Nothing of the weight is kept, so it may be a parameter that is gathered for the forward pass alone
(DeepSpeed ZeRO-3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from xlstm_lm.ops.compiling import autocast_dtype, custom_operator, needs_gradient, without_autocast

Reduction = Literal["mean", "sum", "none"]

# Logits of one chunk. A CPU wants them to stay in its cache; a GPU wants products large enough to fill it (512 MiB).
_CHUNK_LOGITS_CPU = 1 << 20
_CHUNK_LOGITS_ACCELERATOR = 1 << 27


class _Options(NamedTuple):
    """The options, the same for every chunk."""

    soft_cap: float | None
    z_loss: float
    ignore_index: int
    chunk_tokens: int
    matmul_dtype: torch.dtype


def linear_cross_entropy(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    targets_BT: Tensor,
    *,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross entropy of the tokens under softmax(cap(hidden @ weight^T)), without ever holding all logits.

    cap(x) = soft_cap * tanh(x / soft_cap) bounds the logits (arXiv 2503.13427, section 3); z_loss * logsumexp(logits)^2
    is added for each token and keeps their level near zero (arXiv 2204.02311, section 5). Products run in the dtype of
    `hidden` (autocast's, where that is on), softmax and the accumulated weight gradient in at least float32.

    Args:
        hidden_BTD: (..., D); any number of leading dimensions.
        weight_VD: (V, D).
        targets_BT: (...) int64 in [0, V), or `ignore_index` where a token is not counted.
        soft_cap: bound of the logits, > 0; None leaves them as they are.
        z_loss: weight of the squared log-normalizer, >= 0.
        ignore_index: the target of tokens that are not counted.
        chunk_tokens: tokens whose logits exist at a time; None picks a number that suits the device.
        reduction: "mean" over the counted tokens (0 when there are none), "sum", or "none".

    Returns:
        The loss in nats, at least float32: a scalar, or (...) for "none" (0 where ignored). Differentiable once, in
        hidden and weight. "none" recomputes the logits in the backward pass and keeps the weight for it.

    Raises:
        ValueError: shapes that do not fit, targets that are not int64, or an option out of its range.
        IndexError, RuntimeError or a device assertion: a target outside the vocabulary, found by torch's own gather.
    """
    _check(hidden_BTD, weight_VD, targets_BT, soft_cap, z_loss, chunk_tokens, reduction)
    device = hidden_BTD.device.type
    matmul_dtype = autocast_dtype(hidden_BTD) or hidden_BTD.dtype
    if chunk_tokens is None:
        chunk_tokens = chunk_tokens_for(device, weight_VD.shape[0])
    options = _Options(soft_cap, z_loss, ignore_index, chunk_tokens, matmul_dtype)
    hidden_ND, targets_N = hidden_BTD.flatten(0, -2), targets_BT.flatten()
    if reduction == "none":
        return _token_losses(hidden_ND, weight_VD, targets_N, *options).view(targets_BT.shape)
    needed = needs_gradient(hidden_BTD), needs_gradient(weight_VD)
    loss, *_ = _total_loss(hidden_ND, weight_VD, targets_N, *options, reduction == "mean", *needed)
    return loss


def chunk_tokens_for(device: str, vocabulary: int) -> int:
    """Tokens whose logits exist at a time on a type of device, unless the caller gives a number."""
    budget = _CHUNK_LOGITS_CPU if device == "cpu" else _CHUNK_LOGITS_ACCELERATOR
    return max(64, budget // vocabulary)


def _compute_total_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    soft_cap: float | None,
    z_loss: float,
    ignore_index: int,
    chunk_tokens: int,
    matmul_dtype: torch.dtype,
    mean: bool,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum or mean over the tokens; the gradients of the sum by hidden states and weight, each empty unless it is
    needed; and the share of the sum that is returned."""
    options = _Options(soft_cap, z_loss, ignore_index, chunk_tokens, matmul_dtype)
    with without_autocast(hidden_ND):
        weight_VD = weight_VD.to(matmul_dtype)
        gradients = _Gradients(hidden_ND, weight_VD, options, needs_hidden=needs_hidden, needs_weight=needs_weight)
        total = hidden_ND.new_zeros((), dtype=_softmax_dtype(hidden_ND))
        for chunk in _chunks(hidden_ND, weight_VD, targets_N, options):
            total += chunk.losses_N.sum()
            if needs_hidden or needs_weight:
                gradients.add(chunk, None)
        scale = total.new_ones(())
        if mean:
            scale = scale / (targets_N != ignore_index).sum().clamp(min=1)
        return total * scale, gradients.hidden_ND, gradients.weight_VD, scale


def _total_loss_shapes(hidden_ND: Tensor, weight_VD: Tensor, *others: Any) -> tuple[Tensor, ...]:
    needed = others[-2:]
    loss = hidden_ND.new_empty((), dtype=_softmax_dtype(hidden_ND))
    return loss, *_gradient_shapes(hidden_ND, weight_VD, *needed), torch.empty_like(loss)


def _keep_for_total_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.weight_dtype, (*_, ctx.needs_hidden, ctx.needs_weight) = inputs[1].dtype, inputs
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients_of_total_loss(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 11
    dhidden_ND, dweight_VD, scale = ctx.saved_tensors
    scale = scale * dloss
    return (
        dhidden_ND * scale.to(dhidden_ND.dtype) if ctx.needs_hidden else None,
        (dweight_VD * scale).to(ctx.weight_dtype) if ctx.needs_weight else None,
        *[None] * 9,
    )


_total_loss = custom_operator(
    "total_loss",
    _compute_total_loss,
    _total_loss_shapes,
    gradients=_gradients_of_total_loss,
    keep=_keep_for_total_loss,
)


def _compute_token_losses(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    soft_cap: float | None,
    z_loss: float,
    ignore_index: int,
    chunk_tokens: int,
    matmul_dtype: torch.dtype,
) -> Tensor:
    """The loss of every token."""
    options = _Options(soft_cap, z_loss, ignore_index, chunk_tokens, matmul_dtype)
    with without_autocast(hidden_ND):
        chunks = _chunks(hidden_ND, weight_VD.to(matmul_dtype), targets_N, options)
        return torch.cat([chunk.losses_N for chunk in chunks])


def _token_losses_shapes(hidden_ND: Tensor, *_: Any) -> Tensor:
    return hidden_ND.new_empty(hidden_ND.shape[0], dtype=_softmax_dtype(hidden_ND))


def _compute_token_losses_backward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    dlosses_N: Tensor,
    soft_cap: float | None,
    z_loss: float,
    ignore_index: int,
    chunk_tokens: int,
    matmul_dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden states and weight, each empty unless it is needed, from logits made a second time."""
    options = _Options(soft_cap, z_loss, ignore_index, chunk_tokens, matmul_dtype)
    with without_autocast(hidden_ND):
        weight_VD = weight_VD.to(matmul_dtype)
        gradients = _Gradients(hidden_ND, weight_VD, options, needs_hidden=needs_hidden, needs_weight=needs_weight)
        for chunk in _chunks(hidden_ND, weight_VD, targets_N, options):
            gradients.add(chunk, dlosses_N[chunk.tokens])
    return gradients.hidden_ND, gradients.weight_VD


def _token_losses_backward_shapes(hidden_ND: Tensor, weight_VD: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _gradient_shapes(hidden_ND, weight_VD, *others[-2:])


_token_losses_backward = custom_operator(
    "token_losses_backward", _compute_token_losses_backward, _token_losses_backward_shapes
)


def _keep_for_token_losses(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden_ND, weight_VD, targets_N, *options = inputs
    ctx.save_for_backward(hidden_ND, weight_VD, targets_N)
    ctx.options = options


def _gradients_of_token_losses(ctx: Any, dlosses_N: Tensor) -> tuple[Tensor | None, ...]:
    hidden_ND, weight_VD, targets_N = ctx.saved_tensors
    needs_hidden, needs_weight, *_ = ctx.needs_input_grad
    dhidden_ND, dweight_VD = _token_losses_backward(
        hidden_ND, weight_VD, targets_N, dlosses_N, *ctx.options, needs_hidden, needs_weight
    )
    return (
        dhidden_ND if needs_hidden else None,
        dweight_VD.to(weight_VD.dtype) if needs_weight else None,
        *[None] * 6,
    )


_token_losses = custom_operator(
    "token_losses",
    _compute_token_losses,
    _token_losses_shapes,
    gradients=_gradients_of_token_losses,
    keep=_keep_for_token_losses,
)


def _gradient_shapes(
    hidden_ND: Tensor, weight_VD: Tensor, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden states, in their dtype, and of the weight, in at least float32, without content."""
    dtype = _softmax_dtype(hidden_ND)
    dhidden_ND = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format)
    return (
        dhidden_ND if needs_hidden else hidden_ND.new_empty(0),
        weight_VD.new_empty(weight_VD.shape if needs_weight else 0, dtype=dtype),
    )


@dataclass(kw_only=True)
class _Chunk:
    """The tokens of one chunk: their losses, and what the gradients need."""

    tokens: slice
    hidden_ND: Tensor
    targets_N: Tensor
    counted_N: Tensor
    capped_NV: Tensor | None  # tanh(logits / soft_cap)
    log_probability_NV: Tensor
    log_normalizer_N: Tensor | None
    losses_N: Tensor


def _softmax_dtype(hidden_ND: Tensor) -> torch.dtype:
    return torch.promote_types(hidden_ND.dtype, torch.float32)


def _chunks(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, options: _Options) -> Iterator[_Chunk]:
    """The losses, one chunk of tokens after another, all about as long; `weight_VD` in the dtype to multiply in."""
    N = hidden_ND.shape[0]
    length = math.ceil(N / math.ceil(N / options.chunk_tokens))
    for start in range(0, N, length):
        tokens = slice(start, start + length)
        chunk_ND = hidden_ND[tokens].to(options.matmul_dtype)
        logits_NV = (chunk_ND @ weight_VD.t()).to(_softmax_dtype(hidden_ND))
        capped_NV = None
        if options.soft_cap is not None:
            capped_NV = logits_NV.mul_(1.0 / options.soft_cap).tanh_()
            logits_NV = capped_NV * options.soft_cap
        log_probability_NV = torch.log_softmax(logits_NV, dim=-1)
        counted_N = targets_N[tokens] != options.ignore_index
        chunk_targets_N = torch.where(counted_N, targets_N[tokens], 0)
        losses_N = -log_probability_NV.gather(1, chunk_targets_N[:, None])[:, 0]
        log_normalizer_N = None
        if options.z_loss:
            log_normalizer_N = logits_NV[:, 0] - log_probability_NV[:, 0]
            losses_N = losses_N + options.z_loss * log_normalizer_N.square()
        yield _Chunk(
            tokens=tokens,
            hidden_ND=chunk_ND,
            targets_N=chunk_targets_N,
            counted_N=counted_N,
            capped_NV=capped_NV,
            log_probability_NV=log_probability_NV,
            log_normalizer_N=log_normalizer_N,
            losses_N=torch.where(counted_N, losses_N, 0.0),
        )


class _Gradients:
    """Gradients of hidden states (in their dtype) and weight (in at least float32), gathered chunk by chunk."""

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        options: _Options,
        *,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> None:
        self.options = options
        self.head_VD = weight_VD
        self.needs_hidden, self.needs_weight = needs_hidden, needs_weight
        self.hidden_ND, self.weight_VD = _gradient_shapes(hidden_ND, weight_VD, needs_hidden, needs_weight)
        self.weight_VD.zero_()

    def add(self, chunk: _Chunk, dlosses_N: Tensor | None) -> None:
        """Add the chunk's share, its losses weighted by `dlosses_N` (None: all by one). Overwrites the chunk."""
        dlogits_NV = chunk.log_probability_NV.exp_()
        if chunk.log_normalizer_N is not None:
            dlogits_NV *= (1.0 + 2.0 * self.options.z_loss * chunk.log_normalizer_N)[:, None]
        minus_one_N1 = dlogits_NV.new_full((1, 1), -1.0).expand(chunk.targets_N.shape[0], 1)
        dlogits_NV.scatter_add_(1, chunk.targets_N[:, None], minus_one_N1)
        if chunk.capped_NV is not None:
            dlogits_NV = torch.ops.aten.tanh_backward(dlogits_NV, chunk.capped_NV)
        weight_N = chunk.counted_N.to(dlogits_NV.dtype) if dlosses_N is None else dlosses_N * chunk.counted_N
        dlogits_NV = dlogits_NV.mul_(weight_N[:, None]).to(self.options.matmul_dtype)
        if self.needs_hidden:
            self.hidden_ND[chunk.tokens] = dlogits_NV @ self.head_VD
        if not self.needs_weight:
            return
        if self.options.matmul_dtype == self.weight_VD.dtype:
            self.weight_VD.addmm_(dlogits_NV.t(), chunk.hidden_ND)
        else:
            self.weight_VD += dlogits_NV.t() @ chunk.hidden_ND


def _check(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    targets_BT: Tensor,
    soft_cap: float | None,
    z_loss: float,
    chunk_tokens: int | None,
    reduction: str,
) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"unknown reduction {reduction!r}: choose 'mean', 'sum' or 'none'")
    if hidden_BTD.ndim < 2 or hidden_BTD.numel() == 0:
        raise ValueError(f"hidden has shape {tuple(hidden_BTD.shape)}; expected (..., D) with at least one token")
    if weight_VD.ndim != 2 or weight_VD.shape[1] != hidden_BTD.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight_VD.shape)}; expected (V, {hidden_BTD.shape[-1]}) to go with "
            f"hidden {tuple(hidden_BTD.shape)}"
        )
    if targets_BT.dtype != torch.int64 or targets_BT.shape != hidden_BTD.shape[:-1]:
        raise ValueError(
            f"targets is {targets_BT.dtype} of shape {tuple(targets_BT.shape)}; expected torch.int64 of shape "
            f"{tuple(hidden_BTD.shape[:-1])}"
        )
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap is {soft_cap}; it must be above 0, or None for no cap")
    if not z_loss >= 0:
        raise ValueError(f"z_loss is {z_loss}; it must be at least 0")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1, or None for a suitable number")
