"""The mLSTM of xLSTM-7B (arXiv 2503.13427, section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from xlstm_lm.base.fields import Factor, Size
from xlstm_lm.models.layers import Float32Linear, HeadNorm
from xlstm_lm.models.mixers.mixer import (
    NORMS,
    PROJECTIONS,
    FeedForwardConfig,
    Observer,
    OperationUse,
    State,
    check_heads,
    head_norm_kept,
    residual_std,
    silu_feedforward,
    small_std,
)
from xlstm_lm.models.mixers.mlstm_cell import MLSTMCellConfig, MLSTMCellMixer, initialize_mlstm_gates
from xlstm_lm.models.storage import Storage
from xlstm_lm.ops.mlstm import MLSTM


@dataclass(kw_only=True)
class MLSTMConfig(MLSTMCellConfig):
    """Settings of the mLSTM of xLSTM-7B."""

    kind: Literal["mlstm"] = "mlstm"
    """Kind of mixer."""
    qk_dim_factor: Factor
    """Width of queries and keys over the model width."""
    v_dim_factor: Factor
    """Width of values over the model width."""
    feedforward_factor: Factor
    """Feed-forward width over the model width, rounded up to a multiple of 64."""
    feedforward_dim: Size | None
    """Feed-forward width; null for the factor's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.num_heads, "query and key width embedding_dim * qk_dim_factor", self.qk_dim)
        check_heads(self.num_heads, "value width embedding_dim * v_dim_factor", self.v_dim)

    @property
    def qk_dim(self) -> int:
        """Width of the queries of all heads."""
        return round(self.embedding_dim * self.qk_dim_factor)

    @property
    def v_dim(self) -> int:
        """Width of the values of all heads."""
        return round(self.embedding_dim * self.v_dim_factor)

    def papers(self) -> list[str]:
        return [*super().papers(), "2503.13427"]

    def build(self) -> MLSTMMixer:
        return MLSTMMixer(self)

    @property
    def projection_weights(self) -> int:
        """Queries, keys, values, output gate, gates and the output."""
        return self.embedding_dim * (2 * self.qk_dim + 3 * self.v_dim + 2 * self.num_heads)

    def kept_by_part(self, storage: Storage, context_length: int) -> dict[str, float]:
        """The input, in float32 once more for the gates; q, k, v, o and h; norms and the output gate's product."""
        a, D, V = storage.itemsize, self.embedding_dim, self.v_dim
        cell = a * (2 * self.qk_dim + 3 * V) + self.cell_kept(storage, context_length)
        return {
            PROJECTIONS: a * D + storage.copied * D + a * V,
            MLSTM.name: cell,
            NORMS: head_norm_kept(storage, self.cell_norm, self.num_heads, V) + 2 * a * V,
        }

    def state_bytes(self, bytes_per_activation: int, context_length: int) -> int:
        """The cell's state."""
        return self.cell_state_bytes()

    def operations(self, micro_rows: int) -> list[OperationUse]:
        return [self.cell_operation()]

    def feedforward(self) -> FeedForwardConfig:
        return silu_feedforward(self.feedforward_dim, self.embedding_dim * self.feedforward_factor)


class MLSTMMixer(MLSTMCellMixer):
    """The mLSTM of xLSTM-7B. The state is the cell's."""

    def __init__(self, config: MLSTMConfig) -> None:
        super().__init__(config)
        self.widths = (config.qk_dim, config.qk_dim, config.v_dim, config.v_dim)
        self.qkvo = nn.Linear(config.embedding_dim, sum(self.widths), bias=False)
        self.gates = Float32Linear(config.embedding_dim, 2 * config.num_heads)  # they reach e^15
        self.head_norm = HeadNorm(config.num_heads, config.v_dim // config.num_heads, config.cell_norm, config.norm_eps)
        self.out = nn.Linear(config.v_dim, config.embedding_dim, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        context: Tensor | None,
        state: State | None,
        return_state: bool,
        observe: Observer | None = None,
        overwrite_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        *qkv, output_BTV = self.qkvo(x_BTD).split(self.widths, dim=-1)
        h_BTHV, state = self.run_cell(qkv, self.gates(x_BTD), context, state, return_state, observe, overwrite_state)
        return self.out(torch.sigmoid(output_BTV) * self.head_norm(h_BTHV)), state

    @torch.no_grad()
    def initialize_in_turn(self, index: int, depth: int) -> Iterator[Tensor]:
        """Small q, k, v; output gate and gates start from their biases alone; the input gate is nearly shut."""
        width, heads = self.config.embedding_dim, self.config.num_heads
        yield self.head_norm.weight
        nn.init.ones_(self.head_norm.weight)
        yield self.qkvo.weight
        self.initialize_qkvo()
        yield self.out.weight
        nn.init.normal_(self.out.weight, std=residual_std(width, depth))
        yield from initialize_mlstm_gates(self.gates)
        nn.init.constant_(self.gates.bias[:heads], -10.0)

    def initialize_qkvo(self) -> None:
        """Write the weight of queries, keys, values and output gate."""
        qkv, output_gate = self.qkvo.weight.split((sum(self.widths[:3]), self.widths[3]))
        nn.init.normal_(qkv, std=small_std(self.config.embedding_dim))
        nn.init.zeros_(output_gate)
