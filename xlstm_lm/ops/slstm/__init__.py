"""The sLSTM cell: its definition, a compiled CPU loop, fused loops for GPUs, and the entry that chooses among them."""

from __future__ import annotations

from xlstm_lm.ops.slstm.dispatch import slstm
from xlstm_lm.ops.slstm.operation import SLSTM
from xlstm_lm.ops.slstm.recurrence import SLSTMState

__all__ = ["SLSTM", "SLSTMState", "slstm"]
