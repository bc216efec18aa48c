"""The mLSTM block of the first xLSTM paper, up-projection included (arXiv 2405.04517, figure 11)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_lm.base.fields import Factor, Size
from xlstm_lm.models.layers import BlockDiagonalLinear, CausalConv, Float32Linear, HeadNorm, round_up
from xlstm_lm.models.mixers.mixer import (
    NORMS,
    PROJECTIONS,
    Observer,
    OperationUse,
    State,
    check_heads,
    head_norm_kept,
    residual_std,
    small_std,
)
from xlstm_lm.models.mixers.mlstm_cell import MLSTMCellConfig, MLSTMCellMixer, initialize_mlstm_gates
from xlstm_lm.models.storage import Storage
from xlstm_lm.ops.conv import CONV
from xlstm_lm.ops.mlstm import MLSTM


@dataclass(kw_only=True)
class PaperMLSTMConfig(MLSTMCellConfig):
    """Settings of the first paper's mLSTM."""

    kind: Literal["mlstm_paper"] = "mlstm_paper"
    """Kind of mixer."""
    paper_projection_factor: Factor
    """Inner width over the model width, rounded up to a multiple of 64."""
    paper_qkv_block_size: Size
    """Size of the diagonal blocks of the query, key and value projections."""
    conv_width: Size
    """Width of the causal convolution, in tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner_dim % self.paper_qkv_block_size:
            raise ValueError(
                f"paper_qkv_block_size {self.paper_qkv_block_size} does not divide the inner width "
                f"{self.inner_dim} of mlstm_paper blocks; choose a divisor of it."
            )
        check_heads(self.num_heads, "inner width embedding_dim * paper_projection_factor", self.inner_dim)

    @property
    def inner_dim(self) -> int:
        """Width between the projections."""
        return round_up(self.embedding_dim * self.paper_projection_factor, 64)

    @property
    def qk_dim(self) -> int:
        """Width of the queries of all heads."""
        return self.inner_dim

    @property
    def v_dim(self) -> int:
        """Width of the values of all heads."""
        return self.inner_dim

    def build(self) -> PaperMLSTMMixer:
        return PaperMLSTMMixer(self)

    @property
    def projection_weights(self) -> int:
        """Up, two halves, and down; block-diagonal queries, keys and values; gates."""
        diagonal, gates = 3 * self.paper_qkv_block_size, 3 * 2 * self.num_heads
        return self.inner_dim * (3 * self.embedding_dim + diagonal + gates)

    def kept_by_part(self, storage: Storage, context_length: int) -> dict[str, float]:
        """The input, both halves, the convolved half before and after its activation; q, k, v, once more in float32 at
        least for the gates, and h; the norm, the skip's sum, the output gate and the product."""
        a, D, E = storage.itemsize, self.embedding_dim, self.inner_dim
        conv = OperationUse(CONV, {"D": E, "W": self.conv_width})
        return {
            PROJECTIONS: a * (D + 2 * E + E + E) + storage.at_least_float32 * 3 * E,
            CONV.name: a * E + conv.kept(context_length, storage),
            MLSTM.name: a * 4 * E + self.cell_kept(storage, context_length),
            NORMS: head_norm_kept(storage, self.cell_norm, self.num_heads, E) + 2 * a * E,
        }

    def state_bytes(self, bytes_per_activation: int, context_length: int) -> int:
        """The cell's state and the convolution's last inputs."""
        return self.cell_state_bytes() + bytes_per_activation * (self.conv_width - 1) * self.inner_dim

    def operations(self, micro_rows: int) -> list[OperationUse]:
        conv = OperationUse(CONV, {"D": self.inner_dim, "W": self.conv_width})
        return [self.cell_operation(), conv]


class PaperMLSTMMixer(MLSTMCellMixer):
    """The first paper's mLSTM. The state holds the convolution's last inputs, then the cell's state."""

    def __init__(self, config: PaperMLSTMConfig) -> None:
        super().__init__(config)
        inner = config.inner_dim
        self.up = nn.Linear(config.embedding_dim, 2 * inner, bias=False)
        self.conv = CausalConv(inner, config.conv_width)
        num_diagonal_blocks = inner // config.paper_qkv_block_size
        self.query = BlockDiagonalLinear(inner, num_diagonal_blocks)
        self.key = BlockDiagonalLinear(inner, num_diagonal_blocks)
        self.value = BlockDiagonalLinear(inner, num_diagonal_blocks)
        self.gates = Float32Linear(3 * inner, 2 * config.num_heads)
        self.head_norm = HeadNorm(config.num_heads, inner // config.num_heads, config.cell_norm, config.norm_eps)
        self.skip = nn.Parameter(torch.ones(inner))
        self.down = nn.Linear(inner, config.embedding_dim, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        context: Tensor | None,
        state: State | None,
        return_state: bool,
        observe: Observer | None = None,
        overwrite_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        inner_BTE, output_BTE = self.up(x_BTD).chunk(2, dim=-1)
        conv_BTE, conv_state = self.conv(inner_BTE, context, state and state[0], return_state)
        conv_BTE = F.silu(conv_BTE)
        qkv = self.query(conv_BTE), self.key(conv_BTE), self.value(inner_BTE)
        gates_BTG = self.gates(torch.cat(qkv, dim=-1))
        h_BTHV, cell_state = self.run_cell(
            qkv, gates_BTG, context, state and state[1:], return_state, observe, overwrite_state
        )
        h_BTE = self.head_norm(h_BTHV) + self.skip * conv_BTE
        return self.down(h_BTE * F.silu(output_BTE)), None if cell_state is None else (conv_state, *cell_state)

    @torch.no_grad()
    def initialize_in_turn(self, index: int, depth: int) -> Iterator[Tensor]:
        """Small projections; the input gate starts near 1, the convolution as torch's own."""
        width, heads = self.config.embedding_dim, self.config.num_heads
        yield self.head_norm.weight
        nn.init.ones_(self.head_norm.weight)
        for projection in (self.up, self.query, self.key, self.value):
            yield projection.weight
            nn.init.normal_(projection.weight, std=small_std(width))
        yield self.down.weight
        nn.init.normal_(self.down.weight, std=residual_std(width, depth))
        yield self.skip
        nn.init.ones_(self.skip)
        yield from self.conv.initialize_in_turn()
        yield from initialize_mlstm_gates(self.gates)
        nn.init.normal_(self.gates.bias[:heads], std=0.1)
