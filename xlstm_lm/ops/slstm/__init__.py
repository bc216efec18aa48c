"""The sLSTM cell: its definition, a compiled CPU loop, fused loops for GPUs, and the entry that chooses among them."""

from __future__ import annotations

from xlstm_lm.ops.slstm.dispatch import BACKENDS, choose_backend, slstm
from xlstm_lm.ops.slstm.recurrence import SLSTMState

__all__ = ["BACKENDS", "SLSTMState", "choose_backend", "slstm"]
