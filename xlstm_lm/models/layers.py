"""The small layers that the model families share: norms, soft cap, block-diagonal projection, causal convolution,
gated feed-forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_lm.base.fields import Range
from xlstm_lm.ops.compiling import without_autocast
from xlstm_lm.ops.conv import causal_conv

if TYPE_CHECKING:
    from xlstm_lm.parallel.divided_rows import DividedRows

NormKind = Literal["rms", "layer"]
NumBlocks = Annotated[int, Range(1, 4096)]
SoftCap = Annotated[float, Range(0, 1e9, open_below=True)]


def round_up(value: float, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `value`."""
    return multiple * math.ceil(value / multiple)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """`cap * tanh(x / cap)`: the identity near zero, never beyond `cap` (arXiv 2503.13427); `None` changes nothing."""
    return x if cap is None else cap * torch.tanh(x / cap)


def make_norm(kind: NormKind, width: int, eps: float) -> nn.RMSNorm | nn.LayerNorm:
    """The norm before a block or after the last one: a weight, no bias."""
    return nn.RMSNorm(width, eps=eps) if kind == "rms" else nn.LayerNorm(width, eps=eps, bias=False)


class HeadNorm(nn.Module):
    """Norm of each head by itself, with one weight for every unit: (B, T, H, V) -> (B, T, H * V)."""

    def __init__(self, num_heads: int, head_dim: int, kind: NormKind, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads * head_dim))
        self.head_dim, self.kind, self.eps = head_dim, kind, eps

    def forward(self, h_BTHV: Tensor) -> Tensor:
        norm = F.layer_norm if self.kind == "layer" else F.rms_norm
        return norm(h_BTHV, (self.head_dim,), eps=self.eps).flatten(-2) * self.weight


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 at least, whatever the type of its input and weights, and also under
    torch.autocast."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with without_autocast(x):
            return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class BlockDiagonalLinear(nn.Module):
    """`num_blocks` independent projections of `width / num_blocks` units each, without bias: (..., D) -> (..., D).

    The weight is (blocks, out, in).
    """

    WORTHWHILE_WIDTH = 32
    """Units of the widest blocks that narrower ones are joined to."""
    MANY = 64
    """Vectors from which on joining blocks saves more time than it takes."""

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_blocks, width // num_blocks, width // num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if x.shape[:-1].numel() >= self.MANY:
            weight = join_diagonal_blocks(weight, self.WORTHWHILE_WIDTH)
        x_blocks = x.unflatten(-1, (weight.shape[0], -1))
        return torch.einsum("...gi,goi->...go", x_blocks, weight).flatten(-2)


def join_diagonal_blocks(weight_GOI: Tensor, width: int) -> Tensor:
    """The same block-diagonal map in fewer blocks, zeros between the old ones: as few as are of `width` units or less.

    Products with four columns leave a processor waiting for memory: four times the work, with sixteen, takes half the
    time.
    """
    blocks, units, _ = weight_GOI.shape
    together = 1
    for count in range(2, width // units + 1):  # not max(.., default=1), at which torch.compile breaks the graph
        if blocks % count == 0:
            together = count
    if together == 1:
        return weight_GOI
    apart_NM = torch.eye(together, dtype=weight_GOI.dtype, device=weight_GOI.device)
    joined_GNOMI = weight_GOI.unflatten(0, (-1, together))[..., None, :] * apart_NM[:, None, :, None]
    return joined_GNOMI.flatten(3).flatten(1, 2)


class CausalConv(nn.Module):
    """Depthwise causal convolution over time that restarts where a document does."""

    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, kernel_size))
        self.bias = nn.Parameter(torch.empty(width))
        self.divided_rows: DividedRows | None = None
        """Processes that divide the rows; None for whole rows."""

    def initialize_in_turn(self) -> Iterator[Tensor]:
        """Start as torch.nn.Conv1d does, uniform within one over the root of the taps; yields as a mixer's does."""
        bound = self.weight.shape[1] ** -0.5
        yield self.weight
        nn.init.uniform_(self.weight, -bound, bound)
        yield self.bias
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self,
        x_BTD: Tensor,
        resets_BT: Tensor | None = None,
        state_BWD: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The convolved input and, where `return_state` is set, the last inputs for the next call."""
        if self.divided_rows is not None:
            past = self.weight.shape[1] - 1
            state_BWD = self.divided_rows.convolution_inputs_before(x_BTD, resets_BT, past, state_BWD)
        result = causal_conv(
            x_BTD,
            self.weight,
            self.bias,
            resets_BT=resets_BT,
            initial_state_BWD=state_BWD,
            return_state=return_state,
        )
        return result if isinstance(result, tuple) else (result, None)


class GatedFeedForward(nn.Module):
    """`down(activation(gate(x)) * up(x))`, gate and up in one product; no biases."""

    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.activation = activation

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate, up = self.gate_up(x_BTD).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)
