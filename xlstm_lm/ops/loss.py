"""Token losses from hidden states and the head's weight, a chunk of tokens at a time: all logits never exist together.

For a mean or sum the gradients are formed along with the loss, while a chunk's logits are at hand, and only scaled in
the backward pass. Nothing of the weight is kept, so it may be a parameter that is gathered for the forward pass alone
(DeepSpeed ZeRO-3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch.autograd.function import once_differentiable

Reduction = Literal["mean", "sum", "none"]

# Logits of one chunk. A CPU wants them to stay in its cache; a GPU wants products large enough to fill it (512 MiB).
_CHUNK_LOGITS_CPU = 1 << 20
_CHUNK_LOGITS_ACCELERATOR = 1 << 27


@dataclass(kw_only=True, frozen=True)
class _Options:
    """What stays the same for every chunk."""

    soft_cap: float | None
    z_loss: float
    ignore_index: int
    chunk_tokens: int
    matmul_dtype: torch.dtype


def linear_cross_entropy(
    hidden_BTD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_BT: torch.Tensor,
    *,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    reduction: Reduction = "mean",
) -> torch.Tensor:
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
    matmul_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_BTD.dtype
    if chunk_tokens is None:
        budget = _CHUNK_LOGITS_CPU if device == "cpu" else _CHUNK_LOGITS_ACCELERATOR
        chunk_tokens = max(64, budget // weight_VD.shape[0])
    options = _Options(
        soft_cap=soft_cap,
        z_loss=z_loss,
        ignore_index=ignore_index,
        chunk_tokens=chunk_tokens,
        matmul_dtype=matmul_dtype,
    )
    hidden_ND, targets_N = hidden_BTD.flatten(0, -2), targets_BT.flatten()
    if reduction == "none":
        return _TokenLosses.apply(hidden_ND, weight_VD, targets_N, options).view(targets_BT.shape)
    differentiate = torch.is_grad_enabled() and (hidden_BTD.requires_grad or weight_VD.requires_grad)
    return _TotalLoss.apply(hidden_ND, weight_VD, targets_N, options, reduction == "mean", differentiate)


class _TotalLoss(torch.autograd.Function):
    """Sum or mean over the tokens; its gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, options, mean, differentiate):
        with torch.autocast(hidden_ND.device.type, enabled=False):
            ctx.weight_dtype = weight_VD.dtype
            weight_VD = weight_VD.to(options.matmul_dtype)
            needs_hidden = differentiate and ctx.needs_input_grad[0]
            needs_weight = differentiate and ctx.needs_input_grad[1]
            gradients = _Gradients(hidden_ND, weight_VD, options, needs_hidden=needs_hidden, needs_weight=needs_weight)
            total = hidden_ND.new_zeros((), dtype=_softmax_dtype(hidden_ND))
            for chunk in _chunks(hidden_ND, weight_VD, targets_N, options):
                total += chunk.losses_N.sum()
                if differentiate:
                    gradients.add(chunk, None)
            scale = total.new_ones(())
            if mean:
                scale = scale / (targets_N != options.ignore_index).sum().clamp(min=1)
            ctx.save_for_backward(gradients.hidden_ND, gradients.weight_VD, scale)
            return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dhidden_ND, dweight_VD, scale = ctx.saved_tensors
        scale = scale * dloss
        return (
            None if dhidden_ND is None else dhidden_ND * scale.to(dhidden_ND.dtype),
            None if dweight_VD is None else (dweight_VD * scale).to(ctx.weight_dtype),
            *[None] * 4,
        )


class _TokenLosses(torch.autograd.Function):
    """The loss of every token; the backward pass makes the logits a second time."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, options):
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N)
        ctx.options = options
        with torch.autocast(hidden_ND.device.type, enabled=False):
            chunks = _chunks(hidden_ND, weight_VD.to(options.matmul_dtype), targets_N, options)
            return torch.cat([chunk.losses_N for chunk in chunks])

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses_N):
        hidden_ND, weight_VD, targets_N = ctx.saved_tensors
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        with torch.autocast(hidden_ND.device.type, enabled=False):
            weight_dtype, weight_VD = weight_VD.dtype, weight_VD.to(ctx.options.matmul_dtype)
            gradients = _Gradients(
                hidden_ND, weight_VD, ctx.options, needs_hidden=needs_hidden, needs_weight=needs_weight
            )
            for chunk in _chunks(hidden_ND, weight_VD, targets_N, ctx.options):
                gradients.add(chunk, dlosses_N[chunk.tokens])
        dweight_VD = gradients.weight_VD
        return gradients.hidden_ND, None if dweight_VD is None else dweight_VD.to(weight_dtype), None, None


@dataclass(kw_only=True)
class _Chunk:
    """The tokens of one chunk: their losses, and what the gradients need."""

    tokens: slice
    hidden_ND: torch.Tensor
    targets_N: torch.Tensor
    counted_N: torch.Tensor
    capped_NV: torch.Tensor | None  # tanh(logits / soft_cap)
    log_probability_NV: torch.Tensor
    log_normalizer_N: torch.Tensor | None
    losses_N: torch.Tensor


def _softmax_dtype(hidden_ND: torch.Tensor) -> torch.dtype:
    return torch.promote_types(hidden_ND.dtype, torch.float32)


def _chunks(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, options: _Options
) -> Iterator[_Chunk]:
    """The losses, one chunk of tokens after another; `weight_VD` in the dtype to multiply in."""
    for start in range(0, hidden_ND.shape[0], options.chunk_tokens):
        tokens = slice(start, start + options.chunk_tokens)
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
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        options: _Options,
        *,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> None:
        self.options = options
        self.head_VD = weight_VD
        self.hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        self.weight_VD = torch.zeros_like(weight_VD, dtype=_softmax_dtype(hidden_ND)) if needs_weight else None

    def add(self, chunk: _Chunk, dlosses_N: torch.Tensor | None) -> None:
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
        if self.hidden_ND is not None:
            self.hidden_ND[chunk.tokens] = dlogits_NV @ self.head_VD
        if self.weight_VD is None:
            return
        if self.options.matmul_dtype == self.weight_VD.dtype:
            self.weight_VD.addmm_(dlogits_NV.t(), chunk.hidden_ND)
        else:
            self.weight_VD += dlogits_NV.t() @ chunk.hidden_ND


def _check(
    hidden_BTD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_BT: torch.Tensor,
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
