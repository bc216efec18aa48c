"""What an xLSTM block does along time: the mLSTM of xLSTM-7B, the mLSTM of the first paper, and the sLSTM.

Every mixer maps (B, T, D) to (B, T, D) and returns its state after the last token where `return_state` is set.
`observe`, where given, receives the input and forget gate pre-activations, soft cap included. With `overwrite_state`
the state handed in may be overwritten with the one returned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_lm.models.language_model import State
from xlstm_lm.models.layers import BlockDiagonalLinear, CausalConv, Float32Linear, HeadNorm, soft_cap
from xlstm_lm.models.xlstm_config import XLSTMConfig
from xlstm_lm.ops.mlstm import mlstm
from xlstm_lm.ops.slstm import slstm

Observer = Callable[[Tensor, Tensor], None]


class MLSTMMixer(nn.Module):
    """The mLSTM of an xLSTM-7B block (arXiv 2503.13427, section 3): (B, T, D) -> (B, T, D)."""

    def __init__(self, config: XLSTMConfig) -> None:
        super().__init__()
        self.config = config
        self.widths = (config.qk_dim, config.qk_dim, config.v_dim, config.v_dim)
        self.qkvo = nn.Linear(config.embedding_dim, sum(self.widths), bias=False)
        self.gates = Float32Linear(config.embedding_dim, 2 * config.num_heads)  # they reach e^15
        self.head_norm = HeadNorm(config.num_heads, config.v_dim // config.num_heads, config.cell_norm, config.norm_eps)
        self.out = nn.Linear(config.v_dim, config.embedding_dim, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        resets_BT: Tensor | None,
        state: State | None,
        return_state: bool,
        observe: Observer | None = None,
        overwrite_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        q, k, v, output_BTV = self.qkvo(x_BTD).split(self.widths, dim=-1)
        h_BTHV, state = _mlstm_cell(
            self.config, q, k, v, self.gates, x_BTD, resets_BT, state, return_state, observe, overwrite_state
        )
        return self.out(torch.sigmoid(output_BTV) * self.head_norm(h_BTHV)), state


class PaperMLSTMMixer(nn.Module):
    """The mLSTM block of the first paper, up-projection and all (arXiv 2405.04517, figure 11): (B, T, D) -> same."""

    def __init__(self, config: XLSTMConfig) -> None:
        super().__init__()
        self.config = config
        inner = config.paper_inner_dim
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
        resets_BT: Tensor | None,
        state: State | None,
        return_state: bool,
        observe: Observer | None = None,
        overwrite_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        inner_BTE, output_BTE = self.up(x_BTD).chunk(2, dim=-1)
        conv_BTE, conv_state = self.conv(inner_BTE, resets_BT, state and state[0], return_state)
        conv_BTE = F.silu(conv_BTE)
        q, k, v = self.query(conv_BTE), self.key(conv_BTE), self.value(inner_BTE)
        gate_input = torch.cat((q, k, v), dim=-1)
        cell_state = state and state[1:]
        h_BTHV, cell_state = _mlstm_cell(
            self.config, q, k, v, self.gates, gate_input, resets_BT, cell_state, return_state, observe, overwrite_state
        )
        h_BTE = self.head_norm(h_BTHV) + self.skip * conv_BTE
        return self.down(h_BTE * F.silu(output_BTE)), _join(conv_state, cell_state)


class SLSTMMixer(nn.Module):
    """The sLSTM of the first paper with its convolution (arXiv 2405.04517, figure 10): (B, T, D) -> (B, T, D)."""

    def __init__(self, config: XLSTMConfig) -> None:
        super().__init__()
        self.config = config
        heads, head_dim = config.num_heads, config.embedding_dim // config.num_heads
        self.conv = CausalConv(config.embedding_dim, config.conv_width)
        # Gates in the order input, forget, cell input, output.
        self.input_weight = nn.Parameter(torch.empty(4, heads, head_dim, head_dim))
        self.recurrent_weight = nn.Parameter(torch.empty(4, heads, head_dim, head_dim))
        self.bias = nn.Parameter(torch.empty(4, heads, head_dim))
        self.head_norm = HeadNorm(heads, head_dim, config.cell_norm, config.norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        resets_BT: Tensor | None,
        state: State | None,
        return_state: bool,
        observe: Observer | None = None,
        overwrite_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        del overwrite_state  # a few numbers a unit: nothing to save
        conv_BTD, conv_state = self.conv(x_BTD, resets_BT, state and state[0], return_state)
        heads = self.config.num_heads
        conv_BTHD, x_BTHD = F.silu(conv_BTD).unflatten(-1, (heads, -1)), x_BTD.unflatten(-1, (heads, -1))
        wx_BTGHD = torch.cat(
            (
                torch.einsum("bthd,ghde->btghe", conv_BTHD, self.input_weight[:2]),
                torch.einsum("bthd,ghde->btghe", x_BTHD, self.input_weight[2:]),
            ),
            dim=2,
        )
        y_BTHD = slstm(
            wx_BTGHD,
            self.recurrent_weight,
            self.bias,
            resets=resets_BT,
            initial_state=state and state[1:],
            return_state=return_state,
            backend=self.config.slstm_backend,
        )
        y_BTHD, cell_state = y_BTHD if return_state else (y_BTHD, None)
        if observe is not None:
            first_y_BHD = state[1] if state else torch.zeros_like(y_BTHD[:, 0])
            previous_BTHD = torch.cat((first_y_BHD.unsqueeze(1), y_BTHD[:, :-1]), dim=1)
            if resets_BT is not None:
                previous_BTHD = previous_BTHD.masked_fill(resets_BT[..., None, None], 0)
            recurrent_BTGHD = torch.einsum("bthd,ghde->btghe", previous_BTHD, self.recurrent_weight[:2])
            observe(*(wx_BTGHD[:, :, :2] + recurrent_BTGHD + self.bias[:2]).unbind(2))
        return self.head_norm(y_BTHD), _join(conv_state, cell_state)


def _mlstm_cell(
    config: XLSTMConfig,
    q_BTE: Tensor,
    k_BTE: Tensor,
    v_BTE: Tensor,
    gates: nn.Linear,
    gate_input_BTE: Tensor,
    resets_BT: Tensor | None,
    state: State | None,
    return_state: bool,
    observe: Observer | None,
    overwrite_state: bool,
) -> tuple[Tensor, State | None]:
    """Form the gates, split the heads and run the cell: h (B, T, H, V) and the state after the last token."""
    input_BTH, forget_BTH = soft_cap(gates(gate_input_BTE), config.gate_soft_cap).chunk(2, dim=-1)
    if observe is not None:
        observe(input_BTH, forget_BTH)
    h_BTHV = mlstm(
        *(tensor.unflatten(-1, (config.num_heads, -1)) for tensor in (q_BTE, k_BTE, v_BTE)),
        input_BTH,
        forget_BTH,
        resets=resets_BT,
        initial_state=state,
        return_state=return_state,
        input_gate=config.input_gate,
        chunk_length=config.chunk_length,
        eps=config.cell_eps,
        overwrite_state=overwrite_state,
        backend=config.mlstm_backend,
    )
    return h_BTHV if return_state else (h_BTHV, None)


def _join(conv_state_BWD: Tensor | None, cell_state: State | None) -> State | None:
    return None if cell_state is None else (conv_state_BWD, *cell_state)


MIXERS = {"mlstm": MLSTMMixer, "mlstm_paper": PaperMLSTMMixer, "slstm": SLSTMMixer}
