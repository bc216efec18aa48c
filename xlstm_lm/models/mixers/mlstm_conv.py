"""The mLSTM of xLSTM-7B (arXiv 2503.13427) with three parts of the first paper's block (arXiv 2405.04517, figure 11).

They are a causal convolution before the cell, a skip around the cell, and a SiLU output gate. The convolution runs over
queries, keys and values, as in Gated DeltaNet (arXiv 2412.06464) but without an activation behind it, which brought
nothing; the skip carries its values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_lm.base.fields import Size
from xlstm_lm.models.layers import CausalConv
from xlstm_lm.models.mixers.mixer import Observer, OperationUse, State, small_std
from xlstm_lm.models.mixers.mlstm import MLSTMConfig, MLSTMMixer
from xlstm_lm.models.storage import Storage
from xlstm_lm.ops.conv import CONV


@dataclass(kw_only=True)
class ConvMLSTMConfig(MLSTMConfig):
    """Settings of the mLSTM with a convolution."""

    kind: Literal["mlstm_conv"] = "mlstm_conv"  # type: ignore[assignment]  # another kind than the base's
    """Kind of mixer."""
    conv_width: Size
    """Width of the causal convolution, in tokens."""

    @property
    def convolved_dim(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.qk_dim + self.v_dim

    def papers(self) -> list[str]:
        return [*super().papers(), "2412.06464"]

    def build(self) -> ConvMLSTMMixer:
        return ConvMLSTMMixer(self)

    def kept_by_part(self, storage: Storage, context_length: int) -> dict[str, float]:
        """Those of the mLSTM, and queries, keys and values before the convolution."""
        _, conv = self.operations(1)
        kept = storage.itemsize * self.convolved_dim + conv.kept(context_length, storage)
        return super().kept_by_part(storage, context_length) | {CONV.name: kept}

    def state_bytes(self, bytes_per_activation: int, context_length: int) -> int:
        """The cell's state and the convolution's last inputs."""
        return self.cell_state_bytes() + bytes_per_activation * (self.conv_width - 1) * self.convolved_dim

    def operations(self, micro_rows: int) -> list[OperationUse]:
        return [self.cell_operation(), OperationUse(CONV, {"D": self.convolved_dim, "W": self.conv_width})]


class ConvMLSTMMixer(MLSTMMixer):
    """The mLSTM with a convolution. The state holds the convolution's last inputs, then the cell's state."""

    config: ConvMLSTMConfig

    def __init__(self, config: ConvMLSTMConfig) -> None:
        super().__init__(config)
        self.conv = CausalConv(config.convolved_dim, config.conv_width)
        self.skip = nn.Parameter(torch.ones(config.v_dim))

    def forward(
        self,
        x_BTD: Tensor,
        context: Tensor | None,
        state: State | None,
        return_state: bool,
        observe: Observer | None = None,
        overwrite_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        qkv_BTE, output_BTV = self.qkvo(x_BTD).split((self.config.convolved_dim, self.config.v_dim), dim=-1)
        convolved_BTE, conv_state = self.conv(qkv_BTE, context, state and state[0], return_state)
        qkv = convolved_BTE.split(self.widths[:3], dim=-1)
        h_BTHV, cell_state = self.run_cell(
            qkv, self.gates(x_BTD), context, state and state[1:], return_state, observe, overwrite_state
        )
        h_BTV = self.head_norm(h_BTHV) + self.skip * qkv[2]
        return self.out(h_BTV * F.silu(output_BTV)), None if cell_state is None else (conv_state, *cell_state)

    @torch.no_grad()
    def initialize_in_turn(self, index: int, depth: int) -> Iterator[Tensor]:
        """Initialize as the mLSTM of xLSTM-7B, but with a small output gate; the convolution as torch's own."""
        yield from super().initialize_in_turn(index, depth)
        yield self.skip
        nn.init.ones_(self.skip)
        yield from self.conv.initialize_in_turn()

    def initialize_qkvo(self) -> None:
        """Write small queries, keys and values; behind SiLU, an output gate of zero would shut the block."""
        nn.init.normal_(self.qkvo.weight, std=small_std(self.config.embedding_dim))
