"""The mLSTM: a matrix memory with exponential or sigmoid gates, the same function in several forms."""

from xlstm_lm.ops.mlstm.dispatch import INPUT_GATES, mlstm
from xlstm_lm.ops.mlstm.operation import MLSTM

__all__ = ["INPUT_GATES", "MLSTM", "mlstm"]
