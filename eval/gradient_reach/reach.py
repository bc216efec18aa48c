"""How far back the gradient of a loss reaches, measured on the windows of some documents.

The question that the LSTM was made for (Hochreiter, 1991; Bengio, Simard and Frasconi, 1994). A window is T + 1
successive tokens of one document, read from an empty state. Its loss is the cross entropy of the last token given the
T before; e_s is what the embedding gives for the s-th of these, before anything else has touched it. The reach is

    g(k) = || d loss / d e_(T-1-k) ||        k = 0, ..., T - 1

the Euclidean norm of the gradient k tokens before the input at which the prediction is read off. Models differ in
scale, so g(k) / g(0) of the same window is shown: its median and its 10 % and 90 % quantiles over all windows and all
distances of a bin (a quarter of a doubling). Beside it, the distance within which half, 90 % and 99 % of the whole
lies: the share g(k) / (g(0) + ... + g(T-1)) of each window, averaged over windows and summed from k = 0 on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.bench.speed_models import Model, describe_kernels
from eval.scoring.documents import Text
from xlstm_lm.base.finite import check_finite
from xlstm_lm.data import Tokenizer
from xlstm_lm.models.accounting import count_parameters
from xlstm_lm.ops.operation import recorded_choices

DEFINITION = __doc__.split("\n\n", 1)[1]
PARTS = (0.5, 0.9, 0.99)
QUANTILES = (0.1, 0.5, 0.9)


@dataclass(kw_only=True)
class Bin:
    """g(k) / g(0) at the distances first, ..., last."""

    first: int
    last: int
    low: float
    """10 % quantile over windows and distances."""
    median: float
    high: float
    """90 % quantile."""


@dataclass(kw_only=True)
class Reach:
    """One model, before or after training."""

    name: str
    stage: str
    source: str
    """The preset, or the run folder."""
    parameters: int
    kernels: str
    windows: int
    length: int
    """Inputs of a window."""
    loss: float
    """Nats: mean of the losses whose gradient is taken."""
    norm_at_zero: float
    """Median over windows of g(0)."""
    within: dict[str, int]
    """Least distance that contains a part of the whole, by the part, such as 0.9."""
    bins: list[Bin]


def input_gradients(module: nn.Module, embedding: nn.Embedding, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    """g(k) of windows (B, T + 1), as (B, T) in float64 with k along the second axis, and the losses (B,).

    Args:
        module: has `hidden(tokens)` and `loss(hidden, targets)`, as `eval.bench.speed_models` makes them.
        embedding: the layer of it whose output e is.
    """
    # cuDNN computes the gradient of a recurrent layer in training mode alone; nothing else may differ there.
    for each in module.modules():
        each.training = not isinstance(each, nn.Dropout)
    embedded: list[Tensor] = []

    def take(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    with embedding.register_forward_hook(take):
        hidden_BTD = module.hidden(tokens_BT[:, :-1])
    loss_B1 = module.loss(hidden_BTD[:, -1:], tokens_BT[:, -1:], reduction="none")
    [gradient_BTD] = torch.autograd.grad(loss_B1.sum(), embedded)  # rows are independent
    return gradient_BTD.double().norm(dim=-1).flip(1), loss_B1.detach()[:, 0]


def make_bins(length: int) -> list[tuple[int, int]]:
    """First and last distance of each bin: 1, 2, ... and from 8 on a quarter of a doubling, up to `length` - 1."""
    edges = {round(2 ** (quarter / 4)) for quarter in range(4 * length.bit_length())}
    edges = [*sorted(edge for edge in edges if edge < length), length]
    return [(first, after - 1) for first, after in itertools.pairwise(edges)]


def summarize(norms_BT: Tensor) -> dict[str, Any]:
    """The fields norm_at_zero, within and bins of a `Reach`, from g(k) of every window (B, T)."""
    relative_BT = norms_BT / norms_BT[:, :1]
    bins = []
    for first, last in make_bins(norms_BT.shape[1]):
        low, median, high = np.quantile(relative_BT[:, first : last + 1].numpy(), QUANTILES).tolist()
        bins.append(Bin(first=first, last=last, low=low, median=median, high=high))
    reached_T = (norms_BT / norms_BT.sum(1, keepdim=True)).mean(0).cumsum(0)
    last = len(reached_T) - 1  # the whole, but for rounding
    within = {str(part): min(int((reached_T < part).sum()), last) for part in PARTS}
    return {"norm_at_zero": float(norms_BT[:, 0].median()), "within": within, "bins": bins}


def make_windows(texts: Iterable[Text], tokenizer: Tokenizer, length: int, count: int) -> Tensor:
    """`count` windows (count, `length` + 1) of successive tokens of one document each, spread evenly over the texts.

    Raises:
        ValueError: the documents have fewer such windows.
    """
    found = []
    for text in texts:
        tokens_N = tokenizer.encode_array(text.text)
        usable = len(tokens_N) // (length + 1) * (length + 1)
        found += list(tokens_N[:usable].reshape(-1, length + 1))
    if len(found) < count:
        raise ValueError(
            f"The documents hold {len(found)} windows of {length + 1} tokens, but --windows is {count}: give more or "
            "longer documents, fewer windows or a smaller --length."
        )
    chosen = np.linspace(0, len(found) - 1, count).round().astype(int)
    return torch.from_numpy(np.stack([found[index] for index in chosen]).astype(np.int64))


def measure_reach(module: nn.Module, model: Model, windows_NT: Tensor, batch_size: int, **names: str) -> Reach:
    """The reach of one model over windows (N, T + 1); `names` are the fields stage and source."""
    embedding = module.model.get_input_embeddings() if model.is_stock else module.model.embedding
    with recorded_choices() as taken:
        found = [
            input_gradients(module, embedding, windows.to(embedding.weight.device))
            for windows in windows_NT.split(batch_size)
        ]
    norms_NT, nats_N = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    check_finite(norms_NT, module, f"The gradients of {model.name}")
    return Reach(
        name=model.name,
        parameters=count_parameters(model.config),
        kernels=describe_kernels(model, taken),
        windows=len(windows_NT),
        length=norms_NT.shape[1],
        loss=float(nats_N.mean()),
        **summarize(norms_NT),
        **names,
    )
