"""The mLSTM: a matrix memory with exponential or sigmoid gates, the same function in several forms."""

from xlstm_lm.ops.mlstm.dispatch import BACKENDS, INPUT_GATES, STEPS, choose_backend, mlstm

__all__ = ["BACKENDS", "INPUT_GATES", "STEPS", "choose_backend", "mlstm"]
