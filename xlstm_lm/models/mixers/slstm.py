"""The sLSTM of the first xLSTM paper with its convolution (arXiv 2405.04517, figure 10)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_lm.base.fields import Epsilon, Factor, Size
from xlstm_lm.models.layers import CausalConv, HeadNorm, NormKind, round_up
from xlstm_lm.models.mixers.mixer import (
    NORMS,
    PROJECTIONS,
    FeedForwardConfig,
    Mixer,
    MixerConfig,
    Observer,
    OperationUse,
    State,
    check_heads,
    head_norm_kept,
    small_std,
)
from xlstm_lm.models.storage import Storage
from xlstm_lm.ops.conv import CONV
from xlstm_lm.ops.slstm import SLSTM, slstm

# Backends of any machine: a run that names a GPU's kernel is also read where that cannot run.
SLSTMBackend = Literal["auto", "recurrence", "compiled", "triton", "cluster", "batched"]


@dataclass(kw_only=True)
class SLSTMConfig(MixerConfig):
    """Settings of the sLSTM."""

    kind: Literal["slstm"] = "slstm"
    """Kind of mixer."""
    num_heads: Size
    """Heads of the cell."""
    cell_norm: NormKind
    """Norm of each head behind the cell."""
    norm_eps: Epsilon
    """Epsilon of that norm."""
    conv_width: Size
    """Width of the causal convolution, in tokens."""
    slstm_feedforward_factor: Factor
    """Feed-forward width over the model width, rounded up to a multiple of 64."""
    slstm_backend: SLSTMBackend
    """Backend of the cell."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.num_heads, "embedding_dim", self.embedding_dim)

    @property
    def head_dim(self) -> int:
        """Units of a head."""
        return self.embedding_dim // self.num_heads

    def papers(self) -> list[str]:
        return ["2405.04517"]

    def build(self) -> SLSTMMixer:
        return SLSTMMixer(self)

    @property
    def projection_weights(self) -> int:
        """Inputs of the four gates, by heads."""
        return 4 * self.num_heads * self.head_dim**2

    def kept_by_part(self, storage: Storage, context_length: int) -> dict[str, float]:
        """The input, the convolution before and after its activation, the gates' inputs, y, and the norm."""
        a, D = storage.itemsize, self.embedding_dim
        cell, conv = (use.kept(context_length, storage) for use in self.operations(1))
        gates = 0 if storage.device == "cpu" and storage.copied else 4 * a * D  # else the float32 copies stay instead
        return {
            PROJECTIONS: 2 * a * D,
            CONV.name: a * D + conv,
            SLSTM.name: gates + a * D + cell,
            NORMS: head_norm_kept(storage, self.cell_norm, self.num_heads, D),
        }

    def state_bytes(self, bytes_per_activation: int, context_length: int) -> int:
        """Four float32 numbers a unit, and the convolution's last inputs."""
        return self.embedding_dim * (4 * 4 + bytes_per_activation * (self.conv_width - 1))

    def operations(self, micro_rows: int) -> list[OperationUse]:
        cell = {"B": micro_rows, "H": self.num_heads, "D": self.head_dim}
        conv = {"D": self.embedding_dim, "W": self.conv_width}
        return [OperationUse(SLSTM, cell, backend=self.slstm_backend), OperationUse(CONV, conv)]

    def feedforward(self) -> FeedForwardConfig:
        return FeedForwardConfig(round_up(self.embedding_dim * self.slstm_feedforward_factor, 64), "gelu")


class SLSTMMixer(Mixer):
    """The first paper's sLSTM. The state holds the convolution's last inputs, then the cell's state."""

    no_decay = frozenset({"bias"})  # a dimension each for gates, heads and units
    has_gates = True
    parts = MappingProxyType({"input_weight": PROJECTIONS})

    def __init__(self, config: SLSTMConfig) -> None:
        super().__init__()
        self.config = config
        heads, head_dim = config.num_heads, config.head_dim
        self.conv = CausalConv(config.embedding_dim, config.conv_width)
        # Gates in the order input, forget, cell input, output.
        self.input_weight = nn.Parameter(torch.empty(4, heads, head_dim, head_dim))
        self.recurrent_weight = nn.Parameter(torch.empty(4, heads, head_dim, head_dim))
        self.bias = nn.Parameter(torch.empty(4, heads, head_dim))
        self.head_norm = HeadNorm(heads, head_dim, config.cell_norm, config.norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        context: Tensor | None,
        state: State | None,
        return_state: bool,
        observe: Observer | None = None,
        overwrite_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        del overwrite_state  # a few numbers a unit: nothing to save
        conv_BTD, conv_state = self.conv(x_BTD, context, state and state[0], return_state)
        heads = self.config.num_heads
        conv_BTHD, x_BTHD = F.silu(conv_BTD).unflatten(-1, (heads, -1)), x_BTD.unflatten(-1, (heads, -1))
        wx_BTGHD = torch.cat(
            (
                torch.einsum("bthd,ghde->btghe", conv_BTHD, self.input_weight[:2]),
                torch.einsum("bthd,ghde->btghe", x_BTHD, self.input_weight[2:]),
            ),
            dim=2,
        )
        cell = slstm if self.divided_rows is None else self.divided_rows.slstm
        result = cell(
            wx_BTGHD,
            self.recurrent_weight,
            self.bias,
            resets=context,
            initial_state=state and state[1:],
            return_state=return_state,
            backend=self.config.slstm_backend,
        )
        y_BTHD, cell_state = result if isinstance(result, tuple) else (result, None)
        if observe is not None:
            first_y_BHD = state[1] if state else torch.zeros_like(y_BTHD[:, 0])
            if self.divided_rows is not None:
                first_y_BHD = self.divided_rows.convolution_inputs_before(y_BTHD, None, 1, first_y_BHD[:, None])[:, 0]
            previous_BTHD = torch.cat((first_y_BHD.unsqueeze(1), y_BTHD[:, :-1]), dim=1)
            if context is not None:
                previous_BTHD = previous_BTHD.masked_fill(context[..., None, None], 0)
            recurrent_BTGHD = torch.einsum("bthd,ghde->btghe", previous_BTHD, self.recurrent_weight[:2])
            input_BTHD, forget_BTHD = (wx_BTGHD[:, :, :2] + recurrent_BTGHD + self.bias[:2]).unbind(2)
            observe(input_BTHD, forget_BTHD, None)
        return self.head_norm(y_BTHD), None if cell_state is None else (conv_state, *cell_state)

    @torch.no_grad()
    def initialize_in_turn(self, index: int, depth: int) -> Iterator[Tensor]:
        """No recurrence at first; forget biases fall from 5 to -7 over a head, more steeply in later blocks."""
        yield self.head_norm.weight
        nn.init.ones_(self.head_norm.weight)
        yield self.input_weight
        nn.init.normal_(self.input_weight, std=small_std(self.config.embedding_dim))
        yield self.recurrent_weight
        nn.init.zeros_(self.recurrent_weight)
        yield from self.conv.initialize_in_turn()
        yield self.bias
        nn.init.zeros_(self.bias)
        unit = torch.linspace(0, 1, self.bias.shape[-1])
        self.bias[1] = 5 - 12 * unit ** (0.3 + 1.3 * (index / max(depth - 1, 1)))
