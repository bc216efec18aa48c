"""The mLSTM cell (arXiv 2405.04517, section 2.3) as all mLSTM mixers use it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from xlstm_lm.base.fields import Epsilon, Size
from xlstm_lm.models.layers import NormKind, SoftCap, soft_cap
from xlstm_lm.models.mixers.mixer import Mixer, MixerConfig, Observer, OperationUse, State
from xlstm_lm.models.storage import FLOAT32, Storage
from xlstm_lm.ops.backend import COUNTED_CHUNK
from xlstm_lm.ops.mlstm import MLSTM, mlstm
from xlstm_lm.ops.mlstm.recurrence import Options

# Backends of any machine: a run that names a GPU's kernel is also read where that cannot run.
MLSTMBackend = Literal["auto", "recurrence", "chunkwise", "compiled", "step", "triton", "triton_step"]


@dataclass(kw_only=True)
class MLSTMCellConfig(MixerConfig):
    """Settings of an mLSTM cell."""

    num_heads: Size
    """Heads of the cell."""
    input_gate: Literal["exp", "sigmoid"]
    """Input gate."""
    gate_soft_cap: SoftCap | None
    """Soft cap of the gates' pre-activations; null for none."""
    cell_norm: NormKind
    """Norm of each head behind the cell."""
    norm_eps: Epsilon
    """Epsilon of that norm."""
    cell_eps: Epsilon
    """Epsilon of the normalizer."""
    chunk_length: Size | None
    """Chunk length, in tokens; null lets the backend choose."""
    mlstm_backend: MLSTMBackend
    """Backend of the cell."""

    def papers(self) -> list[str]:
        return ["2405.04517", "2503.14376"] if self.input_gate == "sigmoid" else ["2405.04517"]

    @property
    def qk_dim(self) -> int:
        """Width of the queries of all heads."""
        raise NotImplementedError

    @property
    def v_dim(self) -> int:
        """Width of the values of all heads."""
        raise NotImplementedError

    def cell_state_bytes(self) -> int:
        """Bytes of matrices, normalizers and stabilizers, in float32."""
        return 4 * (self.qk_dim * self.v_dim // self.num_heads + self.qk_dim + self.num_heads)

    def cell_kept(self, storage: Storage, context_length: int) -> float:
        """Bytes that the cell keeps for each token beside queries, keys, values and h: gates, and the kernel's own.

        A gate is kept once, and with a soft cap a second time, in float32.
        """
        gates = (1 if self.gate_soft_cap is None else 2) * 2 * self.num_heads * FLOAT32
        return gates + self.cell_operation().kept(context_length, storage, L=self.chunk_length)

    def cell_operation(self) -> OperationUse:
        """The cell's call."""
        sizes = {"K": self.qk_dim // self.num_heads, "V": self.v_dim // self.num_heads}
        options = Options(self.chunk_length, self.input_gate, eps=self.cell_eps)
        counted = {"H": self.num_heads, "L": self.chunk_length or COUNTED_CHUNK}
        return OperationUse(MLSTM, sizes, options, self.mlstm_backend, counted)


class MLSTMCellMixer(Mixer):
    """Base of the mixers around the cell."""

    has_gates = True

    def __init__(self, config: MLSTMCellConfig) -> None:
        super().__init__()
        self.config = config

    def run_cell(
        self,
        qkv_BTE: Sequence[Tensor],
        gates_BTG: Tensor,
        resets_BT: Tensor | None,
        state: State | None,
        return_state: bool,
        observe: Observer | None,
        overwrite_state: bool,
    ) -> tuple[Tensor, State | None]:
        """Cap the gates, split the heads and run the cell: h (B, T, H, V) and the state after the last token."""
        config = self.config
        input_BTH, forget_BTH = soft_cap(gates_BTG, config.gate_soft_cap).chunk(2, dim=-1)
        if observe is not None:
            observe(input_BTH, forget_BTH, config.gate_soft_cap)
        q_BTHK, k_BTHK, v_BTHV = (tensor.unflatten(-1, (config.num_heads, -1)) for tensor in qkv_BTE)
        if self.divided_rows is not None:
            state = self.divided_rows.mlstm_state_before(
                k_BTHK, v_BTHV, input_BTH, forget_BTH, resets_BT, config.input_gate, state
            )
        result = mlstm(
            q_BTHK,
            k_BTHK,
            v_BTHV,
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
        return result if isinstance(result, tuple) else (result, None)


def initialize_mlstm_gates(gates: nn.Linear) -> Iterator[Tensor]:
    """Zero the weights and spread forget biases from 3 to 6 over the heads, which then start with different memories.

    Yields the weight and the bias right before it writes them. The caller then writes the input gates' biases.
    """
    num_heads = gates.bias.shape[0] // 2
    yield gates.weight
    nn.init.zeros_(gates.weight)
    yield gates.bias
    gates.bias[num_heads:] = torch.linspace(3, 6, num_heads, dtype=gates.bias.dtype, device=gates.bias.device)
